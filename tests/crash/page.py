# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write ``docs/proof.md`` of what was tried: ``python -m tests.crash.page TRIED PAGE``."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEAD: Final = """\
<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->
<!-- Written by tests/crash/page.py ('nox -s proof'); figures come from a run: change nothing. -->
# Proof

After any fault each overlay is wholly there or wholly gone, the base is untouched, the next command
works, and nobody else's overlay moved. What was done to that sentence, on Linux {kernel},
{cpus} processors, {hours}:

| fault | tried | held | seed | seconds | code |
|---|---:|---:|---|---:|---|
"""
_FOOT: Final = """
*Tried* counts faults, not tests: each is a command that was killed or refused something at one
exact point, an input, an operation or a change to the code, with everything looked at afterwards.
*Seconds* are those of the tests, which run side by side; *code* is the commit that was tried, with
its day. How each is done is in `tests/crash`.
"""


def main(argv: Sequence[str]) -> int:
    """Run as a program; 1 if something did not hold."""
    tried, page = map(Path, argv)
    every = [json.loads(line) for line in tried.read_text(encoding="utf-8").splitlines()]
    # Of what was tried once more the last counts.
    lines = [*{(line["fault"], line["case"]): line for line in every}.values()]
    kinds: dict[str, list[dict[str, object]]] = defaultdict(list)
    for line in lines:
        kinds[line["fault"]].append(line)
    rows = [_row(fault, cases) for fault, cases in sorted(kinds.items())]
    total = sum(line["seconds"] for line in lines)
    head = _HEAD.format(
        kernel=os.uname().release.partition("-")[0],
        cpus=os.cpu_count(),
        hours=f"{total / 3600:.1f} hours of tests",
    )
    page.write_text(head + "".join(rows) + _FOOT, encoding="utf-8")
    failed = [line for line in lines if line["held"] != line["tried"]]
    for line in failed:
        print(f"did not hold: {line['fault']} {line['case']}", file=sys.stderr)  # noqa: T201
    return 1 if failed else 0


def _row(fault: str, cases: Sequence[dict[str, object]]) -> str:
    def total(key: str) -> float:
        return sum(float(str(case[key])) for case in cases)

    seeds = sorted({str(case["seed"]) for case in cases if case["seed"] is not None})
    figures = f"{total('tried'):,.0f} | {total('held'):,.0f}"
    some = "" if all(case["whole"] for case in cases) else " (quick form)"
    codes = ", ".join(sorted({str(case["code"]) for case in cases}))
    rest = f"{', '.join(seeds) or 'all'} | {total('seconds'):,.0f} | {codes}"
    return f"| {fault}{some} | {figures} | {rest} |\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
