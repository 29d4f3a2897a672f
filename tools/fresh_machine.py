# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prove the committed HEAD on machines that have nothing but git and Python.

For each suite a minimal Debian is made by mmdebstrap, a clone goes in, and the commands a newcomer
would type are run there as root, with an almost empty environment. A suite's mounts are made in a
mount namespace of its own, so no end of this program, not even SIGKILL, leaves one behind; the
process namespace around it does the same for processes.

The machines use the APT mirror (``OVERLAYD_APT_MIRROR`` overrides it) and the pip configuration of
this one, whatever those are.

Usage: fresh_machine.py [SUITE...]
"""

import argparse
import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import unquote, urlsplit

CHECKOUT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from harness.apt import acquire_settings, machine_mirror  # noqa: E402  # needs nothing installed

SUITES: Final = ("bookworm", "trixie")
COMMANDS: Final = ("./nox -s demo", "./nox")
CLONE: Final = "/root/overlayd"  # as the machine sees it
GIVEN: Final = "/etc/fresh-machine"  # files of this machine's pip, as that one sees them

# $1: the machine's root; $2...: directories to show in it, read-only; then a command after "--".
ENTER: Final = r"""
set -eu
root=$1
shift
mount --bind "$root" "$root"
mount -o remount,bind,suid,dev "$root" # wherever it is kept
cd "$root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o nosuid,nodev tmpfs dev/shm
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
while [ "$1" != -- ]; do
    mkdir -p "./$1"
    mount -o bind,ro "$1" "./$1"
    shift
done
shift
mount --make-rshared . # as systemd does
mount --move . /
status=0
chroot . "$@" || status=$? # not the last command: the shell stays, to collect orphans
exit $status
"""


@dataclass(frozen=True, kw_only=True)
class Pip:
    """This machine's pip configuration, as another machine can use it."""

    config: str
    environment: dict[str, str]
    files: dict[str, Path] = field(default_factory=dict)
    """Copied to their names in ``GIVEN``."""
    directories: frozenset[Path] = frozenset()
    """Shown under their own names."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the final table."""

    suite: str
    command: str
    status: int
    seconds: float


def main() -> int:
    """Make the machines, run the commands in each and print what came of it."""
    parser = argparse.ArgumentParser(description="Prove HEAD on minimal machines made for it.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: {' '.join(SUITES)}")
    suites = parser.parse_args().suites or SUITES
    if os.geteuid() != 0:
        die("making a machine needs root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    pip = pip_configuration()
    results: list[Result] = []
    # /tmp may be small and in memory.
    with tempfile.TemporaryDirectory(
        prefix="overlayd-fresh-", dir=os.environ.get("TMPDIR", "/var/tmp")
    ) as scratch:
        Path(scratch).chmod(0o755)  # APT fetches as a user of its own
        clone = clone_head(Path(scratch))
        for suite in suites:
            root = Path(scratch, suite)
            results.extend(try_suite(suite, root, clone, pip))
            shutil.rmtree(root, ignore_errors=True)
    width = max(len(result.command) for result in results)
    print(f"\n{'suite':<10}  {'command':<{width}}  {'result':<8}  seconds")
    for result in results:
        word = "ok" if result.status == 0 else f"exit {result.status}"
        print(f"{result.suite:<10}  {result.command:<{width}}  {word:<8}  {result.seconds:7.0f}")
    return int(any(result.status for result in results))


def try_suite(suite: str, root: Path, clone: Path, pip: Pip) -> Iterator[Result]:
    """Make one machine at ``root`` and run the commands in it."""
    result = timed(suite, "mmdebstrap", bootstrap(suite, root))
    yield result
    if result.status != 0:
        return
    shutil.copytree(clone, f"{root}{CLONE}", symlinks=True)
    give(root, pip)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "TERM": os.environ.get("TERM", "dumb"),
        **pip.environment,
    }
    assignments = [f"{name}={value}" for name, value in environment.items()]
    shown = [str(directory) for directory in sorted(pip.directories)]
    for command in COMMANDS:
        run = ["env", "-i", *assignments, "sh", "-c", f"cd {CLONE} && exec {command}"]
        yield timed(suite, command, ["sh", "-c", ENTER, "-", str(root), *shown, "--", *run])


