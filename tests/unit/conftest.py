# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests share: values to start from, odd names, trees on disk, clocks and counts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import tempfile
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest
from hypothesis import configuration
from hypothesis import strategies as st

from overlayd import config, layers, walker, writer
from overlayd.model import Layer, Options, Overlay, Phase, Record, Scope, State, Storage, Tree
from overlayd.mountinfo import Mount
from overlayd.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Nothing is written into the checkout: not every user who runs these may.
configuration.set_hypothesis_home_dir(
    os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}")
)
hypothesis.settings.register_profile(
    "overlayd",
    deadline=None,
    max_examples=60,
    database=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("overlayd")

UUID: Final = "3f0c8a52-1111-4222-8333-abcdefabcdef"
OTHER_UUID: Final = "3f0c8a52-1111-4222-8333-abcdefabcde0"
BOOT_ID: Final = "11111111-2222-3333-4444-555555555555"
PAGE: Final = 4096
WIDE: Final = walker.Limits(entries=100_000, size=1 << 40, depth=200)
NOTHING: Final = re.compile(r"(?!)")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it sets what only root can")


# Values


def make_record(**changes: object) -> Record:
    """Return the record of a writable, active overlay on /usr/share/app, with *changes*."""
    return Record(
        uuid=UUID,
        name="fix",
        phase=Phase.ACTIVE,
        boot_id=BOOT_ID,
        owner=0,
        session_id=None,
        scope=Scope.SYSTEM,
        source="/root/app",
        target="/usr/share/app",
        mount_point="/usr/share/app",
        entry="",
        created_at="2024-05-06T07:08:09Z",
        options=Options(),
        size=64 << 20,
        inodes=1000,
        layers=(Layer(1, "/root/app", 3, 8192),),
        tree=Tree(version=1, upper=1, st_dev=50, fsid=7),
        pending=None,
        deployment=None,
    ).with_(**changes)


def make_overlay(state: State = State.ACTIVE, **changes: object) -> Overlay:
    """Return an overlay in *state*, its record with *changes*."""
    return Overlay(make_record(**changes), state, 77, Storage(64 << 20, 12288, 1000, 4))


def make_mount(
    mount_point: str, *, mount_id: int = 77, parent_id: int = 1, st_dev: int = 50, tag: str = ""
) -> Mount:
    """Return a tmpfs mount, or with *tag* one of overlayd's."""
    return Mount(
        mount_id=mount_id,
        parent_id=parent_id,
        st_dev=st_dev,
        root="/",
        mount_point=mount_point,
        options=frozenset({"rw"}),
        propagation=(),
        fstype="overlay" if tag else "tmpfs",
        source=f"overlayd:{tag}" if tag else "foreign",
    )


# Text that anybody may write

_AWKWARD: Final = [
    *(b" ", b"\n", b"\t", b"\\", b"\\040", b"\\012", b"\\", b"\r", b"\v", b"\f", b"#", b" - "),
    *(b":", b",", b"=", b'"', b"'", b"%", b"*", b"[", b"-", b".", b"\x1b[2J", b"\x7f", b"\x85"),
    *(b"\xff", b"\xc3", "é".encode(), "\u202e".encode(), "\u2028".encode(), "名".encode(), b"a"),
]


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= 255 and name not in {b".", b".."} and not {0, 0x2F} & set(name)


file_names: Final = st.one_of(
    st.lists(st.sampled_from(_AWKWARD), min_size=1, max_size=6).map(b"".join),
    st.binary(min_size=1, max_size=24),
    st.binary(min_size=255, max_size=255).map(lambda raw: re.sub(rb"[/\0]", b"x", raw)),
).filter(_is_name)
"""Names that a file may have, as bytes: control characters, escapes, anything but UTF-8."""

absolute_paths: Final = st.lists(file_names, min_size=1, max_size=4).map(
    lambda parts: "/" + os.fsdecode(b"/".join(parts))
)
"""Absolute paths, the way Python holds them: bytes that are not UTF-8 as lone surrogates."""

overlay_names: Final = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)


def is_one_printable_line(text: str) -> bool:
    """Whether *text* can go to any terminal as it is."""
    return text.isprintable() and text.encode("utf-8", "replace").decode() == text


