# SPDX-License-Identifier: LGPL-2.1-or-later
"""A source that somebody sends, down to the overlay that shows it: on real storage, or not at all.

The other side of what ``tests/unit/test_receiver.py`` has: how the stream goes with the layer's own
tmpfs, which is as large as was announced, with the base, and with what undoes an apply.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayd import layers, plan, receiver, sender, stream, targets, walker, writer
from overlayd.errors import BusyError, InterruptedByUserError, OverlaydError, SpaceError
from overlayd.manager import User
from overlayd.model import Options, Overlay, Request, SourceKind
from overlayd.progress import Progress
from overlayd.stream import Entry, Header, Type
from overlayd.targets import Streamed
from tests.mounts.conftest import RUN, SOURCES, World, mount, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UID: Final = 7001
PAGE: Final = 4096
LIMITS: Final = walker.Limits(entries=10_000, size=64 << 20, depth=40)
NOTHING: Final = re.compile(r"(?!)")
FOLDER: Final = stream.pack_enter(Entry(b"root", 0o755, 5))
LEAVE: Final = stream.pack(Type.LEAVE)


class Sender(threading.Thread):
    """Sends beside the test, closes the pipe, and keeps what came of it."""

    def __init__(self, fd: int, send: Callable[[int], str | None]) -> None:
        super().__init__(daemon=True)
        self._fd, self._send = fd, send
        self.digest: str | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.digest = self._send(self._fd)
        except (OverlaydError, sender.NobodyReadsError) as error:
            self.error = error
        finally:
            os.close(self._fd)


def near(fd: int) -> int:
    """Return a descriptor of the receiver's own that does not wait."""
    own = os.dup(fd)
    os.set_blocking(own, False)  # the function's own way
    return own


def reading(fd: int, *, patience: float = 20, progress: Progress | None = None) -> Streamed:
    """Return the source that comes from *fd*, which is closed."""
    listener = receiver.Receiver(
        near(fd),
        limits=LIMITS,
        flagged=NOTHING,
        seconds=60,
        patience=patience,
        progress=progress or Progress(),
    )
    os.close(fd)
    return Streamed(SourceKind.DIRECTORY, "", listener)


def apply(
    world: World, target: Path, source: Streamed, path: str, progress: Progress | None = None
) -> Overlay:
    """Do what the service does for a user who is permitted to; *path* is a claim of his."""
    try:
        user = User(plan.Owner(UID, None), source)
        source.path, source.kind = path, source.receiver.header().kind
        request = Request("sent", path, str(target), Options(allow_other=True))
        return world.manager().prepare(request, progress or Progress(), user).commit()
    finally:
        source.close()


def measured(source: targets.OpenSource) -> walker.Measure:
    if source.kind is SourceKind.FILE:
        return walker.measure_file(source.file, source.fd, source.path, LIMITS)
    return walker.measure_tree(
        source.fd,
        source.path,
        base_fd=None,
        base_label="",
        limits=LIMITS,
        flagged=NOTHING,
        progress=Progress(),
    )


def send(path: Path, fd: int) -> str:
    """Send *path* as the client does."""
    source = targets.open_source(str(path))
    try:
        return sender.send(source, fd, measured(source), depth=LIMITS.depth, progress=Progress())
    finally:
        source.close()


def apply_sent(world: World, path: Path, target: Path) -> Overlay:
    """Send *path* and show it on *target*; both sides agree on the digest."""
    out, into = os.pipe()
    thread = Sender(into, lambda fd: send(path, fd))
    thread.start()
    overlay = apply(world, target, reading(out), str(path))
    thread.join()
    assert thread.error is None
    assert overlay.record.layers[0].digest == thread.digest
    return overlay


def written(*frames: bytes) -> Streamed:
    """Return a source that somebody wrote by hand, and closed."""
    out, into = os.pipe()
    data = b"".join(frames)
    assert os.write(into, data) == len(data)
    os.close(into)
    return reading(out)


def header(entries: int = 9, size: int = 1 << 20, kind: SourceKind = SourceKind.DIRECTORY) -> bytes:
    return stream.pack_header(Header(kind, entries, size))


def file(name: bytes, size: int = 0, data: bytes = b"") -> bytes:
    frame = stream.pack_file(Entry(name, 0o644, 5, (), size or len(data)))
    return frame + stream.pack_data(0, len(data)) + data if data else frame


def relative(found: dict[str, tuple[object, ...]], top: Path) -> dict[str, tuple[object, ...]]:
    return {os.path.relpath(path, top): facts for path, facts in found.items()}


