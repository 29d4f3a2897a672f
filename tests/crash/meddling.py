# SPDX-License-Identifier: LGPL-2.1-or-later
"""What others with root's rights may do to overlays, storage and records: one function for each.

Each does its work at once and returns how it is taken back, if whoever did it would have to; where
there is nothing to do it to, the kernel says so (:class:`OSError`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd import mountinfo
from overlayd import syscalls as sc
from tests.mounts.conftest import PLAY, RUN, mount

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.model import Overlay
    from tests.mounts.conftest import World

MS_RDONLY: Final = 1
MS_REMOUNT: Final = 32
MS_MOVE: Final = 1 << 13
MS_UNBINDABLE: Final = 1 << 17
ELSEWHERE: Final = Path("/run/elsewhere")
FOREIGN: Final = "foreign"
RECORDS: Final = RUN / "records"
STORAGE: Final = RUN / "storage"
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Scene:
    """An overlay ``x`` under test on *place*, and two others: one is meddled with, one never."""

    world: World
    place: Path
    """Where x is mounted when it is: a directory or a file."""
    source: Path
    beside: Overlay
    other: Overlay
    before: dict[str, tuple[object, ...]]
    """What the base was."""
    foreign: list[Path] = field(default_factory=list)
    """Where mounts of others lie that nobody but their owner may take away."""

    @property
    def known(self) -> set[str]:
        """The uuids of the other two."""
        return {self.beside.record.uuid, self.other.record.uuid}

    @property
    def uuid(self) -> str:
        """Of x, by its storage.

        :raises FileNotFoundError: if it has none.
        """
        for name in os.listdir(STORAGE):
            if name not in self.known:
                return name
        raise FileNotFoundError

    @property
    def record(self) -> Path:
        """The record of x, and not of y, which a batch makes beside it.

        :raises FileNotFoundError: if there is none.
        """
        for name in os.listdir(RECORDS):
            path = RECORDS / name
            unknown = name.endswith(".json") and name.removesuffix(".json") not in self.known
            if unknown and str(PLAY / "more") not in path.read_text():
                return path
        raise FileNotFoundError

    def parts(self) -> list[Path]:
        """Return the mounts of x's storage.

        :raises FileNotFoundError: if there are none.
        """
        top = STORAGE / self.uuid
        found = [top / name for name in sorted(os.listdir(top)) if (top / name).is_mount()]
        if not found:
            raise FileNotFoundError
        return found


def _shows(scene: Scene) -> None:
    """Insist on x being mounted."""
    top = mountinfo.top_mount_id(str(scene.place))
    if not any(m.mount_id == top and m.tag for m in mountinfo.read()):
        raise FileNotFoundError


def _cover(scene: Scene, place: Path) -> Callable[[], object]:
    if place.is_dir():
        mount(FOREIGN, place, "tmpfs")
    else:
        Path("/run/foreign").touch()
        mount("/run/foreign", place, "none", flags=sc.MS_BIND)
    scene.foreign.append(place)
    return lambda: sc.umount2(str(place))


def _move(origin: Path) -> Callable[[], object]:
    target = Path(f"{ELSEWHERE}.{len(list(ELSEWHERE.parent.iterdir()))}")
    if origin.is_dir():
        target.mkdir()
    else:
        target.touch()
    mount(str(origin), target, "none", flags=MS_MOVE)

    def back() -> None:
        with contextlib.suppress(OSError):  # what is undone goes from wherever it is
            sc.umount2(str(target), sc.MNT_DETACH)

    return back


# The overlay itself.


def unmounts_it(scene: Scene) -> None:
    _shows(scene)
    sc.umount2(str(scene.place))


def unmounts_it_lazily(scene: Scene) -> None:
    _shows(scene)
    sc.umount2(str(scene.place), sc.MNT_DETACH)


def covers_it(scene: Scene) -> Callable[[], object]:
    return _cover(scene, scene.place)


def covers_the_directory_above(scene: Scene) -> Callable[[], object]:
    return _cover(scene, scene.place.parent)


def mounts_inside_it(scene: Scene) -> Callable[[], object]:
    if not scene.place.is_dir():
        raise NotADirectoryError
    return _cover(scene, scene.place / "sub")


def moves_it(scene: Scene) -> Callable[[], object]:
    _shows(scene)
    return _move(scene.place)


def binds_it_elsewhere(scene: Scene) -> Callable[[], object]:
    _shows(scene)
    target = ELSEWHERE
    if scene.place.is_dir():
        target.mkdir()
    else:
        target.touch()
    mount(str(scene.place), target, "none", flags=sc.MS_BIND)
    return lambda: sc.umount2(str(target), sc.MNT_DETACH)


def makes_its_mount_read_only(scene: Scene) -> None:
    _shows(scene)
    mount("none", scene.place, "none", flags=MS_REMOUNT | sc.MS_BIND | MS_RDONLY)


def makes_its_file_system_read_only(scene: Scene) -> None:
    _shows(scene)
    subprocess.run(["mount", "-o", "remount,ro", scene.place], check=True, capture_output=True)


def makes_its_mount_private(scene: Scene) -> None:
    _shows(scene)
    sc.mount_propagation(str(scene.place), sc.MS_PRIVATE)


def makes_its_mount_shared(scene: Scene) -> None:
    _shows(scene)
    sc.mount_propagation(str(scene.place), sc.MS_SHARED)


def makes_its_mount_a_slave(scene: Scene) -> None:
    _shows(scene)
    sc.mount_propagation(str(scene.place), sc.MS_SLAVE)


def makes_its_mount_unbindable(scene: Scene) -> None:
    _shows(scene)
    sc.mount_propagation(str(scene.place), MS_UNBINDABLE)


def changes_the_propagation_beneath_it(_scene: Scene) -> None:
    shared = next(m for m in mountinfo.read() if m.mount_point == str(PLAY)).shared
    sc.mount_propagation(str(PLAY), sc.MS_PRIVATE if shared else sc.MS_SHARED)


def makes_what_is_beneath_it_read_only(_scene: Scene) -> Callable[[], object]:
    mount("none", PLAY, "none", flags=MS_REMOUNT | sc.MS_BIND | MS_RDONLY)
    return lambda: mount("none", PLAY, "none", flags=MS_REMOUNT | sc.MS_BIND)


# Its storage.


def unmounts_its_layer(scene: Scene) -> None:
    sc.umount2(str(scene.parts()[0]), sc.MNT_DETACH)


def unmounts_its_storage(scene: Scene) -> None:
    for part in scene.parts():
        sc.umount2(str(part), sc.MNT_DETACH)


def covers_its_storage(scene: Scene) -> None:
    for part in scene.parts():
        mount(FOREIGN, part, "tmpfs")


def moves_its_storage(scene: Scene) -> Callable[[], object]:
    parts = scene.parts()
    sc.mount_propagation(str(RUN), sc.MS_PRIVATE)  # the kernel moves nothing off a shared mount
    moved = [_move(part) for part in parts]
    return lambda: [back() for back in moved]


def makes_its_storage_read_only(scene: Scene) -> None:
    for part in scene.parts():
        mount("none", part, "tmpfs", flags=MS_REMOUNT | MS_RDONLY)


def makes_its_layer_writable_and_empties_it(scene: Scene) -> None:
    layer = scene.parts()[0]
    mount("none", layer, "tmpfs", flags=MS_REMOUNT)
    subprocess.run(["find", layer, "-xdev", "-mindepth", "1", "-delete"], check=True)


def fills_its_storage(scene: Scene) -> None:
    for part in scene.parts():
        try:
            fill(part / "filling")
        except OSError:  # the layer is read-only
            continue


def deletes_its_storage(scene: Scene) -> None:
    top = STORAGE / scene.uuid
    for part in scene.parts():
        sc.umount2(str(part), sc.MNT_DETACH)
    for name in os.listdir(top):
        (top / name).rmdir()
    top.rmdir()


def exchanges_storage_directories(scene: Scene) -> None:
    _exchange(STORAGE / scene.uuid, STORAGE / scene.other.record.uuid)


def makes_its_storage_directory_a_link(scene: Scene) -> Callable[[], object]:
    top = STORAGE / scene.uuid
    hidden = RUN / "hidden"
    top.rename(hidden)
    top.symlink_to(hidden)

    def back() -> None:
        top.unlink()
        hidden.rename(top)

    return back


# Its record.


def deletes_its_record(scene: Scene) -> None:
    scene.record.unlink()


def truncates_its_record(scene: Scene) -> None:
    os.truncate(scene.record, 0)


def cuts_its_record_short(scene: Scene) -> None:
    os.truncate(scene.record, scene.record.stat().st_size // 2)


def _edit(path: Path, **changes: object) -> None:
    text = json.dumps(json.loads(path.read_text()) | changes)
    fresh = path.with_name(".new-edited")
    fresh.write_text(text)
    fresh.chmod(0o600)
    fresh.rename(path)


def edits_its_phase(scene: Scene) -> None:
    _edit(scene.record, phase="removing")


def edits_its_name(scene: Scene) -> None:
    _edit(scene.record, name="y")


def _unmounts_what_is_left(scene: Scene) -> None:
    """Unmount x, as who made it unknown to overlayd has to."""
    for mounts in mountinfo.read().tagged.values():
        for each in mounts:
            if each.mount_point == str(scene.place):
                sc.umount2(each.mount_point, sc.MNT_DETACH)


def edits_its_place(scene: Scene) -> Callable[[], object]:
    _edit(scene.record, mount_point=f"{PLAY}/outer/nothing")
    return lambda: _unmounts_what_is_left(scene)


def edits_its_tree(scene: Scene) -> Callable[[], object]:
    record = json.loads(scene.record.read_text())
    tree = record["tree"] or record["pending"]
    _edit(scene.record, tree=tree | {"st_dev": 1, "fsid": 1}, pending=None)
    return lambda: _unmounts_what_is_left(scene)


def announces_what_is_not(scene: Scene) -> None:
    tree = {"version": 0, "upper": 40, "st_dev": 0, "fsid": 0}
    _edit(scene.record, pending=tree)


def exchanges_records(scene: Scene) -> None:
    _exchange(scene.record, RECORDS / f"{scene.other.record.uuid}.json")


def _exchange(one: Path, two: Path) -> None:
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


# The world.


def fill(path: Path) -> None:
    """Write to *path* until nothing more fits."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    size = 1 << 22
    try:
        while size:
            try:
                os.write(fd, bytes(size))
            except OSError:
                size //= 8
    finally:
        os.close(fd)


