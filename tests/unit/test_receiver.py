# SPDX-License-Identifier: LGPL-2.1-or-later
"""A source through a pipe: what comes out is what a copy makes, whoever sends it, or an error.

On real trees in a temporary directory, through real pipes.  What somebody hostile may send is
written by hand, frame by frame, with the functions of the format.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import stat
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayd import receiver, sender, stream, walker, writer
from overlayd.errors import (
    BusyError,
    InterruptedByUserError,
    OverlaydError,
    RefusedError,
    SpaceError,
)
from overlayd.model import SourceKind
from overlayd.progress import Progress
from overlayd.stream import FRAME, Entry, Header, Type
from overlayd.targets import OpenSource
from tests.unit.conftest import (
    NOTHING,
    PAGE,
    WIDE,
    Meddler,
    copy,
    file_names,
    follow_chain,
    give_xattr,
    is_one_printable_line,
    make_chain,
    measure,
    needs_root,
    open_fds,
    opened,
    time_limit,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from overlayd.walker import Limits

pytestmark = pytest.mark.usefixtures("no_descriptor_stays_open")
MIB: Final = 1 << 20
TIME: Final = 1_600_000_000_123_456_789


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def near(fd: int) -> int:
    """Return a descriptor of the receiver's own that does not wait."""
    own = os.dup(fd)
    os.set_blocking(own, False)  # the function's own way
    return own


class Sending(threading.Thread):
    """Does *action* beside the test, keeping what it raises."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.error: BaseException | None = None
        self.result: object = None

    def run(self) -> None:
        try:
            self.result = self._action()
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            self.error = error


def make_receiver(  # noqa: PLR0913  # what a receiver can be given
    fd: int,
    *,
    limits: Limits = WIDE,
    flagged: re.Pattern[str] = NOTHING,
    seconds: float = 30,
    patience: float = 10,
    progress: Progress | None = None,
) -> receiver.Receiver:
    return receiver.Receiver(
        near(fd),
        limits=limits,
        flagged=flagged,
        seconds=seconds,
        patience=patience,
        progress=progress or Progress(),
    )


def take(
    listener: receiver.Receiver, dest: Path, *, base: Path | None = None, limits: Limits = WIDE
) -> receiver.Received:
    """Receive into the new directory *dest*: a directory's content, or a file named ``single``."""
    dest.mkdir()
    try:
        with opened(dest) as dest_fd, opened(base) as base_fd:
            into = writer.Writer("sent", limits, dest_fd)
            if listener.header().kind is SourceKind.FILE:
                listener.single_file(into, dest_fd, "single")
            else:
                listener.tree(into, None if base is None else base_fd)
    finally:
        listener.close()
    return listener.received


def send_tree(
    source: Path,
    fd: int,
    *,
    progress: Progress | None = None,
    depth: int = WIDE.depth,
    measured: walker.Measure | None = None,
) -> str:
    """Send the tree *source* to *fd* and close that; return the digest."""
    try:
        found = measured or measure(source)
        with opened(source) as top:
            return sender.send(
                OpenSource(SourceKind.DIRECTORY, str(source), str(source), top, ""),
                fd,
                found,
                depth=depth,
                progress=progress or Progress(),
            )
    finally:
        os.close(fd)


def send_file(path: Path, fd: int, *, progress: Progress | None = None) -> str:
    """Send the single file *path* to *fd* and close that; return the digest."""
    try:
        with opened(path.parent) as top:
            found = walker.measure_file(path.name, top, str(path), WIDE)
            return sender.send(
                OpenSource(SourceKind.FILE, str(path), str(path), top, path.name),
                fd,
                found,
                depth=1,
                progress=progress or Progress(),
            )
    finally:
        os.close(fd)


def transfer(  # noqa: PLR0913  # what a transfer can be given
    source: Path,
    dest: Path,
    *,
    base: Path | None = None,
    limits: Limits = WIDE,
    flagged: re.Pattern[str] = NOTHING,
    progress: Progress | None = None,
) -> receiver.Received:
    """Send *source* and receive it as *dest*; both agree on the digest."""
    out, into = os.pipe()
    send = send_file if source.is_file() else send_tree
    thread = Sending(lambda: send(source, into))
    listener = make_receiver(out, limits=limits, flagged=flagged, progress=progress)
    os.close(out)
    thread.start()
    try:
        received = take(listener, dest, base=base, limits=limits)
    finally:
        listener.close()
        thread.join()
    if thread.error is not None:
        raise thread.error
    assert thread.result == received.digest
    return received


def digest(source: Path) -> str:
    """Return the digest of *source*, reading what is sent without looking at it."""
    out, into = os.pipe()
    thread = Sending(lambda: send_tree(source, into))
    thread.start()
    while os.read(out, MIB):
        pass
    os.close(out)
    thread.join()
    assert isinstance(thread.result, str), thread.error
    return thread.result


def sent_bytes(source: Path) -> bytes:
    """Return the stream of *source*."""
    out, into = os.pipe()
    thread = Sending(lambda: send_tree(source, into))
    thread.start()
    parts = []
    while data := os.read(out, MIB):
        parts.append(data)
    os.close(out)
    thread.join()
    assert thread.error is None
    return b"".join(parts)


def receive(  # noqa: PLR0913  # what a reception can be given
    data: bytes,
    dest: Path,
    *,
    base: Path | None = None,
    limits: Limits = WIDE,
    seconds: float = 30,
    flagged: re.Pattern[str] = NOTHING,
) -> receiver.Received:
    """Receive *data* as *dest*, from somebody who writes all of it at once and closes."""
    out, into = os.pipe()
    listener = make_receiver(out, limits=limits, flagged=flagged, seconds=seconds)
    os.close(out)

    def write() -> None:
        rest = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            while rest:
                rest = rest[os.write(into, rest) :]
        os.close(into)

    thread = Sending(write)
    thread.start()
    try:
        return take(listener, dest, base=base, limits=limits)
    finally:
        listener.close()
        thread.join()


def refused(data: bytes, dest: Path, words: str, *, limits: Limits = WIDE) -> OverlaydError:
    """Receive *data*, which is refused with *words*; return the error."""
    before = open_fds()
    with time_limit(10), pytest.raises(OverlaydError, match=words) as caught:
        receive(data, dest, limits=limits)
    assert is_one_printable_line(caught.value.message)
    assert open_fds() == before
    shutil.rmtree(dest)
    return caught.value


