# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image in a container: what is real there, how it ends, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import host, manifest
from harness import keeper as parts
from harness.base import Recipe
from harness.cache import Cache, default_root
from harness.container import PACKAGES, Engine, System, choose, prepared
from harness.container import ContainerMachine as Machine
from harness.errors import CapabilityError, HostError, MachineError
from harness.host import which
from harness.image import Image, ImageInputs, build
from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="containers need root")

ROOT = Path(__file__).parents[2]
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

# Syscalls that are newer than the host's systemd may be: fsopen, listmount, statmount.
SYSCALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for number in (430, 458, 457):
    libc.syscall(number, -1, -1, -1, -1, -1, -1)
    print(errno.errorcode[ctypes.get_errno()])
"""

# Boots in a process of its own.  $1: sysroot, $2: workdir; then what is run there.
BOOT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from harness.container import System
machine = System(sysroot=Path(sys.argv[1])).boot(Path(sys.argv[2]))
print(machine.pid, machine.run(sys.argv[3]).out.strip(), flush=True)
sys.stdin.read()
machine.close()
"""


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """Give the project's image without its package."""
    recipe = Recipe(context=ROOT)
    inputs = ImageInputs(name="plain", recipe=recipe, seed=ROOT / "vm/cloud-init")
    with build(inputs, Cache(default_root())) as image:
        yield image


@pytest.fixture(scope="session")
def system(image: Image) -> Iterator[System]:
    """Give what boots fast: the image after cloud-init."""
    whole = System(sysroot=image.disk, seed=ROOT / "vm/cloud-init")
    with prepared(Cache(default_root()), whole, identity=[image.fingerprint]) as system:
        yield system


