# SPDX-License-Identifier: LGPL-2.1-or-later
"""A world of its own for each test: real mounts, in a mount namespace that nobody else sees.

``/run`` is a fresh tmpfs, and so are ``/var/lib``, for the history, and the playground ``/usr/src``
(every Debian has it); the base under test lies there.  The playground is shared as under systemd,
or private where a test says so.
The machine's own ``/usr``, ``/run`` and ``/var`` are never written to.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import config, features, mountinfo
from overlayd import syscalls as sc
from overlayd.manager import Manager
from overlayd.model import Options, Overlay, Request
from overlayd.overlayfs import Exchange
from overlayd.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from overlayd.executor import Operation

PLAY = Path("/usr/src")
RUN = Path("/run/overlayd")
STATE = Path("/var/lib")
SOURCES = Path("/run/sources")
EMPTY_CONFIG = Path("/run/empty.toml")
COMMAND = (sys.executable, "-m", "overlayd")
ROOT = Path(__file__).parents[2]
CLONE_FS = 0x200
_machine: list[int] = []
_libc = ctypes.CDLL(None, use_errno=True)


def _ways() -> list[Exchange]:
    """Return the ways of exchange that this kernel has."""
    if os.geteuid() != 0:
        return list(Exchange)  # every test is skipped
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads, which xdist has; the child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        beneath = features.probe().works("exchange by MOVE_MOUNT_BENEATH")
    return [way for way in Exchange if way is not Exchange.BENEATH or beneath]


WAYS = _ways()
EACH_WAY = [
    pytest.param(
        way,
        id=way,
        marks=pytest.mark.skipif(
            way not in WAYS, reason=f"this kernel cannot exchange by {way} (Linux 6.5)"
        ),
    )
    for way in Exchange
]


def mount(source: str, target: Path | str, fstype: str, options: str = "", flags: int = 0) -> None:
    """Mount by the old call, as other programs do."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), fstype.encode(), flags, options.encode() or None
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def bind(source: Path, target: Path) -> None:
    """Bind *source* on *target*."""
    mount(str(source), target, "none", flags=sc.MS_BIND)


def leave_world() -> None:
    """Go back to the machine's own mount namespace, if this process has ever left it."""
    sc.unshare(CLONE_FS)  # threads that are still ending share it, and setns refuses then
    if _machine and _libc.setns(_machine[0], sc.CLONE_NEWNS) < 0:
        raise OSError(ctypes.get_errno(), "setns")