def shape(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Return all that a layer is meant to keep of the tree below *top*, by path."""
    found: dict[bytes, tuple[object, ...]] = {}
    firsts: dict[int, bytes] = {}
    raw_top = os.fsencode(top)
    paths = [raw_top]
    for folder, folders, files in os.walk(raw_top):
        paths += [os.path.join(folder, name) for name in folders + files]
    for path in sorted(paths):
        facts = os.lstat(path)
        content: object = None
        if stat.S_ISREG(facts.st_mode):
            fd = os.open(path, os.O_RDONLY)
            content = os.read(fd, 1 << 24), tuple(walker.extents(fd, facts.st_size))
            os.close(fd)
        elif stat.S_ISLNK(facts.st_mode):
            content = os.readlink(path)
        first = path
        if not stat.S_ISDIR(facts.st_mode):
            first = firsts.setdefault(facts.st_ino, path)
        names = os.listxattr(path, follow_symlinks=False)
        found[os.path.relpath(path, raw_top)] = (
            facts.st_mode,
            facts.st_mtime_ns,
            (facts.st_uid, facts.st_gid),
            facts.st_size if not stat.S_ISDIR(facts.st_mode) else 0,
            content,
            os.path.relpath(first, raw_top),
            {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
        )
    return found


# -- what comes out is what a copy makes -----------------------------------------------------------


def sparse(path: Path, size: int, *stretches: tuple[int, bytes]) -> None:
    """Write a file with holes, or skip where there are none."""
    with path.open("wb") as file:
        for at, data in stretches:
            file.seek(at)
            file.write(data)
        file.truncate(size)
        os.fsync(file.fileno())
    if path.stat().st_blocks * 512 >= size:
        pytest.skip(f"{path.parent} keeps no holes in files")


def fill(source: Path) -> None:
    """Fill *source* with one of everything."""
    for folder in ("d/deeper", "empty", "z"):
        (source / folder).mkdir(parents=True)
    (source / "f").write_bytes(os.urandom(3 * MIB + 5))
    (source / "none").touch()
    (source / "d/run").write_bytes(b"#!\n" * 100)
    (source / "d/run").chmod(0o751)
    (source / "d").chmod(0o1775)
    (source / "d/deeper").chmod(0o500)
    (source / "short").symlink_to("d/nowhere\udcff")
    (source / "long").symlink_to("x/" * 2000)
    (source / os.fsdecode(b"\xff\x01 \n")).write_bytes(b"odd")
    os.link(source / "f", source / "z/linked")
    os.link(source / "f", source / "f2")
    sparse(source / "sparse", 8 * MIB + 5, (2 * MIB, b"m" * 10_000), (6 * MIB, b"y"))
    sparse(source / "z/hole", 3 * MIB)
    give_xattr(source / "f", "user.colour", b"gr\0een")
    give_xattr(source / "f", "user.b", b"")
    give_xattr(source / "d", "user.\udcff", b"1")
    give_xattr(source / "d", "user.\xe9", b"2")
    for number, path in enumerate(sorted(source.rglob("*"))):
        os.utime(path, ns=(5, TIME + number), follow_symlinks=False)
    os.utime(source, ns=(5, -TIME))


def shut(top: Path) -> None:
    """Take from everything in a tree what the receiver would take: others' right to write."""
    for folder, _, files in os.walk(os.fsencode(top), topdown=False):
        for path in (*(os.path.join(folder, name) for name in files), folder):
            if not os.path.islink(path):
                facts = os.lstat(path)
                os.chmod(path, stat.S_IMODE(facts.st_mode) & ~0o1022)
                os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_what_is_received_is_what_a_copy_makes(source: Path, dest: Path, tmp_path: Path) -> None:
    fill(source)
    shut(source)
    copy(source, tmp_path / "copied")
    progress = Progress()
    received = transfer(source, dest, progress=progress)
    assert shape(dest) == shape(tmp_path / "copied")
    found = measure(source)
    assert (received.entries, received.size) == (found.entries, found.size)
    assert (progress.entries, received.file_count) == (found.entries, 10)
    assert received.digest == digest(source)


def test_nobody_but_root_may_write_to_what_was_sent(source: Path, dest: Path) -> None:
    """Else the sender could change what an administrator has permitted."""
    (source / "f").touch()
    (source / "f").chmod(0o777)
    (source / "d").mkdir()
    (source / "d").chmod(0o1777)
    transfer(source, dest)
    assert stat.S_IMODE((dest / "f").stat().st_mode) == 0o755
    assert stat.S_IMODE((dest / "d").stat().st_mode) == 0o755


@needs_root
def test_set_id_bits_owners_and_other_attributes_are_not_sent(
    source: Path, dest: Path, tmp_path: Path
) -> None:
    fill(source)
    shut(source)
    (source / "f").chmod(0o644)
    (source / "d").chmod(0o755)
    plain = digest(source)
    for name in ("f", "d", "."):
        os.chown(source / name, 12, 34)
    (source / "f").chmod(0o6644)
    (source / "d").chmod(0o6755)
    for name in ("f", "d"):
        give_xattr(source / name, "trusted.overlay.opaque", b"y")
        give_xattr(source / name, "security.own", b"y")
        give_xattr(source / name, "user.overlay.opaque", b"y")
    copy(source, tmp_path / "copied")
    assert transfer(source, dest).digest == plain
    assert shape(dest) == shape(tmp_path / "copied")


def test_base_gives_merged_directories_their_attributes(
    source: Path, base: Path, dest: Path, tmp_path: Path
) -> None:
    fill(source)
    (base / "d/deeper").mkdir(parents=True)
    (base / "d/run").write_bytes(b"old")
    (base / "d").chmod(0o711)
    (base / "d/deeper").chmod(0o755)
    give_xattr(base / "d", "user.base", b"1")
    for name in ("d/deeper", "d", "."):
        os.utime(base / name, ns=(7, 7))
    copy(source, tmp_path / "copied", base=base)
    transfer(source, dest, base=base)
    assert shape(dest) == shape(tmp_path / "copied")
    assert os.listxattr(dest / "d") == ["user.base"]
    assert (dest / "d").stat().st_mtime_ns == 7


@pytest.mark.parametrize("what", ["file", "symlink", "link"])
def test_file_over_a_directory_of_the_base_is_refused(
    source: Path, base: Path, dest: Path, what: str
) -> None:
    (base / "sub/thing").mkdir(parents=True)
    (source / "sub").mkdir()
    (source / "sub/first").touch()
    if what == "link":
        os.link(source / "sub/first", source / "sub/thing")
    elif what == "symlink":
        (source / "sub/thing").symlink_to("x")
    else:
        (source / "sub/thing").touch()
    with pytest.raises(RefusedError, match="sent/sub/thing would lay a file over a directory"):
        receive(sent_bytes(source), dest, base=base)


@pytest.mark.parametrize("what", ["file", "symlink"])
def test_directory_over_a_file_of_the_base_is_refused(
    source: Path, base: Path, dest: Path, what: str
) -> None:
    (source / "sub/thing").mkdir(parents=True)
    (base / "sub/real").mkdir(parents=True)
    if what == "symlink":
        (base / "sub/thing").symlink_to("real")
    else:
        (base / "sub/thing").touch()
    with pytest.raises(RefusedError, match="sent/sub/thing would lay a directory over a file"):
        receive(sent_bytes(source), dest, base=base)


def test_single_file_is_received_under_the_name_that_it_gets(source: Path, dest: Path) -> None:
    (source / "tool").write_bytes(b"x" * 10_000)
    (source / "tool").chmod(0o4751)
    give_xattr(source / "tool", "user.a", b"1")
    os.utime(source / "tool", ns=(5, TIME))
    progress = Progress()
    received = transfer(source / "tool", dest, progress=progress, flagged=re.compile("single"))
    assert os.listdir(dest) == ["single"]
    facts = (dest / "single").stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_mtime_ns) == (0o751, TIME)
    assert (dest / "single").read_bytes() == b"x" * 10_000
    assert os.getxattr(dest / "single", "user.a") == b"1"
    assert (received.entries, received.size, received.file_count) == (1, 3 * PAGE, 1)
    assert received.flagged == ["single"]
    assert (progress.entries, progress.size) == (1, 10_000)