def fills_the_bookkeeping(_scene: Scene) -> Callable[[], object]:
    fill(RUN / "filling")
    return (RUN / "filling").unlink


def uses_up_the_inodes_of_the_bookkeeping(_scene: Scene) -> Callable[[], object]:
    facts = os.statvfs(RUN)
    used = facts.f_files - facts.f_ffree
    mount("none", RUN, "tmpfs", f"nr_inodes={used}", flags=MS_REMOUNT)
    return lambda: mount("none", RUN, "tmpfs", f"nr_inodes={facts.f_files}", flags=MS_REMOUNT)


def fills_run(_scene: Scene) -> Callable[[], object]:
    mount("none", "/run", "tmpfs", "size=16M", flags=MS_REMOUNT)
    fill(Path("/run/filling"))
    return Path("/run/filling").unlink


def makes_the_bookkeeping_read_only(_scene: Scene) -> Callable[[], object]:
    mount("none", RUN, "none", flags=MS_REMOUNT | sc.MS_BIND | MS_RDONLY)
    return lambda: mount("none", RUN, "none", flags=MS_REMOUNT | sc.MS_BIND)


def covers_the_bookkeeping(scene: Scene) -> Callable[[], object]:
    return _cover(scene, RUN)


def changes_the_propagation_of_the_bookkeeping(_scene: Scene) -> None:
    sc.mount_propagation(str(RUN), sc.MS_PRIVATE)
    sc.mount_propagation("/run", sc.MS_PRIVATE)


