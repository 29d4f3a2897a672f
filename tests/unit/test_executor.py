# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations run in order, and are undone in reverse until one has decided."""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from overlayd.errors import (
    BusyError,
    InterruptedByUserError,
    KernelError,
    OverlaydError,
    SpaceError,
)
from overlayd.executor import Executor, Run, StaysError, Step
from overlayd.progress import Progress
from tests.unit.conftest import make_record, open_fds

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.executor import Operation
    from overlayd.store import Store


@dataclass
class Note(Step):
    """A step that only writes into a log; it fails where it is told to."""

    name: str
    log: list[str]
    failure: BaseException | None = None
    undo_failure: BaseException | None = None

    def describe(self) -> str:
        return f"note {self.name}"

    def apply(self, run: Run) -> None:
        del run
        self.log.append(self.name)
        if self.failure is not None:
            raise self.failure

    def undo(self, run: Run) -> None:
        del run
        self.log.append(f"undo {self.name}")
        if self.undo_failure is not None:
            raise self.undo_failure


@dataclass
class Decide(Note):
    """A step after which nothing is undone."""

    decisive: ClassVar[bool] = True


@dataclass
class Bench:
    """A run with no store behind it, and the log of what happened."""

    log: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    def run(self) -> Run:
        return Run(cast("Store", None), self.progress, make_record())

    def executor(
        self, *steps: Operation, trace: Callable[[str, Operation], None] | None = None
    ) -> Executor:
        return Executor(self.run(), steps, trace)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_steps_run_in_order(bench: Bench) -> None:
    bench.executor(*(Note(name, bench.log) for name in "abc")).advance()
    assert bench.log == ["a", "b", "c"]


def test_failure_undoes_in_reverse_with_the_failed_step_first(bench: Bench) -> None:
    steps = [Note("a", bench.log), Note("b", bench.log, BusyError("no")), Note("c", bench.log)]
    with pytest.raises(BusyError, match="no"):
        bench.executor(*steps).advance()
    assert bench.log == ["a", "b", "undo b", "undo a"]


@pytest.mark.parametrize("number", range(1, 6))
def test_failure_of_each_step_undoes_all_before_it(bench: Bench, number: int) -> None:
    names = [str(i) for i in range(1, 6)]
    steps = [
        Note(name, bench.log, BusyError("no") if name == str(number) else None) for name in names
    ]
    with pytest.raises(BusyError):
        bench.executor(*steps).advance()
    done = names[:number]
    assert bench.log == [*done, *(f"undo {name}" for name in reversed(done))]


def test_nothing_is_undone_once_a_decisive_step_is_done(bench: Bench) -> None:
    steps = [Note("a", bench.log), Decide("b", bench.log), Note("c", bench.log, BusyError("no"))]
    with pytest.raises(BusyError):
        bench.executor(*steps).advance()
    assert bench.log == ["a", "b", "c"]


def test_decisive_step_that_fails_is_undone(bench: Bench) -> None:
    steps = [Note("a", bench.log), Decide("b", bench.log, BusyError("no"))]
    with pytest.raises(BusyError):
        bench.executor(*steps).advance()
    assert bench.log == ["a", "b", "undo b", "undo a"]


@pytest.mark.parametrize("bad", [OSError(errno.EIO, "io"), BusyError("later")])
def test_first_cause_is_what_the_caller_hears_and_undoing_goes_on(
    bench: Bench, bad: Exception
) -> None:
    steps = [
        Note("a", bench.log),
        Note("b", bench.log, undo_failure=bad),
        Note("c", bench.log, BusyError("first")),
    ]
    with pytest.raises(BusyError, match="first"):
        bench.executor(*steps).advance()
    assert bench.log == ["a", "b", "c", "undo c", "undo b", "undo a"]


def test_what_has_to_stay_keeps_what_came_before_it(bench: Bench) -> None:
    steps = [
        Note("a", bench.log),
        Note("b", bench.log, undo_failure=StaysError()),
        Note("c", bench.log, BusyError("first")),
    ]
    executor = bench.executor(*steps)
    with pytest.raises(BusyError, match="first"):
        executor.advance()
    executor.roll_back()  # once more, as an atomic batch does
    assert bench.log == ["a", "b", "c", "undo c", "undo b"]