@pytest.fixture(scope="module", params=list(Engine))
def shared(
    request: pytest.FixtureRequest, system: System, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """Give a machine that tests leave as it was, by each engine in turn."""
    engine: Engine = request.param
    if engine is not Engine.NSPAWN and not all(map(which, PACKAGES[engine])):
        pytest.skip(f"no {engine} here")
    system = replace(system, engine=engine)
    with system.boot(tmp_path_factory.mktemp("shared"), name="shared") as machine:
        yield machine


@pytest.fixture
def fresh(system: System, tmp_path: Path) -> Iterator[Machine]:
    """Give a machine of the test's own."""
    with system.boot(tmp_path / "fresh", name="fresh") as machine:
        yield machine


# What is real there.


def test_it_is_the_deployment_to_the_last_byte(shared: Machine, image: Image) -> None:
    status = shared.run("ostree admin status").out
    assert f"* debian {image.commit}.0" in status
    shared.copy_in(Path(manifest.__file__), "/var/tmp/manifest.py")
    digest = shared.run(["python3", "-IS", "/var/tmp/manifest.py", "/usr"]).out.strip()
    assert digest == image.digest


def test_it_looks_booted_by_ostree(shared: Machine) -> None:
    assert "ostree=/ostree/boot." in shared.run("cat /proc/cmdline").out
    assert shared.run("test -e /run/ostree-booted").returncode == 0
    mounts = {mount: shared.run(["findmnt", "-no", "OPTIONS", mount]).out for mount in PLACES}
    assert {mount: options.split(",")[0] for mount, options in mounts.items()} == PLACES


PLACES = {"/": "ro", "/etc": "rw", "/usr": "ro", "/sysroot": "ro", "/boot": "rw", "/var": "rw"}


def test_all_units_start(shared: Machine) -> None:
    assert shared.run("systemctl is-system-running --wait", check=False).out.strip() == "running"
    assert shared.run("systemctl --failed --no-legend").out == ""


def test_root_and_usr_are_one_file_system(shared: Machine) -> None:
    devices = shared.run("stat -c %d / /usr /usr/share /sysroot/ostree/deploy/*/deploy/*.0").out
    assert len(set(devices.split())) == 1


def test_usr_cannot_be_made_writable(shared: Machine) -> None:
    for command in ("touch /usr/x", "mount -o remount,rw /usr && touch /usr/x"):
        assert shared.run(command, check=False).returncode != 0


@pytest.mark.parametrize("directory", ["/run", "/var/tmp", "/tmp"])
def test_overlays_on_usr_can_have_their_upper_here(shared: Machine, directory: str) -> None:
    script = """
        set -e
        mkdir -p $0/o/upper $0/o/work
        mount -t overlay o -o lowerdir=/usr/share,upperdir=$0/o/upper,workdir=$0/o/work /usr/share
        touch /usr/share/new
        umount /usr/share
        test -e $0/o/upper/new -a ! -e /usr/share/new
        rm -r $0/o
    """
    shared.run(["sh", "-c", script, directory])


def test_unlock_lasts_until_the_reboot(fresh: Machine) -> None:
    fresh.run("ostree admin unlock && touch /usr/new")
    fresh.reboot()
    assert fresh.run("test -e /usr/new", check=False).returncode == 1
    assert "unlocked" not in fresh.run("ostree admin status").out.lower()


def test_no_system_call_is_filtered(shared: Machine) -> None:
    found = shared.run(["python3", "-c", SYSCALLS]).out.split()
    assert not {"EPERM"} & set(found)
    local = [sys.executable, "-c", SYSCALLS]
    assert found == subprocess.run(local, check=True, stdout=-1, text=True).stdout.split()


def test_users_are_those_of_the_seed(shared: Machine) -> None:
    assert shared.user("alice").run("id -un; pwd; echo $HOME").out.split() == [
        *("alice", "/", "/home/alice")
    ]


def test_it_cannot_reach_what_is_the_hosts(shared: Machine) -> None:
    for command in (
        "date -s 2001-01-01",
        "sysctl -w kernel.hostname=x",
        "ls /dev/loop* /dev/[sv]d* /dev/kmsg",
        "ip route get 192.0.2.1",
    ):
        assert shared.run(command, check=False).returncode != 0, command


@pytest.mark.parametrize(
    "capability",
    [Capability.POWER_CUT, Capability.OWN_KERNEL, Capability.OWN_CLOCK, Capability.FREEZE],
)
def test_what_is_missing_has_a_reason(shared: Machine, capability: Capability) -> None:
    with pytest.raises(CapabilityError, match=f"shared cannot do {capability}: .*[a-z]{{4}}"):
        shared.need(capability)
    with pytest.raises(CapabilityError):
        shared.power_cut()


def test_mounts_do_not_leave_it(shared: Machine, tmp_path: Path) -> None:
    shared.run("mkdir -p /run/inner && mount -t tmpfs from-inside /run/inner")
    try:
        for process in ("self", str(shared.pid)):
            assert "from-inside" not in Path(f"/proc/{process}/mountinfo").read_text()
    finally:
        shared.run("umount /run/inner")
    command = 'mount -t tmpfs from-outside "$0" && echo ok && read line'
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", command, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ok\n"
        assert "from-outside" not in shared.run("cat /proc/self/mountinfo").out
        subprocess.run(["nsenter", "-m", "-t", str(other.pid), "umount", tmp_path], check=True)


def test_its_mounts_are_shared_as_systemd_has_them(shared: Machine) -> None:
    assert shared.run("findmnt -no PROPAGATION /").out.strip() == "shared"
    assert shared.run("findmnt -no PROPAGATION /usr").out.strip() == "shared"


# Its life.


def test_a_reboot_keeps_what_a_disk_would(fresh: Machine) -> None:
    fresh.run("touch /etc/kept /var/kept /run/lost /tmp/lost")
    before = fresh.run(BOOT_ID).out
    fresh.reboot()
    assert fresh.run(BOOT_ID).out != before
    assert fresh.run("ls /etc/kept /var/kept").returncode == 0
    assert fresh.run("ls /run/lost", check=False).returncode != 0
    assert fresh.run("ls /tmp/lost", check=False).returncode != 0


def test_a_soft_reboot_keeps_the_kernels_side(fresh: Machine) -> None:
    fresh.run("touch /etc/kept /var/kept /run/kept")
    before = fresh.run(BOOT_ID).out
    fresh.reboot("soft")
    assert fresh.run(BOOT_ID).out == before
    fresh.run("ls /etc/kept /var/kept /run/kept")
    assert "Failed unmounting" not in fresh.console()
    assert "SoftRebootsCount=1" in fresh.run("systemctl show -p SoftRebootsCount").out
    test_all_units_start(fresh)
    test_it_looks_booted_by_ostree(fresh)
    fresh.run("ostree admin status")


def test_podman_reboots_as_well(system: System, tmp_path: Path) -> None:
    if not all(map(which, PACKAGES[Engine.PODMAN])):
        pytest.skip("no podman here")
    with replace(system, engine=Engine.PODMAN).boot(tmp_path / "podman") as machine:
        test_a_reboot_keeps_what_a_disk_would(machine)
        test_a_soft_reboot_keeps_the_kernels_side(machine)
        test_unlock_lasts_until_the_reboot(machine)
        assert machine.pid is not None
        processes = descendants(machine.pid)
        with contextlib.suppress(MachineError):  # the agent may be ended before it answers
            machine.run("systemctl --no-block poweroff")
        wait_until(lambda: machine.broken is not None)
        assert "powered itself off" in str(machine.broken)
    wait_until(lambda: not any(map(alive, processes)))


def test_machines_know_nothing_of_one_another(shared: Machine, fresh: Machine) -> None:
    fresh.run("touch /etc/mine /var/mine /run/mine /tmp/mine")
    for directory in ("etc", "var", "run", "tmp"):
        assert shared.run(f"test -e /{directory}/mine", check=False).returncode == 1
    assert shared.hello.boot_id != fresh.hello.boot_id
    with pytest.raises(MachineError):  # the agent goes, too
        fresh.run("kill -9 -1")
    shared.run("true")


def test_what_it_wrote_can_be_the_beginning_of_others(system: System, tmp_path: Path) -> None:
    with system.boot(tmp_path / "first") as first:
        first.run("echo kept >/etc/mine && rm /etc/hosts")
        first.run("install -o alice -m 2750 -d /var/mine && ln /etc/mine /etc/other")
        first.save(tmp_path / "state")
        with pytest.raises(MachineError):
            first.run("true")
    again = System(sysroot=system.sysroot, state=tmp_path / "state", append=system.append)
    for name in ("second", "third"):
        with again.boot(tmp_path / name) as machine:
            assert machine.run("cat /etc/mine && rm /etc/mine && cat /etc/other").out == (
                "kept\nkept\n"
            )
            assert machine.run("test -e /etc/hosts", check=False).returncode == 1
            assert machine.run("stat -c %U:%a /var/mine").out == "alice:2750\n"
            assert "* debian" in machine.run("ostree admin status").out


def test_a_seed_is_used_once(image: Image, system: System, tmp_path: Path) -> None:
    whole = System(sysroot=image.disk, seed=ROOT / "vm/cloud-init")
    with whole.boot(tmp_path / "first") as first:
        assert first.run("hostname").out.strip() == "overlayd-test"
        assert "status: done" in first.run("cloud-init status", check=False).out
    with system.boot(tmp_path / "later") as later:
        assert later.run("hostname").out.strip() == "overlayd-test"
        assert "disabled" in later.run("cloud-init status", check=False).out


def test_the_log_of_the_console_is_there(shared: Machine) -> None:
    assert "Welcome to Debian" in shared.console()
    assert "Reached target" in shared.console()


def test_journal_entries_are_followed(shared: Machine) -> None:
    seen: list[str] = []
    shared.follow(lambda event: seen.append(str(event)))
    shared.run("logger found-by-the-watch")
    wait_until(lambda: any("found-by-the-watch" in event for event in seen))


@pytest.mark.parametrize("name", ["a b", "with:colons:and,commas", "%n\\x", "l" * 150])
def test_any_path_will_do(system: System, tmp_path: Path, name: str) -> None:
    with system.boot(tmp_path / name) as machine:
        machine.copy_in(b"x", "/var/tmp/x")


def test_people_can_enter(shared: Machine) -> None:
    shared.run("touch /run/here")
    command = [*shared.enter(), "sh", "-c", "cat /proc/1/comm; ls /run/here; hostname"]
    found = subprocess.run(command, check=True, stdout=-1, text=True).stdout.split()
    assert found == ["systemd", "/run/here", shared.run("hostname").out.strip()]


def test_nothing_is_masked_if_it_shall_boot_plainly(system: System, tmp_path: Path) -> None:
    with replace(system, quick=False).boot(tmp_path / "plain") as machine:
        test_all_units_start(machine)
        assert "masked" not in machine.run("systemctl is-enabled getty.target", check=False).out


# How it ends.


def test_a_power_off_is_reported(fresh: Machine) -> None:
    with contextlib.suppress(MachineError):  # the agent may be ended before it answers
        fresh.run("systemctl --no-block poweroff")
    wait_until(lambda: fresh.broken is not None)
    for _ in range(2):
        with pytest.raises(MachineError, match="fresh: powered itself off"):
            fresh.run("true")


def test_a_killed_nspawn_is_reported_at_once(fresh: Machine) -> None:
    os.kill(nspawn_of(fresh), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(MachineError, match=r"fresh: .* was killed by SIGKILL"):
        fresh.run("sleep 30")
    assert time.monotonic() - begun < 10


def test_a_killed_keeper_takes_all_along(fresh: Machine) -> None:
    assert fresh.pid is not None
    processes = descendants(fresh.pid)
    os.kill(fresh.pid, signal.SIGKILL)
    with pytest.raises(MachineError, match="killed by"):
        fresh.run("sleep 30")
    wait_until(lambda: not any(map(alive, processes)))


def test_a_crash_of_its_init_is_reported(fresh: Machine) -> None:
    (init,) = children(nspawn_of(fresh))
    os.kill(init, signal.SIGKILL)
    with pytest.raises(MachineError) as caught:
        fresh.run("sleep 30")
    assert "complaints" in "".join(caught.value.__notes__) or "console" in "".join(
        caught.value.__notes__
    )


def test_nothing_stays_after_close(system: System, tmp_path: Path) -> None:
    with system.boot(tmp_path / "machine") as machine:
        keeper = machine.pid
        assert keeper is not None
        processes = descendants(keeper)
        assert len(processes) > 5
        assert groups(keeper)
    assert not any(map(alive, [keeper, *processes]))
    assert not groups(keeper)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert sorted(os.listdir(tmp_path / "machine")) == [parts.CONSOLE, parts.ERRORS]
    machine.close()


def test_nothing_stays_when_its_python_is_killed(image: Image, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", image.disk, disk], check=True)
    with booted(disk, tmp_path / "machine", "true") as (python, keeper, _):
        processes = descendants(keeper)
        assert len(processes) > 5
        assert loop_devices(disk)
        python.kill()
        wait_until(lambda: not any(map(alive, [keeper, *processes])))
    assert not groups(keeper)
    wait_until(lambda: not loop_devices(disk))


def test_the_group_of_a_killed_keeper_goes_with_the_next(system: System, tmp_path: Path) -> None:
    with system.boot(tmp_path / "first") as first:
        keeper = first.pid
        assert keeper is not None
        processes = descendants(keeper)
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, processes)))
    with system.boot(tmp_path / "second"):
        assert not groups(keeper)


