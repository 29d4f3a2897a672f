# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring two things against each other, and writing down what came out.

Machines are noisy and drift, so nothing is measured alone: the two take turns (A B A B …) within
each round, a round gives one ratio (of its two medians), and a row shows the median, least and
largest of the rounds' ratios.  Times are in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Sample = Callable[[], float]
    """Does the work once; returns the seconds that the part of interest took."""

_HEAD: Final = ("work", "against", "takes", "to", "ratio", "min-max", "to reach", "reached")
_GAP_HEAD: Final = (
    "exchange",
    "rounds",
    "opens",
    "failed",
    "base",
    "each",
    "to reach",
    "reached",
)
_DECIMALS_BELOW: Final = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """The medians of each round of a paired measurement, in seconds."""

    ours: tuple[float, ...]
    against: tuple[float, ...]
    inner: int

    @property
    def ratios(self) -> list[float]:
        """One ratio per round."""
        return [a / b for a, b in zip(self.ours, self.against, strict=True)]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of ratios; no goal where it is only reported."""

    name: str
    work: str
    against: str
    pair: Pair
    goal: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median ratio is as low as it should be."""
        return None if self.goal is None else median(self.pair.ratios) <= self.goal

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        ratios = self.pair.ratios
        return (
            self.work,
            self.against,
            human_time(median(self.pair.ours)),
            human_time(median(self.pair.against)),
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            "-" if self.goal is None else f"<= {self.goal:g}",
            _yes(self.reached),
        )

    def as_object(self) -> dict[str, object]:
        """Return what the JSON file holds of it."""
        ratios = self.pair.ratios
        return {
            "name": self.name,
            "work": self.work,
            "against": self.against,
            "ours_seconds": median(self.pair.ours),
            "against_seconds": median(self.pair.against),
            "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
            "rounds": len(ratios),
            "samples_per_round": self.pair.inner,
            "to_reach": self.goal,
            "reached": self.reached,
        }


@dataclass(frozen=True, slots=True)
class GapRow:
    """What a reader saw while a mount was exchanged *rounds* times in *seconds*."""

    name: str
    way: str
    rounds: int
    seconds: float
    opens: int
    failed: int
    base: int
    other: int
    must_be_gapless: bool

    @property
    def reached(self) -> bool | None:
        """Whether nothing but the overlay was seen; None where nobody claims that."""
        if not self.must_be_gapless:
            return None
        return self.opens > 0 and not (self.failed or self.base or self.other)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        return (
            self.way,
            f"{self.rounds:,}",
            f"{self.opens:,}",
            f"{self.failed:,}",
            f"{self.base:,}" + (f" (and {self.other:,} something else)" if self.other else ""),
            human_time(self.seconds / self.rounds),
            "0, 0" if self.must_be_gapless else "-",
            _yes(self.reached),
        )

    def as_object(self) -> dict[str, object]:
        """Return what the JSON file holds of it."""
        return {
            "name": self.name,
            "way": self.way,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "opens": self.opens,
            "failed": self.failed,
            "saw_base": self.base,
            "saw_something_else": self.other,
            "reached": self.reached,
        }


@dataclass(slots=True)
class Meter:
    """Progress on standard error: on a terminal one line that is redrawn, else one per case."""

    live: bool = field(default_factory=sys.stderr.isatty)
    _title: str = ""
    _drawn: bool = False

    def begin(self, title: str) -> None:
        """Announce the next case."""
        self._title = title
        self._write(title)
        if not self.live:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def step(self, done: int, total: int) -> None:
        """Show how far the case is."""
        if self.live:
            self._write(f"{self._title}: {done} of {total}")

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self.live and self._drawn:
            self._write("")
            self._drawn = False

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}" if self.live else text)
        sys.stderr.flush()
        self._drawn = True


def timed(work: Callable[[], object]) -> float:
    """Do *work* once and return the seconds it took."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e9


def run_quietly(*command: str) -> None:
    """Run a program to its end and throw its output away.

    Python may write its bytecode, as it may where programs are installed: who forbids it in the
    environment would measure the compiler at every start.

    :raises subprocess.CalledProcessError: if it fails.
    """
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    null = subprocess.DEVNULL
    subprocess.run(command, check=True, env=env, stdin=null, stdout=null)


def paired(ours: Sample, against: Sample, meter: Meter, *, rounds: int, inner: int) -> Pair:
    """Measure the two in turns, after one turn each that does not count."""
    ours()
    against()
    medians: list[tuple[float, float]] = []
    for number in range(rounds):
        meter.step(number, rounds)
        turns = [(ours(), against()) for _ in range(inner)]
        medians.append((median(a for a, _ in turns), median(b for _, b in turns)))
    return Pair(tuple(a for a, _ in medians), tuple(b for _, b in medians), inner)


def human_time(seconds: float) -> str:
    """Write a time in the unit that suits it, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            digits = 2 if value < _DECIMALS_BELOW else 1 if value < _DECIMALS_BELOW**2 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError


def _yes(reached: bool | None) -> str:  # noqa: FBT001  # it is the value shown
    return "reported" if reached is None else "yes" if reached else "NO"


def table(rows: Sequence[Row]) -> str:
    """Return the table of ratios."""
    return _columns([_HEAD, *(row.cells() for row in rows)], texts=2)


def gap_table(rows: Sequence[GapRow]) -> str:
    """Return the table of what readers saw."""
    return _columns([_GAP_HEAD, *(row.cells() for row in rows)], texts=1)


def _columns(rows: Sequence[Sequence[str]], *, texts: int) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
