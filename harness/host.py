# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this host has, and what it must get: programs from Debian's packages, QEMU, room on a disk.

As root, what is missing is installed; otherwise a HostError says what to type.  No APT source is
ever left behind: where QEMU must come from backports, the source for them exists for that one
command.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.apt import DEFAULT_MIRROR, KEYRING, machine_mirror
from harness.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

QEMU: Final = "qemu-system-x86_64"
QEMU_PACKAGES: Final = ("qemu-system-x86", "qemu-utils")
QEMU_AT_LEAST: Final = 10
"""Debian 12's 7.2 crashes guests under TCG: "Fatal exception in interrupt"."""

_PATH: Final = ":/usr/local/sbin:/usr/sbin:/sbin"  # not in an ordinary user's
_MIB: Final = 1 << 20


class Cgroups(StrEnum):
    """How control groups are mounted."""

    V2 = "v2"
    HYBRID = "hybrid"
    """v1 controllers, with v2 beside them for systemd."""
    V1 = "v1"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a backend must know of the host to choose its way."""

    root: bool
    cgroups: Cgroups
    nspawn: bool
    podman: bool
    buildah: bool
    cpus: int
    """That this process may use."""
    memory_mib: int
    """That is available at the moment."""


def look() -> Host:
    """Look at the host as it is now."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = re.search(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE)
    return Host(
        root=os.geteuid() == 0,
        cgroups=cgroups(Path("/proc/self/mountinfo").read_text(encoding="utf-8")),
        nspawn=which("systemd-nspawn") is not None,
        podman=which("podman") is not None,
        buildah=which("buildah") is not None,
        cpus=len(os.sched_getaffinity(0)),
        memory_mib=int(available[1]) >> 10 if available else 0,
    )


def cgroups(mountinfo: str) -> Cgroups:
    """Tell from a mount table how control groups are mounted."""
    types: dict[str, str] = {}  # by mount point, the last one counts
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        types[left.split()[4]] = right.split()[0]
    below = {kind for place, kind in types.items() if place.startswith("/sys/fs/cgroup/")}
    if types.get("/sys/fs/cgroup") == "cgroup2":
        return Cgroups.V2
    if "cgroup" in below:
        return Cgroups.HYBRID if "cgroup2" in below else Cgroups.V1
    return Cgroups.NONE


def which(command: str) -> Path | None:
    """Return where a program is, those for administrators included."""
    found = shutil.which(command, path=os.environ.get("PATH", os.defpath) + _PATH)
    return Path(found) if found else None


def need(packages: Mapping[str, str]) -> None:
    """Have these commands, given with their packages: what is missing is installed.

    Raises HostError with the line to type where it cannot be.
    """
    missing = {command: package for command, package in packages.items() if not which(command)}
    if not missing:
        return
    names = sorted(set(missing.values()))
    if os.geteuid() != 0:
        raise HostError(
            f"missing commands: {', '.join(missing)}",
            hint=f"as root: apt-get install {' '.join(names)}",
        )
    install(names)
    if still := [command for command in missing if not which(command)]:
        raise HostError(f"{', '.join(still)}: not there after the installation of {names}")


def install(packages: Sequence[str], *options: str) -> None:
    """Install packages by APT, with *options* of ``apt-get``; needs root."""
    command = ("install", "--no-install-recommends", *packages)
    # Package lists may be missing or outdated: they are fetched if it does not work as is.
    if _apt_get(*options, *command).returncode == 0:
        return
    _apt_get(*options, "update")
    done = _apt_get(*options, *command)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise HostError(
            f"cannot install {' '.join(packages)}: {lines[0][3:] if lines else 'APT failed'}",
            hint=f"try: apt-get install {' '.join(packages)}",
        )


def need_disk(directory: Path, size: int, *, what: str) -> None:
    """Raise HostError unless *size* bytes are free for *what* where *directory* is or will be."""
    free = free_disk(directory)
    if free < size:
        raise HostError(f"{what} needs {size // _MIB} MiB at {directory}; {free // _MIB} are free")


