# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records that cannot be believed, and mounts that no record speaks for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo
from overlayd.errors import NotFoundError, OverlaydError
from overlayd.store import Store
from tests.mounts.conftest import RUN, bind, snapshot
from tests.mounts.processes import child

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
RECORDS = RUN / "records"
QUARANTINE = RUN / "quarantine"


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def nested_without_end(path: Path) -> None:
    path.write_bytes(b"[" * 60_000)


def number_without_end(path: Path) -> None:
    path.write_bytes(b'{"schema": ' + b"9" * 20_000 + b"}")


def not_an_object(path: Path) -> None:
    path.write_text("[1, 2]")


def without_a_key(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["mount_point"]
    path.write_text(json.dumps(record))


def of_another_boot(path: Path) -> None:
    edited(path, boot_id="11111111-2222-3333-4444-555555555555")


def of_a_newer_schema(path: Path) -> None:
    edited(path, schema=2)


def of_a_wrong_type(path: Path) -> None:
    edited(path, schema=True)


def of_another_name(path: Path) -> None:
    edited(path, name="../../etc/passwd")


def of_another_uuid(path: Path) -> None:
    edited(path, uuid="11111111-2222-3333-4444-555555555555")


def outside_usr(path: Path) -> None:
    edited(path, mount_point="/usr/../etc")


def owned_by_somebody(path: Path) -> None:
    os.chown(path, 1000, 0)


def writable_by_a_group(path: Path) -> None:
    path.chmod(0o620)


def writable_by_everybody(path: Path) -> None:
    path.chmod(0o602)


def a_symlink(path: Path) -> None:
    path.rename(RUN / "elsewhere")
    path.symlink_to(RUN / "elsewhere")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def a_megabyte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * (1 << 20))


DAMAGE = [
    empty,
    cut,
    garbage,
    nested_without_end,
    number_without_end,
    not_an_object,
    without_a_key,
    of_another_boot,
    of_a_newer_schema,
    of_a_wrong_type,
    of_another_name,
    of_another_uuid,
    outside_usr,
    owned_by_somebody,
    writable_by_a_group,
    writable_by_everybody,
    a_symlink,
    a_fifo,
    a_directory,
    a_megabyte,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.replace("_", " "))
def test_record_that_cannot_be_believed_is_set_aside_and_all_else_works(
    world: World, damage: Callable[[Path], None]
) -> None:
    bases = {name: world.base(name, FILES) for name in ("bad", "good", "more")}
    before = snapshot(bases["bad"])
    source = world.source("s", NEW)
    bad = world.apply("bad", source, bases["bad"])
    world.apply("good", source, bases["good"])
    damage(RECORDS / f"{bad.record.uuid}.json")
    assert [o.record.name for o in world.manager().list()] == ["good"]
    (warning,) = world.warnings
    assert bad.record.uuid in warning
    (name,) = os.listdir(QUARANTINE)
    assert str(QUARANTINE / name) in warning
    # Only once: what is in quarantine is looked at no more.
    assert [o.record.name for o in world.manager().list()] == ["good"]
    assert len(world.warnings) == 1
    with pytest.raises(NotFoundError):
        world.manager().status("bad")
    with pytest.raises(NotFoundError):
        world.manager().remove("bad")
    # Nobody takes away what the system may be using.
    assert (bases["bad"] / "a").read_text() == "new a"
    with pytest.raises(OverlaydError, match=f"on {bases['bad']}|{bases['bad']} is a mount point"):
        world.apply("again", source, bases["bad"])
    world.apply("more", source, bases["more"])
    world.manager().reset("good", 0)
    world.manager().reset("good", 1)
    assert (bases["bad"] / "a").read_text() == "new a"
    # The storage of the mount that shows is known to be overlayd's: so cleanup may end it.
    kinds = [action.kind for action in world.manager().cleanup(dry_run=True)]
    assert kinds == ["orphan", "quarantine"]
    assert (bases["bad"] / "a").read_text() == "new a"
    actions = world.manager().cleanup()
    assert [(action.kind, action.failed) for action in actions] == [
        ("orphan", None),
        ("quarantine", None),
    ]
    assert snapshot(bases["bad"]) == before
    world.check_invariants()
    assert os.listdir(QUARANTINE) == []
    world.apply("bad", source, bases["bad"])
    for name in ("bad", "good", "more"):
        world.manager().remove(name)
    assert world.leftovers() == []


