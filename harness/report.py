# SPDX-License-Identifier: LGPL-2.1-or-later
"""One table for the terminal and one page for the browser, from the records of any number of runs.

``python -m harness.report RECORDS... [--html FILE]`` joins the runs of several kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.figures import seconds_text
from harness.page import page
from harness.results import Outcome, Record, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Row:
    """What came of all tests on one machine with one kernel."""

    machine: str
    kernel: str
    release: str
    counts: Counter[Outcome]
    seconds: float

    @property
    def kernel_text(self) -> str:
        """The kernel as it was asked for, and what it was."""
        return f"{self.kernel} ({self.release})" if self.release else self.kernel


def rows(records: Iterable[Record]) -> list[Row]:
    """Return one row for each kernel and machine, in the order in which they first appear."""
    cases: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        cases.setdefault((record.kernel, record.machine), []).append(record)
    return [
        Row(
            machine=machine,
            kernel=kernel,
            release=next((record.release for record in found if record.release), ""),
            counts=Counter(record.outcome for record in found),
            seconds=sum(record.seconds for record in found),
        )
        for (kernel, machine), found in cases.items()
    ]


def table(records: Sequence[Record]) -> str:
    """Return kernel by machine by tests, why tests were skipped, and what failed how."""
    lines: list[tuple[str, ...]] = [("KERNEL", "MACHINE", "PASSED", "FAILED", "SKIPPED", "TIME")]
    lines += [
        (
            row.kernel_text or "-",
            row.machine or "-",
            *(str(row.counts[outcome]) for outcome in Outcome),
            seconds_text(row.seconds),
        )
        for row in rows(records)
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)  # noqa: PLR2004 - names
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    skips = Counter(
        (record.reason or "no reason given", place(record))
        for record in records
        if record.outcome is Outcome.SKIPPED
    )
    if skips:
        text += ["", "skipped:"]
        text += [
            f"{count:5} on {where}: {reason}" for (reason, where), count in skips.most_common()
        ]
    failures = [record for record in records if record.outcome is Outcome.FAILED]
    if failures:
        text += ["", "failed:"]
    for record in failures:
        text.append(f"  {record.test} on {place(record)}: {record.reason}")
        if record.artefacts:
            text.append(f"      kept in   {record.artefacts}")
        if record.reproduce:
            text.append(f"      again by  {record.reproduce}")
    return "\n".join(text) + "\n"


def place(record: Record) -> str:
    """Return the machine and kernel of a record for people."""
    return f"{record.machine}, {record.kernel}" if record.machine else "no machine"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of records, write the page if asked to; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description="Join the records of test runs."
    )
    parser.add_argument("records", nargs="+", type=Path, help="files of the option --records")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page to FILE")
    parser.add_argument("--title", default="System tests")
    options = parser.parse_args(arguments)
    try:
        records = read(*options.records)
        if options.html is not None:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(page(records, title=options.title), encoding="utf-8")
    except (HarnessError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(records))
    if options.html is not None:
        sys.stdout.write(f"\nreport: {options.html}\n")
    return int(any(record.outcome is Outcome.FAILED for record in records))


if __name__ == "__main__":
    sys.exit(main())
