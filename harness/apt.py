# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian packages for machines under test, from a private APT root.

A suite's lists, its cache of packages and its configuration lie in one directory: nothing of this
machine's APT is changed, no root is needed, and no package is installed.  What a machine needs to
reach its mirror (proxy, certificates, its clock's failings) is taken over from its own APT.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from harness.errors import BuildError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MIRROR_VARIABLE: Final = "OVERLAYD_APT_MIRROR"
DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"
MAIN: Final = "Debian"  # labels of archives
SECURITY: Final = "Debian-Security"
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
ARCHITECTURE: Final = "amd64"
LISTS_STAY_FRESH: Final = 12 * 3600.0  # seconds; superseded packages stay on mirrors for a day

_ROLLING: Final = {"sid", "unstable", "testing"}
_TIMEOUT: Final = 900.0  # seconds, for a slow mirror
_TAKEN_OVER: Final = ("http::", "https::", "Check-", "ForceIPv", "Retries")


@dataclass(frozen=True, kw_only=True, order=True)
class Package:
    """One version of a package, as a mirror offers it."""

    name: str
    version: str
    file: str
    """The name of its file, which tells the architecture too."""
    size: int
    """Of the file, in bytes."""


class Apt:
    """The packages of one suite (``trixie``, ``sid``, …) of Debian's main archive.

    *directory* keeps lists and packages between uses; several processes may share it.  The lists
    are fetched when they are missing or older than half a day, and once there they serve offline
    as well.  *say* gets a line where something takes long or is not as it should be.
    """

    def __init__(
        self,
        suite: str,
        directory: Path,
        *,
        mirror: str | None = None,
        say: Callable[[str], object] = lambda _line: None,
    ) -> None:
        self.suite = suite
        self.directory = directory.absolute() / suite
        self._mirror = mirror
        self._say = say
        self._fresh = False

    def update(self, *, max_age: float = LISTS_STAY_FRESH) -> None:
        """Fetch the package lists if they are older than *max_age* seconds.

        Raises BuildError when they can neither be fetched nor are there from an earlier time.
        """
        stamp, written = self.directory / "updated", self.directory / "sources.list"
        with self._locked():
            sources = self._sources()
            same = written.exists() and written.read_text(encoding="utf-8") == sources
            if not same:
                stamp.unlink(missing_ok=True)
            if stamp.exists() and time.time() - stamp.stat().st_mtime < max_age:
                self._fresh = True
                return
            self._write_configuration(sources)
            self._say(f"fetching the package lists of {self.suite}")
            # Without this option a list that could not be fetched is only a warning.
            done = self._try("apt-get", "-qq", "-o", "APT::Update::Error-Mode=any", "update")
            if done.returncode == 0:
                stamp.touch()
            elif stamp.exists():
                self._say(f"the package lists of {self.suite} are old: {_reason(done.stderr)}")
            else:
                raise BuildError(
                    f"cannot fetch the package lists of {self.suite}: {_reason(done.stderr)}",
                    hint=f"is the mirror reachable? {MIRROR_VARIABLE}=URL names another",
                )
            self._fresh = True

    def candidate(self, package: str) -> str:
        """Return the version of *package* in the suite."""
        return self.versions([package])[package]

    def versions(self, packages: Iterable[str]) -> dict[str, str]:
        """Return the version of each of *packages* in the suite."""
        names = sorted(set(packages))
        found: dict[str, str] = {}
        name = ""
        for line in self._output("apt-cache", "policy", *names).splitlines():
            if not line.startswith(" "):
                name = line.removesuffix(":")
            elif line.startswith("  Candidate: ") and not line.endswith(" (none)"):
                found[name] = line.split(": ", 1)[1]
        if missing := [name for name in names if name not in found]:
            raise BuildError(f"no such package in {self.suite}: {', '.join(missing)}")
        return found

    def closure(self, packages: Sequence[str]) -> tuple[Package, ...]:
        """Return *packages* with everything they depend on, sorted by name."""
        listing = self._output("apt-get", "-qq", "-y", "--print-uris", "install", *packages)
        return tuple(sorted(_parse_uris(listing)))

    def download(
        self,
        packages: Sequence[str],
        directory: Path,
        *,
        only: Callable[[Package], bool] = lambda _package: True,
    ) -> list[Path]:
        """Fetch *packages* with everything they depend on into *directory*.

        *only* chooses what is wanted of them.  Return the files, sorted by name.
        """
        wanted = [package for package in self.closure(packages) if only(package)]
        size = sum(package.size for package in wanted) >> 20
        self._say(f"fetching {len(wanted)} packages of {self.suite} ({size} MiB)")
        directory.mkdir(parents=True, exist_ok=True)
        names = [f"{package.name}={package.version}" for package in wanted]
        self._output("apt-get", "-qq", "download", *names, cwd=directory)
        return [directory / package.file for package in wanted]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write_configuration(self, sources: str) -> None:
        root = self.directory
        for name in ("archives/partial", "lists/partial", "none"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        (root / "sources.list").write_text(sources, encoding="utf-8")
        if not Path(KEYRING).exists():
            raise HostError(
                f"no Debian archive keys at {KEYRING}",
                hint="as root: apt-get install debian-archive-keyring",
            )
        settings = {
            "Dir::Etc::SourceList": root / "sources.list",
            "Dir::Etc::SourceParts": root / "none",
            "Dir::Etc::Main": root / "none/apt.conf",
            "Dir::Etc::Parts": root / "none",
            "Dir::Etc::Preferences": root / "none/preferences",
            "Dir::Etc::PreferencesParts": root / "none",
            "Dir::State": root,
            "Dir::State::Lists": root / "lists",
            "Dir::State::Status": root / "status",
            "Dir::State::extended_states": root / "extended_states",
            "Dir::Cache": root,
            "Dir::Cache::Archives": root / "archives",
            "Dir::Log": root,
            "APT::Architecture": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            # Of 130 MiB that a suite would take this leaves 10, for a tenth of a second each time.
            "Acquire::GzipIndexes": "true",
            "Acquire::CompressionTypes::Order": "gz",
            "Dir::Cache::srcpkgcache": "",
            "Debug::NoLocking": "true",  # our own lock covers more
        }
        lines = ["#clear APT::Architectures;"]
        lines += [f'{name} "{value}";' for name, value in settings.items()]
        lines += [f"{setting};" for setting in acquire_settings()]
        (root / "apt.conf").write_text("\n".join(lines) + "\n")

    def _sources(self) -> str:
        places = [(self._mirror or machine_mirror() or DEFAULT_MIRROR, self.suite)]
        # An old release's kernels are in the security archive first.
        security = "" if self._mirror or self.suite in _ROLLING else machine_mirror(SECURITY)
        if security:
            places.append((security, f"{self.suite}-security"))
        options = f"[arch={ARCHITECTURE} signed-by={KEYRING}]"
        return "".join(f"deb {options} {mirror} {suite} main\n" for mirror, suite in places)

    def _output(self, *command: str, cwd: Path | None = None) -> str:
        if not self._fresh:
            self.update()
        done = self._try(*command, cwd=cwd)
        if done.returncode != 0:
            raise BuildError(f"{self.suite}: {_reason(done.stderr)}")
        return done.stdout

    def _try(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "APT_CONFIG": str(self.directory / "apt.conf"), "LC_ALL": "C"}
        try:
            return subprocess.run(  # noqa: S603
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT,
            )
        except FileNotFoundError as error:
            raise HostError(f"{command[0]} is missing: Debian packages need APT") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{' '.join(command[:2])} took over {_TIMEOUT:.0f} s") from error


def unpack(files: Iterable[Path], directory: Path) -> None:
    """Unpack packages into *directory* without installing them: no scripts run."""
    for file in files:
        done = subprocess.run(  # noqa: S603
            ["dpkg-deb", "--extract", file, directory],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildError(f"cannot unpack {file.name}: {_reason(done.stderr)}")


def machine_mirror(label: str = MAIN) -> str:
    """Return this machine's mirror of an archive of Debian's, or nothing where it has none."""
    if mirror := os.environ.get(MIRROR_VARIABLE):
        return mirror if label == MAIN else ""
    for line in _targets().splitlines():
        found, uri = line.split("|", 1)
        if found == label:
            return _first_of_list(uri)
    return ""


@functools.cache  # half a second each time
def _targets() -> str:
    command = ("apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)")
    listing = _listing(*command)
    if not listing and os.geteuid() == 0:  # without lists it knows of nothing
        _listing("apt-get", "-qq", "update")
        listing = _listing(*command)
    return listing


def acquire_settings() -> list[str]:
    """Return what this machine's APT needs to fetch anything, as ``NAME "VALUE"``."""
    lines = _listing("apt-config", "dump", "--format", '%F "%v"%n', "Acquire").splitlines()
    wanted = tuple(f"Acquire::{name}" for name in _TAKEN_OVER)
    return [line for line in lines if line.startswith(wanted)]


def _first_of_list(uri: str) -> str:
    """Return the first mirror of a ``mirror+file:`` list, which another machine does not have."""
    if not uri.startswith("mirror+file:"):
        return uri
    lines = Path(urlsplit(uri).path.rstrip("/")).read_text(encoding="utf-8").splitlines()
    return next(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))


def _listing(*command: str) -> str:
    """Return what a command of APT's prints: nothing where it is missing or fails."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(  # noqa: S603
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def _parse_uris(text: str) -> Iterator[Package]:
    """Read lines such as ``'http://…/a_1%3a2_all.deb' a_1%3a2_all.deb 123 SHA256:…``."""
    for line in text.splitlines():
        if line.startswith("'"):
            _, file, size, *_ = line.split()
            name, version, _ = file.split("_")
            yield Package(name=name, version=unquote(version), file=file, size=int(size))


def _reason(stderr: str) -> str:
    """Return the line that says most: APT's first error, else the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line[3:] for line in lines if line.startswith("E: ")]
    return (errors or lines[-1:] or ["no reason given"])[0].strip()