def test_flagged_names_are_noted_but_for_directories(source: Path, dest: Path) -> None:
    (source / "d.so").mkdir()
    for name in ("a.so", "d.so/b.so", "c"):
        (source / name).touch()
    (source / "l.so").symlink_to("x")
    os.link(source / "c", source / "h.so")
    received = transfer(source, dest, flagged=re.compile(r".*\.so\Z"))
    assert received.flagged == ["a.so", "h.so", "l.so", "d.so/b.so"]
    assert (received.flagged_count, received.file_count) == (4, 5)


def test_path_of_a_flagged_file_that_would_fill_a_dialog_is_cut_but_not_its_name(
    dest: Path,
) -> None:
    sent = header() + ROOT + enter(b"d" * 200) + file(b"a.so") + enter(b"e" * 200) + file(b"b.so")
    sent += LEAVE * 3 + end(5)
    received = receive(sent, dest, flagged=re.compile(r".*\.so\Z"))
    assert received.flagged == ["d" * 200 + "/a.so", "…/b.so"]


def test_what_comes_after_the_end_is_refused_though_it_comes_late(
    pipe: tuple[int, int], dest: Path
) -> None:
    os.write(pipe[1], header() + ROOT + LEAVE + end(1))
    listener = make_receiver(pipe[0])
    listener.header()  # all that was sent so far is read with it
    os.write(pipe[1], b"x")
    with pytest.raises(RefusedError, match="something comes after its end"):
        take(listener, dest)


def test_end_is_the_end_though_the_sender_keeps_the_pipe_open(
    pipe: tuple[int, int], dest: Path
) -> None:
    os.write(pipe[1], header() + ROOT + LEAVE + end(1))
    assert take(make_receiver(pipe[0], patience=60), dest).entries == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "n" * 256, "a\0b"])
def test_single_file_is_not_written_under_a_name_that_no_file_can_have(
    dest: Path, name: str
) -> None:
    sent = header(kind=SourceKind.FILE) + file(b"a") + end(1)
    out, into = os.pipe()
    os.write(into, sent)
    os.close(into)
    listener = make_receiver(out)
    os.close(out)
    dest.mkdir()
    try:
        with opened(dest) as dest_fd, pytest.raises(RefusedError, match="the name '"):
            listener.single_file(writer.Writer("sent", WIDE, dest_fd), dest_fd, name)
    finally:
        listener.close()
    assert not os.listdir(dest)