def fill(source: Path) -> None:
    """Put one of everything into *source*."""
    (source / "sub/deep").mkdir(parents=True)
    (source / "empty").mkdir(mode=0o700)
    (source / "a").write_bytes(random.Random(1).randbytes(3 << 20))
    (source / "sub/none").touch()
    os.link(source / "a", source / "sub/deep/a again")
    (source / os.fsdecode(b"\xffodd\n")).write_text("odd")
    (source / "short").symlink_to("a")
    (source / "long").symlink_to("x/" * 1000)
    with (source / "sparse").open("wb") as out:
        out.seek(8 << 20)
        out.write(b"end")
        out.truncate(16 << 20)
    (source / "a").chmod(0o751)
    (source / "sub").chmod(0o1711)
    with contextlib.suppress(OSError):  # tmpfs has them since Linux 6.6
        os.setxattr(source / "a", "user.colour", b"green")
    for number, path in enumerate(sorted(source.rglob("*"))):
        os.utime(path, ns=(5, 1_600_000_000_123_456_789 + number), follow_symlinks=False)


# -- what is shown ---------------------------------------------------------------------------------


def test_sent_tree_shows_what_an_apply_of_roots_shows(world: World) -> None:
    files = {"old": "old", "sub/old": "old"}
    one, other = world.base("one", files), world.base("other", files)
    (one / "sub").chmod(0o750)
    (other / "sub").chmod(0o750)
    for base in (one, other):
        for name in ("sub/old", "old", "sub", "."):
            os.utime(base / name, ns=(7, 7))
    source = SOURCES / "s"
    fill(source)
    world.apply("copied", source, one)
    overlay = apply_sent(world, source, other)
    assert relative(snapshot(other), other) == relative(snapshot(one), one)
    assert stat.S_IMODE((other / "sub").stat().st_mode) == 0o750
    assert os.lstat(other / "a").st_ino == os.lstat(other / "sub/deep/a again").st_ino
    assert (overlay.record.owner, overlay.record.scope) == (UID, "system")
    world.check_invariants()


def test_storage_of_a_sent_layer_holds_exactly_what_was_announced(world: World) -> None:
    source = SOURCES / "s"
    fill(source)
    overlay = apply_sent(world, source, world.base("app", {"old": "old"}))
    layer = os.statvfs(RUN / "storage" / overlay.record.uuid / "layer")
    used = (layer.f_blocks - layer.f_bfree) * layer.f_frsize
    opened = targets.open_source(str(source))
    announced = measured(opened)
    opened.close()
    assert used == layer.f_blocks * layer.f_frsize == announced.size
    assert overlay.record.layers[0].size == announced.size
    assert overlay.record.layers[0].entries == announced.entries


def test_sent_tree_makes_the_target_that_does_not_exist(world: World) -> None:
    base = world.base("app", {"old": "old"})
    source = world.source("s", {"a": "new", "d/b": "new"})
    overlay = apply_sent(world, source, base / "not/there")
    assert (base / "not/there/d/b").read_text() == "new"
    assert (base / "old").read_text() == "old"
    assert overlay.record.mount_point == str(base)


def test_sent_file_covers_a_file_and_its_neighbours_stay(world: World) -> None:
    base = world.base("app", {"tool": "old", "other": "old"})
    source = world.source("s", {"tool-2": "new"}) / "tool-2"
    apply_sent(world, source, base / "tool")
    assert (base / "tool").read_text() == "new"
    assert (base / "other").read_text() == "old"
    assert not (base / "tool-2").exists()
    (base / "new").touch()  # it is the base that one writes to


def test_sent_file_is_laid_into_a_directory_under_its_own_name(world: World) -> None:
    base = world.base("app", {"old": "old"})
    apply_sent(world, world.source("s", {"tool": "new"}) / "tool", base)
    assert (base / "tool").read_text() == "new"
    assert (base / "old").read_text() == "old"


# -- what is refused leaves nothing ----------------------------------------------------------------

