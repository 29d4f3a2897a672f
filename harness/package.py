# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package of a source tree, built in seconds, as a machine under test installs it.

It is built from a copy of exactly the files that :func:`inputs` names, with the tools of Debian
and nothing of the caller's environment.  So it is a function of those files and of the host's
build tools: the same files give the same bytes, wherever and whenever, and their names and content
are all that a cache has to look at.

What is no input is said by the project, in ``debian/not-packaged``: pathspecs of Git, one per line.
Unless a project says so, every file counts.  A build runs no tests and asks for no packages that
only tests need: this is for the loop of change and try, not for a release.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import host
from harness.errors import BuildError, HarnessError, HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NOT_PACKAGED: Final = Path("debian/not-packaged")
CHANGELOG: Final = Path("debian/changelog")

# Without /usr/local: packages are built with Debian's Python, whichever others are around.
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROFILES: Final = "nocheck"
_TIMEOUT: Final = 600.0  # seconds
_NOTE_LENGTH: Final = 4096
_SUFFIX: Final = re.compile(r"[A-Za-z0-9.+~]*", re.ASCII)
_UNMET: Final = re.compile("[Uu]nmet build dependencies: (.*)")  # dpkg 1.21, 1.22
_HEADING: Final = re.compile(r"(\S+ \([^()\s]+)(\))")


def inputs(source: Path) -> list[Path]:
    """Return the files that the package is made of: what Git tracks or would track in *source*.

    Uncommitted changes and new files count, ignored files and those of ``debian/not-packaged`` do
    not.  The paths are sorted and begin with *source*.  For a key take the names beneath *source*
    as well as the content.

    :raises HarnessError: if *source* is no working tree of Git.
    """
    source = source.absolute()
    excluded: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        lines = (source / NOT_PACKAGED).read_text(encoding="utf-8").splitlines()
        excluded += [f":(exclude){line}" for line in lines if line and not line.startswith("#")]
    host.need({"git": "git"})
    # Whoever owns the tree: as root one also builds what belongs to a user.
    command = ("git", "-c", "safe.directory=*", "ls-files", "-z")
    what = ("--cached", "--others", "--exclude-standard", "--", ".", *excluded)
    status, listing = _run([*command, *what], cwd=source, env=_environment(), merge=False)
    if status != 0:
        raise HostError(
            f"cannot tell the files of {source}: git ls-files failed",
            hint="a package is built from a working tree of Git",
        )
    paths = [source / name for name in sorted(set(listing.split("\0")) - {""})]
    # A tracked file may be gone; a submodule is a directory.
    return [path for path in paths if path.is_symlink() or path.is_file()]


def build(source: Path, out: Path, *, version_suffix: str = "") -> Path:
    """Build the Debian package of the working tree *source*; return its file in *out*.

    *version_suffix* is appended to the version.  What the package's build needs and the host lacks
    is installed, if that may be.

    :raises BuildError: if the build fails; the notes have the end of its output.
    :raises HostError: if the host lacks something and we are not root.
    """
    if not _SUFFIX.fullmatch(version_suffix):
        raise BuildError(
            f"not a part of a Debian version: {version_suffix!r}",
            hint="letters, digits and . + ~ may be used",
        )
    files = inputs(source)
    source = source.absolute()
    if source / CHANGELOG not in files:
        raise BuildError(
            f"{source} has no {CHANGELOG}", hint="the project needs a debian directory in Git"
        )
    _need_build_dependencies(source)
    # Not in *out*: build tools have trouble with odd characters in their path.
    with tempfile.TemporaryDirectory(prefix="package-") as scratch:
        tree = Path(scratch, "source")  # the tools put their results beside it
        epoch = _copy(source, files, tree, version_suffix)
        cpus = len(os.sched_getaffinity(0))
        environment = _environment(
            DEB_BUILD_OPTIONS=f"nocheck parallel={cpus}",
            DEB_BUILD_PROFILES=_PROFILES,
            HOME=scratch,
            SOURCE_DATE_EPOCH=str(epoch),
        )
        # The target alone, without the files for an archive, which take a third of the time.
        command = ("dpkg-buildpackage", "--rules-target=binary")
        status, log = _run(command, cwd=tree, env=environment)
        if status != 0:
            raise _noted(BuildError(f"building the package of {source.name} failed"), log)
        debs = [deb for deb in Path(scratch).glob("*.deb") if "-dbgsym_" not in deb.name]
        if len(debs) != 1:
            names = ", ".join(sorted(deb.name for deb in debs)) or "none"
            raise _noted(BuildError(f"one package was to be built from {source}: {names}"), log)
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(debs[0], out / debs[0].name))