def timed(suite: str, name: str, command: Sequence[str]) -> Result:
    """Run a command in mount and process namespaces of its own."""
    print(f"\n== {suite}: {name}", flush=True)
    start = time.monotonic()
    isolated = (
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("unshare", "--mount", "--propagation", "private"),
        *("--pid", "--fork", "--kill-child", "--mount-proc", "--", *command),
    )
    # In a session of its own it gets no Ctrl-C from the terminal, only what is sent below.
    with subprocess.Popen(
        isolated, stdin=subprocess.DEVNULL, cwd="/", start_new_session=True
    ) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # With its process 1 the whole namespace ends, and unshare sees that through: killed
            # itself, it would leave processes that still write where the machine is removed.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended already
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                for child in children.split():
                    os.kill(int(child), signal.SIGKILL)
            raise
    return Result(suite=suite, command=name, status=status, seconds=time.monotonic() - start)


def bootstrap(suite: str, root: Path) -> list[str]:
    """Return the mmdebstrap command for a Debian of the essential packages, APT, git and Python."""
    command = ["mmdebstrap", "--mode=root", "--variant=apt", "--include=git,python3"]
    mirror = machine_mirror()
    if mirror.startswith("https:"):
        command.append("--include=ca-certificates")
    command += [f"--aptopt={setting};" for setting in acquire_settings()]
    command += [suite, str(root)]
    return [*command, mirror] if mirror else command  # mmdebstrap has a default


def clone_head(scratch: Path) -> Path:
    """Clone the checkout, whoever owns it."""
    config = scratch / "gitconfig"
    config.write_text("[safe]\n\tdirectory = *\n[advice]\n\tdetachedHead = false\n")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": str(config)}
    git = ("git", "-C", str(CHECKOUT))
    head = [*git, "rev-parse", "--quiet", "--verify", "HEAD"]
    if subprocess.run(head, check=False, env=env, stdout=subprocess.DEVNULL).returncode != 0:
        die("nothing is committed yet")
    status = [*git, "status", "--porcelain"]
    if subprocess.run(status, check=True, env=env, capture_output=True).stdout:
        print("note: what is not committed is not tried")
    clone = scratch / "clone"
    command = ["git", "clone", "--quiet", "--no-hardlinks", str(CHECKOUT), str(clone)]
    subprocess.run(command, check=True, env=env)
    return clone


def give(root: Path, pip: Pip) -> None:
    """Put into the machine what lets it reach what this one reaches."""
    for source in filter(Path.exists, (Path("/etc/resolv.conf"), Path("/etc/hosts"))):
        target = Path(f"{root}{source}")
        target.unlink(missing_ok=True)
        shutil.copy(source, target)
    given = Path(f"{root}{GIVEN}")
    given.mkdir()
    for name, source in pip.files.items():
        shutil.copy(source, given / name)
    if pip.config:
        (root / "etc/pip.conf").write_text(pip.config, encoding="utf-8")


def pip_configuration() -> Pip:
    """Collect what ``pip config`` says and the environment variables that pip heeds."""
    files: dict[str, Path] = {}
    directories: set[Path] = set()

    def translated(key: str, value: str) -> str:
        """Note the local paths in a setting, and return it with the files' new names."""
        words = []
        for word in value.split():
            path = Path(unquote(urlsplit(word).path) if word.startswith("file:") else word)
            if path.is_absolute() and path.is_file():
                name = f"{len(files)}-{path.name}"
                files[name] = path
                words.append(f"{GIVEN}/{name}")
                continue
            if path.is_absolute() and key.endswith(("index-url", "find-links")):
                # An index refers to packages beside it.
                beside = key.endswith("index-url") and path.parent != path.parents[-1]
                directories.add(path.parent if beside else path)
            words.append(word)
        return "\n".join(words) if "\n" in value else " ".join(words)

    environment = {
        name: translated(name.removeprefix("PIP_").lower().replace("_", "-"), value)
        for name, value in os.environ.items()
        if (name.startswith("PIP_") and name != "PIP_CONFIG_FILE")
        or name in {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
        or name.lower() in {"http_proxy", "https_proxy", "no_proxy", "all_proxy"}
    }
    listing = output(sys.executable, "-m", "pip", "config", "list")
    config: dict[str, list[str]] = {}
    for line in listing.splitlines():
        name, _, quoted = line.partition("=")
        section, _, key = name.partition(".")
        if section.startswith(":"):  # the environment
            continue
        value = translated(key, ast.literal_eval(quoted)).replace("\n", "\n    ")
        config.setdefault(section, []).append(f"{key} = {value}\n")
    text = "".join(f"[{section}]\n{''.join(lines)}" for section, lines in config.items())
    return Pip(
        config=text,
        environment=environment,
        files=files,
        directories=frozenset(filter(Path.is_dir, directories)),
    )


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def die(message: str) -> NoReturn:
    """Print one line and leave."""
    sys.exit(f"fresh-machine: {message}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
