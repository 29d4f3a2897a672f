# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tour of overlayd on this machine's /usr: ``python demo/tour.py``, as root.

A real package, not installed, is laid over parts of /usr, tried, edited, reset and removed, and
at the end everything that was covered is shown to be as it was.  All of it happens in a mount
namespace of its own with its own /run and /var/lib, so the machine's stay untouched, and whatever
way the tour ends, nothing is left.  Any answer that is not as expected ends it with exit code 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd import overlayfs, syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGE: Final = "hello"
DOC: Final = "/usr/share/doc"
# Where the program is tried: in every Debian, and nothing depends on it.
PLACES: Final = ("/usr/games", "/usr/src", "/usr/share/misc")
EXISTS, REFUSED, BUSY = 4, 5, 6  # exit codes of overlayd
EDIT: Final = "Edited on the running system."


class TourError(Exception):
    """Something answered otherwise than the tour says it does."""


def main() -> int:
    """Give the tour; return the exit code."""
    if os.geteuid() != 0:
        print("the tour needs root: it mounts overlays under /usr", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="overlayd-tour-") as folder:
            os.chdir(folder)
            source = fetch_package()
            enter_own_world()
            tour(source)
    except TourError as error:
        print(f"\nthe tour failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left behind", file=sys.stderr)
        return 130
    return 0


def tour(source: str) -> None:
    """Walk through the commands; *source* is the unpacked package."""
    place = next((path for path in PLACES if os.path.isdir(path) and not os.path.ismount(path)), "")
    if not place:
        raise TourError(f"none of {', '.join(PLACES)} can be laid over")
    target = f"{DOC}/{PACKAGE}"
    missing = 0 if os.path.lexists(target) else 2  # what ls answers while only the base shows
    before = {path: digest(path) for path in (DOC, place)}
    run("ls", target, code=missing)
    say("This is what /usr shows before.")
    lay_over(source, target, place)
    take_back(target, missing)
    prove(before)


def lay_over(source: str, target: str, place: str) -> None:
    """Apply, use, edit and look; and see mistakes refused."""
    text = f"{target}/copyright"
    heading("Will it work here?")
    run("overlayd", "doctor", expect="overlayd works here", last=1)
    say("The doctor tries what the kernel can do, and tells it line by line; this is the last.")

    heading("Try the package")
    run("overlayd", "apply", "docs", f"{source}/usr/share/doc", DOC, expect="docs: ")
    run("ls", "-l", target, expect="copyright")
    run("head", "-n", "2", text)
    say("A directory is merged into its target, live; nothing was written into /usr itself.")
    run("overlayd", "apply", "program", f"{source}/usr/bin/{PACKAGE}", place, expect="program: ")
    run(f"{place}/{PACKAGE}", expect="Hello, world!")
    say("A file is laid into a directory as cp would do it, and the program runs from there.")

    heading("Edit it on the running system")
    shell(f"echo '{EDIT}' >> {text}")
    run("tail", "-n", "1", text, expect=EDIT)
    say("What is written through the target goes to the overlay's own storage, of limited size.")
    run("overlayd", "list", expect="program")
    run("overlayd", "status", "docs", expect="active")
    say("What there is and where, and how much was edited.")

    heading("Mistakes")
    run("overlayd", "apply", "../docs", source, place, code=REFUSED, expect="not an overlay name")
    run("overlayd", "apply", "new", source, "/usr/share/new", code=REFUSED, expect="critical")
    run("overlayd", "apply", "more", source, f"{DOC}/more", code=EXISTS, expect="'docs'")
    say("A bad name, a place that much depends on, an overlay on an overlay: all refused.")


def take_back(target: str, missing: int) -> None:
    """Reset and remove, the first time while somebody reads."""
    text = f"{target}/copyright"
    heading("Remove it while somebody reads")
    with reading(text) as pid:
        run("overlayd", "remove", "docs", code=BUSY, expect=f" {pid} (tail)")
        shell(f"kill {pid}")
    say("It was in use by the tail, which is ended now; --lazy would have let it read on.")

    heading("Take the edit back")
    run("overlayd", "reset", "docs", "--to", "applied", expect="docs: ")
    run("tail", "-n", "1", text, unexpected=EDIT)
    say("As applied. It stayed mounted all the time: no reader saw a moment without it.")
    run("overlayd", "reset", "docs", expect="the base")
    run("ls", target, code=missing)
    say("The base, as if nothing had been applied; 'reset --to applied' would go back again.")

    heading("Take all of it away")
    run("overlayd", "remove", "docs", expect="removed")
    run("overlayd", "remove", "program", expect="removed")
    run("overlayd", "list", expect="no overlays")
    say("The names are free again, and the storage went with the overlays.")