def test_link_in_place_of_a_record_is_not_followed(world: World) -> None:
    overlay = world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    path = RECORDS / f"{overlay.record.uuid}.json"
    victim = Path("/run/victim")
    victim.write_text("victim")
    path.unlink()
    path.symlink_to(victim)
    world.manager().list()
    world.manager().cleanup()
    assert victim.read_text() == "victim"
    assert world.leftovers() == []


def test_link_in_place_of_a_new_version_of_a_record_is_not_written_through(world: World) -> None:
    overlay = world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    victim = Path("/run/victim")
    victim.write_text("victim")
    (RECORDS / f".new-{overlay.record.uuid}").symlink_to(victim)
    with pytest.raises(OverlaydError, match="writing the record"):
        world.manager().reset("fix", 0)
    assert victim.read_text() == "victim"
    world.manager().reset("fix", 0)
    world.check_invariants()


def test_new_version_of_a_record_that_was_left_goes_with_the_overlay(world: World) -> None:
    overlay = world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    with pytest.MonkeyPatch.context() as patch:
        # The last write: nothing else would take it.
        patch.setattr(Store, "write", lambda *_: None)
        (RECORDS / f".new-{overlay.record.uuid}").touch()
        world.manager().remove("fix")
    assert world.leftovers() == []


@pytest.mark.parametrize("name", ["name", "x.json", ".hidden", "..json", "a\nb\x1b[31m.json"])
def test_strange_file_among_the_records_is_set_aside(world: World, name: str) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    (RECORDS / name).write_text("{}")
    assert [o.record.name for o in world.manager().list()] == ["fix"]
    (warning,) = world.warnings
    assert warning.isprintable()
    assert not (RECORDS / name).exists()
    world.check_invariants()


