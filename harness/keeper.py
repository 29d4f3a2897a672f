# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper of one container: its namespaces, control group and root, and what boots it.

    python3 -IS keeper.py '{"sysroot": ..., "workdir": ..., ...}'      the fields of Spec

A process of its own, in the standard library alone: it takes everything along when it ends, and it
ends when its parent does, however that ends.  It forks once:

``outer``
    in a mount namespace of its own.  Makes the control group, waits, and removes it.
``inner``
    process 1 of a process namespace: nothing in there survives it, nor do the mounts.  Builds the
    root as an initramfs with ``ostree-prepare-root`` would, and runs ``systemd-nspawn`` or
    ``podman`` once for each boot.

The root is the deployment itself as far as nobody may write: it and OSTree's repository are
the files of the sysroot, bound read-only.  ``/etc``, ``/var`` and the rest of the sysroot, a few
MB, are copies on a tmpfs.  There is no overlay beneath, so that overlays on ``/usr`` and uppers in
``/var`` are possible.

Control groups are version 2 in there whatever the host has: a mount of its own, on which the
container's group is the root.

    WORKDIR/run         /run/harness in the container
        agent.sock      where the agent listens
        early           what is in /run before init starts, as an initramfs would leave it there
    WORKDIR/console.log what the system wrote on its console
    WORKDIR/keeper.err  what the keeper complained about, or what it ran
    WORKDIR/state       if it is there when the system powers off, all it wrote is copied here
"""

from __future__ import annotations

import configparser
import ctypes
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
GROUP = "harness-container-"  # and the number of the keeper
GUEST_DIRECTORY = "/run/harness"
SHARED, EARLY, SOCKET = "run", "early", "agent.sock"
CONSOLE = "console.log"
ERRORS = "keeper.err"
STATE = "state"
SHARED_PARTS = ("ostree/repo", "boot/ostree")
"""Of the sysroot, besides the deployment's ``/usr``: large, and nothing changes them."""
CLOUD_SEED = "lib/cloud/seed/nocloud"

# In a mount namespace and on a tmpfs of our own.
TOP = Path("/run/keeper")
SOURCE, WORK = TOP / "source", TOP / "work"  # what Spec names
SAVED, SEED = TOP / "saved", TOP / "seed"
DISK = TOP / "disk"  # the sysroot, if it is on an image
SYSROOT = TOP / "sysroot"  # the container's own, on a tmpfs
ROOT = TOP / "root"
ETC = TOP / "etc"
NSPAWN, PODMAN = "systemd-nspawn", "podman"
REBOOT = {NSPAWN: 133, PODMAN: 128 + signal.SIGHUP}
"""What they return when the system asked for a reboot.

To reboot or to end a process namespace the kernel kills its init, and says by which signal it was.
"""
OFF = {NSPAWN: 0, PODMAN: 128 + signal.SIGINT}
UNUSABLE = 3  # what the keeper returns when the host cannot do it

HELD_BACK = "CAP_SYS_MODULE,CAP_SYS_RAWIO,CAP_SYS_TIME"  # they act on the host

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWPID = 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1

# Runs as the container's process 1 before its init.  $1: the early directory; then init.
EARLY_SCRIPT = """
set -e
cp -R "$1"/. /run/
shift
mount --bind /run/cmdline /proc/cmdline
exec "$@"
"""
# Podman leaves to it what nspawn does by itself.
EARLY_IN_PODMAN = """
umount /etc/hostname
mount --make-rshared /
mount --bind "$1/boot-id" /proc/sys/kernel/random/boot_id
"""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Spec:
    """What the keeper is told.

    *sysroot* is a directory or a disk image with an OSTree sysroot; *state* is what an earlier
    container wrote, which then is the beginning instead of the sysroot's own; *append* is added to
    the kernel's command line; *seed* has the files of a seed for cloud-init.
    """

    name: str
    sysroot: str
    workdir: str
    state: str = ""
    seed: str = ""
    append: str = ""
    init: str = "/sbin/init"
    engine: str = NSPAWN


class UnusableError(Exception):
    """The host cannot do this; the text is for people."""


# -- the kernel --------------------------------------------------------------------------------


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Leave namespaces."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str | Path, kind: str, flags: int = 0, data: str = "") -> None:
    """Mount by the old call, which is enough here."""
    arguments = (source.encode(), os.fsencode(target), kind.encode())
    _check(
        _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode()), f"mount {source} {target}"
    )