def free_disk(directory: Path) -> int:
    """Return the bytes that are free where *directory* is or will be."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def qemu() -> Path:
    """Return where a QEMU for x86-64 is that is new enough; it is installed if need be.

    ``qemu-img`` comes along.  Raises HostError where there is none and none can be had.
    """
    if (found := _good_qemu()) and which("qemu-img"):
        return found
    if os.geteuid() != 0:
        raise HostError(
            f"QEMU {QEMU_AT_LEAST} or newer is needed, with qemu-img; here is {_qemu_here()}",
            hint=f"as root: {_qemu_line(_backports_needed())}",
        )
    if suite := _backports_needed():
        with tempfile.TemporaryDirectory(prefix="harness-apt-") as scratch:
            install(QEMU_PACKAGES, "-t", suite, *_with_source(Path(scratch), suite))
    else:
        install(QEMU_PACKAGES)
    if (found := _good_qemu()) is None:
        raise HostError(
            f"QEMU {QEMU_AT_LEAST} or newer is needed; APT installed {_qemu_here()}",
            hint="Debian 13 has 10.0, and so have Debian 12's backports",
        )
    return found


def qemu_version(text: str) -> tuple[int, ...]:
    """Return the version in what ``qemu-system-x86_64 --version`` prints, () if there is none."""
    found = re.search(r"version (\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _good_qemu() -> Path | None:
    found = which(QEMU)
    return found if found and qemu_version(says(found))[:1] >= (QEMU_AT_LEAST,) else None


def _qemu_here() -> str:
    found = which(QEMU)
    return says(found).partition("\n")[0] if found else "none"


def says(program: Path) -> str:
    """Return what a program prints of its version."""
    return _output(str(program), "--version")


def _backports_needed() -> str:
    """Return the suite QEMU must come from, or nothing where the machine's own has a new one."""
    policy = _output("apt-cache", "policy", QEMU_PACKAGES[0])
    candidate = re.search(r"^  Candidate: (?:\d+:)?(\d+)", policy, re.MULTILINE)
    if candidate and int(candidate[1]) >= QEMU_AT_LEAST:
        return ""
    codename = _release().get("VERSION_CODENAME", "")
    # Where APT has no lists yet only the release tells, and from Debian 13 on its own is new.
    return f"{codename}-backports" if candidate or codename == "bookworm" else ""


def _qemu_line(suite: str) -> str:
    packages = " ".join(QEMU_PACKAGES)
    if not suite:
        return f"apt-get install {packages}"
    return f"apt-get install -t {suite} {packages}, with {suite} among APT's sources"


def _release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def _with_source(scratch: Path, suite: str) -> list[str]:
    """Return options that give APT one more source besides the machine's, for one command.

    The lists go to *scratch* too, or the next ``apt-get update`` would find them out of place.
    """
    parts, lists = scratch / "sources.list.d", scratch / "lists"
    for directory in (parts, lists / "partial"):
        directory.mkdir(parents=True)
    scratch.chmod(0o755)  # APT fetches as a user of its own
    own = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for number, source in enumerate(sorted(filter(Path.is_file, own))):
        (parts / f"{number}-{source.name}").symlink_to(source)
    line = f"deb [signed-by={KEYRING}] {machine_mirror() or DEFAULT_MIRROR} {suite} main\n"
    (parts / "backports.list").write_text(line)
    return [
        *("-o", f"Dir::Etc::SourceList={scratch / 'none'}"),
        *("-o", f"Dir::Etc::SourceParts={parts}"),
        *("-o", f"Dir::State::Lists={lists}"),
        *("-o", f"Dir::Cache::pkgcache={scratch / 'pkgcache'}"),
        *("-o", f"Dir::Cache::srcpkgcache={scratch / 'srcpkgcache'}"),
    ]


def _apt_get(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    return subprocess.run(  # noqa: S603
        ["apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300", *arguments],  # noqa: S607
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _output(*command: str) -> str:
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(  # noqa: S603
            command, env=env, capture_output=True, text=True, check=False
        ).stdout
    except FileNotFoundError:
        raise HostError(
            f"{command[0]} is missing", hint="the harness gets its tools by APT, on Debian"
        ) from None