# Trees on disk


class Meddler(Progress):
    """A progress object that calls *action* once, when the first step is reported."""

    def __init__(self, action: Callable[[], object], *, when: Callable[[int, int], bool]) -> None:
        """Call *action* at the first report of (entries, size) that *when* accepts."""
        super().__init__()
        self._action: Callable[[], object] | None = action
        self._when = when

    def advance(self, entries: int, size: int) -> None:
        """Count, and meddle if it is time."""
        super().advance(entries, size)
        if self._action is not None and self._when(entries, size):
            action, self._action = self._action, None
            action()


def copy(  # noqa: PLR0913  # what a copy can be given
    source: Path,
    dest: Path,
    *,
    base: Path | None = None,
    limits: walker.Limits = WIDE,
    preserve_owner: bool = False,
    progress: Progress | None = None,
) -> Progress:
    """Copy the tree *source* into the new directory *dest*; return the progress object."""
    dest.mkdir()
    counts = progress or Progress()
    with opened(source) as source_fd, opened(dest) as dest_fd, opened(base) as base_fd:
        into = writer.Writer(str(source), limits, dest_fd)
        copier = layers.Copier(into, preserve_owner, counts)
        copier.tree(source_fd, None if base is None else base_fd)
    return counts


def measure(
    source: Path,
    *,
    base: Path | None = None,
    limits: walker.Limits = WIDE,
    flagged: re.Pattern[str] = NOTHING,
    progress: Progress | None = None,
) -> walker.Measure:
    """Measure the tree *source*."""
    with opened(source) as source_fd, opened(base) as base_fd:
        return walker.measure_tree(
            source_fd,
            str(source),
            base_fd=None if base is None else base_fd,
            base_label=str(base),
            limits=limits,
            flagged=flagged,
            progress=progress or Progress(),
        )


@contextlib.contextmanager
def opened(path: Path | None) -> Iterator[int]:
    """Open the directory *path*; -1 for None."""
    fd = -1 if path is None else os.open(path, walker.OPEN_DIRECTORY)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def make_chain(top: Path, names: list[str]) -> int:
    """Make directories within one another below *top*; return the fd of the innermost.

    The path may be longer than one system call takes.
    """
    fd = os.open(top, walker.OPEN_DIRECTORY)
    for name in names:
        os.mkdir(name, dir_fd=fd)
        deeper = os.open(name, walker.OPEN_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    return fd


def follow_chain(top: Path, names: list[str]) -> int:
    """Return the fd of the directory that :func:`make_chain` made."""
    fd = os.open(top, walker.OPEN_DIRECTORY)
    for name in names:
        deeper = os.open(name, walker.OPEN_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    return fd


def make_acl(*, default_for: int) -> bytes:
    """Return a POSIX ACL (linux/posix_acl_xattr.h) that gives one more user all rights."""
    none = 0xFFFFFFFF
    entries = [(1, 7, none), (2, 7, default_for), (4, 5, none), (16, 7, none), (32, 5, none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def give_xattr(path: Path, name: str, value: bytes) -> None:
    """Set an extended attribute, or skip the test where the filesystem has none."""
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        pytest.skip(f"{path.parent} takes no {name}: {error.strerror}")


def open_fds() -> int:
    """Count the descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail what takes more of the processor's time, or sleeps long in a system call."""

    def ring(_number: int, _frame: object) -> None:
        text = f"it took longer than {seconds} s"
        raise AssertionError(text)

    # Of the clock's time a busy machine takes any number.
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, seconds * 30),
    }
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@pytest.fixture
def defaults(tmp_path: Path) -> config.Config:
    """Return the default configuration, whatever this machine has in /etc."""
    empty = tmp_path / "empty.toml"
    empty.touch()
    return config.load(empty)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give an empty source."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Give an empty base."""
    path = tmp_path / "base"
    path.mkdir()
    return path


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """Give a place where a layer is to be made."""
    return tmp_path / "dest"


@pytest.fixture
def no_descriptor_stays_open() -> Iterator[None]:
    """Insist that a test closes what it opens."""
    before = open_fds()
    yield
    assert open_fds() == before