def bind(source: Path, target: Path, *, read_only: bool = False, recursive: bool = False) -> None:
    """Show *source* at *target* too."""
    mount(os.fspath(source), target, "", MS_BIND | (MS_REC if recursive else 0))
    if read_only:
        # The flags are set as a whole: set-id programs work wherever the sysroot is kept.
        mount("", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY)


def unmount_all(target: Path) -> None:
    """Take away all that is mounted at *target*."""
    with suppress(OSError):  # EINVAL: nothing is left there
        while True:
            _check(_libc.umount2(os.fsencode(target), MNT_DETACH), "umount2")


def mounts_beneath(top: Path) -> list[Path]:
    """Return what is mounted beneath *top*, the last one last."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [Path(line.split()[4]) for line in lines]  # none with a blank in it
    return [place for place in places if top in place.parents]


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send the signal when the parent is gone."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl")


# -- outer -------------------------------------------------------------------------------------


def outer(spec: Spec) -> int:
    """Keep the container until it ends or we are told to end it; return the exit status."""
    waited = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    unshare(CLONE_NEWNS)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    group = make_group()
    unshare(CLONE_NEWPID)
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os._exit(guarded(lambda: inner(spec, group, ready)))
    os.close(ready)
    os.write(go, b"x")
    status = None
    while status is None:
        if signal.sigwait(waited) != signal.SIGCHLD:
            os.kill(child, signal.SIGKILL)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    remove_group(group)
    return status if status >= 0 else 1


def make_group() -> Path:
    """Make the container's control group; what killed keepers left is removed."""
    unmount_all(CGROUPS)
    try:
        mount("cgroup2", CGROUPS, "cgroup2")
    except OSError as error:
        raise UnusableError(f"cannot mount cgroup2: {error.strerror}") from None
    found = re.search(r"^0::(/.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    own = found[1] if found else "/"
    parent = CGROUPS / ("" if own.startswith("/..") else own.lstrip("/"))
    for left in parent.glob(f"{GROUP}*"):
        number = left.name.removeprefix(GROUP).partition("-")[0]
        with suppress(OSError):
            empty = "populated 0" in (left / "cgroup.events").read_text()
            # It may belong to another process namespace, where there is such a process.
            if empty and not os.path.exists(f"/proc/{number}"):
                remove_group(left)
    group = parent / f"{GROUP}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        group.mkdir()
    except OSError as error:
        raise UnusableError(f"cannot make a control group: {error.strerror}") from None
    return group


def remove_group(group: Path) -> None:
    """Remove the control group and those beneath it; killed processes may need a moment to go."""
    deadline = time.monotonic() + 5
    while True:
        for directory, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)
        if not group.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.005)


# -- inner -------------------------------------------------------------------------------------


