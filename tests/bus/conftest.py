# SPDX-License-Identifier: LGPL-2.1-or-later
"""A message bus and a polkit of a test's own: the real programs, at the speed of this machine.

They run in the world of ``tests/mounts``: a mount namespace with a ``/run`` and a ``/var/lib`` of
its own, the playground in ``/usr/src``, and users, policies and rules where the machine has its.
There is no systemd in it, so the service is started by the test; that D-Bus starts it is for the
system tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.mounts.conftest import ROOT, SOURCES, World, bind, enter_new_world, mount, tree
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

USERS: Final = {
    "root": 0,
    "alice": 7001,
    "bob": 7002,
    "carol": 7003,
    "large": 3_000_000_000,
    "last": 2**32 - 3,
}
"""carol is an administrator.  The others' overlays are permitted by the rules below."""
MARK: Final = "OVERLAYD_TEST_MARK"
"""In the environment of what a test starts."""
_SOCKET: Final = "/run/dbus/system_bus_socket"
_POLKITD: Final = "/usr/lib/polkit-1/polkitd"
_TOLD: Final = Path("/run/told/log")
# What it is told is kept, so that tests can look at it; what a name begins with decides.
RULES: Final = r"""
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.projectatomic.aptostree.usroverlay") != 0)
        return polkit.Result.NOT_HANDLED;
    var name = action.lookup("name") || "";
    var told = ["name", "target", "source", "user", "files", "entries", "size", "digest",
                "flagged", "critical", "owner", "operation"].map(
        function(key) { return key + "=" + (action.lookup(key) || ""); });
    var line = action.id + " " + subject.user + " " + told.join("|");
    polkit.spawn(["/bin/sh", "-c", "printf '%s\\n' \"$1\" >> /run/told/log", "sh", line]);
    if (subject.user == "carol")
        return polkit.Result.YES;
    if (name.indexOf("no-") == 0)
        return polkit.Result.NO;
    if (name.indexOf("later-") == 0 && action.lookup("digest"))
        return polkit.Result.NO;
    if (action.id == "org.projectatomic.aptostree.usroverlay" && name.indexOf("ask-") != 0)
        return polkit.Result.YES;
    return polkit.Result.NOT_HANDLED;
});
"""


@dataclass
class Bus(World):
    """A world with a bus, and what tests do with it."""

    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    config: Path = Path("/etc/overlayd/overlayd.toml")
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def begin(self) -> None:
        """Start the bus and polkit."""
        os.environ[MARK] = self.mark  # of root's commands
        self.start("dbus", "dbus-daemon", "--system", "--nofork", "--nopidfile")
        eventually(lambda: os.path.exists(_SOCKET))
        self.start("polkit", _POLKITD, "--no-debug")
        eventually(lambda: self.has_name("org.freedesktop.PolicyKit1"))

    def start(self, name: str, *argv: str, env: Mapping[str, str] | None = None) -> None:
        """Start a program whose output goes to a file."""
        with self.log(name).open("a") as log:
            self.processes[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd="/",
                text=True,
            )

    @staticmethod
    def log(name: str) -> Path:
        """Return the file that a program's output goes to."""
        return Path(f"/run/{name}.log")

    def serve(self, *, idle: float = 60.0) -> subprocess.Popen[str]:
        """Start the service, and wait until it answers."""
        self.start("service", *PYTHON, "-m", "overlayd.service", str(idle), env=_ENVIRONMENT)
        eventually(lambda: self.has_name("org.projectatomic.aptostree.Overlay1"))
        return self.processes["service"]

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """End a program and return its exit status."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def close(self) -> None:
        """End everything."""
        for name in [*self.processes][::-1]:
            self.stop(name, signal.SIGTERM if name == "service" else signal.SIGKILL)
        for user in USERS.values():
            for pid in self.holders(user):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def holders(self, uid: int) -> list[int]:
        """Return the processes of this world that keep private overlays of a user."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"overlayd.holder" not in words or os.stat(f"/proc/{pid}").st_uid != uid:
                    continue
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
        return found

    def has_name(self, name: str) -> bool:
        """Whether somebody has a name on the bus."""
        answer = self.call(
            *("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"),
            *("NameHasOwner", "s", name),
            code=None,
        )
        return answer.stdout.strip() == "b true"

    def call(
        self, *arguments: str, user: str = "root", code: int | None = 0, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Call a method by busctl."""
        return self.as_user(
            user, "busctl", "--system", "call", *arguments, code=code, timeout=timeout
        )

    def as_user(
        self,
        user: str,
        *argv: str | Path,
        code: int | None = 0,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as *user*, and expect its exit *code*."""
        done = subprocess.run(
            [*map(str, argv)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            check=False,
            cwd="/",
            env=self.environment(env),
            user=USERS[user],
            group=USERS[user],
            extra_groups=[],
        )
        if code is not None:
            assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of what users run."""
        return {**_ENVIRONMENT, MARK: self.mark, **(env or {})}

    def start_overlayd(
        self, user: str, *arguments: str | Path, apart: bool = False
    ) -> subprocess.Popen[str]:
        """Start the command as *user*, *apart* in a process group of its own."""
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=self.environment(),
            user=USERS[user],
            group=USERS[user],
            extra_groups=[],
            start_new_session=apart,
        )

    def overlayd(
        self, user: str, *arguments: str | Path, code: int | None = 0, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as *user*."""
        return self.as_user(user, *COMMAND, *arguments, code=code, timeout=timeout)

    def json_as(self, user: str, *arguments: str | Path) -> object:
        """Run the command as *user* with --json, and return what it printed."""
        return json.loads(self.overlayd(user, *arguments, "--json").stdout)

    def source_of(self, user: str, name: str, files: dict[str, str]) -> Path:
        """Make a source that only *user* can read."""
        place = tree(SOURCES / user / name, files)
        for path in [SOURCES / user, *place.rglob("*"), place]:
            os.chown(path, USERS[user], USERS[user], follow_symlinks=False)
        (SOURCES / user).chmod(0o700)
        return place

    def configure(self, text: str) -> None:
        """Write the configuration, and wait until the service reads it again."""
        self.config.write_text(text)
        time.sleep(1.1)

    def told(self) -> list[dict[str, str]]:
        """Return what polkit's rules were told, in order."""
        found = []
        for line in _TOLD.read_text().splitlines():
            action, user, facts = line.split(" ", 2)
            pairs = dict(fact.partition("=")[::2] for fact in facts.split("|"))
            found.append({"action": action, "caller": user, **pairs})
        return found


_SITE: Final = "/run/python/site"
_PROJECT: Final = "/run/python/project"
LIBRARY: Final = f"{_PROJECT}:{_SITE}"
# The tree, its environment and Python may lie where only root gets: in here everybody sees them.
_PREFIX: Final = "/run/python/prefix"
_INTERPRETER: Final = os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix)
PYTHON: Final = (f"{_PREFIX}/{_INTERPRETER}",)
COMMAND: Final = (*PYTHON, "-m", "overlayd")
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONPATH": LIBRARY,
    "PYTHONHOME": _PREFIX,
    "PYTHONDONTWRITEBYTECODE": "1",
}