def prove(before: dict[str, str]) -> None:
    """Show that what was covered is as it was, and that no mount is left."""
    heading("The proof")
    for path, was in before.items():
        now = digest(path)
        print(f"{path}\n  before  {was}\n  after   {now}", flush=True)
        if now != was:
            raise TourError(f"{path} is not as it was")
    say("SHA-256 over every name, mode, owner, time and content there: the base is unchanged.")
    table = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    marks = (" overlayd:", " /run/overlayd/storage/")
    left = [line for line in table.splitlines() if any(mark in line for mark in marks)]
    print(f"mounts of overlays left: {len(left)}", flush=True)
    if left:
        raise TourError("\n".join(["mounts are left:", *left]))
    say("And no mount is left. After a reboot that would be so without any removal.")


def fetch_package() -> str:
    """Download and unpack a real package; return the directory, relative to this one.

    Where APT reaches nothing, a small tree is built instead.
    """
    heading("A package that is not installed")
    # As root all the way: APT's own user cannot write into a temporary directory of root's.
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=20"]
    if not quietly("apt-get", *options, "download", PACKAGE):
        print("no usable package lists: fetching some, into a temporary directory", flush=True)
        Path("lists/partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={Path.cwd()}/lists"]
        options += ["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]
        quietly("apt-get", *options, "update")
        quietly("apt-get", *options, "download", PACKAGE)
    found = sorted(Path().glob(f"{PACKAGE}_*.deb"))
    if not found:
        print(f"APT does not reach {PACKAGE}: the tour builds a small tree instead")
        build_tree()
        return PACKAGE
    print(f"$ apt-get download {PACKAGE}\n{found[0]}")
    run("dpkg-deb", "-x", str(found[0]), PACKAGE)
    run("ls", f"{PACKAGE}/usr/share/doc/{PACKAGE}", expect="copyright")
    say("Unpacked into a directory, as any build would leave its result.")
    return PACKAGE


def build_tree() -> None:
    """Build what the package would have been."""
    program = Path(PACKAGE, "usr/bin", PACKAGE)
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'Hello, world!'\n", "utf-8")
    program.chmod(0o755)
    doc = Path(PACKAGE, "usr/share/doc", PACKAGE)
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("Built by the tour of overlayd.\nIt is free.\n", "utf-8")


def enter_own_world() -> None:
    """Move into a private mount namespace with a /run and a /var/lib of its own."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount_propagation("/", syscalls.MS_REC | syscalls.MS_PRIVATE)
        for path in ("/run", "/var/lib"):
            mount = overlayfs.make_tmpfs(64 << 20, 100_000, mode=0o755)
            place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            syscalls.move_mount(mount, place)
            os.close(place)
            os.close(mount)
    except OSError as error:
        raise TourError(f"no mount namespace of its own to be had here: {error}") from error


def quietly(*command: str) -> bool:
    """Run a program, its output thrown away; return whether it did its work in time."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return True
    return False


def run(*words: str, code: int = 0, expect: str = "", unexpected: str = "", last: int = 0) -> None:
    """Show a command with its output, or the *last* lines of it; check code and output.

    :raises TourError: if they are not as expected.
    """
    own = words[0] == "overlayd"  # the one of this environment, whatever PATH says
    line = shlex.join(words) + (f" | tail -n {last}" if last else "")
    _run(line, (sys.executable, "-m", *words) if own else words, code, expect, unexpected, last)
    if own and code:
        print(f"(exit code {code})", flush=True)


def shell(line: str) -> None:
    """Show and run a line of shell."""
    _run(line, ("sh", "-c", line), 0, "", "", 0)


def _run(  # noqa: PLR0913, PLR0917  # a command and what is expected of it
    line: str, command: Sequence[str], code: int, expect: str, unexpected: str, last: int
) -> None:
    print(f"$ {line}", flush=True)
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    text = "\n".join(done.stdout.decode(errors="replace").splitlines()[-last:])
    if text:
        print(text, flush=True)
    if done.returncode != code:
        raise TourError(f"{line!r} ended with exit code {done.returncode} instead of {code}")
    if expect not in text or (unexpected and unexpected in text):
        raise TourError(f"{line!r} answered otherwise than {expect or 'without ' + unexpected!r}")


@contextlib.contextmanager
def reading(path: str) -> Iterator[int]:
    """Have a process that keeps *path* open while the body runs; yields its pid."""
    print(f"$ tail -f {path} &", flush=True)
    process = subprocess.Popen(["tail", "-f", path], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not _holds(process.pid, path) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _holds(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def digest(top: str) -> str:
    """Return SHA-256 over names, modes, owners, times and contents of everything at *top*."""
    total = hashlib.sha256()
    for folder, names, files in os.walk(top):
        names.sort()
        for path in (folder, *(f"{folder}/{name}" for name in sorted([*files, *names]))):
            facts = os.lstat(path)
            seen = (path, facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime_ns)
            total.update(repr(seen).encode())
            if stat.S_ISREG(facts.st_mode):
                with open(path, "rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            elif stat.S_ISLNK(facts.st_mode):
                total.update(os.fsencode(os.readlink(path)))
    return total.hexdigest()


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"=== {text}", flush=True)


def say(text: str) -> None:
    """Print the line that explains what was just seen."""
    print(f"# {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