def inner(spec: Spec, group: Path, ready: int) -> int:
    """Be process 1 in the process namespace; return the exit status."""
    die_with_parent(signal.SIGKILL)
    if os.read(ready, 1) != b"x":  # it was gone before that
        return 1
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    (group / "cgroup.procs").write_text("0")
    unshare(CLONE_NEWNS | CLONE_NEWCGROUP)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    unmount_all(CGROUPS)
    mount("cgroup2", CGROUPS, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    given = {SOURCE: spec.sysroot, WORK: spec.workdir, SAVED: spec.state, SEED: spec.seed}
    bring_along(given)
    cmdline = make_root(spec)
    while (status := boot(spec, cmdline)) == REBOOT[spec.engine]:
        pass
    if status != OFF[spec.engine]:
        raise UnusableError(f"{spec.engine} ended with status {status}")
    if (WORK / STATE).is_dir():
        unmount_all(ETC)
        for path in reversed(mounts_beneath(SYSROOT)):  # they hide what is to be kept
            unmount_all(path)
        copy_tree(SYSROOT, WORK / STATE)
    return 0


def bring_along(paths: dict[Path, str]) -> None:
    """Mount a ``/run`` that is ours alone, and bind *paths* to places in there.

    Nspawn leaves files in ``/run``, and in its options a path could not have every character.
    """
    taken = {place: os.open(path, os.O_PATH) for place, path in paths.items() if path}
    mount("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for place in (SYSROOT, ROOT, ETC):
        place.mkdir(parents=True)
    for place, fd in taken.items():
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            place.mkdir()
        else:
            place.touch()
        bind(Path(f"/proc/self/fd/{fd}"), place)
        os.close(fd)


def make_root(spec: Spec) -> str:
    """Build the root; return the kernel's command line."""
    source = SOURCE
    if not source.is_dir():
        source = DISK
        mount_image(SOURCE, source, spec.sysroot)
    if (found := booted(source)) is None:
        raise UnusableError(f"no boot loader's entry for an OSTree deployment in {spec.sysroot}")
    deployment, cmdline = found
    mount("state", SYSROOT, "tmpfs", 0, "mode=755")
    copy_tree(SAVED if spec.state else source, SYSROOT, f"{deployment}/usr")
    var = (SYSROOT / deployment).parent.parent / "var"
    if spec.seed:
        shutil.copytree(SEED, var / CLOUD_SEED, dirs_exist_ok=True)
    # Root and /usr are of one file system, as elsewhere.  And OSTree finds the booted deployment by
    # device and inode of "/": it must be that in the sysroot.
    bind(SYSROOT / deployment / "etc", ETC)
    for path in (*SHARED_PARTS, deployment):
        bind(source / path, SYSROOT / path, read_only=True)
    bind(source / deployment, ROOT, read_only=True)
    bind(source / deployment / "usr", ROOT / "usr", read_only=True)
    for root in (SYSROOT / deployment, ROOT):
        bind(ETC, root / "etc")
    bind(var, ROOT / "var")
    bind(SYSROOT / "boot", ROOT / "boot", recursive=True)
    bind(SYSROOT, ROOT / "sysroot", recursive=True)
    mount("", ROOT / "sysroot", "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    keep_mounted()
    cmdline = f"{cmdline} {spec.append}".strip()
    write_early("cmdline", f"{cmdline}\n".encode())
    write_early("ostree-booted", booted_as())
    (WORK / SHARED / EARLY / "ostree").mkdir()
    return cmdline


def write_early(name: str, content: bytes) -> None:
    """Put a file into the container's ``/run``."""
    path = WORK / SHARED / EARLY / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def keep_mounted() -> None:
    """Have mounts survive soft reboots, which take away what no unit would bring back.

    OSTree's unit for ``/var`` would, but read-only as the sysroot is; and its program that makes it
    writable does nothing where the root's file system cannot be.
    """
    unit = "[Unit]\nDefaultDependencies=no\n"
    for name in ("boot", "etc", "sysroot", "var"):
        # Units of their own: where others depend on them, systemd heeds no drop-ins for a mount
        # that it finds only later.
        text = f"{unit}[Mount]\nWhat=state\nWhere=/{name}\n"
        write_early(f"systemd/system/{name}.mount", text.encode())
    for name in ("boot-", "sysroot-", "run-harness"):
        write_early(f"systemd/system/{name}.mount.d/harness.conf", unit.encode())


def mount_image(image: Path, target: Path, name: str) -> None:
    """Mount a disk image read-only.  Nothing is written to it, not even a journal."""
    target.mkdir()
    command = ["mount", "-o", "loop,ro,noload", os.fspath(image), os.fspath(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["mount failed"])[-1]
        raise UnusableError(f"cannot mount {name}: {last.removeprefix('mount: ')}")


def booted(sysroot: Path) -> tuple[str, str] | None:
    """Return the deployment that a boot loader would boot, and the command line it would give."""
    entries = sorted((sysroot / "boot/loader/entries").glob("*.conf"))
    for entry in reversed(entries):  # the one with the highest index is the default
        found = re.search(r"^options\s+(.*)$", entry.read_text(), re.MULTILINE)
        link = found and re.search(r"(?:^|\s)ostree=(\S+)", found[1])
        if found and link:
            path = os.path.realpath(sysroot / link[1].lstrip("/"))
            return os.path.relpath(path, os.path.realpath(sysroot)), found[1].strip()
    return None


def copy_tree(source: Path, target: Path, *leave_empty: str) -> None:
    """Copy what is on *source*'s file system, less what is shared and in *leave_empty*."""
    left_out = [f"--exclude=./{path}/*" for path in (*leave_empty, *SHARED_PARTS)]
    options = (
        "--one-file-system",
        "--anchored",
        "--sparse",
        "--xattrs",
        "--acls",
        "--numeric-owner",
    )
    pack = ["tar", "-cf-", *options, *left_out, "-C", os.fspath(source), "."]
    unpack = ["tar", "-xpf-", *options[3:], "-C", os.fspath(target)]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as packer:  # noqa: S603
        done = subprocess.run(unpack, stdin=packer.stdout, check=False)  # noqa: S603
    if packer.returncode or done.returncode:
        raise UnusableError(f"cannot copy {source} to {target}")


def boot(spec: Spec, cmdline: str) -> int:
    """Boot once; return the exit status of what did it."""
    init = [f"{GUEST_DIRECTORY}/{EARLY}", spec.init, *cmdline.split()]
    command = podman(spec, init) if spec.engine == PODMAN else nspawn(spec, init)
    # Nspawn's filter of system calls would be that of its own version: new ones would be missing.
    env = {"PATH": os.environ.get("PATH", os.defpath), "SYSTEMD_SECCOMP": "0", "TERM": "dumb"}
    (WORK / SHARED / SOCKET).unlink(missing_ok=True)
    with open(WORK / CONSOLE, "ab") as console:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, env=env).pid  # noqa: S603
    while True:  # whatever loses its parent is ours to collect
        ended, status = os.wait()
        if ended == child:
            break
    if (code := os.waitstatus_to_exitcode(status)) < 0:
        raise UnusableError(f"{spec.engine} was killed by {signal.Signals(-code).name}")
    return code


def nspawn(spec: Spec, init: list[str]) -> list[str]:
    """Return the command that boots by systemd-nspawn."""
    return [
        *(NSPAWN, "--quiet", "--settings=no", "--register=no", "--keep-unit"),
        *(f"--machine={spec.name}", f"--directory={ROOT}", "--private-network"),
        *("--capability=all", f"--drop-capability={HELD_BACK}"),
        *("--kill-signal=SIGRTMIN+3", "--console=read-only"),
        *("--resolv-conf=off", "--timezone=off", "--link-journal=no"),
        f"--bind={WORK / SHARED}:{GUEST_DIRECTORY}",
        *("--", "/bin/sh", "-c", EARLY_SCRIPT, "sh", *init),
    ]


def podman(spec: Spec, init: list[str]) -> list[str]:
    """Return the command that boots by podman."""
    write_early("boot-id", f"{uuid.uuid4()}\n".encode())
    own = TOP / "podman"
    return [
        # It keeps nothing of its own: what it must write goes with the mounts.
        *(PODMAN, f"--root={own}/root", f"--runroot={own}/run", f"--tmpdir={own}/scratch"),
        *("--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none"),
        *("--runtime=crun", "run", "--rm", "--tty", "--systemd=always", "--cgroups=disabled"),
        *("--log-driver=none", "--network=none", "--no-hosts", f"--hostname={spec.name}"),
        "--env=TERM=dumb",
        *("--cap-add=all", *(f"--cap-drop={name}" for name in HELD_BACK.split(","))),
        *("--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined"),
        *("--ulimit=host", f"--volume={WORK / SHARED}:{GUEST_DIRECTORY}", "--rootfs", str(ROOT)),
        *("/bin/sh", "-c", EARLY_IN_PODMAN + EARLY_SCRIPT, "sh", *init),
    ]


def booted_as() -> bytes:
    """Return what ``ostree-prepare-root`` of 2025.2 would leave to ``ostree-remount``: a GVariant.

    Empty, it stands for a ``/sysroot`` that is to be writable.
    """
    config = configparser.ConfigParser(strict=False)
    config.read([ROOT / "usr/lib/ostree/prepare-root.conf", ROOT / "etc/ostree/prepare-root.conf"])
    if not config.getboolean("sysroot", "readonly", fallback=False):
        return b""
    return b"sysroot-ro\0" + bytes(5) + b"\1\0b" + b"\x0b\x14"  # a{sv}: {"sysroot-ro": true}


def guarded(work: object) -> int:
    """Run *work* and say in one line why it failed."""
    try:
        return work()  # type: ignore[operator,no-any-return]
    except UnusableError as error:
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"{where}{error.strerror}\n")
    finally:
        sys.stderr.flush()
    return UNUSABLE


if __name__ == "__main__":
    sys.exit(guarded(lambda: outer(Spec(**json.loads(sys.argv[1])))))