def _copy(source: Path, files: Sequence[Path], tree: Path, suffix: str) -> int:
    """Copy *files* to *tree*, all as old as the changelog says; return that time.

    Modes and times of a checkout are accidents, which would show in the package.
    """
    for file in files:
        target = tree / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            target.symlink_to(os.readlink(file))
            continue
        shutil.copyfile(file, target)
        target.chmod(0o755 if file.stat().st_mode & 0o111 else 0o644)
    changelog = tree / CHANGELOG
    text = changelog.read_text(encoding="utf-8")
    heading, entry = text.partition("\n")[::2]
    trailer = re.search(r"^ -- .*>  (.*)$", entry, re.MULTILINE)
    heading, found = _HEADING.subn(rf"\g<1>{suffix}\2", heading, count=1)
    if not (found and trailer):
        raise BuildError(f"{source / CHANGELOG} does not begin with an entry")
    changelog.write_text(f"{heading}\n{entry}", encoding="utf-8")
    epoch = int(parsedate_to_datetime(trailer[1]).timestamp())
    for file in files:
        os.utime(tree / file.relative_to(source), (epoch, epoch), follow_symlinks=False)
    return epoch


def _need_build_dependencies(source: Path) -> None:
    """Have what the build needs; what is missing is installed by APT if we are root."""
    host.need({"dpkg-buildpackage": "dpkg-dev"})
    check = ("dpkg-checkbuilddeps", "-P", _PROFILES, str(source / "debian/control"))
    status, answer = _run(check, cwd=source, env=_environment())
    if status == 0:
        return
    found = _UNMET.search(answer)
    if found is None:
        raise _noted(BuildError(f"{source}: debian/control cannot be understood"), answer)
    what = ("--no-install-recommends", "-P", _PROFILES, "build-dep", f"{source}/")
    if os.geteuid() != 0:
        raise HostError(
            f"missing packages to build that of {source.name}: {found[1]}",
            hint=f"as root: {shlex.join(('apt-get', *what))}",
        )
    apt = ("apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300")
    install = (*apt, *what)
    environment = {**os.environ, **_environment(DEBIAN_FRONTEND="noninteractive")}
    # Package lists may be missing or outdated: they are fetched if it does not work as is.
    for command in (install, (*apt, "update"), install):
        status, log = _run(command, cwd=source, env=environment)
        if status == 0 and command is install:
            return
    raise _noted(HostError(f"cannot install what building {source.name} needs: {found[1]}"), log)


def _environment(**settings: str) -> dict[str, str]:
    """Return all that a command gets to see of our environment, and *settings*."""
    return {
        "PATH": _PATH,
        "HOME": os.environ.get("HOME", "/"),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        **settings,
    }


def _run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], merge: bool = True
) -> tuple[int, str]:
    """Run a command to its end or ours; return its status and output, with *merge* errors too."""
    try:
        process = subprocess.Popen(  # noqa: S603  # commands are lists, of this module's making
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge else subprocess.DEVNULL,
            start_new_session=True,
            umask=0o022,
        )
    except OSError as error:
        raise HostError(f"cannot start {command[0]} in {cwd}: {error.strerror}") from error
    with process:
        try:
            output, _ = process.communicate(timeout=_TIMEOUT)
        except BaseException as error:
            # make and what it started must not write on where the copy is being removed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{command[0]} took over {_TIMEOUT:.0f} s") from None
            raise
    return process.returncode, os.fsdecode(output)


def _noted(error: HarnessError, log: str) -> HarnessError:
    """Return *error* with the end of *log* in its notes."""
    error.add_note(log[-_NOTE_LENGTH:].strip())
    return error