def test_records_of_one_name_are_set_aside_side_by_side(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    for text in ("one", "two"):
        (RECORDS / "x.json").write_text(text)
        world.manager().list()
    assert sorted(path.read_text() for path in QUARANTINE.iterdir()) == ["one", "two"]


def test_link_to_a_directory_among_the_records_is_deleted_and_not_followed(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    victim = world.source("victim", {"file": "file"})
    (RECORDS / "x.json").symlink_to(victim)
    world.manager().list()
    assert [(action.kind, action.failed) for action in world.manager().cleanup()] == [
        ("quarantine", None)
    ]
    assert (victim / "file").read_text() == "file"
    assert os.listdir(QUARANTINE) == []


def test_storage_without_a_record_goes_once_nothing_shows_it(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    storage = RUN / "storage" / overlay.record.uuid
    empty(RECORDS / f"{overlay.record.uuid}.json")
    with child("os.chdir(sys.argv[1])", base) as holder:
        world.manager().cleanup()
        assert storage.exists()
        assert (base / "a").read_text() == "new a"
        holder.let_go()
    subprocess.run(["umount", base], check=True)
    world.manager().cleanup()
    assert world.leftovers() == []


def test_storage_bound_over_an_orphan_is_left_alone(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    empty(RECORDS / f"{overlay.record.uuid}.json")
    bind(RUN / "storage" / overlay.record.uuid / "upper.1", base)
    assert [action.kind for action in world.manager().cleanup()] == ["quarantine"]
    assert sorted(os.listdir(base)) == ["upper", "work"]
    subprocess.run(["umount", base], check=True)
    assert [action.kind for action in world.manager().cleanup()] == ["orphan"]
    assert world.leftovers() == []


def test_command_line_prints_the_warning_and_succeeds(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    empty(RECORDS / f"{overlay.record.uuid}.json")
    done = world.run("list")
    assert done.stdout == "no overlays\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"overlayd: warning: record {overlay.record.uuid}.json: empty; moved to")
    done = world.run("cleanup")
    assert f"an overlay without a record on {base}" in done.stdout
    assert world.leftovers() == []


def test_orphan_that_is_in_use_stays_and_cleanup_says_so(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    empty(RECORDS / f"{overlay.record.uuid}.json")
    world.manager().list()
    with child("os.chdir(sys.argv[1])", base) as holder:
        actions = {action.kind: action for action in world.manager().cleanup()}
        assert actions["orphan"].failed is not None
        assert (base / "a").read_text() == "new a"
        holder.let_go()
    actions = {action.kind: action for action in world.manager().cleanup()}
    assert actions["orphan"].failed is None
    assert (base / "a").read_text() == "base a"
    assert world.leftovers() == []


def test_orphan_that_another_command_has_is_left_to_that(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    empty(RECORDS / f"{overlay.record.uuid}.json")
    lock = Store(world.warnings.append).try_lock(overlay.record.uuid)
    assert lock is not None
    assert [action.kind for action in world.manager().cleanup()] == ["quarantine"]
    assert (base / "a").read_text() == "new a"
    lock.release()
    assert [action.kind for action in world.manager().cleanup()] == ["orphan"]
    assert world.leftovers() == []


def test_orphan_beneath_the_mount_of_somebody_else_is_left_alone(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    empty(RECORDS / f"{overlay.record.uuid}.json")
    theirs = Path("/run/theirs")
    theirs.mkdir()
    (theirs / "file").touch()
    bind(theirs, base)
    assert [action.kind for action in world.manager().cleanup()] == ["quarantine"]
    assert (base / "file").exists()
    assert overlay.record.uuid in mountinfo.read().tagged


def forge(uuid: str, place: Path) -> None:
    """Mount an overlay that says it is overlayd's, as anybody can who may mount."""
    ground = Path("/run/forger")
    ground.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "forger", ground], check=True)
    for name in ("lower", "upper", "work"):
        (ground / name).mkdir()
    (ground / "lower/theirs").write_text("theirs")
    options = f"lowerdir={ground}/lower,upperdir={ground}/upper,workdir={ground}/work,uuid=off"
    subprocess.run(
        ["mount", "-t", "overlay", f"overlayd:{uuid}", "-o", options, place],
        check=True,
    )


@pytest.mark.parametrize("whose", ["nobody's", "an overlay's", "no uuid", "a path"])
def test_forged_mount_is_left_alone_and_reported(world: World, whose: str) -> None:
    base = world.base("app", FILES)
    place = world.base("forged", {"x": "x"})
    overlay = world.apply("fix", world.source("s", NEW), base)
    uuid = {
        "nobody's": "11111111-2222-3333-4444-555555555555",
        "an overlay's": overlay.record.uuid,
        "no uuid": "x",
        "a path": f"../records/{overlay.record.uuid}",
    }[whose]
    forge(uuid, place)
    assert [(o.record.name, o.state) for o in world.manager().list()] == [("fix", "active")]
    assert world.manager().cleanup() == []
    assert (place / "theirs").read_text() == "theirs"
    done = world.json("doctor")
    assert isinstance(done, dict)
    (problem,) = done["problems"]
    assert str(place) in problem["text"]
    assert "cannot be proven" in problem["hint"]
    assert done["ok"]
    world.manager().reset("fix", 1)
    world.manager().remove("fix")
    assert (place / "theirs").read_text() == "theirs"
    assert (base / "a").read_text() == "base a"
    assert world.manager().cleanup() == []
    assert (place / "theirs").read_text() == "theirs"


def test_mount_forged_over_a_live_overlay_only_covers_it(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    forge(overlay.record.uuid, base)
    assert [o.state for o in world.manager().list()] == ["covered"]
    for lazy in (False, True):
        with pytest.raises(OverlaydError):
            world.manager().remove("fix", lazy=lazy)
    with pytest.raises(OverlaydError):
        world.manager().reset("fix", 0)
    assert (base / "theirs").read_text() == "theirs"
    assert world.manager().cleanup() == []
    assert (base / "theirs").read_text() == "theirs"
    subprocess.run(["umount", base], check=True)
    assert [o.state for o in world.manager().list()] == ["active"]
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_forged_record_cannot_make_cleanup_or_remove_unmount_what_is_not_overlayds(
    world: World,
) -> None:
    base = world.base("app", FILES)
    place = world.base("forged", {"x": "x"})
    overlay = world.apply("fix", world.source("s", NEW), base)
    path = RECORDS / f"{overlay.record.uuid}.json"
    record = json.loads(path.read_text())
    uuid = "11111111-2222-3333-4444-555555555555"
    forged = record | {"uuid": uuid, "name": "forged", "mount_point": str(place)}
    (RECORDS / f"{uuid}.json").write_text(json.dumps(forged))
    (RECORDS / f"{uuid}.json").chmod(0o600)
    subprocess.run(["mount", "-t", "tmpfs", "theirs", place], check=True)
    (place / "theirs").touch()
    states = {o.record.name: o.state for o in world.manager().list()}
    assert states == {"fix": "active", "forged": "lost"}
    world.manager().remove("forged")
    world.manager().cleanup()
    assert (place / "theirs").exists()
    assert [o.record.name for o in world.manager().list()] == ["fix"]