def test_path_longer_than_one_system_call_takes_is_received_with_its_hard_links(
    source: Path, dest: Path
) -> None:
    names = ["d" * 255] * 20
    fd = make_chain(source, names)
    Path(f"/proc/self/fd/{fd}/f").write_text("deep")
    os.link("f", "linked", src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    transfer(source, dest)
    fd = follow_chain(dest, names)
    assert os.stat("f", dir_fd=fd).st_ino == os.stat("linked", dir_fd=fd).st_ino
    assert os.stat("f", dir_fd=fd).st_nlink == 2
    os.close(fd)
    shutil.rmtree(source)
    shutil.rmtree(dest)


Node = bytes | tuple[str, bytes] | dict[bytes, object]
contents = st.one_of(
    st.binary(max_size=50),
    st.integers(1, 3).map(lambda count: b"p" * PAGE * count),
    st.tuples(st.just("symlink"), file_names),
    st.tuples(st.just("link"), st.binary(max_size=2)),
)
trees = st.recursive(
    contents,
    lambda inner: st.dictionaries(file_names, inner, max_size=5),
    max_leaves=12,
)


def build(top: bytes, tree: dict[bytes, object], files: list[bytes]) -> None:
    """Make *tree* below *top*; hard links go to one of *files*."""
    for number, (name, node) in enumerate(tree.items()):
        path = os.path.join(top, name)
        try:
            if isinstance(node, dict):
                os.mkdir(path)
                build(path, node, files)
            elif isinstance(node, tuple) and node[0] == "symlink":
                os.symlink(node[1], path)
            elif isinstance(node, tuple) and files:
                os.link(files[sum(node[1]) % len(files)], path)
            else:
                with open(path, "wb") as file:
                    file.write(node if isinstance(node, bytes) else b"")
                files.append(path)
        except OSError:  # a filesystem that takes UTF-8 alone, say
            continue
        os.utime(path, ns=(5, TIME + number), follow_symlinks=False)
    os.utime(top, ns=(5, TIME))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(tree=st.dictionaries(file_names, trees, max_size=6), data=st.data())
def test_any_tree_is_received_as_it_is_copied_in_whatever_order_it_was_made(
    tmp_path: Path, tree: dict[bytes, object], data: st.DataObject
) -> None:
    for path in tmp_path.iterdir():  # of an example that was given up
        shutil.rmtree(path)
    source, other = tmp_path / "made", tmp_path / "again"
    for path in (source, other):
        path.mkdir()
    build(os.fsencode(source), tree, [])
    shut(source)
    # The same once more, in another order, beside names that came and went.
    names = data.draw(st.permutations([path.name for path in source.iterdir()]))
    for number in range(9):
        (other / f"gone{number}").touch()
    shutil.copytree(source, tmp_path / "plain", symlinks=True)
    for name in names:
        os.rename(tmp_path / "plain" / name, other / name)
    for number in range(9):
        (other / f"gone{number}").unlink(missing_ok=True)
    linked = any(path.lstat().st_nlink > 1 and path.is_file() for path in source.rglob("*"))
    os.utime(other, ns=(5, TIME))
    copy(source, tmp_path / "copied")
    received = transfer(source, tmp_path / "received")
    assert shape(tmp_path / "received") == shape(tmp_path / "copied")
    assert received.digest == digest(tmp_path / "received")
    if not linked and not any(name.startswith("gone") for name in names):
        assert received.digest == digest(other)
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


# -- the digest ------------------------------------------------------------------------------------


def plant(source: Path) -> None:
    """Fill *source* with what the changes below change."""
    source.mkdir(exist_ok=True)
    (source / "d/sub").mkdir(parents=True)
    (source / "d/f").write_bytes(b"x" * 3 * PAGE)
    (source / "g").write_bytes(b"x" * 3 * PAGE)
    os.link(source / "g", source / "h")
    (source / "i").write_bytes(b"x" * 3 * PAGE)
    (source / "l").symlink_to("g")
    give_xattr(source / "g", "user.a", b"1")
    give_xattr(source / "d", "user.a", b"1")
    sparse(source / "s", 4 * MIB, (MIB, b"x"))
    settle(source)


def settle(source: Path) -> None:
    """Give all the same time, so that nothing but what a test changes is another."""
    for path in (*source.rglob("*"), source):
        os.utime(path, ns=(5, TIME), follow_symlinks=False)


def write_zeros(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(bytes(PAGE))
        os.fsync(file.fileno())


def unlink_and_copy(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    give_xattr(path, "user.a", b"1")


CHANGES: Final[dict[str, Callable[[Path], object]]] = {
    "name of a file": lambda top: (top / "i").rename(top / "j"),
    "name of a directory": lambda top: (top / "d/sub").rename(top / "d/sub2"),
    "name of a symlink": lambda top: (top / "l").rename(top / "m"),
    "place": lambda top: (top / "i").rename(top / "d/i"),
    "mode of a file": lambda top: (top / "d/f").chmod(0o600),
    "mode of a directory": lambda top: (top / "d/sub").chmod(0o700),
    "mode of the root": lambda top: top.chmod(0o700),
    "sticky bit": lambda top: (top / "d").chmod(0o1755),
    "attribute of a file": lambda top: give_xattr(top / "g", "user.a", b"2"),
    "attribute's name": lambda top: give_xattr(top / "g", "user.b", b"1"),
    "no attribute": lambda top: os.removexattr(top / "d", "user.a"),
    "data": lambda top: (top / "d/f").write_bytes(b"x" * (3 * PAGE - 1) + b"y"),
    "size": lambda top: os.truncate(top / "d/f", 3 * PAGE - 1),
    "size of a hole": lambda top: os.truncate(top / "s", 4 * MIB + 1),
    "zeros for a hole": lambda top: write_zeros(top / "s"),
    "no link": lambda top: unlink_and_copy(top / "h"),
    "text": lambda top: _replace(top / "l", lambda new: new.symlink_to("h")),
    "kind": lambda top: _replace(top / "l", lambda new: new.write_bytes(b"g")),
    "new": lambda top: (top / "z").touch(),
    "gone": lambda top: (top / "d/sub").rmdir(),
}
TIMES: Final = {
    "time of a file": "g",
    "time of a directory": "d",
    "time of a symlink": "l",
    "time of the root": ".",
}


@pytest.mark.parametrize("change", [*CHANGES, *TIMES])
def test_any_difference_gives_another_digest(source: Path, change: str) -> None:
    plant(source)
    before = digest(source)
    settle(source)
    assert digest(source) == before
    if change in CHANGES:
        CHANGES[change](source)
        settle(source)
    else:
        os.utime(source / TIMES[change], ns=(5, TIME + 1), follow_symlinks=False)
    assert digest(source) != before


def test_equal_trees_have_one_digest_whatever_their_inodes_and_links_outside(
    source: Path, tmp_path: Path
) -> None:
    plant(source)
    other = tmp_path / "other"
    other.mkdir()
    # As many names come and go first, so that readdir gives another order where it is by inode.
    for number in range(20):
        (other / str(number)).touch()
    (other / "s").touch()
    (other / "i").touch()
    for number in range(20):
        (other / str(number)).unlink()
    plant(other)
    assert digest(source) == digest(other)
    os.link(source / "i", tmp_path / "outside")
    os.link(source / "g", tmp_path / "outside2")
    assert digest(source) == digest(other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(
    names=st.lists(file_names, min_size=2, max_size=8, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_names_are_sent_in_the_order_of_their_bytes(
    tmp_path: Path, names: list[bytes], order: random.Random
) -> None:
    found = []
    for _ in range(2):
        top = tmp_path / "named"
        for left in tmp_path.iterdir():  # of an example that was given up
            shutil.rmtree(left)
        top.mkdir()
        made: dict[bytes, str] = {}
        shuffled = list(names)
        order.shuffle(shuffled)
        for name in shuffled:
            path = os.path.join(os.fsencode(top), name)
            with contextlib.suppress(OSError):
                if names.index(name) % 2:
                    os.mkdir(path)
                else:
                    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
                made[name] = "made"
                os.utime(path, ns=(5, TIME))
        os.utime(top, ns=(5, TIME))
        found.append(digest(top))
        transfer(top, tmp_path / "received")
        shutil.rmtree(top)
        shutil.rmtree(tmp_path / "received")
    assert found[0] == found[1]


# -- lies ------------------------------------------------------------------------------------------


def header(entries: int = 9, size: int = MIB, kind: SourceKind = SourceKind.DIRECTORY) -> bytes:
    return stream.pack_header(Header(kind, entries, size))


def enter(name: bytes = b"d", mode: int = 0o755) -> bytes:
    return stream.pack_enter(Entry(name, mode, TIME))


def file(name: bytes, size: int = 0, attributes: stream.Attributes = ()) -> bytes:
    return stream.pack_file(Entry(name, 0o644, TIME, attributes, size))


def data(offset: int, content: bytes) -> bytes:
    return stream.pack_data(offset, len(content)) + content


LEAVE: Final = stream.pack(Type.LEAVE)
ROOT: Final = enter(b"root")


def end(entries: int, size: int = 0) -> bytes:
    return stream.pack_end(entries, size)


def test_stream_written_by_hand_is_received(dest: Path) -> None:
    sent = (
        *(header(6, 2 * PAGE), ROOT, file(b"a", 5000), data(0, b"x" * 10), data(4999, b"y")),
        *(stream.pack_link(b"b", [b"a"]), stream.pack_symlink(b"c", TIME, b"a")),
        *(enter(b"a2"), enter(b"inner"), LEAVE, LEAVE, LEAVE, end(6, 2 * PAGE)),
    )
    received = receive(b"".join(sent), dest)
    assert (received.entries, received.size) == (6, 2 * PAGE)
    assert (dest / "b").read_bytes() == b"x" * 10 + bytes(4989) + b"y"


WRONG: Final[dict[str, tuple[str, tuple[bytes, ...]]]] = {
    "no frames": ("broke off", (header(),)),
    "no directory": ("does not begin with a directory", (header(), file(b"a"))),
    "a leave": ("does not begin with a directory", (header(), LEAVE)),
    "an end": ("does not begin with a directory", (header(), end(1))),
    "file for directory": (
        "does not begin with a file",
        (header(kind=SourceKind.FILE), ROOT, LEAVE, end(1)),
    ),
    "two files": (
        "type FILE after all of it",
        (header(kind=SourceKind.FILE), file(b"a"), file(b"b"), end(2)),
    ),
    "no entries": ("no entries", (header(0), ROOT, LEAVE, end(1))),
    "file and no entries": (
        "no entries",
        (header(0, kind=SourceKind.FILE), file(b"a"), end(1)),
    ),
    "same name": ("sent/a comes twice", (header(), ROOT, file(b"a"), file(b"a"))),
    "same name, a symlink": (
        "sent/a comes twice",
        (header(), ROOT, file(b"a"), stream.pack_symlink(b"a", 0, b"x")),
    ),
    "same name, a link": (
        "sent/a comes twice",
        (header(), ROOT, file(b"a"), stream.pack_link(b"a", [b"a"])),
    ),
    "disorder": ("sent/a comes twice", (header(), ROOT, file(b"b"), file(b"a"))),
    "same directory": ("sent/a comes twice", (header(), ROOT, enter(b"a"), LEAVE, enter(b"a"))),
    "disorder of directories": (
        "sent/a comes twice",
        (header(), ROOT, enter(b"b"), LEAVE, enter(b"a")),
    ),
    "disorder beneath": (
        "sent/z/a comes twice",
        (header(), ROOT, enter(b"z"), file(b"b"), file(b"a")),
    ),
    "file after directories": (
        "'b' comes after directories",
        (header(), ROOT, enter(b"a"), LEAVE, file(b"b")),
    ),
    "symlink after directories": (
        "'b' comes after directories",
        (header(), ROOT, enter(b"a"), LEAVE, stream.pack_symlink(b"b", 0, b"x")),
    ),
    "link after directories": (
        "'b' comes after directories",
        (header(), ROOT, enter(b"a"), file(b"f"), LEAVE, stream.pack_link(b"b", [b"a", b"f"])),
    ),
    "link to nothing": (
        "sent/b is a link to no file",
        (header(), ROOT, stream.pack_link(b"b", [b"a"])),
    ),
    "link to itself": (
        "sent/b is a link to no file",
        (header(), ROOT, stream.pack_link(b"b", [b"b"])),
    ),
    "link to what comes later": (
        "sent/b is a link to no file",
        (header(), ROOT, stream.pack_link(b"b", [b"c"]), file(b"c")),
    ),
    "link to a directory": (
        "sent/a/b is a link to no file",
        (header(), ROOT, enter(b"a"), stream.pack_link(b"b", [b"a"])),
    ),
    "link beneath a file": (
        "sent/b is a link to no file",
        (header(), ROOT, file(b"a"), stream.pack_link(b"b", [b"a", b"c"])),
    ),
    "link to a symlink": (
        "sent/b is a link to no file",
        (header(), ROOT, stream.pack_symlink(b"a", 0, b"x"), stream.pack_link(b"b", [b"a"])),
    ),
    "link through a symlink": (
        "sent/b is a link to no file",
        (
            *(header(), ROOT, stream.pack_symlink(b"a", 0, b"/etc")),
            stream.pack_link(b"b", [b"a", b"passwd"]),
        ),
    ),
    "link to what lies outside": (
        "the name '..'",
        (header(), ROOT, file(b"a"), stream.pack_link(b"b", [b"..", b"secret"])),
    ),
    "data in a directory": ("type DATA where", (header(), ROOT, data(0, b"x"))),
    "data after a symlink": (
        "type DATA where",
        (header(), ROOT, stream.pack_symlink(b"a", 0, b"x"), data(0, b"x")),
    ),
    "data after a link": (
        "type DATA where",
        (header(), ROOT, file(b"a", 9), stream.pack_link(b"b", [b"a"]), data(0, b"x")),
    ),
    "data that overlaps": (
        "sent/a that lies where",
        (header(), ROOT, file(b"a", 9), data(0, b"xxx"), data(2, b"y")),
    ),
    "data that goes back": (
        "sent/a that lies where",
        (header(), ROOT, file(b"a", 9), data(5, b"x"), data(1, b"y")),
    ),
    "data beyond the size": (
        "sent/a that lies where",
        (header(), ROOT, file(b"a", 9), data(5, b"xxxxx")),
    ),
    "data of an empty file": (
        "sent/a that lies where",
        (header(), ROOT, file(b"a"), data(0, b"x")),
    ),
    "data beyond all": (
        "sent/a that lies where",
        (header(), ROOT, file(b"a", (1 << 63) - 1), data((1 << 64) - 1, b"x")),
    ),
    "too many leaves": ("type LEAVE after all of it", (header(), ROOT, LEAVE, LEAVE, end(1))),
    "leave with a body": (
        "3 bytes with the end of a directory",
        (header(), ROOT, stream.pack(Type.LEAVE, b"xxx"), end(1)),
    ),
    "end too early": ("type END where", (header(), ROOT, end(1))),
    "end twice": ("something comes after", (header(), ROOT, LEAVE, end(1), end(1))),
    "byte after the end": ("something comes after", (header(), ROOT, LEAVE, end(1), b"x")),
    "file after the root": ("type FILE after all", (header(), ROOT, LEAVE, file(b"a"), end(2))),
    "more entries in the end": ("not the 1 entries", (header(), ROOT, LEAVE, end(2))),
    "fewer entries in the end": (
        "not the 2 entries",
        (header(), ROOT, file(b"a"), LEAVE, end(1)),
    ),
    "what was announced in the end": ("not the 1 entries", (header(), ROOT, LEAVE, end(9, MIB))),
    "other bytes in the end": (
        "and 4096 bytes that it says",
        (header(), ROOT, file(b"a", 1), data(0, b"x"), LEAVE, end(2, 1)),
    ),
    "more entries than announced": (
        "more than the 2 entries that it announced",
        (header(2), ROOT, file(b"a"), file(b"b"), LEAVE, end(3)),
    ),
    "more directories than announced": (
        "more than the 2 entries that it announced",
        (header(2), ROOT, enter(b"a"), enter(b"a")),
    ),
    "more bytes than announced": (
        "more than the 4096 bytes that it announced",
        (header(2, PAGE), ROOT, file(b"a", PAGE + 1), data(0, b"x" * (PAGE + 1)), LEAVE),
    ),
    "more pages than announced": (
        "more than the 4096 bytes that it announced",
        (header(2, PAGE), ROOT, file(b"a", MIB), data(0, b"x"), data(MIB - 1, b"x"), LEAVE),
    ),
    "symlink beyond the announced": (
        "more than the 0 bytes that it announced",
        (header(2, 0), ROOT, stream.pack_symlink(b"a", 0, b"x" * 128), LEAVE, end(2, PAGE)),
    ),
    "later name that leads elsewhere": (
        "the name '..'",
        (header(), ROOT, enter(b"a"), enter(b"..")),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_stream_that_lies_is_refused(dest: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "secret").write_text("secret")
    words, sent = WRONG[case]
    error = refused(b"".join(sent), dest, re.escape(words))
    assert isinstance(error, RefusedError)
    assert error.message.startswith("the source that was sent makes no sense: ")
    assert sorted(os.listdir(tmp_path)) == ["secret"]
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_less_than_was_announced_is_received_as_what_it_is(dest: Path) -> None:
    sent = header(1000, 1 << 30) + ROOT + file(b"a", 1) + data(0, b"x") + LEAVE + end(2, PAGE)
    received = receive(sent, dest)
    assert (received.entries, received.size) == (2, PAGE)


def test_file_that_fits_only_in_part_is_an_error_of_space(dest: Path) -> None:
    sent = header(2) + ROOT + file(b"a", PAGE) + data(0, b"x" * PAGE) + LEAVE + end(2, PAGE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE // 2, limits[1]))
    try:
        with pytest.raises(SpaceError):
            receive(sent, dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# -- limits ----------------------------------------------------------------------------------------


def test_limit_of_entries_binds_what_is_announced_to_the_last(dest: Path) -> None:
    sent = header(3) + ROOT + file(b"a") + file(b"b") + LEAVE + end(3)
    receive(sent, dest, limits=walker.Limits(3, MIB, 9))
    shutil.rmtree(dest)
    error = refused(sent, dest, "more than 2 entries", limits=walker.Limits(2, MIB, 9))
    assert isinstance(error, SpaceError)


def test_limit_of_size_binds_what_is_announced_to_the_last_byte(dest: Path) -> None:
    sent = header(1, MIB) + ROOT + LEAVE + end(1)
    receive(sent, dest, limits=walker.Limits(3, MIB, 9))
    shutil.rmtree(dest)
    error = refused(sent, dest, "holds 1M; a source may", limits=walker.Limits(3, MIB - 1, 9))
    assert isinstance(error, SpaceError)


def test_limit_of_depth_binds_to_the_last_directory(source: Path, dest: Path) -> None:
    os.close(make_chain(source, ["d"] * 5))
    sent = sent_bytes(source)
    receive(sent, dest, limits=walker.Limits(9, MIB, 5))
    shutil.rmtree(dest)
    error = refused(sent, dest, "deeper than 4 ", limits=walker.Limits(9, MIB, 4))
    assert "source_depth" in str(error.hint)


def test_attributes_of_a_whole_source_are_bounded(dest: Path) -> None:
    attributes = [(b"user.%02d" % number, bytes(65536)) for number in range(32)]
    sent = [header(20), ROOT]
    sent += [enter(b"d") + stream.pack_enter(Entry(b"e", 0o755, 0, attributes)) for _ in range(9)]
    refused(b"".join(sent), dest, "more than 16777216 bytes of attributes", limits=WIDE)


def test_attribute_that_the_layer_cannot_hold_is_an_error_of_the_tree(dest: Path) -> None:
    attributes = [(b"user.%02d" % number, bytes(65536)) for number in range(9)]
    sent = header() + ROOT + file(b"a", 0, attributes) + LEAVE + end(2)
    with contextlib.suppress(OverlaydError):  # not every filesystem minds
        receive(sent, dest)
    assert (dest / "a").exists()


# -- damage ----------------------------------------------------------------------------------------


def small(source: Path) -> bytes:
    """Return the stream of a small tree with everything in it."""
    (source / "d/e").mkdir(parents=True)
    (source / "a").write_bytes(b"x" * 10)
    os.link(source / "a", source / "d/b")
    (source / "c").symlink_to("a")
    give_xattr(source / "a", "user.k", b"v")
    sparse(source / "s", (64 << 10) + 1, (64 << 10, b"s"))
    return sent_bytes(source)


class Reused:
    """Receives many streams into one directory, from a pipe that holds each of them whole."""

    def __init__(self, dest: Path) -> None:
        self._dest = dest

    def __call__(self, sent: bytes) -> OverlaydError | receiver.Received:
        out, into = os.pipe()
        listener = make_receiver(out, seconds=5, patience=1)
        os.close(out)
        assert os.write(into, sent) == len(sent)
        os.close(into)
        try:
            return take(listener, self._dest)
        except OverlaydError as error:
            assert is_one_printable_line(error.message)  # noqa: PT017
            return error
        finally:
            shutil.rmtree(self._dest)


def test_stream_that_breaks_off_anywhere_is_refused(source: Path, dest: Path) -> None:
    whole = small(source)
    before = open_fds()
    attempt = Reused(dest)
    with time_limit(20):
        assert isinstance(attempt(whole), receiver.Received)
        for length in range(len(whole)):
            error = attempt(whole[:length])
            assert isinstance(error, RefusedError), length
            assert "it broke off" in error.message
    assert open_fds() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 1 << 16), st.sampled_from(["flip", "cut", "put"]), st.binary(max_size=9)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_stream_is_an_error_of_the_tree_or_another_source(
    tmp_path: Path, edits: list[tuple[int, str, bytes]]
) -> None:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    whole = small(source) if not list(source.iterdir()) else sent_bytes(source)
    damaged = bytearray(whole)
    for place, what, new in edits:
        at = place % len(damaged)
        if what == "flip":
            damaged[at] ^= (sum(new) % 255) + 1
        elif what == "cut":
            del damaged[at : at + len(new)]
        else:
            damaged[at:at] = new
    before = open_fds()
    with time_limit(10):
        found = Reused(tmp_path / "dest")(bytes(damaged))
    if isinstance(found, receiver.Received):
        same = found.digest == digest(source)
        assert same == (bytes(damaged) == whole)
    assert open_fds() == before
    assert sorted(os.listdir(tmp_path)) == ["source"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    frames=st.lists(
        st.sampled_from(
            [
                *(ROOT, LEAVE, end(1), end(3), file(b"a"), file(b"b", 9), file(b"c", MIB)),
                *(data(0, b"x"), data(5, b"yyyy"), data(MIB - 1, b"z"), enter(b"a"), enter(b"b")),
                *(stream.pack_link(b"d", [b"a"]), stream.pack_link(b"e", [b"a", b"a"])),
                *(stream.pack_symlink(b"a", 0, b".."), stream.pack_symlink(b"e", 0, b"x" * 200)),
                stream.pack(Type.FILE, b"\0" * 20),
            ]
        ),
        max_size=12,
    )
)
def test_any_sequence_of_frames_is_an_error_of_the_tree_or_a_source(
    tmp_path: Path, frames: list[bytes]
) -> None:
    with time_limit(10):
        Reused(tmp_path / "dest")(b"".join([header(), ROOT, *frames]))
    assert not os.listdir(tmp_path)


# -- time ------------------------------------------------------------------------------------------


def listen(fd: int, dest: Path, **options: float) -> tuple[OverlaydError, float]:
    """Receive from the open pipe *fd*; return the error, and the seconds that it took."""
    listener = make_receiver(fd, **options)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(OverlaydError) as caught:
        take(listener, dest)
    assert is_one_printable_line(caught.value.message)
    return caught.value, time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"over", header(), header() + ROOT + b"\3"])
def test_silence_ends_with_patience(pipe: tuple[int, int], dest: Path, sent: bytes) -> None:
    os.write(pipe[1], sent)
    error, took = listen(pipe[0], dest, patience=0.1)
    assert isinstance(error, BusyError)
    assert "nothing more of the source came" in error.message
    assert 0.1 <= took < 2


@contextlib.contextmanager
def written(fd: int, step: Callable[[], bytes], pause: float) -> Iterator[None]:
    """Write what *step* returns to *fd*, again and again, with a *pause* between."""
    enough = threading.Event()

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            while not enough.wait(pause):
                with contextlib.suppress(BlockingIOError):
                    os.write(fd, step())

    thread = Sending(write)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
    assert thread.error is None


def test_trickle_ends_in_time_though_never_silent(pipe: tuple[int, int], dest: Path) -> None:
    os.write(pipe[1], header(100_000) + ROOT + FRAME.pack(Type.FILE, 60_000))
    with written(pipe[1], lambda: b"x", 0.02):
        error, took = listen(pipe[0], dest, seconds=0.5, patience=0.3)
    assert isinstance(error, BusyError)
    assert "was not there whole within" in error.message
    assert 0.3 < took < 3  # it began before


def test_endless_stream_of_tiny_frames_ends_in_time(pipe: tuple[int, int], dest: Path) -> None:
    os.set_blocking(pipe[1], False)
    os.write(pipe[1], header(2, 1 << 40) + ROOT + file(b"a", 1 << 40))
    at = iter(range(1 << 40))

    def step() -> bytes:
        return b"".join(data(next(at), b"x") for _ in range(200))

    with written(pipe[1], step, 0):  # less than PIPE_BUF at a time, so never a part of a frame
        error, took = listen(pipe[0], dest, seconds=0.5, patience=5)
    assert isinstance(error, BusyError)
    assert "was not there whole within" in error.message
    assert took < 4


def test_stop_ends_waiting_soon(pipe: tuple[int, int], dest: Path) -> None:
    progress = Progress()
    os.write(pipe[1], header() + ROOT)
    listener = make_receiver(pipe[0], progress=progress)
    thread = Sending(lambda: take(listener, dest))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    progress.stop()
    began = time.monotonic()
    thread.join(5)
    assert isinstance(thread.error, InterruptedByUserError)
    assert time.monotonic() - began < 0.5


def test_stop_ends_what_never_waits(pipe: tuple[int, int], dest: Path) -> None:
    progress = Meddler(lambda: progress.stop(), when=lambda entries, _size: entries > 0)  # noqa: PLW0108
    os.write(pipe[1], header() + ROOT + file(b"a") + file(b"b") + file(b"c"))
    with pytest.raises(InterruptedByUserError):
        take(make_receiver(pipe[0], progress=progress), dest)
    assert len(os.listdir(dest)) <= 1


def test_time_is_over_though_there_is_always_more_to_read(
    pipe: tuple[int, int], dest: Path
) -> None:
    os.write(pipe[1], header() + ROOT + LEAVE + end(1))
    with pytest.raises(BusyError, match="was not there whole within"):
        take(make_receiver(pipe[0], seconds=0), dest)


def test_large_frame_that_comes_bit_by_bit_is_read_in_linear_time(pipe: tuple[int, int]) -> None:
    listener = make_receiver(pipe[0], seconds=60)
    os.write(pipe[1], header() + ROOT + FRAME.pack(Type.FILE, stream.FRAME_MAX))
    listener.header()
    began = time.process_time()
    for _ in range(20_000):
        os.write(pipe[1], b"x" * 150)
        listener._read()
    took = time.process_time() - began
    listener.close()
    assert listener._filled - listener._at > 20_000 * 150
    assert took < 1.5  # to move all that is there at each step is to move 30 GB


# -- others at the pipe ----------------------------------------------------------------------------


def test_second_reader_who_drains_the_pipe_does_not_make_us_wait(
    pipe: tuple[int, int], dest: Path
) -> None:
    os.set_blocking(pipe[0], False)
    enough = threading.Event()

    def drain() -> None:
        while not enough.is_set():
            with contextlib.suppress(BlockingIOError):
                os.read(pipe[0], 1 << 16)

    thread = Sending(drain)
    thread.start()
    try:
        with written(pipe[1], lambda: b"x" * 100, 0.001):
            error, took = listen(pipe[0], dest, seconds=0.6, patience=0.3)
    finally:
        enough.set()
        thread.join()
    assert isinstance(error, BusyError | RefusedError)
    assert took < 4


def test_pipe_of_packets_is_read_as_any_other(source: Path, dest: Path) -> None:
    whole = small(source)
    out, into = os.pipe2(os.O_DIRECT)
    for at in range(0, len(whole), 50):
        os.write(into, whole[at : at + 50])  # each takes one of 16 pages
    os.close(into)
    listener = make_receiver(out)
    os.close(out)
    take(listener, dest)
    assert shape(dest)[b"s"] == shape(source)[b"s"]


def test_error_of_reading_is_one_of_the_tree(tmp_path: Path, dest: Path) -> None:
    listener = receiver.Receiver(
        os.open(tmp_path, os.O_RDONLY),
        limits=WIDE,
        flagged=NOTHING,
        seconds=1,
        patience=1,
        progress=Progress(),
    )
    with pytest.raises(OverlaydError, match="reading the source"):
        listener.header()
    listener.close()
    listener.close()
    assert not dest.exists()


# -- the sender ------------------------------------------------------------------------------------


def test_sender_notices_that_nobody_reads(source: Path) -> None:
    (source / "f").write_bytes(b"x" * 4 * MIB)
    out, into = os.pipe()
    os.close(out)
    with pytest.raises(sender.NobodyReadsError):
        send_tree(source, into)


def test_sender_notices_that_the_reader_goes_while_the_pipe_is_full(source: Path) -> None:
    (source / "f").write_bytes(b"x" * 4 * MIB)
    out, into = os.pipe()
    thread = Sending(lambda: send_tree(source, into))
    thread.start()
    os.read(out, 10)
    time.sleep(0.1)
    assert thread.is_alive()
    os.close(out)
    thread.join(5)
    assert isinstance(thread.error, sender.NobodyReadsError)


def test_stop_ends_a_sender_whose_pipe_is_full(source: Path, pipe: tuple[int, int]) -> None:
    (source / "f").write_bytes(b"x" * 4 * MIB)
    progress = Progress()
    thread = Sending(lambda: send_tree(source, os.dup(pipe[1]), progress=progress))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    progress.stop()
    began = time.monotonic()
    thread.join(5)
    assert isinstance(thread.error, InterruptedByUserError)
    assert time.monotonic() - began < 0.5


def meddle(
    source: Path,
    dest: Path,
    action: Callable[[], object],
    when: Callable[[int, int], bool] = lambda _entries, size: size > 0,
) -> OverlaydError:
    """Send, and let *action* happen once; return the sender's error.  No layer comes of it."""
    out, into = os.pipe()
    progress = Meddler(action, when=when)
    thread = Sending(lambda: send_tree(source, into, progress=progress))
    listener = make_receiver(out)
    os.close(out)
    thread.start()
    with time_limit(20), pytest.raises(RefusedError, match="it broke off"):
        take(listener, dest)
    thread.join(5)
    assert isinstance(thread.error, OverlaydError)
    assert is_one_printable_line(thread.error.message)
    return thread.error


@pytest.fixture
def several(source: Path) -> Path:
    folder = source / "some/where"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / name).write_bytes(b"x")
    (folder / "c").symlink_to("x")
    (folder / "d/sub").mkdir(parents=True)
    return folder


def _grow(path: Path) -> None:
    with path.open("ab") as out:
        out.write(b"more")


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


MEDDLING: Final[dict[str, tuple[str, str, Callable[[Path], object]]]] = {
    "grows": ("a", "changed while it was read", _grow),
    "is rewritten": ("a", "changed while it was read", lambda path: path.write_bytes(b"y")),
    "is touched": ("a", "changed while it was read", lambda path: os.utime(path, ns=(1, 1))),
    "vanishes": ("b", "changed while it was read", Path.unlink),
    "becomes a symlink": (
        "b",
        "changed while it was read",
        lambda path: _replace(path, lambda new: new.symlink_to("/etc/passwd")),
    ),
    "becomes a FIFO": ("b", "is a FIFO", lambda path: _replace(path, os.mkfifo)),
    "becomes a directory": ("b", "", lambda path: _replace(path, Path.mkdir)),
    "symlink vanishes": ("c", "changed while it was read", Path.unlink),
    "symlink becomes a file": (
        "c",
        "changed while it was read",
        lambda path: _replace(path, Path.touch),
    ),
    "directory vanishes": ("d", "changed while it was read", shutil.rmtree),
    "directory becomes a symlink": (
        "d",
        "changed while it was read",
        lambda path: _replace(path, lambda new: new.symlink_to("/etc")),
    ),
}


@pytest.mark.parametrize("case", MEDDLING)
def test_source_that_changes_while_it_is_sent_is_refused_by_name(
    source: Path, dest: Path, several: Path, case: str
) -> None:
    name, words, action = MEDDLING[case]
    error = meddle(source, dest, lambda: action(several / name))
    assert isinstance(error, RefusedError)
    assert error.message.startswith(f"{several}/{name} ")
    assert error.message.endswith(words)


@pytest.mark.parametrize("size", [0, 100, MIB], ids=["to nothing", "a bit", "to what was sent"])
def test_file_that_is_truncated_while_it_is_sent_is_refused_naming_it(
    source: Path, dest: Path, size: int
) -> None:
    (source / "f").write_bytes(b"x" * 3 * MIB)
    error = meddle(source, dest, lambda: os.truncate(source / "f", size))
    assert error.message == f"{source}/f changed while it was read"


def test_single_file_that_changes_while_it_is_sent_is_refused(
    source: Path, pipe: tuple[int, int]
) -> None:
    (source / "tool").write_bytes(b"x")
    progress = Meddler(lambda: _grow(source / "tool"), when=lambda _entries, size: size > 0)
    with pytest.raises(RefusedError, match=re.escape(f"{source}/tool changed while")):
        send_file(source / "tool", os.dup(pipe[1]), progress=progress)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read_is_named(source: Path, pipe: tuple[int, int]) -> None:
    (source / "d").mkdir()
    (source / "d/closed").touch(mode=0)
    with pytest.raises(OverlaydError, match=re.escape(f"{source}/d/closed")) as caught:
        send_tree(source, os.dup(pipe[1]))
    assert caught.value.code == "no-permission"


def test_more_attributes_than_can_be_said_are_refused_by_name(
    source: Path, pipe: tuple[int, int]
) -> None:
    (source / "d").mkdir()
    for number in range(33):
        give_xattr(source / "d", f"user.{number}", b"")
    with pytest.raises(RefusedError, match=f"{source}/d has more than 32 extended attributes"):
        send_tree(source, os.dup(pipe[1]))


def test_time_that_cannot_be_said_is_refused_by_name(pipe: tuple[int, int]) -> None:
    shm = Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        pytest.skip("no tmpfs on /dev/shm, which takes any time")
    source = shm / f"overlayd-unit-{os.getpid()}"
    (source / "d").mkdir(parents=True)
    try:
        (source / "d/f").touch()
        os.utime(source / "d/f", ns=(0, 1 << 64))
        if (source / "d/f").stat().st_mtime_ns != 1 << 64:
            pytest.skip("it takes no such time")
        with pytest.raises(RefusedError, match=f"{source}/d/f has a time of change"):
            send_tree(source, os.dup(pipe[1]))
    finally:
        shutil.rmtree(source)


@pytest.mark.parametrize("depth", [4, 5])
def test_sender_goes_as_deep_as_it_may(source: Path, depth: int) -> None:
    os.close(make_chain(source, ["d"] * 5))
    out, into = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, out)
        if depth < 5:
            stack.enter_context(pytest.raises(RefusedError, match="deeper than 4 "))
        assert len(send_tree(source, into, depth=depth)) == 64


# -- memory ----------------------------------------------------------------------------------------


def peak(action: Callable[[], object]) -> int:
    """Return by how many bytes *action* grows the peak of a child's memory."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before = _peak()
            action()
            os.write(into, struct.pack("q", _peak() - before))
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    found = os.read(out, 8)
    os.close(out)
    os.waitpid(pid, 0)
    assert len(found) == 8
    size: int = struct.unpack("q", found)[0]
    return size


def _peak() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"VmHWM:\s+([0-9]+) kB", text)
    assert match is not None
    return int(match[1]) << 10


def test_memory_of_the_receiver_does_not_grow_with_the_source(source: Path, dest: Path) -> None:
    (source / "large").write_bytes(os.urandom(MIB) * 64)
    sparse(source / "sparse", 1 << 30, (512 * MIB, b"x"))

    def grown(top: Path, to: Path) -> int:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(out)
                send_tree(top, into)
            finally:
                os._exit(0)
        os.close(into)
        found = peak(lambda: take(make_receiver(out), to))
        os.close(out)
        os.waitpid(pid, 0)
        return found

    assert grown(source, dest) < 12 * MIB
    facts = (dest / "sparse").stat()
    assert facts.st_size == 1 << 30
    assert facts.st_blocks * 512 <= MIB
    assert (dest / "large").stat().st_size == 64 * MIB


def test_largest_frames_take_bounded_memory(dest: Path) -> None:
    attributes = [(b"user.%02d" % number, bytes(65536)) for number in range(32)]
    body = b"".join(stream.pack_enter(Entry(b"d", 0o755, 0, attributes)) for _ in range(9))

    def take_it() -> None:
        with pytest.raises(OverlaydError):
            receive(header() + ROOT + body, dest)

    assert peak(take_it) < 64 * MIB
