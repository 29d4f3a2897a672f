# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache: built once, whole or not at all, bounded, and never taken from under a user."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import cache as cache_module
from harness import trees
from harness.cache import Cache, default_root, key
from harness.errors import BuildError, HostError
from harness.figures import age_text, parse_size, seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
K1, K2, K3 = key("1"), key("2"), key("3")
MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def writes(size: int, name: str = "content") -> Callable[[Path], None]:
    def build(path: Path) -> None:
        (path / name).write_bytes(b"x" * size)

    return build


def fails(_path: Path) -> None:
    raise AssertionError("built again")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def spawn(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start Python on *code*, which finds the cache module's names and sys."""
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom harness.cache import Cache, key\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def leftovers(cache: Cache) -> list[str]:
    return sorted(os.listdir(cache.root / "stage"))


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """Be in a mount namespace of one's own; threads of this process stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    # CLONE_NEWNS needs a file system context of its own, which every call of unshare gives.
    if libc.unshare(0x00020000) != 0:
        pytest.skip(f"no mount namespace here: {os.strerror(ctypes.get_errno())}")
    try:
        assert libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0  # MS_PRIVATE | MS_REC
        yield
    finally:
        here = os.getcwd()
        assert libc.setns(before, 0) == 0
        os.chdir(here)
        os.close(before)


def mount_tmpfs(where: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "test", where], check=True)


# -- keys --------------------------------------------------------------------------------------


def test_key_tells_parts_and_types_apart() -> None:
    keys = {key("ab"), key("a", "b"), key(b"ab"), key("ab", ""), key(), key("")}
    assert len(keys) == 6
    assert all(len(each) == 64 for each in keys)
    assert key("ab", b"\0") == key("ab", b"\0")


def test_key_of_a_tree_changes_with_names_content_modes_and_links(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("one")
    (tree / "link").symlink_to("sub/file")
    os.mkfifo(tree / "fifo")  # is never opened: that would wait for ever
    seen = [key(tree)]

    def differs() -> None:
        seen.append(key(tree))
        assert len(set(seen)) == len(seen)

    (tree / "sub" / "file").write_text("two")
    differs()
    (tree / "sub" / "file").chmod(0o755)
    differs()
    (tree / "sub").chmod(0o700)
    differs()
    (tree / "sub" / "file").rename(tree / "sub" / "other")
    differs()
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    differs()
    (tree / "empty").mkdir()
    differs()


def test_key_of_a_tree_ignores_its_place_times_and_compiled_python(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("same")
        os.utime(tmp_path / name / "file", (len(name), len(name)))
    (tmp_path / "there" / "__pycache__").mkdir()
    (tmp_path / "there" / "__pycache__" / "file.pyc").write_bytes(b"compiled")
    assert key(tmp_path / "here") == key(tmp_path / "there")
    assert key(tmp_path / "here" / "file") == key(tmp_path / "there" / "file")


def test_key_of_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        key(tmp_path / "missing")


def test_kind_and_key_cannot_leave_the_cache(cache: Cache) -> None:
    for kind, name in (("../x", K1), ("image", "../../etc"), ("image", "abc"), ("", K1)):
        with pytest.raises(ValueError, match="not a kind and key"):
            cache.has(kind, name)


# -- entries -----------------------------------------------------------------------------------


def test_entry_is_built_once_and_then_found(cache: Cache) -> None:
    assert not cache.has("image", K1)
    assert not cache.root.exists()  # looking makes nothing
    lines: list[str] = []
    with cache.entry("image", K1, writes(10), lines.append, label="trixie") as path:
        assert path.joinpath("content").read_bytes() == b"x" * 10
    with cache.entry("image", K1, fails, lines.append) as again:
        assert again == path
    assert cache.has("image", K1)
    assert lines[0] == "image (trixie): building"
    assert lines[1].startswith("image (trixie): built in ")
    assert len(lines) == 2
    assert leftovers(cache) == []


def test_entry_directory_can_be_entered_by_other_users(cache: Cache) -> None:
    with cache.entry("image", K1, writes(1)) as path:
        assert path.stat().st_mode & 0o777 == 0o755
        assert path.parent.stat().st_mode & 0o777 == 0o755


def test_entries_nest(cache: Cache) -> None:
    def top(path: Path) -> None:
        with cache.entry("base", K1, writes(3)) as base:
            (path / "top").write_bytes((base / "content").read_bytes() + b"!")

    with cache.entry("image", K2, top) as path:
        assert (path / "top").read_bytes() == b"xxx!"
    assert {entry.kind for entry in cache.list()} == {"base", "image"}


def test_builder_that_raises_leaves_nothing_and_the_next_one_builds(cache: Cache) -> None:
    def breaks(path: Path) -> None:
        (path / "half").write_bytes(b"half")
        raise BuildError("the compiler is gone")

    with pytest.raises(BuildError, match="the compiler is gone"), cache.entry("image", K1, breaks):
        pass
    assert not cache.has("image", K1)
    assert leftovers(cache) == []
    with cache.entry("image", K1, writes(1)) as path:
        assert os.listdir(path) == ["content"]


def test_interrupted_builder_leaves_nothing(cache: Cache) -> None:
    def interrupted(path: Path) -> None:
        (path / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.entry("image", K1, interrupted):
        pass
    assert leftovers(cache) == []


def test_error_in_the_block_keeps_the_entry(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError), cache.entry("image", K1, writes(1)):
        raise ZeroDivisionError
    assert cache.has("image", K1)


WRITER = """
    root, log, ready, go = map(Path, sys.argv[1:])
    def build(path):
        with log.open("a") as lines:
            lines.write("built\\n")
        time.sleep(0.5)
        (path / "content").write_text("whole")
    ready.touch()
    while not go.exists():
        time.sleep(0.005)
    with Cache(root).entry("image", key("1"), build, print) as path:
        assert (path / "content").read_text() == "whole"
        print("got it")
"""


def test_two_writers_at_once_build_once(cache: Cache, tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    writers = []
    for number in range(4):
        ready = tmp_path / f"ready{number}"
        writers.append(spawn(WRITER, cache.root, log, ready, go))
        wait_for(ready)
    go.touch()
    output = [writer.communicate(timeout=30) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, output
    assert log.read_text() == "built\n"
    assert sum("waiting for another run" in out for out, _ in output) == 3
    assert all("got it" in out for out, _ in output)


def test_two_threads_at_once_build_once(cache: Cache) -> None:
    built: list[int] = []
    barrier = threading.Barrier(4)

    def build(path: Path) -> None:
        built.append(1)
        time.sleep(0.2)
        writes(1)(path)

    def use() -> None:
        barrier.wait()
        with cache.entry("image", K1, build):
            pass

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert built == [1]


def test_waiter_builds_itself_when_the_builder_fails(cache: Cache, tmp_path: Path) -> None:
    started = tmp_path / "started"
    first = spawn(
        """
        def build(path):
            Path(sys.argv[2]).touch()
            time.sleep(0.5)
            raise SystemExit(3)
        with Cache(Path(sys.argv[1])).entry("image", key("1"), build):
            pass
        """,
        cache.root,
        started,
    )
    wait_for(started)
    with cache.entry("image", K1, writes(1)) as path:
        assert (path / "content").exists()
    first.communicate(timeout=20)
    assert first.returncode == 3


def test_killed_builder_blocks_nobody_and_is_not_taken_for_finished(
    cache: Cache, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    builder = spawn(
        """
        def build(path):
            (path / "content").write_text("half")
            (path / "locked").mkdir(mode=0o500)
            Path(sys.argv[2]).touch()
            time.sleep(60)
        with Cache(Path(sys.argv[1])).entry("image", key("1"), build):
            pass
        """,
        cache.root,
        started,
    )
    wait_for(started)
    assert cache.prune(0) == ()  # while it lives its stage stays
    assert len(leftovers(cache)) == 1
    builder.kill()
    builder.communicate(timeout=20)
    assert not cache.has("image", K1)
    assert cache.list() == ()
    assert len(leftovers(cache)) == 1
    with cache.entry("image", K1, writes(5)) as path:
        assert os.listdir(path) == ["content"]
        assert leftovers(cache) == []


def test_prune_removes_what_a_killed_builder_left(cache: Cache) -> None:
    with cache.entry("image", K1, writes(1)):
        pass
    left = cache.root / "stage" / f"image.{K2}.abcdefgh"
    (left / "data").mkdir(parents=True)
    (cache.root / "stage" / "trash.xyz").mkdir()
    foreign = cache.root / "stage" / "somebody's"
    foreign.mkdir()
    cache.prune()
    assert leftovers(cache) == ["somebody's"]


# -- limit -------------------------------------------------------------------------------------


def use(cache: Cache, name: str, size: int, when: float) -> None:
    with cache.entry("image", name, writes(size)) as path:
        pass
    os.utime(path.parent / "label", (when, when))


def test_limit_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=5 * MIB)
    use(cache, K1, 2 * MIB, 1000)
    use(cache, K2, 2 * MIB, 2000)
    with cache.entry("image", K1, fails):  # used anew: now K2 is the oldest
        pass
    lines: list[str] = []
    with cache.entry("image", K3, writes(2 * MIB), lines.append, label="new"):
        pass
    assert {entry.key for entry in cache.list()} == {K1, K3}
    assert any("dropped image" in line for line in lines)
    assert sum(entry.size for entry in cache.list()) <= 5 * MIB
    assert leftovers(cache) == []
    assert not list((cache.root / "locks").glob(f"*{K2}*"))


def test_entry_larger_than_the_limit_serves_its_builder_and_goes_with_the_next(
    tmp_path: Path,
) -> None:
    cache = Cache(tmp_path / "cache", limit=MIB)
    lines: list[str] = []
    with cache.entry("image", K1, writes(3 * MIB), lines.append) as path:
        assert (path / "content").exists()
    assert "the rest is in use" in lines[-1]
    with cache.entry("image", K2, writes(10)):
        assert not cache.has("image", K1)


def test_entry_in_use_by_another_process_is_not_pruned(cache: Cache, tmp_path: Path) -> None:
    with cache.entry("image", K1, writes(MIB)):
        pass
    using, done = tmp_path / "using", tmp_path / "done"
    user = spawn(
        """
        with Cache(Path(sys.argv[1])).entry("image", key("1"), None) as path:
            Path(sys.argv[2]).touch()
            while not Path(sys.argv[3]).exists():
                time.sleep(0.01)
            assert (path / "content").stat().st_size == 1 << 20
        """,
        cache.root,
        using,
        done,
    )
    wait_for(using)
    use(cache, K2, MIB, 1)
    assert [entry.key for entry in cache.prune(0)] == [K2]
    assert cache.has("image", K1)
    done.touch()
    _, errors = user.communicate(timeout=20)
    assert user.returncode == 0, errors
    assert [entry.key for entry in cache.prune(0)] == [K1]
    assert cache.list() == ()


def test_cache_that_is_half_made_can_be_pruned(cache: Cache) -> None:
    (cache.root / "entries").mkdir(parents=True)
    assert cache.prune(0) == ()


def test_users_and_pruners_do_not_race(cache: Cache, tmp_path: Path) -> None:
    """An entry a block got is whole until the block ends, whatever is pruned meanwhile."""
    stop = tmp_path / "stop"
    program = """
        cache, rounds = Cache(Path(sys.argv[1])), 0
        def build(path):
            (path / "content").write_text("whole")
        while not Path(sys.argv[2]).exists():
            with cache.entry("image", key("1"), build) as path:
                assert (path / "content").read_text() == "whole"
            rounds += 1
        print(rounds)
    """
    users = [spawn(program, cache.root, stop) for _ in range(3)]
    end = time.monotonic() + 20
    pruned = 0
    try:
        while pruned < 10 and time.monotonic() < end:
            pruned += len(cache.prune(0))
    finally:
        stop.touch()
    for user in users:
        out, errors = user.communicate(timeout=20)
        assert user.returncode == 0, errors
        assert int(out) > 0
    assert pruned == 10


def test_size_counts_blocks_and_hard_links_once(cache: Cache) -> None:
    def build(path: Path) -> None:
        with (path / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        writes(MIB, "first")(path)
        os.link(path / "first", path / "second")

    with cache.entry("disk", K1, build, label="sparse"):
        pass
    (entry,) = cache.list()
    assert MIB <= entry.size < 2 * MIB
    assert entry.label == "sparse"


def test_what_entries_share_counts_once_and_for_the_one_used_last(cache: Cache) -> None:
    with cache.entry("disk", K1, writes(MIB)) as first:
        pass
    with cache.entry("disk", K2, lambda path: os.link(first / "content", path / "content")) as path:
        for place, used in (first, 1), (path, 2):
            os.utime(place.parent / "label", (used, used))
    sizes = {entry.key: entry.size for entry in cache.list()}
    assert sizes[K1] < MIB <= sizes[K2] < 2 * MIB
    os.utime(first.parent / "label", (3, 3))
    sizes = {entry.key: entry.size for entry in cache.list()}
    assert sizes[K2] < MIB <= sizes[K1] < 2 * MIB
    assert cache.prune(MIB + (16 << 10))[0].key == K2


# -- what else may lie there -------------------------------------------------------------------


def test_foreign_and_corrupt_files_are_neither_listed_nor_removed(cache: Cache) -> None:
    use(cache, K1, 10, 1)
    entries = cache.root / "entries"
    (entries / "README").write_text("mine")
    (entries / "image" / "notes").mkdir()
    (entries / "Image").mkdir()
    (entries / "image" / K2).mkdir()  # without data: no entry
    (cache.root / "locks" / "whatever").write_text("")
    assert [entry.key for entry in cache.list()] == [K1]
    assert [entry.key for entry in cache.prune(0)] == [K1]
    assert sorted(os.listdir(entries / "image")) == [K2, "notes"]
    assert (entries / "README").exists()


def test_what_lies_in_place_of_an_entry_gives_way(cache: Cache) -> None:
    use(cache, K1, 10, 1)
    (cache.root / "entries" / "image" / K2).write_text("a file, not an entry")
    (cache.root / "entries" / "image" / K3 / "stuff").mkdir(parents=True)
    for name in (K2, K3):
        with cache.entry("image", name, writes(1)) as path:
            assert os.listdir(path) == ["content"]
    assert leftovers(cache) == []


def test_entry_without_label_is_built_again_not_believed(cache: Cache) -> None:
    use(cache, K1, 10, 1)
    (cache.root / "entries" / "image" / K1 / "label").unlink()
    with cache.entry("image", K1, fails) as path:  # the label is for people and for the order
        assert (path / "content").exists()


def test_removed_cache_directory_is_made_again(cache: Cache) -> None:
    use(cache, K1, 10, 1)
    trees.remove_tree(cache.root)
    use(cache, K1, 10, 1)
    assert cache.has("image", K1)


@needs_root
def test_leftover_with_immutable_files_goes(cache: Cache) -> None:
    use(cache, K1, 10, 1)
    left = cache.root / "stage" / f"image.{K2}.abcdefgh" / "data"
    left.mkdir(parents=True)
    fd = os.open(left, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, trees.FS_IOC_SETFLAGS, struct.pack("l", trees.FS_IMMUTABLE_FL))
    except OSError as error:
        pytest.skip(f"no immutable flag here: {error}")
    finally:
        os.close(fd)
    cache.prune()
    assert leftovers(cache) == []


@needs_root
def test_nothing_is_deleted_through_a_mount_that_a_killed_build_left(
    cache: Cache, tmp_path: Path
) -> None:
    use(cache, K1, 10, 1)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    left = cache.root / "stage" / f"image.{K2}.abcdefgh" / "data" / "mnt point"
    left.mkdir(parents=True)
    with own_mounts():
        subprocess.run(["mount", "--bind", precious, left], check=True)
        cache.prune(0)
        assert (precious / "file").read_text() == "mine"
        with pytest.raises(HostError, match="is a mount point"):
            trees.remove_tree(left.parent)
        subprocess.run(["umount", left], check=True)
    cache.prune(0)
    assert leftovers(cache) == []


@needs_root
def test_full_disk_is_said_plainly_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "small"
    root.mkdir()
    with own_mounts():
        mount_tmpfs(root, "size=1m")
        cache = Cache(root)
        with (
            pytest.raises(HostError, match=r"cannot build image .*no room left") as caught,
            cache.entry("image", K1, writes(2 * MIB), label="big"),
        ):
            pass
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.hint
        assert not cache.has("image", K1)
        assert leftovers(cache) == []
        with cache.entry("image", K1, writes(1000)) as path:
            assert (path / "content").exists()
        subprocess.run(["umount", root], check=True)


@needs_root
def test_tool_that_fails_for_lack_of_room_is_reported_as_that(tmp_path: Path) -> None:
    def tool(path: Path) -> None:
        with contextlib.suppress(OSError):
            writes(MIB * 2)(path)
        raise BuildError("mktool: exit code 1")

    root = tmp_path / "small"
    root.mkdir()
    with own_mounts():
        mount_tmpfs(root, "size=1m")
        with pytest.raises(HostError, match="no room left"), Cache(root).entry("image", K1, tool):
            pass
        subprocess.run(["umount", root], check=True)


@needs_root
def test_read_only_cache_serves_what_it_has(tmp_path: Path) -> None:
    root = tmp_path / "readonly"
    root.mkdir()
    with own_mounts():
        mount_tmpfs(root, "size=1m")
        cache = Cache(root)
        use(cache, K1, 10, 1)
        for locks in (True, False):
            if not locks:
                for lock in (root / "locks").iterdir():
                    lock.unlink()
            subprocess.run(["mount", "-o", "remount,ro", root], check=True)
            with cache.entry("image", K1, fails) as path:
                assert (path / "content").exists()
            assert cache.prune(0) == ()
            with (
                pytest.raises(HostError, match=r"cannot build image.*cannot be written to"),
                cache.entry("image", K2, writes(1)),
            ):
                pass
            subprocess.run(["mount", "-o", "remount,rw", root], check=True)
        subprocess.run(["umount", root], check=True)


@needs_root
def test_other_users_may_use_but_not_change_the_cache(cache: Cache, tmp_path: Path) -> None:
    use(cache, K1, 10, 1)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)  # pytest's own directories
    program = """
        os.setgid(65534); os.setuid(65534)
        cache = Cache(Path(sys.argv[1]))
        with cache.entry("image", key("1"), None) as path:
            assert (path / "content").exists()
        assert cache.prune(0) == ()
        try:
            with cache.entry("image", key("2"), None):
                pass
        except Exception as error:
            print(type(error).__name__, error)
    """
    user = spawn(program, cache.root)
    out, errors = user.communicate(timeout=20)
    assert user.returncode == 0, errors
    assert out.startswith("HostError cannot build image: the cache ")
    assert cache.has("image", K1)


def test_default_root_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("THEIR_THING_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root("their-thing") == tmp_path / "named"
    monkeypatch.delenv("THEIR_THING_CACHE")
    assert default_root("their-thing") == tmp_path / "xdg" / "their-thing-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root("their-thing") == tmp_path / ".cache" / "their-thing-harness"


# -- the command -------------------------------------------------------------------------------


def test_command_lists_and_prunes(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(cache.root)]
    assert cache_module.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out == f"0 entries, 0 of 4 G in {cache.root}\n"
    with cache.entry("image", K1, writes(2 * MIB), label="trixie, 6.12"):
        pass
    assert cache_module.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["KIND", "KEY", "SIZE", "USED", "AGO", "WHAT"]
    assert lines[1].startswith(f"image  {K1[:12]}  ")
    assert lines[1].endswith("trixie, 6.12")
    assert cache_module.main([*arguments, "--prune", "--limit", "1G"]) == 0
    assert capsys.readouterr().out.startswith("dropped 0 entries")
    assert cache_module.main([*arguments, "--prune", "--limit", "0"]) == 0
    assert capsys.readouterr().out.startswith("dropped 1 entries, 2.0")
    assert not cache.has("image", K1)


def test_command_refuses_what_is_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cache_module.main(["--prune", "--limit", "much"])
    assert caught.value.code == 2
    assert "not a size: 'much'" in capsys.readouterr().err


def test_command_runs_as_a_module(cache: Cache) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.cache", "--root", cache.root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "0 entries" in done.stdout
    assert done.stderr == ""


def test_figures_read_as_people_write_them() -> None:
    assert [size_text(n) for n in (0, 999, 1024, 1536, 3 << 30)] == [
        *("0", "999", "1 K", "1.5 K", "3 G"),
    ]
    assert [parse_size(t) for t in ("0", "4G", "1.5 k", "500MiB", "7B")] == [
        *(0, 4 << 30, 1536, 500 << 20, 7),
    ]
    with pytest.raises(ValueError, match="not a size"):
        parse_size("-1")
    assert [age_text(s) for s in (-3, 59, 60, 7200, 200000)] == [
        *("0 s", "59 s", "1 min", "2 h", "2 d"),
    ]
    assert [seconds_text(s) for s in (0.314, 42, 59.97, 185)] == [
        *("0.31 s", "42.0 s", "1 min 00 s", "3 min 05 s"),
    ]


def test_stage_of_a_terminated_builder_is_swept(cache: Cache, tmp_path: Path) -> None:
    started = tmp_path / "started"
    builder = spawn(
        """
        def build(path):
            Path(sys.argv[2]).touch()
            time.sleep(60)
        with Cache(Path(sys.argv[1])).entry("image", key("1"), build):
            pass
        """,
        cache.root,
        started,
    )
    wait_for(started)
    builder.send_signal(signal.SIGTERM)
    builder.communicate(timeout=20)
    cache.prune()
    assert leftovers(cache) == []


def test_error_of_the_builder_about_other_files_goes_through(cache: Cache) -> None:
    def breaks(_path: Path) -> None:
        raise OSError(errno.ENOENT, "No such file", "/missing")

    with pytest.raises(FileNotFoundError), cache.entry("image", K1, breaks):
        pass