# Hosts.


def test_a_host_with_control_groups_of_version_2_only(image: Image, tmp_path: Path) -> None:
    prepare = """
        umount -R /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mkdir /sys/fs/cgroup/harness-test-$$
        echo $$ >/sys/fs/cgroup/harness-test-$$/cgroup.procs
    """
    command = "systemctl --failed --no-legend | cat; systemctl is-system-running"
    with booted(image.disk, tmp_path / "machine", command, prepare) as (python, keeper, output):
        assert output == "running"
        (group,) = groups(keeper)
        assert group.parent.name == f"harness-test-{python.pid}"
        python.communicate(timeout=30)
    assert not groups(keeper)
    group.parent.rmdir()


def test_a_sysroot_may_be_a_directory(image: Image, tmp_path: Path) -> None:
    sysroot = tmp_path / "sysroot"
    sysroot.mkdir()
    prepare = f'mount -o loop,ro,noload "{image.disk}" "{sysroot}"'
    with booted(sysroot, tmp_path / "machine", "ostree admin status", prepare) as (_, _, output):
        assert image.commit in output


def test_what_cannot_be_booted_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    for name, message in {"empty": "no boot loader's entry", "zeros": "cannot mount"}.items():
        sysroot = tmp_path / name
        machine = Machine(System(sysroot=sysroot), workdir=tmp_path / f"{name}.work")
        with machine, pytest.raises(MachineError, match=f"{message}.*{re.escape(str(sysroot))}"):
            machine.start()


