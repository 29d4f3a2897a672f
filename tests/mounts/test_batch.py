# SPDX-License-Identifier: LGPL-2.1-or-later
"""Batch files: many overlays at once, all or none, and the way back from dump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import batch, mountinfo
from overlayd.errors import (
    ExistsError,
    InterruptedByUserError,
    NotFoundError,
    OverlaydError,
    RefusedError,
)
from overlayd.manager import Manager
from overlayd.model import Options, Request
from overlayd.progress import Progress
from tests.mounts.conftest import COMMAND, PLAY, ROOT, RUN, SOURCES, defaults, snapshot
from tests.mounts.processes import child, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from overlayd.executor import Operation
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
FILE = SOURCES / "overlays.toml"


def table(name: str, **keys: str | bool) -> str:
    usual = {"name": name, "source": f"{SOURCES}/s", "target": f"{PLAY}/{name}"}
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in {**usual, **keys}.items())
    return "[[overlay]]\n" + "".join(lines)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """Wait for the threads of the pool: a process with others cannot enter the next world."""
    before = len(os.listdir("/proc/self/task"))
    yield
    assert eventually(lambda: len(os.listdir("/proc/self/task")) <= before)


def prepare(world: World, *names: str) -> None:
    world.source("s", NEW)
    for name in names:
        world.base(name, FILES)


def apply_all(
    requests: Sequence[Request], manager: Callable[[], Manager], *, jobs: int, atomic: bool
) -> list[batch.Outcome]:
    whole = manager if atomic else None
    return batch.run(requests, manager, Progress(), jobs=jobs, atomic=whole)


def run(
    world: World, requests: Sequence[Request], *, atomic: bool = False, jobs: int = 4
) -> list[batch.Outcome]:
    return apply_all(requests, world.manager, jobs=jobs, atomic=atomic)


def requests(*names: str) -> list[Request]:
    return [Request(name, f"{SOURCES}/s", f"{PLAY}/{name}") for name in names]


def codes(outcomes: Sequence[batch.Outcome]) -> list[str]:
    return ["done" if o.error is None else o.error.code for o in outcomes]


@pytest.mark.parametrize("atomic", [False, True], ids=["each for itself", "atomic"])
@pytest.mark.parametrize("jobs", [1, 8])
def test_batch_applies_all_and_answers_in_the_order_of_the_file(
    world: World, *, atomic: bool, jobs: int
) -> None:
    names = [f"t{number}" for number in range(12)]
    prepare(world, *names)
    outcomes = run(world, requests(*names), atomic=atomic, jobs=jobs)
    assert codes(outcomes) == ["done"] * 12
    assert [o.overlay.record.name for o in outcomes if o.overlay is not None] == names
    for name in names:
        assert (PLAY / name / "a").read_text() == "new a"
    world.check_invariants()
    for name in names:
        world.manager().remove(name)
    assert world.leftovers() == []


@pytest.mark.parametrize("atomic", [False, True], ids=["each for itself", "atomic"])
def test_sources_are_copied_at_the_same_time(world: World, *, atomic: bool) -> None:
    prepare(world, "one", "two", "new")
    barrier = threading.Barrier(2)

    def trace(when: str, operation: Operation) -> None:
        if when == "before" and type(operation).__name__ == "FillLayer":
            barrier.wait(10)

    def manager() -> Manager:
        return Manager(defaults, warn=world.warnings.append, trace=trace)

    outcomes = apply_all(requests("one", "two"), manager, jobs=2, atomic=atomic)
    assert codes(outcomes) == ["done", "done"]


def test_each_error_is_reported_and_the_others_are_applied(world: World) -> None:
    prepare(world, "good", "taken", "last")
    world.apply("taken", SOURCES / "s", PLAY / "taken")
    wanted = [
        *requests("good", "taken"),
        Request("missing", f"{SOURCES}/nothing", f"{PLAY}/last"),
        Request("outside", f"{SOURCES}/s", "/etc/x"),
        *requests("last"),
    ]
    outcomes = run(world, wanted)
    assert codes(outcomes) == ["done", "exists", "not-found", "refused", "done"]
    assert isinstance(batch.worst(outcomes), ExistsError)
    assert sorted(o.record.name for o in world.manager().list()) == ["good", "last", "taken"]
    world.check_invariants()


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_atomic_leaves_nothing_when_one_fails_and_says_which(world: World, bad: int) -> None:
    names = ["t0", "t1", "t2", "t3", "t4"]
    prepare(world, *names)
    before = snapshot(PLAY)
    wanted = requests(*names)
    wanted[bad] = Request(names[bad], f"{SOURCES}/nothing", f"{PLAY}/{names[bad]}")
    outcomes = run(world, wanted, atomic=True, jobs=2)
    assert all(o.error is not None and o.overlay is None for o in outcomes)
    assert isinstance(outcomes[bad].error, NotFoundError)
    # What decides the exit code is the cause and not what followed from it.
    worst = batch.worst(outcomes)
    assert isinstance(worst, NotFoundError)
    assert f"{SOURCES}/nothing" in worst.message
    assert snapshot(PLAY) == before
    assert world.leftovers() == []


def test_atomic_shows_nothing_before_everything_is_copied(world: World) -> None:
    names = ["t0", "t1", "t2"]
    prepare(world, *names)
    seen: list[tuple[str, list[str]]] = []

    def trace(when: str, operation: Operation) -> None:
        step = type(operation).__name__
        if when == "after" and step in {"Reserve", "FillLayer", "BuildOverlay"}:
            seen.append((step, [n for n in names if (PLAY / n / "a").read_text() == "new a"]))

    def manager() -> Manager:
        return Manager(defaults, warn=world.warnings.append, trace=trace)

    outcomes = apply_all(requests(*names), manager, jobs=2, atomic=True)
    assert codes(outcomes) == ["done"] * 3
    assert len(seen) == 9
    assert [shown for _, shown in seen if shown] == []


def test_atomic_undoes_what_it_had_attached_when_a_later_attach_fails(world: World) -> None:
    names = ["t0", "t1", "t2"]
    prepare(world, *names)
    before = snapshot(PLAY)
    attached: list[str] = []

    def trace(when: str, operation: Operation) -> None:
        if type(operation).__name__ == "Attach":
            attached.append(when)
            if when == "before" and attached.count("after") == 2:
                raise OSError(5, "made to fail")

    def manager() -> Manager:
        return Manager(defaults, warn=world.warnings.append, trace=trace)

    # Somebody who looked into the first in the moment it was there does not keep it.
    outcomes = apply_all(requests(*names), manager, jobs=1, atomic=True)
    assert attached[:5] == ["before", "after", "before", "after", "before"]
    assert all(o.error is not None and o.overlay is None for o in outcomes)
    worst = batch.worst(outcomes)
    assert worst is not None
    assert worst.code == "kernel"
    assert snapshot(PLAY) == before
    assert world.leftovers() == []


@pytest.mark.parametrize("atomic", [False, True], ids=["each for itself", "atomic"])
@pytest.mark.parametrize("second", ["outer/t", "outer/t/sub", "outer", "outer/t/new"])
def test_of_conflicting_targets_in_one_file_one_wins_or_none_if_atomic(
    world: World, *, atomic: bool, second: str
) -> None:
    prepare(world, "outer/t")
    world.source("file", {"x": "x"})
    before = snapshot(PLAY)
    wanted = [
        Request("one", f"{SOURCES}/file", f"{PLAY}/outer/t"),
        Request("two", f"{SOURCES}/file", f"{PLAY}/{second}"),
    ]
    outcomes = run(world, wanted, atomic=atomic)
    got = sorted(codes(outcomes))
    if atomic:
        assert "done" not in got
        assert "exists" in got
        assert isinstance(batch.worst(outcomes), ExistsError)
        assert snapshot(PLAY) == before
        assert world.leftovers() == []
    else:
        assert got == ["done", "exists"]
        assert len(world.manager().list()) == 1
        world.check_invariants()


def facts(world: World) -> list[tuple[object, ...]]:
    return [
        (
            o.record.name,
            o.record.source,
            o.record.target,
            o.record.mount_point,
            o.record.options,
            o.record.size,
            o.state,
        )
        for o in world.manager().list()
    ]


def test_what_dump_writes_makes_the_same_overlays_again(world: World) -> None:
    manager = world.manager()
    source = world.source("s", NEW)
    odd = world.source('odd, "quoted": \\ dir\nline', {"x": "x"})
    for name in ("plain", "options", "into", "single", "above", "link"):
        world.base(name, FILES)
    (PLAY / "way").symlink_to("link")
    world.apply("plain", source, PLAY / "plain")
    world.apply(
        "options",
        source,
        PLAY / "options",
        read_only=True,
        allow_other=True,
        default_permissions=True,
        preserve_owner=True,
        allow_critical=True,
    )
    world.apply("into", source / "a", PLAY / "into", size=12345 << 10)
    world.apply("single", source / "a", PLAY / "single/a", size=4 << 30)
    world.apply("above", odd, PLAY / "above/not/there: yet", size=64 << 10)
    world.apply("link", source, PLAY / "way")
    before = facts(world)
    shown = {p: v for p, v in snapshot(PLAY).items() if isinstance(v[-1], bytes)}
    dumped = world.run("dump").stdout
    FILE.write_text(dumped)
    assert len(tomllib.loads(dumped)["overlay"]) == 6
    for name in ("plain", "options", "into", "single", "above", "link"):
        manager.remove(name)
    done = world.run("batch", FILE, "--atomic")
    assert len(done.stdout.splitlines()) == 7  # 'above' says what it covers, too
    assert facts(world) == before
    assert {p: v for p, v in snapshot(PLAY).items() if isinstance(v[-1], bytes)} == shown
    assert world.run("dump").stdout == dumped
    world.check_invariants()


def test_dump_of_nothing_and_of_what_is_draining_holds_no_overlay(world: World) -> None:
    assert "[[overlay]]" not in world.run("dump").stdout
    prepare(world, "fix")
    world.apply("fix", SOURCES / "s", PLAY / "fix")
    answer = world.json("dump")
    assert isinstance(answer, dict)
    assert tomllib.loads(answer["toml"])["overlay"][0]["name"] == "fix"
    with child("os.chdir(sys.argv[1])", PLAY / "fix") as holder:
        world.manager().remove("fix", lazy=True)
        assert "[[overlay]]" not in batch.dump(world.manager().list(draining=True))
        holder.let_go()


def test_path_that_toml_cannot_hold_is_refused_by_dump_with_the_overlay_named(
    world: World,
) -> None:
    prepare(world, "fix")
    source = SOURCES / os.fsdecode(b"\xff")
    source.mkdir()
    world.apply("fix", source, PLAY / "fix")
    done = world.run("dump", code=5)
    assert done.stdout == ""
    assert "fix: source " in done.stderr
    assert "\\xff" in done.stderr


def test_relative_source_is_relative_to_the_file(world: World) -> None:
    world.base("app", FILES)
    world.source("folder/tree", NEW)
    file = SOURCES / "folder/overlays.toml"
    file.write_text(table("one", source="tree", target=f"{PLAY}/app"))
    assert batch.read(file)[0].source == f"{SOURCES}/folder/tree"
    file.write_text(table("one", source="./tree/../tree", target=f"{PLAY}/app"))
    world.run("batch", "folder/overlays.toml", cwd=SOURCES)
    assert (PLAY / "app/a").read_text() == "new a"


def test_every_key_of_apply_can_be_said(world: World) -> None:
    FILE.write_text(
        table(
            "one",
            size="64K",
            allow_other=True,
            default_permissions=True,
            allow_critical=True,
            preserve_owner=True,
        )
        + table("two", read_only=True)
    )
    del world
    one, two = batch.read(FILE)
    assert one.size == 64 << 10
    assert one.options == Options(
        allow_other=True, default_permissions=True, allow_critical=True, preserve_owner=True
    )
    assert two.options == Options(read_only=True)


BAD = {
    "empty": ("", "must hold [[overlay]] tables"),
    "not toml": ("[[overlay]\n", "not TOML"),
    "not utf-8": ("\udcff = 1", "not TOML"),
    "another table": (f"{table('x')}[other]\n", "other is unknown"),
    "one table, not an array": ("[overlay]\nname = 'x'\n", "must hold [[overlay]] tables"),
    "not tables": ("overlay = [1, 2]\n", "overlay 1: must be a table"),
    "unknown key": (table("x") + table("y", sice="1M"), "overlay 2: sice: no such key"),
    "wrong type": (table("x", read_only="yes"), "overlay 1: read_only must be true or false"),
    "number": ("[[overlay]]\nname = 3\n", "overlay 1: name must be a string"),
    "no name": ("[[overlay]]\nsource = '/s'\ntarget = '/usr/t'\n", "name is missing"),
    "empty source": (table("x", source=""), "overlay 1: source is missing"),
    "bad name": (table("-x"), "overlay 1: '-x' is not an overlay name"),
    "bad size": (table("x", size="12"), "overlay 1: '12' is not a size"),
    "relative target": (table("x", target="usr/x"), "overlay 1: target must be an absolute path"),
    "nul": (table("x", source="/a\0b"), "overlay 1: source must be a string"),
    "name twice": (table("x") + table("x", target="/usr/y"), "two overlays are named 'x'"),
    "size of what is read-only": (
        table("x", read_only=True, size="1M"),
        "overlay 1: size is the room for edits, and read_only has none",
    ),
    "control characters": (table("x", **{"\x1b[31m\n": "1"}), "\\x1b[31m\\n: no such key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_with_file_table_and_key_and_nothing_is_applied(
    world: World, case: str
) -> None:
    prepare(world, "x")
    text, message = BAD[case]
    if case == "control characters":
        text = table("x") + '"\\u001b[31m\\n" = "1"\n'
    FILE.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RefusedError) as caught:
        batch.read(FILE)
    assert str(FILE) in caught.value.message
    assert message in caught.value.message
    assert caught.value.message.isprintable()
    assert not RUN.exists()


def test_file_that_is_missing_a_directory_or_endless_is_an_error(world: World) -> None:
    del world
    for path, code in ((FILE, "not-found"), (SOURCES, "kernel"), (Path("/dev/zero"), "refused")):
        with pytest.raises(OverlaydError) as caught:
            batch.read(path)
        assert caught.value.code == code
        assert str(path) in caught.value.message


def test_file_can_be_a_pipe(world: World) -> None:
    prepare(world, "one")
    subprocess.run(
        [*COMMAND, "batch", "/dev/stdin"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=table("one").encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    assert (PLAY / "one/a").read_text() == "new a"


def test_command_line_says_what_became_of_each(world: World) -> None:
    prepare(world, "one", "two", "new")
    world.apply("two", SOURCES / "s", PLAY / "two")
    FILE.write_text(table("one") + table("two", target=f"{PLAY}/new"))
    done = world.run("batch", FILE, code=4)
    assert done.stdout.splitlines() == [
        f"one: {PLAY}/one shows {SOURCES}/s, 4 entries, 8K, writable"
    ]
    assert "two: failed: there is an overlay 'two' already" in done.stderr
    assert "overlayd: 1 of 2 overlays failed" in done.stderr


def test_json_has_an_overlay_or_an_error_for_each(world: World) -> None:
    prepare(world, "one", "two", "new")
    world.apply("two", SOURCES / "s", PLAY / "two")
    FILE.write_text(table("one") + table("two", target=f"{PLAY}/new"))
    done = world.run("batch", FILE, "--json", code=4)
    one, two = json.loads(done.stdout)
    assert (one["name"], one["overlay"]["state"]) == ("one", "active")
    assert set(one) == {"name", "overlay"}
    assert set(two) == {"name", "error"}
    assert set(two["error"]) == {"code", "message", "hint"}
    assert two["error"]["code"] == "exists"
    assert json.loads(done.stderr)["error"]["code"] == "exists"


def test_atomic_on_the_command_line_names_the_cause_and_exits_with_its_code(world: World) -> None:
    prepare(world, "one", "two", "new")
    world.apply("two", SOURCES / "s", PLAY / "two")
    FILE.write_text(table("one") + table("two", target=f"{PLAY}/new"))
    done = world.run("batch", FILE, "--atomic", code=4)
    assert done.stdout == ""
    assert "the first: there is an overlay 'two' already" in done.stderr
    assert "one: failed: not applied" in done.stderr
    assert [o.record.name for o in world.manager().list()] == ["two"]


@pytest.mark.parametrize("jobs", ["0", "65", "x"])
def test_number_of_jobs_has_bounds(world: World, jobs: str) -> None:
    prepare(world, "one")
    FILE.write_text(table("one"))
    assert "--jobs" in world.run("batch", FILE, "--jobs", jobs, code=2).stderr


def test_interrupted_between_copying_and_showing_atomic_leaves_nothing(world: World) -> None:
    names = ["t0", "t1", "t2"]
    prepare(world, *names)
    before = snapshot(PLAY)
    for point in range(40):
        progress = Progress()
        passed = 0

        def trace(_when: str, _operation: Operation, progress: Progress = progress) -> None:
            nonlocal passed
            if passed == point:  # noqa: B023  # used before the next round
                progress.stop()
            passed += 1

        def manager() -> Manager:
            return Manager(defaults, warn=world.warnings.append, trace=trace)

        outcomes = batch.run(
            requests(*names),
            manager,
            progress,
            jobs=1,
            atomic=manager,
        )
        if codes(outcomes) == ["done"] * 3:
            assert passed <= point + 2
            break
        assert isinstance(batch.worst(outcomes), InterruptedByUserError)
        assert snapshot(PLAY) == before
        assert world.leftovers() == []
    for overlay in world.manager().list():
        world.manager().remove(overlay.record.name)
    assert snapshot(PLAY) == before
    assert world.leftovers() == []


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "each for itself"])
def test_ctrl_c_in_the_middle_of_a_batch(world: World, *, atomic: bool) -> None:
    names = [f"t{number}" for number in range(4)]
    for name in names:
        world.base(name, FILES)
    source = world.source("s", {})
    for number in range(4000):
        (source / f"file{number}").write_bytes(b"x")
    before = snapshot(PLAY)
    FILE.write_text("".join(map(table, names)))
    process = subprocess.Popen(
        [*COMMAND, "batch", str(FILE), *(["--atomic"] if atomic else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert eventually(lambda: RUN.is_mount() and len(os.listdir(RUN / "records")) == 4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    if atomic:
        assert mountinfo.read().tagged == {}
    else:
        world.check_invariants()
        for overlay in world.manager().list():
            world.manager().remove(overlay.record.name)
    assert snapshot(PLAY) == before
    assert world.leftovers() == []
