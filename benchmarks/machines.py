# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m benchmarks.machines [--json FILE] [--full] [--rounds N]``: the harness, measured.

Boots take turns with what they are held against, as everywhere; where a goal is a time and not a
ratio, the row is held against that time.  ``--full`` runs the whole of the system tests too, with
a warm cache and with an empty one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.measure import Meter, Pair, Row, paired, run_quietly, table, timed
from harness import host, package
from harness.cache import DEFAULT_LIMIT, Cache, default_root
from harness.errors import HarnessError
from tests.system import project

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.fleet import Fleet

_LOOP: Final = 20.0
_WARM: Final = 240.0
_COLD: Final = 720.0
"""Seconds: from a changed line to a result; all system tests; the same with nothing cached."""
_FIRST: Final = "tests/system/test_content.py::test_later_changes_of_the_source_do_not_show"
_ROOT: Final = project.ROOT


def boots(machines: Fleet, meter: Meter, rounds: int) -> Iterator[Row]:
    """Restore, boot quickly and boot as anybody would, each up to the first command answered."""
    template = machines.template()

    def restored() -> float:
        with tempfile.TemporaryDirectory(prefix="bench-") as place:
            start = time.perf_counter()
            with template.restore(Path(place)) as machine:
                machine.run("true")
                return time.perf_counter() - start

    def booted(*, tuned: bool, whole: bool) -> float:
        with machines.cold(tuned=tuned) as machine:
            start = time.perf_counter()
            machine.start()
            if whole:
                wait = ["systemctl", "is-system-running", "--wait"]
                machine.run(wait, check=False, timeout=300)
            return time.perf_counter() - start

    tuned = partial(booted, tuned=True, whole=False)
    yield Row(
        *("restore", "restore, first command", "its boot, tuned"),
        paired(restored, tuned, meter, rounds=rounds, inner=1),
        1 / 20,
    )
    tuned, untuned = (partial(booted, tuned=each, whole=True) for each in (True, False))
    yield Row(
        *("tuned", "tuned boot, all units", "the same image untuned"),
        paired(tuned, untuned, meter, rounds=rounds, inner=1),
        0.5,
    )


def loop() -> Iterator[Row]:
    """Change a line, and wait for the first result of a system test in a VM."""
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        for file in package.inputs(_ROOT):
            _copy(file, Path(place))
        for name in ("harness", "tests", "images", "vm", "pyproject.toml"):
            shutil.copytree(_ROOT / name, Path(place, name)) if (
                _ROOT / name
            ).is_dir() else shutil.copy(_ROOT / name, place)
        run_quietly("git", "-C", place, "init", "-q")
        changed = Path(place, "overlayd/__init__.py")
        changed.write_text(changed.read_text("utf-8") + f"\n# {uuid.uuid4()}\n", "utf-8")
        command = ("-m", "pytest", "-p", "harness.plugin", "-q", "-x", "--machine=vm", _FIRST)
        start = time.perf_counter()
        with subprocess.Popen(
            (sys.executable, *command), cwd=place, stdout=subprocess.PIPE, text=True
        ) as tests:
            if tests.stdout is None:
                raise AssertionError
            while tests.stdout.read(1) not in {".", ""}:
                pass
            seconds = time.perf_counter() - start
            tests.stdout.read()
    if tests.returncode != 0:
        raise RuntimeError("the test failed that was to be timed")
    pair = Pair((seconds,), (_LOOP,), 1)
    yield Row("loop", "changed line to first result, VM", "20 s", pair, 1)


def whole() -> Iterator[Row]:
    """Run all system tests, with a warm cache and with an empty one."""
    command = (sys.executable, "-m", "pytest", "-p", "harness.plugin", "-q", "-n", "auto")
    for name, more, goal in (
        ("system", (), _WARM),
        ("system-cold", ("--no-cache",), _COLD),
    ):
        seconds = timed(lambda: run_quietly(*command, *more, "tests/system"))  # noqa: B023
        what = f"all system tests {' '.join(more)}".strip()
        yield Row(name, what, f"{goal / 60:.0f} min", Pair((seconds,), (goal,), 1), 1)


def disk() -> str:
    """Say what the cache takes."""
    used = sum(entry.size for entry in Cache(default_root()).list())
    return f"the cache takes {used / 1e9:.2f} GB of at most {DEFAULT_LIMIT / 1e9:.2f}"


def _copy(file: Path, place: Path) -> None:
    target = place / file.relative_to(_ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)


def main() -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machines", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--full", action="store_true", help="all system tests as well; long")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    chosen = parser.parse_args()
    meter = Meter()
    rows: list[Row] = []
    try:
        host.qemu()
        machines = project.fleet(say=lambda line: print(line, file=sys.stderr))
        try:
            rows += boots(machines, meter, chosen.rounds)
        finally:
            machines.close()
        rows += loop()
        if chosen.full:
            rows += whole()
    except (HarnessError, OSError, RuntimeError) as error:
        print(f"not measured: {error}", file=sys.stderr)
    meter.clear()
    print(f"{table(rows)}\n\n{disk()}")
    if chosen.json is not None:
        found = {"rows": [row.as_object() for row in rows], "disk": disk()}
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
