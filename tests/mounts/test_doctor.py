# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the doctor says of a healthy machine, and of each thing that can be wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import pytest

from overlayd import config, doctor, mountinfo
from overlayd.errors import NotFoundError, OverlaydError
from tests.mounts.conftest import COMMAND, EMPTY_CONFIG, PLAY, ROOT, RUN, mount
from tests.mounts.processes import as_nobody

if TYPE_CHECKING:
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}


class Problem(TypedDict):
    text: str
    hint: str
    fatal: bool


class Report(TypedDict):
    ok: bool
    kernel: str
    service: str | None
    features: dict[str, bool]
    depth_left: int
    limits: dict[str, str]
    config_files: list[str]
    problems: list[Problem]


def examine(file: Path = EMPTY_CONFIG) -> Report:
    """Examine in-process: a command line costs a tenth of a second."""
    here = os.getpid()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads, which xdist has; the doctor has none.
            warnings.simplefilter("ignore", DeprecationWarning)
            report = doctor.examine(lambda: config.load(file))
    finally:
        if os.getpid() != here:
            os._exit(1)  # a child of the doctor's that came back must not go on as a second pytest
    return cast("Report", json.loads(json.dumps(report.as_object())))


def test_healthy_machine_is_ok_and_every_needed_feature_is_named(world: World) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    report = cast("Report", world.json("doctor", "--config", EMPTY_CONFIG))
    assert set(report) == set(Report.__annotations__)
    assert report["ok"]
    assert report["problems"] == []
    assert report["kernel"] == "{0.sysname} {0.release} {0.machine}".format(os.uname())
    for name in ("openat2", "new mount API", "writable overlay", "read-only overlay"):
        assert report["features"][name] is True
    assert any(
        report["features"][f"exchange by {way}"] for way in ("MOVE_MOUNT_BENEATH", "propagation")
    )
    assert 1 <= report["depth_left"] <= 2
    assert report["limits"]["source_size"] == "4G"
    assert report["limits"]["overlays"] == "1000"
    assert report["config_files"] == [str(EMPTY_CONFIG)]
    # Probing is done where nobody sees it, and a look makes no world.
    assert Path("/proc/self/mountinfo").read_text() == before
    assert not RUN.exists()


def test_report_for_people_says_the_same(world: World) -> None:
    text = world.run("doctor", "--config", EMPTY_CONFIG).stdout
    for line in (
        f"kernel: Linux {os.uname().release} {os.uname().machine}",
        "writable overlay: yes",
        "source_size: 4G",
        f"configuration: {EMPTY_CONFIG}",
    ):
        assert line in re.sub(" +", " ", text)
    assert text.isascii()


def test_features_are_what_the_kernel_does_and_not_its_version(world: World) -> None:
    # A new kernel that denies a call, as it does in some containers; the rest is the real one.
    del world
    code = (
        "import errno, json, os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from overlayd import doctor, config, syscalls\n"
        "def refused(*_):\n    raise OSError(errno.EPERM, 'refused', 'move_mount')\n"
        "real = syscalls.move_mount\n"
        "def some(fd, to, flags=0):\n"
        "    if flags & syscalls.MOVE_MOUNT_BENEATH:\n        refused()\n"
        "    return real(fd, to, flags)\n"
        "syscalls.move_mount = some\n"
        "report = doctor.examine(config.load)\n"
        "print(json.dumps(report.as_object()))\n"
    )
    done = subprocess.run([COMMAND[0], "-c", code], capture_output=True, text=True, check=True)
    report = cast("Report", json.loads(done.stdout))
    assert report["features"]["exchange by MOVE_MOUNT_BENEATH"] is False
    assert report["features"]["exchange by propagation"] is True
    assert report["ok"]


def test_depth_left_shrinks_with_each_file_system_below_usr(world: World) -> None:
    del world
    depths = [examine()["depth_left"]]
    for level in range(2):
        ground = Path(f"/run/ground{level}")
        ground.mkdir()
        mount("ground", ground, "tmpfs")
        (ground / "other").mkdir()
        mount("stacked", "/usr", "overlay", f"lowerdir=/usr:{ground}/other,xino=off")
        report = examine()
        depths.append(report["depth_left"])
    assert depths == [2, 1, 0]
    (problem,) = report["problems"]
    assert problem["fatal"]
    assert "no overlay on /usr" in problem["text"]
    assert "two stacked file systems" in problem["hint"]
    assert not report["ok"]