def test_oserror_says_what_was_being_done(bench: Bench) -> None:
    error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    with pytest.raises(KernelError, match=r"note a: Invalid argument \(EINVAL\)"):
        bench.executor(Note("a", bench.log, error)).advance()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_storage_is_an_error_of_space(bench: Bench, number: int) -> None:
    with pytest.raises(SpaceError, match="no space left while trying to note a"):
        bench.executor(Note("a", bench.log, OSError(number, "full"))).advance()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), OverlaydError("x")])
def test_anything_that_is_raised_undoes_and_comes_through(
    bench: Bench, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        bench.executor(Note("a", bench.log), Note("b", bench.log, error)).advance()
    assert bench.log == ["a", "b", "undo b", "undo a"]


def test_wish_to_stop_is_heard_between_steps(bench: Bench) -> None:
    def stop(when: str, operation: Operation) -> None:
        if (when, operation.describe()) == ("after", "note a"):
            bench.progress.stop()

    with pytest.raises(InterruptedByUserError):
        bench.executor(Note("a", bench.log), Note("b", bench.log), trace=stop).advance()
    assert bench.log == ["a", "undo a"]


def test_wish_to_stop_comes_too_late_after_a_decisive_step(bench: Bench) -> None:
    def stop(when: str, operation: Operation) -> None:
        if (when, operation.describe()) == ("after", "note a"):
            bench.progress.stop()

    bench.executor(Decide("a", bench.log), Note("b", bench.log), trace=stop).advance()
    assert bench.log == ["a", "b"]


def test_running_stops_before_a_kind_of_step_and_goes_on_from_there(bench: Bench) -> None:
    executor = bench.executor(
        Note("a", bench.log), Note("b", bench.log), Decide("c", bench.log), Note("d", bench.log)
    )
    executor.advance(before=Decide)
    assert bench.log == ["a", "b"]
    executor.advance(before=Decide)
    assert bench.log == ["a", "b"]
    executor.advance()
    assert bench.log == ["a", "b", "c", "d"]


def test_what_was_run_so_far_can_be_rolled_back_once(bench: Bench) -> None:
    executor = bench.executor(Note("a", bench.log), Note("b", bench.log), Decide("c", bench.log))
    executor.advance(before=Decide)
    executor.roll_back()
    executor.roll_back()
    assert bench.log == ["a", "b", "undo b", "undo a"]


def test_trace_is_called_around_each_step_and_before_each_undo(bench: Bench) -> None:
    seen: list[tuple[str, str]] = []
    steps = [Note("a", bench.log), Note("b", bench.log, BusyError("no"))]
    executor = bench.executor(*steps, trace=lambda when, op: seen.append((when, op.describe())))
    with pytest.raises(BusyError):
        executor.advance()
    assert seen == [
        ("before", "note a"),
        ("after", "note a"),
        ("before", "note b"),
        ("undo", "note b"),
        ("undo", "note a"),
    ]


def test_signals_wait_until_everything_is_undone(bench: Bench) -> None:
    heard: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(",".join(bench.log)))

    def interrupt(when: str, operation: Operation) -> None:
        if (when, operation.describe()) == ("undo", "note b"):
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    try:
        with pytest.raises(BusyError):
            bench.executor(
                Note("a", bench.log), Note("b", bench.log, BusyError("no")), trace=interrupt
            ).advance()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["a,b,undo b,undo a"]


def test_closing_a_run_closes_its_descriptors_and_a_second_time_does_nothing(
    bench: Bench,
) -> None:
    before = open_fds()
    run = bench.run()
    run.overlay_fd = os.open("/", os.O_PATH)
    run.base_fd = os.open("/", os.O_PATH)
    run.base_mount_fd = os.open("/", os.O_PATH)
    run.close()
    run.close()
    assert open_fds() == before
