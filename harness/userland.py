# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs on a bare kernel: Debian's Python, a handful of programs, and the agent.

The files come out of a suite's packages, not from this machine; nothing is installed, only
unpacked, and of that only what is named here is taken, with the shared libraries it asks for.
Python's own modules are taken compiled, by the very interpreter that will run them: in a guest
without KVM a compilation costs more than everything else of a start.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import conversation, elf, precompile
from harness.apt import unpack
from harness.errors import BuildError
from harness.initramfs import Archive
from harness.qemu import AGENT_PORT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.apt import Apt

SUITE: Final = "trixie"
PYTHON: Final = "3.13"
"""The version of Python there, for those who install libraries for it."""
AGENT: Final = "/usr/lib/harness/agent.py"
MODULES: Final = "/usr/lib/harness/modules"
"""One name of a file in each line, in the order in which they are loaded."""
BUILDERS: Final = tuple(
    Path(__file__).with_name(name)
    for name in ("userland.py", "initramfs.py", "elf.py", "precompile.py")
)
"""The code that decides what is in an archive: part of the key of each."""
LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
"""Where programs ask for it; they do not all name it as a library."""
LIBRARIES: Final = "/usr/lib/python3/dist-packages"

_PACKAGES: Final = (
    *("python3", "busybox-static", "dash", "bash", "coreutils"),
    *("mount", "util-linux", "libcap2-bin"),
)
_PROGRAMS: Final = (
    # busybox stands in for the rest, but one that is copied under another name must be itself.
    *("busybox", "dash", "bash", "cat", "env", "id", "sleep", "true"),
    *("mount", "umount", "unshare", "nsenter", "setpriv", "findmnt", "getcap", "setcap"),
)
_NOT_OF_PYTHON: Final = (
    # What no test needs, and what would pull in large libraries (OpenSSL alone has 8 MiB).
    *("config-*", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle*"),
    *("venv", "__pycache__", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    *(f"lib-dynload/{name}*" for name in ("_codecs_", "_ctypes_test", "_curses", "_dbm")),
    *(f"lib-dynload/{name}*" for name in ("_hashlib", "_sqlite3", "_ssl", "_test", "_uuid")),
    *(f"lib-dynload/{name}*" for name in ("_xx", "readline", "xx")),
)
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/inittab": f"::respawn:/usr/bin/python3 -IS {AGENT} port:/dev/harness\n"
    "::ctrlaltdel:/usr/bin/busybox poweroff -f\n",
}
_DIRECTORIES: Final = {
    **dict.fromkeys(("dev", "etc", "mnt", "proc", "sys", "run"), 0o755),
    **dict.fromkeys(("usr/local", "usr/share/doc", "usr/src", "var/tmp"), 0o755),
    "root": 0o700,
    "tmp": 0o1777,
}

# The root of an initramfs cannot be pivoted and has no parent: bound onto itself it is an
# ordinary mount, shared as systemd makes it.
_INIT: Final = f"""#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin
mount -n --bind / /mnt
cd /mnt
mount -n --move . /
exec chroot . /usr/bin/busybox sh -c '
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=755 devtmpfs /dev
mkdir /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mount -t devpts -o nosuid,noexec,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /tmp
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
mount --make-rshared /
while read -r module; do insmod "$module"; done < {MODULES}
for port in /sys/class/virtio-ports/*; do
    read -r name < "$port/name"
    [ "$name" != {AGENT_PORT} ] || ln -s "${{port##*/}}" /dev/harness
done
ip link set lo up
hostname bare
exec busybox init
'
"""


@dataclass(frozen=True, kw_only=True)
class Userland:
    """What goes in besides Python and the agent.

    :ivar libraries: directories as ``pip install --target`` makes them, for the suite's Python.
    :ivar programs: names of programs, besides those that are always there, and
    :ivar packages: where they come from.
    """

    suite: str = SUITE
    libraries: tuple[Path, ...] = ()
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def inputs(userland: Userland, apt: Apt) -> Iterator[str | Path]:
    """Name all that the archive depends on."""
    yield from (*BUILDERS, conversation.AGENT)
    yield from userland.programs
    for package in apt.closure([*_PACKAGES, *userland.packages]):
        yield f"{package.name}={package.version}"
    yield from userland.libraries


def write(userland: Userland, apt: Apt, directory: Path) -> None:
    """Write the ``archive`` to *directory*, and what is in it as a tree called ``root``."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        tree = Path(scratch, "tree")
        files = apt.download([*_PACKAGES, *userland.packages], Path(scratch, "packages"))
        unpack(files, tree)
        archive = _assembled(userland, tree)
        archive.extract(directory / "root")
        with (directory / "archive").open("wb") as out:
            archive.write(out)


def _assembled(userland: Userland, root: Path) -> Archive:
    """Take out of the unpacked packages what the archive shall hold."""
    archive = Archive()
    for name, mode in _DIRECTORIES.items():
        archive.directory(name, mode=mode)
    for name, target in (("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib")):
        archive.symlink(name, target)
    archive.symlink("lib64", "usr/lib64")
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, mode=0o666)
    for name, text in _FILES.items():
        archive.file(name, text.encode())
    archive.file("init", _INIT.encode(), mode=0o755)
    archive.file(AGENT, conversation.AGENT)
    python = next((root / "usr/bin").glob("python3.*[0-9]"))
    binaries = [python, *(_program(root, name) for name in (*_PROGRAMS, *userland.programs))]
    binaries += _python_modules(userland, root, python, archive)
    libraries = elf.libraries(binaries, [root / precompile.MULTIARCH])
    for path in [*binaries, root / LOADER, root / precompile.LOADER, *libraries.values()]:
        archive.file(str(path.relative_to(root)), path.resolve(), mode=0o755)
    archive.symlink("usr/bin/python3", python.name)
    archive.symlink("usr/bin/sh", "dash")
    busybox = root / "usr/bin/busybox"
    for applet in _output([str(busybox), "--list"]).split():
        if f"usr/bin/{applet}" not in archive and f"usr/sbin/{applet}" not in archive:
            archive.symlink(f"usr/bin/{applet}", "busybox")
    return archive


def _program(root: Path, name: str) -> Path:
    for directory in ("usr/bin", "usr/sbin"):
        path = root / directory / name
        if path.is_file():
            return path
    raise BuildError(f"no program {name} in the packages", hint="name the package it is in")


def _python_modules(userland: Userland, root: Path, python: Path, archive: Archive) -> list[Path]:
    """Put in Python's own modules and the libraries; return the extension modules."""
    own = root / "usr/lib" / python.name
    for name in [name for name in _walk(own) if _unwanted(name)]:
        path = own / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    site = root / LIBRARIES.lstrip("/")
    shutil.rmtree(site)
    for directory in userland.libraries:
        ignored = shutil.ignore_patterns("__pycache__", "bin")
        shutil.copytree(directory, site, symlinks=True, ignore=ignored, dirs_exist_ok=True)
    # Beside a module's name a compiled one stands for it, without the source.
    _compile(root, own, "-b")
    if userland.libraries:
        _compile(root, site)
    archive.tree(own, f"usr/lib/{python.name}", skip=lambda name: name.endswith((".py", ".so")))
    archive.tree(site, LIBRARIES)
    extensions = sorted((own / "lib-dynload").glob("*.so"))
    return [*extensions, *(path for path in sorted(site.rglob("*.so")))]


def _walk(directory: Path) -> Iterator[str]:
    """Name everything below, what is in a directory that goes anyway left out."""
    for folder, folders, files in os.walk(directory):
        names = [os.path.relpath(os.path.join(folder, name), directory) for name in folders + files]
        yield from names
        folders[:] = [
            name
            for name in folders
            if not _unwanted(os.path.relpath(os.path.join(folder, name), directory))
        ]


def _unwanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_OF_PYTHON)


def _compile(root: Path, directory: Path, *options: str) -> None:
    """Compile a tree of modules by the interpreter in *root*, which needs no installation."""
    command = [
        *precompile.python(root),
        *("-BsS", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", *options),
        *("-s", str(root), "-p", "/", str(directory)),
    ]
    _output(command, **precompile.environment(root))


def _output(command: list[str], **environment: str) -> str:
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise BuildError(f"{Path(command[0]).name}: {said[-1]}")
    return done.stdout
