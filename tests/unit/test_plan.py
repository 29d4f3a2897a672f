# SPDX-License-Identifier: LGPL-2.1-or-later
"""The planner: what is refused before anything is done, and which operations come when."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd import contents, mountinfo, ops, plan, removal
from overlayd.errors import BusyError, ExistsError, NotFoundError, RefusedError, SpaceError
from overlayd.model import Layer, Options, Phase, Request, State, Tree, human_size
from overlayd.mountinfo import Mount, Table
from overlayd.targets import Place
from overlayd.walker import Measure
from tests.unit.conftest import (
    BOOT_ID,
    UUID,
    WIDE,
    absolute_paths,
    is_one_printable_line,
    make_mount,
    make_overlay,
    make_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.model import Record

APP = "/usr/share/app"
DIRECTORY = Place(APP, APP, (), "")
FILE_IN_DIRECTORY = Place(APP, APP, ("tool",), "")
FILE_OVER_FILE = Place("/usr/bin/tool", "/usr/bin/tool", ("tool",), "tool")
NEW_PATH = Place("/usr/share/new/deep", "/usr/share", ("new", "deep"), "")
MEASURE = Measure(entries=40, size=81920)
IDENTITY = plan.Identity(
    uuid=UUID,
    boot_id=BOOT_ID,
    owner=plan.Owner(0, None),
    created_at="2024-05-06T07:08:09Z",
    deployment=None,
)


def kinds(steps: Sequence[Operation]) -> list[type]:
    return [type(step) for step in steps]


def place_at(path: str) -> Place:
    return Place(path, path, (), "")


# Names and places


def check_free(path: str, *present: Record, name: str = "new", limit: int = 1000) -> None:
    plan.check_free(name, place_at(path), present, limit)


def test_name_in_use_is_refused_saying_where_it_lies() -> None:
    with pytest.raises(ExistsError, match="'fix'") as caught:
        check_free("/usr/share/other", make_record(), name="fix")
    assert caught.value.hint is not None
    assert APP in caught.value.hint


def test_name_that_another_command_is_applying_is_refused_saying_so() -> None:
    with pytest.raises(ExistsError, match="another command is applying it"):
        check_free("/usr/share/other", make_record(phase=Phase.PREPARING), name="fix")


def test_name_and_place_of_a_draining_overlay_are_free() -> None:
    check_free(APP, make_record(phase=Phase.DRAINING), name="fix", limit=1)


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.ACTIVE, Phase.REMOVING])
def test_place_is_taken_from_the_first_to_the_last_moment(phase: Phase) -> None:
    with pytest.raises(ExistsError):
        check_free(APP, make_record(phase=phase))


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (APP, f"overlay 'fix' lies on {APP} already"),
        (f"{APP}/x/y", f"inside that of overlay 'fix', {APP}"),
        ("/usr/share", f"around that of overlay 'fix', {APP}"),
    ],
)
def test_overlays_do_not_nest(path: str, word: str) -> None:
    with pytest.raises(ExistsError, match=word) as caught:
        check_free(path, make_record())
    assert path in caught.value.message


@pytest.mark.parametrize(
    "path", ["/usr/share/app2", "/usr/share/ap", "/usr/share/app.d/x", "/usr/lib/app"]
)
def test_overlays_beside_one_another_are_free(path: str) -> None:
    check_free(path, make_record())


def test_overlay_on_usr_lib64_does_not_nest_with_one_on_usr_lib() -> None:
    check_free("/usr/lib64", make_record(mount_point="/usr/lib"))
    check_free("/usr/lib", make_record(mount_point="/usr/lib64"))


@given(absolute_paths, st.lists(absolute_paths, max_size=3))
def test_place_is_refused_exactly_if_it_shares_components(path: str, others: list[str]) -> None:
    present = [make_record(name=f"n{i}", mount_point=other) for i, other in enumerate(others)]
    parts = path.split("/")
    nested = any(
        parts[: len(other.split("/"))] == other.split("/")
        or other.split("/")[: len(parts)] == parts
        for other in others
    )
    if not nested:
        check_free(path, *present)
        return
    with pytest.raises(ExistsError) as caught:
        check_free(path, *present)
    assert is_one_printable_line(caught.value.message)


def test_what_counts_is_where_the_mount_lies_not_what_was_asked_for() -> None:
    with pytest.raises(ExistsError, match="/usr/share/new/deep"):
        plan.check_free("new", NEW_PATH, [make_record()], 10)


def test_limit_of_overlays_binds_and_is_named() -> None:
    present = [make_record(name=f"n{i}", mount_point=f"/usr/n{i}") for i in range(3)]
    check_free("/usr/other", *present, limit=4)
    with pytest.raises(SpaceError, match="3 overlays") as caught:
        check_free("/usr/other", *present, limit=3)
    assert caught.value.hint is not None
    assert "limits.overlays" in caught.value.hint


# Mounts at the target


def table_of(*mounts: Mount) -> Table:
    return Table(
        b"".join(
            f"{m.mount_id} {m.parent_id} 0:{m.st_dev} {m.root} ".encode()
            + mountinfo._mangle(m.mount_point)
            + f" rw - {m.fstype} {m.source} rw\n".encode()
            for m in mounts
        )
    )


def on_root(root: str, mount_point: str, *, st_dev: int = 50) -> Mount:
    return replace(make_mount(mount_point, st_dev=st_dev), root=root)


USR = Place("/usr", "/usr", (), "")


def test_what_is_removed_and_still_used_counts_against_its_owner() -> None:
    kept = make_record(owner=1000, size=1 << 20, inodes=10, layers=())
    draining = kept.with_(phase=Phase.DRAINING)
    others = kept.with_(owner=1001)
    assert plan.usage_of(1000, [kept, draining, others]) == plan.Usage(2, 2 << 20, 20)


def test_usr_may_be_a_mount_but_nothing_may_be_stacked_on_it() -> None:
    usr = on_root("/ostree/deploy/debian/deploy/4567.0/usr", "/usr")
    plan.check_mounts(USR, table_of(make_mount("/"), usr))
    stacked = replace(make_mount("/usr"), fstype="overlay")
    with pytest.raises(RefusedError, match=r"TARGET /usr is a mount point: .*overlay of foreign"):
        plan.check_mounts(USR, table_of(make_mount("/"), usr, stacked))


def test_mounts_inside_of_usr_are_refused_also_where_it_is_a_mount() -> None:
    mounts = (make_mount("/"), make_mount("/usr"), make_mount("/usr/local"))
    with pytest.raises(RefusedError, match="has mounts in it: /usr/local"):
        plan.check_mounts(USR, table_of(*mounts))


def test_target_without_mounts_is_free() -> None:
    plan.check_mounts(DIRECTORY, table_of())


def test_target_that_is_a_mount_point_is_refused_naming_the_mount() -> None:
    with pytest.raises(RefusedError, match=rf"is a mount point: {APP} \(tmpfs of foreign\)"):
        plan.check_mounts(DIRECTORY, table_of(make_mount(APP)))


def test_target_with_an_overlay_in_it_is_taken_whatever_else_is_there() -> None:
    mounts = [make_mount(f"{APP}/a"), make_mount(f"{APP}/b\n", tag=UUID)]
    with pytest.raises(ExistsError, match=rf"another overlay lies on {APP}/b\\n"):
        plan.check_mounts(DIRECTORY, table_of(*mounts))


def test_target_with_mounts_in_it_is_refused_naming_some() -> None:
    mounts = [make_mount(f"{APP}/{name}\n") for name in "abcdefgh"]
    with pytest.raises(RefusedError, match=rf"has mounts in it: {APP}/a") as caught:
        plan.check_mounts(DIRECTORY, table_of(*mounts))
    assert is_one_printable_line(caught.value.message)
    assert len(caught.value.message) < 300


# Memory


def test_source_that_fits_into_memory_passes_to_the_last_byte() -> None:
    plan.check_memory(Measure(size=6 << 20), "/root/app", 8 << 20, 2 << 20)
    plan.check_memory(Measure(size=0), "/root/app", 0, 2 << 20)


def test_source_beyond_free_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(SpaceError, match=r"/root/a\\n needs 3G of memory, and 512M is") as caught:
        plan.check_memory(Measure(size=3 << 30), "/root/a\n", 640 << 20, 128 << 20)
    assert caught.value.hint is not None
    assert "128M" in caught.value.hint
    assert "limits.memory_reserve" in caught.value.hint


def test_reserve_larger_than_what_is_free_leaves_nothing_and_not_less() -> None:
    with pytest.raises(SpaceError, match="4K of memory, and 0 bytes is free"):
        plan.check_memory(Measure(size=4096), "/root/app", 1 << 20, 2 << 20)


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50), st.integers(1, 1 << 50))
def test_memory_is_refused_exactly_if_it_does_not_fit(
    size: int, available: int, reserve: int
) -> None:
    if size <= max(0, available - reserve):
        plan.check_memory(Measure(size=size), "/root/app", available, reserve)
        return
    with pytest.raises(SpaceError) as caught:
        plan.check_memory(Measure(size=size), "/root/app", available, reserve)
    assert human_size(size) in caught.value.message
    assert human_size(max(0, available - reserve)) in caught.value.message


# The record


def new_record(defaults: Config, place: Place = DIRECTORY, **changes: object) -> Record:
    request = replace(Request("fix", "/root/app", place.target), **changes)  # type: ignore[arg-type]
    return plan.new_record(request, place, MEASURE, IDENTITY, defaults)


def test_new_record_is_preparing_and_says_what_it_is_about_to_show(defaults: Config) -> None:
    record = new_record(defaults)
    assert record.phase is Phase.PREPARING
    assert record.tree is None
    assert record.pending == Tree(version=1, upper=1)
    assert record.layers == (Layer(1, "/root/app", 40, 81920),)
    assert (record.uuid, record.boot_id, record.owner) == (UUID, BOOT_ID, 0)


def test_room_for_edits_is_what_was_asked_for_or_the_default(defaults: Config) -> None:
    assert new_record(defaults).size == defaults.upper_size
    assert new_record(defaults).inodes == defaults.upper_inodes
    assert new_record(defaults, size=1 << 20).size == 1 << 20


def test_read_only_overlay_has_no_room_for_edits(defaults: Config) -> None:
    record = new_record(defaults, options=Options(read_only=True))
    assert (record.size, record.inodes, record.pending) == (0, 0, Tree(version=1, upper=1))


def test_record_keeps_target_and_mount_point_apart(defaults: Config) -> None:
    record = new_record(defaults, NEW_PATH)
    assert (record.target, record.mount_point) == ("/usr/share/new/deep", "/usr/share")


# Apply


def planned(defaults: Config, place: Place, *, read_only: bool) -> tuple[Operation, ...]:
    record = new_record(defaults, place, options=Options(read_only=read_only))
    return plan.plan_apply(record, place, MEASURE, WIDE)


_UPPER = [contents.MountStorage, contents.PrepareUpper]


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("place", "entry"),
    [
        (DIRECTORY, []),
        (FILE_IN_DIRECTORY, []),
        (FILE_OVER_FILE, [ops.ShowEntry]),
        (NEW_PATH, []),
    ],
    ids=["directory", "file in directory", "file over file", "new path"],
)
def test_apply_reserves_fills_builds_and_only_then_attaches(
    defaults: Config,
    place: Place,
    entry: list[type],
    read_only: bool,  # noqa: FBT001
) -> None:
    assert kinds(planned(defaults, place, read_only=read_only)) == [
        ops.Reserve,
        contents.MountStorage,
        contents.FillLayer,
        *_UPPER,
        ops.BuildOverlay,
        *entry,
        ops.Attach,
        ops.Commit,
    ]


@pytest.mark.parametrize("place", [DIRECTORY, FILE_IN_DIRECTORY, FILE_OVER_FILE, NEW_PATH])
def test_apply_mounts_at_the_place_and_puts_the_source_where_the_target_is(
    defaults: Config, place: Place
) -> None:
    steps = planned(defaults, place, read_only=False)
    assert [step.mount_point for step in steps if isinstance(step, ops.Attach)] == [
        place.mount_point
    ]
    assert [step.prefix for step in steps if isinstance(step, contents.FillLayer)] == [place.prefix]
    assert [step.entry for step in steps if isinstance(step, ops.ShowEntry)] == (
        [place.entry] if place.entry else []
    )
    assert [step.tree for step in steps if isinstance(step, ops.BuildOverlay)] == [Tree(1, 1)]


def test_storage_is_sized_by_what_was_measured_and_by_the_record(defaults: Config) -> None:
    steps = planned(defaults, NEW_PATH, read_only=False)
    layer, upper = (step for step in steps if isinstance(step, contents.MountStorage))
    assert (layer.which, layer.size) == ("layer", MEASURE.size)
    assert layer.inodes >= MEASURE.entries + len(NEW_PATH.prefix) + 3
    assert (upper.which, upper.size, upper.inodes) == (
        *("upper.1", defaults.upper_size, defaults.upper_inodes),
    )


def test_layer_of_an_empty_source_has_a_page(defaults: Config) -> None:
    steps = plan.plan_apply(new_record(defaults), DIRECTORY, Measure(entries=1), WIDE)
    assert next(step.size for step in steps if isinstance(step, contents.MountStorage)) == 4096


def test_limits_and_owners_reach_the_copy(defaults: Config) -> None:
    record = new_record(defaults, options=Options(preserve_owner=True))
    steps = plan.plan_apply(record, DIRECTORY, MEASURE, WIDE)
    (fill,) = (step for step in steps if isinstance(step, contents.FillLayer))
    assert fill == contents.FillLayer("/root/app", (), WIDE, True, 40, 81920)  # noqa: FBT003


def test_only_the_end_of_apply_is_decisive(defaults: Config) -> None:
    steps = planned(defaults, FILE_OVER_FILE, read_only=False)
    assert [type(step) for step in steps if step.decisive] == [ops.Commit]


# Reset


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("entry", ["", "tool"])
def test_reset_of_a_writable_overlay_brings_a_fresh_upper_and_drops_the_old_one(
    version: int, entry: str
) -> None:
    overlay = make_overlay(tree=Tree(1, 4, 50, 7), entry=entry)
    steps = plan.plan_reset(overlay, version, [make_mount(APP, tag=UUID)])
    assert kinds(steps) == [
        ops.Announce,
        ops.OpenBase,
        *_UPPER,
        ops.BuildOverlay,
        ops.CloseBase,
        *([ops.ShowEntry] if entry else []),
        ops.PutBeneath,
        ops.DetachOld,
        removal.DropStorage,
        ops.Commit,
    ]
    tree = Tree(version, 5)
    assert ops.Announce(tree) in steps
    assert ops.BuildOverlay(tree) in steps
    assert contents.PrepareUpper(5) in steps
    assert contents.MountStorage("upper.5", 64 << 20, 1000) in steps
    assert removal.DropStorage("upper.4") in steps


@pytest.mark.parametrize("version", [0, 1])
def test_reset_of_a_read_only_overlay_gives_its_empty_top_a_page(version: int) -> None:
    overlay = make_overlay(
        options=Options(read_only=True), tree=Tree(1, 4, 50, 7), size=0, inodes=0
    )
    steps = plan.plan_reset(overlay, version, [])
    assert contents.MountStorage("upper.5", 4096, 8) in steps
    assert removal.DropStorage("upper.4") in steps
    assert ops.BuildOverlay(Tree(version, 5)) in steps


def test_reset_can_be_undone_until_the_new_mount_lies_beneath() -> None:
    steps = plan.plan_reset(make_overlay(), 0, [])
    decisive = [type(step) for step in steps if step.decisive]
    assert decisive[0] is ops.PutBeneath


@pytest.mark.parametrize("version", [2, 7, -1])
def test_version_that_does_not_exist_is_not_found_and_those_that_do_are_named(
    version: int,
) -> None:
    with pytest.raises(NotFoundError, match=f"no version {version}") as caught:
        plan.plan_reset(make_overlay(), version, [])
    assert caught.value.hint == "it has 0 (the base) and 1"


def test_reset_of_a_lost_overlay_is_not_found_and_hints_at_remove() -> None:
    for overlay in (make_overlay(State.LOST), make_overlay(tree=None)):
        with pytest.raises(NotFoundError, match="is gone from") as caught:
            plan.plan_reset(overlay, 0, [])
        assert caught.value.hint == "overlayd remove fix"


# Remove


@pytest.mark.parametrize("lazy", [False, True])
def test_remove_marks_detaches_and_frees_the_storage_and_then_the_name(lazy: bool) -> None:  # noqa: FBT001
    steps = plan.plan_remove(make_overlay(), [make_mount(APP, tag=UUID)], lazy=lazy)
    assert kinds(steps) == [
        removal.MarkRemoving,
        *([] if lazy else [removal.CheckUnused]),
        removal.Detach,
        removal.DropStorage,
        removal.Retire,
    ]
    assert removal.Detach(APP, lazy, 77) in steps
    assert removal.DropStorage() in steps


@pytest.mark.parametrize("lazy", [False, True])
def test_remove_of_a_lost_overlay_detaches_nothing(lazy: bool) -> None:  # noqa: FBT001
    steps = plan.plan_remove(make_overlay(State.LOST), [make_mount(APP)], lazy=lazy)
    assert kinds(steps) == [removal.MarkRemoving, removal.DropStorage, removal.Retire]


# Both


def plans(overlay_state: State, *mounts: str) -> list[BusyError]:
    """Return the errors of reset and remove of an overlay with foreign *mounts* in it."""
    inside = [make_mount(APP, tag=UUID), *map(make_mount, mounts)]
    overlay = make_overlay(overlay_state)
    errors = []
    attempts: list[Callable[[], object]] = [
        lambda: plan.plan_reset(overlay, 0, inside),
        lambda: plan.plan_remove(overlay, inside, lazy=False),
        lambda: plan.plan_remove(overlay, inside, lazy=True),
    ]
    for attempt in attempts:
        with pytest.raises(BusyError) as caught:
            attempt()
        errors.append(caught.value)
    return errors


def test_overlay_with_mounts_of_others_in_it_is_left_alone_and_they_are_named() -> None:
    for error in plans(State.ACTIVE, f"{APP}/a\n", f"{APP}/b"):
        assert rf"{APP}/a\n (tmpfs of foreign), {APP}/b (" in error.message
        assert is_one_printable_line(error.message)


def test_covered_overlay_is_left_alone() -> None:
    for error in plans(State.COVERED, APP):
        assert APP in error.message
    for error in plans(State.COVERED):
        assert "over fix: a parent of it" in error.message


def test_every_step_describes_itself_on_one_line(defaults: Config) -> None:
    hostile = "/usr/share/a\nb\udcff\x1b[2J"
    place = Place(hostile, hostile, ("a\nb",), "a\nb")
    record = new_record(defaults, place, source=hostile)
    overlay = make_overlay(mount_point=hostile, entry="a\nb", source=hostile)
    for steps in (
        plan.plan_apply(record, place, MEASURE, WIDE),
        plan.plan_reset(overlay, 0, []),
        plan.plan_remove(overlay, [], lazy=False),
        plan.plan_remove(overlay, [], lazy=True),
    ):
        for step in steps:
            assert is_one_printable_line(step.describe()), step
            assert step.describe()