def enter_new_world(*, shared: bool = True) -> None:
    """Leave the mount namespace for a fresh one with its own /run and playground.

    Made from the machine's own each time: the mounts of an earlier world would lie beneath.
    """
    leave_world()
    if not _machine:
        _machine.append(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount_propagation("/", sc.MS_REC | sc.MS_PRIVATE)
    mount("run", "/run", "tmpfs", "mode=755")
    mount("playground", PLAY, "tmpfs", "mode=755")
    STATE.mkdir(parents=True, exist_ok=True)  # a bare kernel has none
    mount("state", STATE, "tmpfs", "mode=755")
    if shared:
        sc.mount_propagation("/run", sc.MS_SHARED)
        sc.mount_propagation(str(PLAY), sc.MS_SHARED)
    SOURCES.mkdir()
    EMPTY_CONFIG.touch(0o644)


def defaults() -> config.Config:
    """Return the default configuration, whatever this machine has in /etc."""
    return config.load(EMPTY_CONFIG)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Make a tree of text files; a name that ends in / is a directory, one with -> a symlink."""
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)
    return root


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Return everything that can be told of a tree: types, modes, owners, times, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in [b".", *folders, *files]:
            path = os.path.join(folder, name)
            facts = os.lstat(path)
            if os.path.islink(path):
                content: object = os.readlink(path)
            elif os.path.isdir(path):
                content = sorted(os.listxattr(path))
            else:
                content = Path(os.fsdecode(path)).read_bytes()
            found[os.fsdecode(path)] = (
                facts.st_mode,
                facts.st_uid,
                facts.st_gid,
                facts.st_mtime_ns,
                content,
            )
    return found


@dataclass
class World:
    """What a test does in its world."""

    warnings: list[str] = field(default_factory=list)

    def manager(
        self,
        *,
        way: Exchange | None = None,
        trace: Callable[[str, Operation], None] | None = None,
        settings: config.Config | None = None,
    ) -> Manager:
        """Return a manager with the default configuration, or with *settings*."""
        return Manager(
            lambda: settings or defaults(), warn=self.warnings.append, way=way, trace=trace
        )

    def apply(  # what an apply can be given
        self,
        name: str,
        source: Path | str,
        target: Path | str,
        *,
        size: int | None = None,
        manager: Manager | None = None,
        **options: bool,
    ) -> Overlay:
        """Apply in-process."""
        flags = Options(**options, writable_dirs=())
        request = Request(name, str(source), str(target), flags, size)
        return (manager or self.manager()).apply(request, Progress())

    def base(self, name: str, files: dict[str, str]) -> Path:
        """Make a base in the playground."""
        return tree(PLAY / name, files)

    def source(self, name: str, files: dict[str, str]) -> Path:
        """Make a source."""
        return tree(SOURCES / name, files)

    def run(
        self, *arguments: str | Path, code: int | None = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line and expect its exit *code*."""
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        if code is not None:
            assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *arguments: str | Path) -> object:
        """Run the command line with --json and return what it printed."""
        return json.loads(self.run(*arguments, "--json").stdout)

    def leftovers(self) -> list[str]:
        """Name everything of overlayd's that would be left if there were no overlay."""
        table = mountinfo.read()
        found = [m.mount_point for mounts in table.tagged.values() for m in mounts]
        found += [
            m.mount_point
            for m in table.within(str(RUN))
            if m.mount_point not in {str(RUN), str(RUN / "stage")}
        ]
        for folder in ("records", "storage", "stage"):
            if (RUN / folder).exists():
                found += [f"{folder}/{name}" for name in os.listdir(RUN / folder)]
        return found

    def check_invariants(self) -> None:
        """Check that records, mounts and storage say the same."""
        overlays = self.manager().list()
        table = mountinfo.read()
        assert {o.state for o in overlays} <= {"active"}, overlays
        uuids = {o.record.uuid for o in overlays}
        assert set(table.tagged) == uuids
        for mounts in table.tagged.values():
            assert len(mounts) == 1, mounts
        assert set(os.listdir(RUN / "storage")) == uuids
        # A killed command may leave a new version of a record, which the next one takes.
        names = {*os.listdir(RUN / "records")}
        fresh = {name for name in names if name.startswith(".new-")}
        assert {name.removesuffix(".json") for name in names - fresh} == uuids
        assert {name.removeprefix(".new-") for name in fresh} <= uuids
        expected = set()
        for overlay in overlays:
            assert overlay.record.tree is not None
            parts = {"layer", f"upper.{overlay.record.tree.upper}"}
            expected |= {f"{RUN}/storage/{overlay.record.uuid}/{part}" for part in parts}
        stored = {m.mount_point for m in table.within(str(RUN / "storage"))}
        assert stored == expected
        stage = str(RUN / "stage")
        assert {mount.mount_point for mount in table.within(stage)} <= {stage}


@pytest.fixture
def world() -> Iterator[World]:
    """Give a world whose playground is shared, as under systemd."""
    enter_new_world()
    yield World()
    os.chdir("/")


@pytest.fixture(params=["shared", "private"])
def either_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Give a world with the playground shared, and another with it private."""
    enter_new_world(shared=request.param == "shared")
    yield World()
    os.chdir("/")


@pytest.fixture(autouse=True)
def _root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount overlays in a mount namespace of its own")