BROKEN = {
    "unknown key": ("[limits]\noverlay = 3\n", "limits.overlay: no such key"),
    "unknown table": ("[limit]\noverlays = 3\n", "[limit]: no such table"),
    "wrong type": ('[limits]\noverlays = "3"\n', "limits.overlays: must be a whole number"),
    "no size": ('[limits]\nupper_size = "3"\n', "limits.upper_size: '3' is not a size"),
    "not toml": ("[limits\n", "not TOML"),
    "action": ('[flagged]\nroot = "shout"\n', "flagged.root: must be one of"),
    "tree": ('[critical]\ntrees = ["/etc"]\n', "critical.trees: '/etc' must be"),
    "depth": ("[limits]\nsource_depth = 100000\n", "limits.source_depth: must be at most"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_configuration_is_fatal_with_file_key_and_reason(world: World, case: str) -> None:
    text, reason = BROKEN[case]
    file = world.source("config", {"broken.toml": text}) / "broken.toml"
    report = examine(file)
    assert not report["ok"]
    (problem,) = report["problems"]
    assert problem["fatal"]
    assert problem["text"].startswith(f"{file}: ")
    assert reason in problem["text"]
    assert problem["hint"]
    # What can be known without it is still told.
    assert report["features"]["writable overlay"]


def test_configuration_that_does_not_exist_is_fatal(world: World) -> None:
    done = world.run("doctor", "--config", "/run/nothing.toml", code=9)
    assert "/run/nothing.toml" in done.stdout


def test_too_little_memory_is_fatal_with_both_figures(world: World) -> None:
    file = world.source("config", {"big.toml": '[limits]\nmemory_reserve = "100000G"\n'})
    (problem,) = examine(file / "big.toml")["problems"]
    assert problem["fatal"]
    assert "limits.memory_reserve" in problem["hint"]


def test_lost_overlay_is_named_with_the_way_to_be_rid_of_it(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    assert examine()["problems"] == []
    subprocess.run(["umount", base], check=True)
    report = examine()
    assert report["ok"]
    (problem,) = report["problems"]
    assert problem["text"] == f"fix: its mount is gone from {base}"
    assert problem["hint"] == "overlayd remove fix"
    world.run(*problem["hint"].split()[1:])
    assert examine()["problems"] == []


def test_covered_overlay_is_named(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    mount("foreign", base, "tmpfs")
    (problem,) = examine()["problems"]
    assert problem["text"] == f"fix: something is mounted over {base}"
    assert problem["hint"] == f"findmnt {base}"
    assert not problem["fatal"]


@pytest.mark.parametrize("part", ["layer", "upper.1"])
def test_storage_that_somebody_unmounted_is_told_and_does_not_stand_in_the_way(
    world: World, part: str
) -> None:
    base = world.base("app", FILES)
    uuid = world.apply("fix", world.source("s", NEW), base).record.uuid
    assert examine()["problems"] == []
    subprocess.run(["umount", "--lazy", RUN / "storage" / uuid / part], check=True)
    (problem,) = examine()["problems"]
    assert problem["text"].startswith(f"fix: its storage {part} was unmounted")
    storage = world.manager().status("fix").storage
    assert (storage is None) == (part == "upper.1"), "the figures of what lies beneath mean nothing"
    if part == "layer":
        with pytest.raises(NotFoundError, match="storage of fix is gone") as caught:
            world.manager().reset("fix", 1)
        assert caught.value.hint is not None
        assert (base / "a").read_text() == "new a"
    world.manager().reset("fix", 0)
    assert (base / "a").read_text() == "base a"
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_overlays_that_outlive_the_world_are_told(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    subprocess.run(["umount", "--recursive", "--lazy", RUN], check=True)
    (problem,) = examine()["problems"]
    assert problem["text"].endswith(f"without a record: {base}")
    assert "unmount it" in problem["hint"]
    subprocess.run(["umount", base], check=True)
    assert examine()["problems"] == []


def test_orphan_and_record_in_quarantine_are_named_and_cleanup_ends_both(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", NEW), base)
    (RUN / f"records/{overlay.record.uuid}.json").write_bytes(b"")
    problems = [p for p in examine()["problems"] if "moved to" not in p["text"]]
    assert [p["text"] for p in problems] == [
        f"a mount tagged overlayd:{overlay.record.uuid} without a record: {base}",
        f"a record could not be believed: {RUN}/quarantine/{overlay.record.uuid}.json.0",
    ]
    assert all("overlayd cleanup" in p["hint"] for p in problems)
    world.manager().cleanup()
    assert examine()["problems"] == []
    assert world.leftovers() == []


def test_foreign_mount_in_place_of_the_world_is_fatal(world: World) -> None:
    del world
    RUN.mkdir()
    mount("foreign", RUN, "tmpfs")
    report = examine()
    assert not report["ok"]
    (problem,) = report["problems"]
    assert "not overlayd's" in problem["text"]
    assert problem["hint"] == f"see 'findmnt {RUN}'"


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a\x0bb", "a\x85b", "a b\\040", "\udcff"])
def test_odd_mount_points_of_others_do_not_matter(world: World, name: str) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    theirs = Path("/run") / name
    theirs.mkdir()
    mount("theirs", theirs, "tmpfs")
    report = examine()
    assert report["ok"]
    assert report["problems"] == []


def test_quarantine_that_somebody_deleted_does_not_stop_the_doctor(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    os.rmdir(RUN / "quarantine")
    try:
        report = examine()
    except (OSError, OverlaydError) as error:
        pytest.fail(f"the doctor never raises for what it finds: {error!r}")
    assert report["kernel"]


def test_doctor_of_a_user_says_that_there_is_no_service(world: World) -> None:
    del world  # in which there is no bus
    done = as_nobody("doctor", "--json")
    assert done.returncode == 10, done.stderr
    report = cast("Report", json.loads(done.stdout))
    assert not report["ok"]
    [private, problem] = report["problems"]
    assert private["text"].startswith("no private overlays: ")  # as no boot made /run/overlayd
    assert (private["fatal"], problem["fatal"]) == (False, True)
    # A bare kernel has no library for it either.
    assert problem["text"].startswith(("the system bus cannot be", "the service cannot be asked"))


def test_probing_leaves_no_mount_process_or_file(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    before = (
        Path("/proc/self/mountinfo").read_text(),
        sorted(os.listdir("/run")),
        sorted(os.listdir("/proc/self/fd")),
        Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    )
    for _ in range(3):
        assert examine()["ok"]
    after = (
        Path("/proc/self/mountinfo").read_text(),
        sorted(os.listdir("/run")),
        sorted(os.listdir("/proc/self/fd")),
        Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    )
    assert after == before
    assert "probe" not in mountinfo.read().tagged
    assert os.listdir(PLAY) == ["app"]