def test_only_root_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine = Machine(System(sysroot=tmp_path), workdir=tmp_path / "work")
    with pytest.raises(HostError, match="root"):
        machine.start()
    machine.close()


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("systemd-nspawn", "podman", "crun"), Engine.NSPAWN),
        (("podman", "crun"), Engine.PODMAN),
        (("podman",), Engine.NSPAWN),
        ((), Engine.NSPAWN),
    ],
)
def test_the_host_runs_what_it_has(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], chosen: Engine
) -> None:
    has = (*there, "mount", "tar")
    monkeypatch.setattr(host, "which", lambda name: Path(name) if name in has else None)
    installed: list[str] = []
    monkeypatch.setattr(host, "install", installed.extend)
    if chosen in there:
        assert choose() is chosen
        assert not installed
    else:
        with pytest.raises(HostError):  # nothing was really installed
            choose()
        assert installed == ["systemd-container"]


# Helpers.


@contextlib.contextmanager
def booted(
    sysroot: Path, workdir: Path, command: str, prepare: str = ""
) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Boot in another process; give it, the keeper's number and what the command printed.

    The process has a mount namespace of its own, in which *prepare* is run before.
    """
    script = f'set -e\n{prepare}\nexec "$@"'
    python = [sys.executable, "-c", BOOT, str(sysroot), str(workdir), command]
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *python],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            keeper, _, output = process.stdout.readline().strip().partition(" ")
            yield process, int(keeper), output
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Return the children of a process with one thread."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def nspawn_of(machine: Machine) -> int:
    """Return the process of nspawn: the only child of the keeper's only child."""
    assert machine.pid is not None
    (inner,) = children(machine.pid)
    (process,) = children(inner)
    return process


def groups(keeper: int) -> list[Path]:
    """Return the control groups of a keeper's container, below none of each other."""
    begin = f"{parts.GROUP}{keeper}-"
    tree = os.walk("/sys/fs/cgroup")
    return [Path(top, name) for top, names, _ in tree for name in names if name.startswith(begin)]


def loop_devices(file: Path) -> str:
    return subprocess.run(
        ["losetup", "--associated", file], capture_output=True, text=True, check=True
    ).stdout


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
