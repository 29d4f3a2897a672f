# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m benchmarks [--json FILE] [--only NAME…] [--quick]``; needs root.

Prints a table of ratios and one of what readers saw.  Nothing depends on how long anything took:
the exit code is 1 only if something could not be measured, or a reader saw a gap.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks import baseline, gap, world
from benchmarks.cases import CASES, Setting
from benchmarks.measure import GapRow, Meter, Row, gap_table, table
from overlayd import mountinfo
from overlayd.errors import OverlaydError

_GAP: Final = "gap"


def main() -> int:
    """Measure what was asked for; return the exit code."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("the benchmarks need root: they mount overlays", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    meter = Meter()
    rows: list[Row] = []
    gaps: list[GapRow] = []
    failures: list[str] = []
    start = time.monotonic()
    try:
        ground = world.enter()
        where = os.environ.get("TMPDIR", "/var/tmp")  # a disk, unlike /tmp in many places
        with tempfile.TemporaryDirectory(prefix="overlayd-bench-", dir=where) as temporary:
            baseline.prepare()
            here = Setting(ground, temporary, meter, arguments.quick)
            for name in arguments.only or [*CASES, _GAP]:
                meter.begin(name)
                try:
                    if name == _GAP:
                        full, plain = here.times(10_000, 1_000), here.times(1_000, 200)
                        gaps += gap.rows(ground, temporary, meter, full, plain)
                    else:
                        rows += CASES[name](here)
                except (OverlaydError, OSError, RuntimeError) as error:
                    failures.append(f"{name}: {error}")
        if not failures:
            failures = [f"the overlay {uuid} is left" for uuid in mountinfo.read().tagged]
    except KeyboardInterrupt:
        meter.clear()
        print("interrupted; nothing is left behind", file=sys.stderr)
        return 130
    meter.clear()
    for text in (table(rows) if rows else "", gap_table(gaps) if gaps else ""):
        if text:
            print(f"{text}\n")
    for failure in failures:
        print(f"not measured: {failure}", file=sys.stderr)
    if arguments.json is not None:
        seconds = time.monotonic() - start
        result = _as_object(rows, gaps, failures, quick=arguments.quick, seconds=seconds)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 1 if failures or any(row.reached is False for row in gaps) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sources")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[*CASES, _GAP], help=", ".join([*CASES, _GAP])
    )
    return parser.parse_args()


def _as_object(
    rows: list[Row], gaps: list[GapRow], failures: list[str], *, quick: bool, seconds: float
) -> dict[str, object]:
    return {
        "machine": {
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "quick": quick,
        "seconds": seconds,
        "rows": [row.as_object() for row in rows],
        "gap": [row.as_object() for row in gaps],
        "not_measured": failures,
    }


if __name__ == "__main__":
    sys.exit(main())