DATA: Final = b"x" * 5000
REFUSED: Final[dict[str, tuple[str, str, tuple[bytes, ...]]]] = {
    "nothing": ("broke off", "/home/s", ()),
    "a header": ("broke off", "/home/s", (header(),)),
    "half a file": (
        "broke off",
        "/home/s",
        (header(), FOLDER, file(b"a", data=DATA)[:-1]),
    ),
    "no end": ("broke off", "/home/s", (header(), FOLDER, file(b"a", data=DATA), LEAVE)),
    "more bytes than announced": (
        "more than the 4096 bytes that it announced",
        "/home/s",
        (header(9, PAGE), FOLDER, file(b"a", data=DATA)),
    ),
    "more than there may be": (
        "holds 65M; a source may have 64M",
        "/home/s",
        (header(9, 65 << 20),),
    ),
    "more entries than there may be": ("more than 10000 entries", "/home/s", (header(10_001),)),
    "file over a directory": (
        "/home/s/sub would lay a file over a directory",
        "/home/s",
        (header(), FOLDER, file(b"sub")),
    ),
    "directory over a file": (
        "/home/s/sub/b would lay a directory over a file",
        "/home/s",
        (header(), FOLDER, *(stream.pack_enter(Entry(n, 0o755, 5)) for n in (b"sub", b"b"))),
    ),
    "single file over a directory": (
        "/home/sub would lay a file over a directory: /usr/src/app/sub",
        "/home/sub",
        (header(1, kind=SourceKind.FILE), file(b"x"), stream.pack_end(1, 0)),
    ),
    "single file above": (
        "would lay a file over a directory",
        "/home/..",
        (header(1, kind=SourceKind.FILE), file(b"x"), stream.pack_end(1, 0)),
    ),
    "single file without a name": (
        "the name ''",
        "/",
        (header(1, kind=SourceKind.FILE), file(b"x"), stream.pack_end(1, 0)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_base_and_nothing_else(world: World, case: str) -> None:
    base = world.base("app", {"a": "base", "sub/b": "base"})
    before = snapshot(base)
    words, path, frames = REFUSED[case]
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OverlaydError, match=re.escape(words)):
        apply(world, base, written(*frames), path)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert snapshot(base) == before
    assert world.leftovers() == []
    apply(world, base, written(header(), FOLDER, LEAVE, stream.pack_end(1, 0)), "/home/s")


def test_files_that_fill_the_storage_are_an_error_of_space_and_leave_nothing(world: World) -> None:
    base = world.base("app", {"a": "base"})
    attributes = [(b"user.%02d" % number, bytes(60_000)) for number in range(32)]
    frame = stream.pack_file(Entry(b"a", 0o644, 5, attributes))
    probe = SOURCES / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.a", b"")
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP  # noqa: PT017  # nothing else is expected
        pytest.skip("tmpfs has no user.* attributes before Linux 6.6")
    out, into = os.pipe()

    def write(fd: int) -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(fd), "wb") as pipe:
            pipe.write(header(2, 0) + FOLDER + frame + LEAVE + stream.pack_end(2, 0))

    thread = Sender(into, write)
    thread.start()
    with pytest.raises(SpaceError, match="outgrew the storage"):
        apply(world, base, reading(out), "/home/s")
    thread.join()
    assert (base / "a").read_text() == "base"
    assert world.leftovers() == []


def test_sender_who_falls_silent_is_given_up_and_leaves_nothing(world: World) -> None:
    base = world.base("app", {"a": "base"})
    out, into = os.pipe()
    os.write(into, header() + FOLDER + file(b"a", data=DATA)[:-1])
    with pytest.raises(BusyError, match="nothing more of the source came for 0 seconds"):
        apply(world, base, reading(out, patience=0.3), "/home/s")
    os.close(into)
    assert world.leftovers() == []


def test_caller_who_goes_ends_the_waiting_and_leaves_nothing(world: World) -> None:
    base = world.base("app", {"a": "base"})
    out, into = os.pipe()
    os.write(into, header() + FOLDER + file(b"a", data=DATA)[:-1])
    progress = Progress()
    at: list[float] = []

    def stop() -> None:
        at.append(time.monotonic())
        progress.stop()

    timer = threading.Timer(0.5, stop)
    timer.start()
    with pytest.raises(InterruptedByUserError):
        apply(world, base, reading(out, progress=progress), "/home/s", progress)
    assert time.monotonic() - at[0] < 10  # of 20 that it would be patient
    timer.join()
    os.close(into)
    assert world.leftovers() == []


# -- any tree --------------------------------------------------------------------------------------

_names = st.sampled_from([b"a", b"B", b"b", b"\xff", b"\xc3\xa9", b" ", b"\n", b"z" * 255, b"sub"])
_contents = st.one_of(
    st.binary(max_size=9),
    st.integers(0, 3 * PAGE + 1).map(bytes),
    st.tuples(st.integers(0, 40_000), st.binary(max_size=9)),  # a hole before it
)
_trees = st.recursive(
    st.one_of(
        _contents,
        st.sampled_from(["-> a", "-> " + "x" * 127, "-> " + "x" * 128, "-> nowhere\udcff", "link"]),
    ),
    lambda inner: st.dictionaries(_names, inner, max_size=5),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def make(top: bytes, tree: object, first: list[bytes], numbers: random.Random) -> None:
    """Make *tree* at *top*; what is to be a link is one to the first file."""
    if isinstance(tree, dict):
        os.mkdir(top)
        for name in tree:
            make(os.path.join(top, name), tree[name], first, numbers)
        os.chmod(top, numbers.choice([0o755, 0o700, 0o1777, 0o111]))
    elif isinstance(tree, str) and tree != "link":
        os.symlink(os.fsencode(tree[3:]), top)
    elif tree == "link" and first:
        os.link(first[0], top)
        return
    else:
        fd = os.open(top, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        at, data = (
            tree if isinstance(tree, tuple) else (0, tree if isinstance(tree, bytes) else b"")
        )
        os.pwrite(fd, data, at)
        os.fchmod(fd, numbers.choice([0o644, 0o400, 0o755, 0]))
        os.close(fd)
        first.append(top)
    when = numbers.randrange(-(10**18), 10**18)
    os.utime(top, ns=(when, when), follow_symlinks=False)


def everything(top: bytes) -> dict[bytes, tuple[object, ...]]:
    """Return all that is kept of a tree, links and holes too."""
    found: dict[bytes, tuple[object, ...]] = {}
    firsts: dict[int, bytes] = {}
    paths = [top]
    for folder, folders, files in os.walk(top):
        paths += [os.path.join(folder, name) for name in folders + files]
    for path in sorted(paths):
        facts, name = os.lstat(path), os.path.relpath(path, top)
        content: object = None
        if stat.S_ISREG(facts.st_mode):
            fd = os.open(path, os.O_RDONLY)
            content = os.read(fd, 1 << 20), facts.st_size, list(walker.extents(fd, facts.st_size))
            os.close(fd)
        elif stat.S_ISLNK(facts.st_mode):
            content = os.readlink(path)
        linked = None if stat.S_ISDIR(facts.st_mode) else firsts.setdefault(facts.st_ino, name)
        found[name] = facts.st_mode, facts.st_mtime_ns, content, linked
    return found


def shut(top: Path) -> None:
    """Take from everything in a tree what the receiver would take: others' right to write."""
    for folder, _, files in os.walk(os.fsencode(top), topdown=False):
        for path in (*(os.path.join(folder, name) for name in files), folder):
            if not os.path.islink(path):
                facts = os.lstat(path)
                os.chmod(path, stat.S_IMODE(facts.st_mode) & ~0o1022)
                os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(tree=_trees, seed=st.integers(0, 1000))
def test_any_tree_comes_through_on_storage_of_just_the_size_that_was_measured(
    world: World, tree: dict[bytes, object], seed: int
) -> None:
    del world
    number = len(os.listdir(SOURCES))
    top = SOURCES / f"t{number}"
    for name in ("", "sent", "copied"):
        (top / name).mkdir()
    make(os.fsencode(top / "source"), tree, [], random.Random(seed))
    shut(top / "source")
    source = targets.open_source(str(top / "source"))
    found = measured(source)
    mount("layer", top / "sent", "tmpfs", f"size={max(found.size, PAGE)},nr_inodes=200")
    out, into = os.pipe()
    thread = Sender(into, lambda fd: send(top / "source", fd))
    thread.start()
    listener = reading(out).receiver
    fds = [os.open(top / name, walker.OPEN_DIRECTORY) for name in ("sent", "copied")]
    try:
        listener.tree(writer.Writer("sent", LIMITS, fds[0]), None)
        into_copy = writer.Writer("copied", LIMITS, fds[1])
        layers.Copier(into_copy, preserve_owner=False, progress=Progress()).tree(source.fd, None)
    finally:
        listener.close()
        source.close()
        thread.join()
        for fd in fds:
            os.close(fd)
    sent, copied, made = (os.fsencode(top / name) for name in ("sent", "copied", "source"))
    assert everything(sent) == everything(copied) == everything(made)
    facts = os.statvfs(sent)
    assert (facts.f_blocks - facts.f_bfree) * facts.f_frsize == found.size
    assert thread.digest == listener.received.digest
