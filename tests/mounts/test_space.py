# SPDX-License-Identifier: LGPL-2.1-or-later
"""Full storage, full bookkeeping, sources too large: clear errors, nothing lost, nothing left."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from overlayd.errors import OverlaydError, RefusedError, SpaceError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.mounts.conftest import RUN, defaults, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
FILLING = RUN / "filling"


def fill(file: Path) -> int:
    """Write to *file* until there is no space; return how much went in."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    written = 0
    try:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    written += os.write(fd, bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017  # after many that succeeded
    finally:
        os.close(fd)
    return written


def fill_inodes(folder: Path) -> int:
    """Make files in *folder* until there can be no more; return how many there are."""
    number = 0
    try:
        while True:
            (folder / f"file{number}").touch()
            number += 1
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017  # after many that succeeded
    return number


def test_overlay_that_is_full_can_be_seen_reset_and_removed_and_others_do_not_notice(
    world: World,
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    other = world.base("other", FILES)
    source = world.source("s", NEW)
    world.apply("full", source, base, size=1 << 20)
    world.apply("other", source, other, size=1 << 20)
    written = fill(base / "big")
    assert 0 < written <= 1 << 20
    storage = world.manager().status("full").storage
    assert storage is not None
    assert storage.size_bytes == storage.used_bytes == 1 << 20
    (other / "edit").write_bytes(bytes(500_000))
    assert [o.state for o in world.manager().list()] == ["active", "active"]
    world.check_invariants()
    world.manager().reset("full", 1)
    assert (base / "a").read_text() == "new a"
    assert not (base / "big").exists()
    (base / "fits").write_bytes(bytes(500_000))
    fill(base / "big")
    world.manager().remove("full")
    assert snapshot(base) == before
    assert (other / "edit").stat().st_size == 500_000
    world.manager().remove("other")
    assert world.leftovers() == []


def test_overlay_without_inodes_can_be_seen_reset_and_removed(world: World) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    manager = world.manager(settings=replace(defaults(), upper_inodes=50))
    world.apply("full", world.source("s", NEW), base, manager=manager)
    assert 30 < fill_inodes(base) < 50
    storage = world.manager().status("full").storage
    assert storage is not None
    assert storage.inodes == storage.used_inodes == 50
    assert [o.state for o in world.manager().list()] == ["active"]
    world.manager().reset("full", 0)
    assert snapshot(base) == before
    fill_inodes(base)
    world.manager().remove("full")
    assert snapshot(base) == before
    assert world.leftovers() == []


@pytest.mark.parametrize("size", [4 << 10, 64 << 10, 1 << 20])
def test_size_bounds_what_can_be_written(world: World, size: int) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base, size=size)
    assert overlay.storage is not None
    assert overlay.storage.size_bytes == size
    assert size * 3 // 4 <= fill(base / "big") <= size
    reset = world.manager().reset("fix", 0)
    assert reset.storage is not None
    assert reset.storage.size_bytes == size
    assert size * 3 // 4 <= fill(base / "big") <= size


def test_default_size_comes_from_the_configuration(world: World) -> None:
    base = world.base("app", FILES)
    manager = world.manager(settings=replace(defaults(), upper_size=3 << 20))
    overlay = world.apply("fix", world.source("s", NEW), base, manager=manager)
    assert overlay.storage is not None
    assert overlay.storage.size_bytes == 3 << 20


def test_source_beyond_its_limit_is_refused_before_anything_is_copied_with_both_figures(
    world: World,
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    (source / "big").write_bytes(bytes(3 << 20))
    steps: list[str] = []
    manager = world.manager(
        settings=replace(defaults(), source_size=2 << 20),
        trace=lambda when, step: steps.append(f"{when} {step.describe()}"),
    )
    with pytest.raises(SpaceError) as caught:
        world.apply("fix", source, base, manager=manager)
    assert "holds 3M" in caught.value.message
    assert "may have 2M" in caught.value.message
    assert "limits.source_size" in (caught.value.hint or "")
    assert steps == []
    assert world.leftovers() == []


def test_source_beyond_free_memory_is_refused_before_anything_is_copied_with_both_figures(
    world: World,
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    (source / "big").write_bytes(bytes(3 << 20))
    config = world.source("config", {"big.toml": '[limits]\nmemory_reserve = "100000G"\n'})
    done = world.run("apply", "fix", source, base, "--config", config / "big.toml", code=8)
    assert re.search(r"needs 3M of memory, and 0 bytes is free for it", done.stderr)
    assert "limits.memory_reserve" in done.stderr
    assert world.leftovers() == []


def test_figures_of_a_sparse_source_are_those_of_its_data(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"x" * 4096)
    manager = world.manager(settings=replace(defaults(), source_size=1 << 20))
    overlay = world.apply("fix", source, base, manager=manager)
    assert overlay.record.layers[0].size == 4096
    facts = (base / "sparse").stat()
    assert facts.st_size == 1 << 40
    assert facts.st_blocks * 512 <= 8192


def test_layer_takes_no_more_room_than_was_measured(world: World) -> None:
    sizes = [1, 4095, 4097, 20_000, 65_536, 100_001, (2 << 20) - 1, (2 << 20) + 1]
    source = world.source("s", {f"file{size}": "x" * size for size in sizes})
    overlay = world.apply("fix", source, world.base("app", FILES))
    (layer,) = overlay.record.layers
    facts = os.statvfs(RUN / "storage" / overlay.record.uuid / "layer")
    used = (facts.f_blocks - facts.f_bfree) * facts.f_bsize
    assert layer.size == sum(-(-size // 4096) * 4096 for size in sizes)
    assert used == layer.size


def test_too_many_entries_are_refused_before_anything_is_copied(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {f"file{number}": "" for number in range(12)})
    with pytest.raises(SpaceError, match="more than 12 entries") as caught:
        world.apply(
            "fix",
            source,
            base,
            manager=world.manager(settings=replace(defaults(), source_entries=12)),
        )
    assert "limits.source_entries" in (caught.value.hint or "")
    assert world.leftovers() == []
    world.apply(
        "fix", source, base, manager=world.manager(settings=replace(defaults(), source_entries=13))
    )


def test_as_many_overlays_as_there_may_be_and_removing_one_makes_room(world: World) -> None:
    manager = world.manager(settings=replace(defaults(), overlays=2))
    source = world.source("s", NEW)
    for name in ("one", "two", "three"):
        world.base(name, FILES)
    world.apply("one", source, "/usr/src/one", manager=manager)
    world.apply("two", source, "/usr/src/two", manager=manager)
    with pytest.raises(SpaceError, match="there are 2 overlays") as caught:
        world.apply("three", source, "/usr/src/three", manager=manager)
    assert "limits.overlays" in (caught.value.hint or "")
    manager.remove("one")
    world.apply("three", source, "/usr/src/three", manager=manager)
    world.check_invariants()


class Meddler(Progress):
    """Changes the source in the moment between measuring and copying, or in the midst of it."""

    def __init__(self, change: Callable[[], object], *, after: int = 0) -> None:
        super().__init__()
        self._change: Callable[[], object] | None = change
        self._after = after

    def expect(self, entries: int, size: int) -> None:
        super().expect(entries, size)
        if not self._after:
            self._meddle()

    def advance(self, entries: int, size: int) -> None:
        super().advance(entries, size)
        if self.entries >= self._after:
            self._meddle()

    def _meddle(self) -> None:
        if self._change is not None:
            change, self._change = self._change, None
            change()


def grow_a_file(source: Path) -> None:
    with (source / "z").open("ab") as file:
        file.write(bytes(1 << 20))


def grow_every_file_beyond_the_limit(source: Path) -> None:
    for path in source.iterdir():
        path.write_bytes(bytes(300 << 10))


def add_many_files(source: Path) -> None:
    for number in range(200):
        (source / f"more{number}").touch()


def add_a_deep_tree(source: Path) -> None:
    (source / "/".join(["d"] * 105)).mkdir(parents=True)


def replace_a_file_by_a_fifo(source: Path) -> None:
    (source / "z").unlink()
    os.mkfifo(source / "z")


def replace_a_file_by_a_link(source: Path) -> None:
    (source / "z").unlink()
    (source / "z").symlink_to("/etc/shadow")


@pytest.mark.parametrize(
    "change",
    [
        grow_a_file,
        grow_every_file_beyond_the_limit,
        add_many_files,
        add_a_deep_tree,
        replace_a_file_by_a_fifo,
        replace_a_file_by_a_link,
    ],
    ids=lambda change: change.__name__.replace("_", " "),
)
def test_source_that_grows_or_changes_meanwhile_is_a_clear_error_and_leaves_nothing(
    world: World, change: Callable[[Path], None]
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    source = world.source("s", dict.fromkeys("abcz", "x"))
    settings = replace(defaults(), source_size=1 << 20, source_entries=100)
    request = Request("fix", str(source), str(base))
    try:
        world.manager(settings=settings).apply(request, Meddler(lambda: change(source)))
    except (RefusedError, SpaceError) as error:
        assert str(source) in error.message  # noqa: PT017  # a whole copy of the change is fine too
    else:
        # The scan had not come to it, or it lay within all limits: then it must be whole.
        assert change is replace_a_file_by_a_link
        assert (base / "z").is_symlink()
        world.manager().remove("fix")
    assert snapshot(base) == before
    assert world.leftovers() == []
    world.apply("fix", world.source("t", NEW), base)


def test_file_that_grows_while_it_is_read_is_named(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    big = source / "big"
    big.write_bytes(bytes(40 << 20))

    def grow() -> None:
        with big.open("ab") as file:
            file.write(b"more")

    class InTheMidst(Progress):
        def advance(self, entries: int, size: int) -> None:
            super().advance(entries, size)
            if size and self.size < 40 << 20:
                grow()

    with pytest.raises(RefusedError, match=f"{big} changed while it was read"):
        world.manager().apply(Request("fix", str(source), str(base)), InTheMidst())
    assert world.leftovers() == []


@contextlib.contextmanager
def full_bookkeeping(*, spare: int = 0) -> Iterator[None]:
    """Fill the records' own tmpfs, but for *spare* bytes."""
    fill(FILLING)
    if spare:
        os.truncate(FILLING, FILLING.stat().st_size - spare)
    try:
        yield
    finally:
        FILLING.unlink()


def open_descriptors() -> list[str]:
    return sorted(
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    )


def records() -> list[str]:
    return sorted(os.listdir(RUN / "records"))


def test_apply_with_full_bookkeeping_is_a_space_error_and_leaves_nothing(world: World) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    source = world.source("s", NEW)
    world.apply("first", source, base)
    world.manager().remove("first")
    manager = world.manager()
    with full_bookkeeping():
        held = open_descriptors()
        with pytest.raises(SpaceError, match=r"No space|no space"):
            world.apply("fix", source, base, manager=manager)
        assert open_descriptors() == held
        assert records() == []
        assert snapshot(base) == before
        assert manager.list() == []
    assert world.leftovers() == []
    world.apply("fix", source, base)


@pytest.mark.parametrize("what", ["remove", "lazy remove", "reset"])
def test_present_overlay_survives_full_bookkeeping_whatever_is_tried(
    world: World, what: str
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    world.apply("fix", world.source("s", NEW), base)
    (base / "edit").write_text("edit")
    with full_bookkeeping():
        try:
            if what == "reset":
                world.manager().reset("fix", 1)
            else:
                world.manager().remove("fix", lazy=what == "lazy remove")
        except SpaceError:
            # Nothing lost, then: it shows what it showed, and nothing lies about.
            assert (base / "edit").read_text() == "edit"
            assert [o.state for o in world.manager().list()] == ["active"]
            assert len(records()) == 1
    if what == "reset":
        world.manager().reset("fix", 1)
        assert not (base / "edit").exists()
        assert (base / "a").read_text() == "new a"
    if world.manager().list():
        world.check_invariants()
        world.manager().remove("fix")
    assert snapshot(base) == before
    assert world.warnings == []
    assert world.leftovers() == []


def test_record_that_fits_only_in_part_is_never_believed_nor_put_in_place(world: World) -> None:
    base = world.base("app", FILES)
    # Paths may be long, so a record may be larger than the one page that is still free.
    deep = "/".join(["x" * 200] * 15)
    source = world.source(f"long/{deep}", NEW)
    world.apply("fix", source, base)
    (base / "edit").write_text("edit")
    whole = (RUN / "records" / records()[0]).read_bytes()
    assert len(whole) > 4096
    with full_bookkeeping(spare=4096):
        with pytest.raises(SpaceError):
            world.manager().reset("fix", 1)
        assert [(RUN / "records" / name).read_bytes() for name in records()] == [whole]
        with contextlib.suppress(SpaceError):
            world.manager().remove("fix")
    assert world.warnings == []
    if world.manager().list():
        world.check_invariants()
        world.manager().remove("fix")
    assert world.leftovers() == []


def test_bookkeeping_without_inodes_is_a_space_error_and_leaves_nothing(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    world.apply("kept", source, base)
    world.base("other", FILES)
    folder = RUN / "quarantine"
    facts = os.statvfs(RUN)
    spare = world.source("inodes", {"one": ""}) / "one"
    assert spare.exists()
    for number in range(facts.f_ffree):
        os.mknod(folder / str(number))
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the number says it
        os.mknod(folder / "beyond")
    assert caught.value.errno == errno.ENOSPC
    try:
        held = open_descriptors()
        with pytest.raises(SpaceError):
            world.apply("fix", source, "/usr/src/other")
        assert open_descriptors() == held
        assert [o.record.name for o in world.manager().list()] == ["kept"]
        with contextlib.suppress(OverlaydError):
            world.manager().reset("kept", 1)
        assert (base / "a").read_text() == "new a"
    finally:
        for path in folder.iterdir():
            path.unlink()
    world.check_invariants()
    world.manager().remove("kept")
    assert world.leftovers() == []