def deletes_the_lock(_scene: Scene) -> None:
    (RUN / "lock").unlink()


def deletes_the_directory_of_records(_scene: Scene) -> Callable[[], object]:
    kept = RUN / "kept"
    RECORDS.rename(kept)

    def back() -> None:
        if RECORDS.exists():
            for path in kept.iterdir():
                path.rename(RECORDS / path.name)
        else:
            kept.rename(RECORDS)

    return back


def deletes_the_quarantine(_scene: Scene) -> None:
    (RUN / "quarantine").rmdir()


def _stage() -> None:
    """See to it that there is the stage, which newer kernels rarely need."""
    if not (RUN / "stage").is_mount():
        mount("overlayd-storage", RUN / "stage", "tmpfs", "mode=700")
        sc.mount_propagation(str(RUN / "stage"), sc.MS_PRIVATE)


def unmounts_the_stage(_scene: Scene) -> None:
    _stage()
    sc.umount2(str(RUN / "stage"), sc.MNT_DETACH)


def shares_the_stage(_scene: Scene) -> None:
    _stage()
    sc.mount_propagation(str(RUN / "stage"), sc.MS_SHARED)


def deletes_world_json(_scene: Scene) -> Callable[[], object]:
    (RUN / "world.json").rename(RUN / "kept")
    return lambda: (RUN / "kept").rename(RUN / "world.json")


MEDDLINGS: Final = (
    unmounts_it,
    unmounts_it_lazily,
    covers_it,
    covers_the_directory_above,
    mounts_inside_it,
    moves_it,
    binds_it_elsewhere,
    makes_its_mount_read_only,
    makes_its_file_system_read_only,
    makes_its_mount_private,
    makes_its_mount_shared,
    makes_its_mount_a_slave,
    makes_its_mount_unbindable,
    changes_the_propagation_beneath_it,
    makes_what_is_beneath_it_read_only,
    unmounts_its_layer,
    unmounts_its_storage,
    covers_its_storage,
    moves_its_storage,
    makes_its_storage_read_only,
    makes_its_layer_writable_and_empties_it,
    fills_its_storage,
    deletes_its_storage,
    exchanges_storage_directories,
    makes_its_storage_directory_a_link,
    deletes_its_record,
    truncates_its_record,
    cuts_its_record_short,
    edits_its_phase,
    edits_its_name,
    edits_its_place,
    edits_its_tree,
    announces_what_is_not,
    exchanges_records,
    fills_the_bookkeeping,
    uses_up_the_inodes_of_the_bookkeeping,
    fills_run,
    makes_the_bookkeeping_read_only,
    covers_the_bookkeeping,
    changes_the_propagation_of_the_bookkeeping,
    deletes_the_lock,
    deletes_the_directory_of_records,
    deletes_the_quarantine,
    unmounts_the_stage,
    shares_the_stage,
    deletes_world_json,
)
