# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was tried of one kind of fault, as a line of JSON; :mod:`tests.crash.page` reads them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPORT = pytest.StashKey[bool]()


@dataclass(frozen=True, kw_only=True)
class Tried:
    """So many faults of a kind, how many of them held, and by which seed, if by any.

    Of the same fault and case what was added last counts.
    """

    fault: str
    case: str
    tried: int
    held: int
    seed: int | None
    seconds: float
    whole: bool
    remarks: list[str]

    def add(self, file: str) -> None:
        """Add it to a file, to which others may add at the same time."""
        line = asdict(self) | {"seconds": round(self.seconds, 1), "code": _code()}
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, json.dumps(line).encode() + b"\n")
        os.close(fd)


def _code() -> str:
    """Return which commit this is, and of which day."""
    here = os.path.dirname(__file__)
    said = ["git", "-C", here, "log", "-1", "--format=%h of %cs"]
    return subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()


@dataclass
class Proof:
    """What a test tried: *fault* is the kind, ``tried`` how many; ``whole`` and so on as asked."""

    fault: str
    whole: bool
    seed: int
    minutes: float
    tried: int = 0
    random: bool = False
    """Whether the seed was used."""
    remarks: list[str] = field(default_factory=list)

    def count(self, number: int = 1) -> None:
        """Note that so many more were tried, before it is known whether they hold."""
        self.tried += number

    def remark(self, text: str) -> None:
        """Note something for people, such as a rate."""
        self.remarks.append(text)


def proving(
    request: pytest.FixtureRequest, *, whole: bool, seed: int = 1, minutes: float = 0.0
) -> Iterator[Proof]:
    """Give what a test counts in; the kind of fault is the first line of its docstring."""
    doc = (request.function.__doc__ or request.node.name).strip().split("\n")[0]
    made = Proof(doc.rstrip("."), whole, seed, minutes)
    start = time.monotonic()
    yield made
    held = request.node.stash.get(_REPORT, False)
    if made.tried:
        tried = Tried(
            fault=made.fault,
            case=request.node.name,
            tried=made.tried,
            held=made.tried if held else made.tried - 1,
            seed=made.seed if made.random else None,
            seconds=time.monotonic() - start,
            whole=made.whole,
            remarks=made.remarks,
        )
        text = ", ".join([f"{made.tried} tried", *made.remarks])
        request.node.add_report_section("call", "tried", text)
        if file := request.config.option.tried:
            tried.add(file)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep whether the test held."""
    report = yield
    if report.when == "call":  # type: ignore[attr-defined]
        item.stash[_REPORT] = report.passed  # type: ignore[attr-defined]
    return report