def furnish() -> None:
    """Put users, policies and rules where programs look for them."""
    for path in (Path("/run/dbus"), Path(_SITE), Path(_PROJECT), Path(_PREFIX)):
        path.mkdir(parents=True)
    bind(Path(sys.base_prefix), Path(_PREFIX))
    bind(Path(sysconfig.get_path("purelib")), Path(_SITE))
    bind(ROOT, Path(_PROJECT))
    etc = Path("/run/etc")
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    bind(etc, Path("/etc"))
    for name, line in (("passwd", "{0}:x:{1}:{1}::/nonexistent:/bin/sh"), ("group", "{0}:x:{1}:")):
        kept = [
            each
            for each in (etc / name).read_text().splitlines()
            if each.partition(":")[0] == "root" or each.partition(":")[0] not in USERS
        ]
        ours = [line.format(user, uid) for user, uid in USERS.items() if uid]
        (etc / name).write_text("\n".join([*kept, *ours, ""]))
    shutil.rmtree(etc / "overlayd", ignore_errors=True)
    (etc / "overlayd").mkdir()
    for place, files in (
        ("/usr/share/dbus-1/system.d", ROOT.glob("data/dbus/*.conf")),
        ("/usr/share/polkit-1/actions", ROOT.glob("data/polkit/*.policy")),
    ):
        theirs = {path.name: path.read_bytes() for path in Path(place).iterdir()}
        ours_too = {path.name: path.read_bytes() for path in files}
        mount("policies", place, "tmpfs", "mode=755")
        for name, data in (theirs | ours_too).items():
            Path(place, name).write_bytes(data)
    mount("rules", "/usr/share/polkit-1/rules.d", "tmpfs", "mode=755")
    _TOLD.parent.mkdir()
    _TOLD.touch()
    for path in (_TOLD.parent, _TOLD):
        path.chmod(0o777)
    # As booting and logging in make them.
    Path("/run/overlayd").mkdir(mode=0o700)
    for uid in filter(None, USERS.values()):
        home = Path(f"/run/user/{uid}")
        home.mkdir(mode=0o700, parents=True)
        os.chown(home, uid, uid)
    rules = etc / "polkit-1/rules.d"
    shutil.rmtree(rules, ignore_errors=True)
    rules.mkdir(parents=True)
    (rules / "50-test.rules").write_text(RULES)
    for path in (rules, rules.parent):
        path.chmod(0o755)


@pytest.fixture
def bus() -> Iterator[Bus]:
    """Give a world with a bus and polkit."""
    needed = {"dbus-daemon": "dbus", "busctl": "systemd", _POLKITD: "polkitd"}
    if missing := [package for name, package in needed.items() if shutil.which(name) is None]:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    enter_new_world()
    furnish()
    made = Bus()
    try:
        made.begin()
        yield made
    finally:
        made.close()
        os.chdir("/")
