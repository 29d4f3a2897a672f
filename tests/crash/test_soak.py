# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short soak, and that what would grow, or show a gap, in a long one is found."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Final

import pytest

from tests.crash.flatness import Series, draw
from tests.crash.soak import Reader
from tests.mounts.conftest import ROOT, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.crash.tried import Proof

_QUICK: Final = 0.05
_WHOLE: Final = 10.0
"""Minutes."""

SHAPES: dict[str, tuple[Callable[[int, random.Random], float], bool]] = {
    "always the same": (lambda _n, _r: 7, True),
    "noise": (lambda _n, r: 100 + r.uniform(-3, 3), True),
    "warming up, then the same": (lambda n, _r: min(n, 30), True),
    "peaks": (lambda n, _r: 7 + 1000 * (n % 9 == 0), True),
    "less and less": (lambda n, _r: 1000 - n, True),
    "a saw": (lambda n, _r: n % 10, True),
    "one more in fifty": (lambda n, _r: 7 + n // 50, False),
    "growth below noise": (lambda n, r: 100 + n / 20 + r.uniform(-3, 3), False),
    "late growth": (lambda n, _r: max(7, n - 150), False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_made_up_figures_are_judged_as_they_were_made(shape: str) -> None:
    figure, flat = SHAPES[shape]
    generator = random.Random(1)
    series = Series("made up", absolute=0.0 if "one more" in shape else 2.0)
    series.values += [figure(number, generator) for number in range(200)]
    assert series.flat() is flat, series.verdict()
    assert series.verdict().startswith("flat" if flat else "GROWS")


def test_figures_taken_too_seldom_are_not_called_flat() -> None:
    assert Series("few", values=[1.0] * 4).flat() is False
    assert Series("few", values=[1.0] * 5).flat() is True


def test_picture_is_xml_with_a_line_for_each_figure() -> None:
    series = [Series(f"<{number}>", values=[1.0, number]) for number in range(4)]
    picture = ET.fromstring(draw([*series, Series("none")], "a & b"))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5


def test_reader_notices_what_it_should_not_see(world: World) -> None:
    base = world.base("t", {"file": "base"})
    source = world.source("s", {"file": "layer"})
    world.apply("x", source, base)
    with Reader({f"{base}/file": {b"layer"}}) as reader:
        world.manager().reset("x", 1)
    assert reader.seen["opens"] > 0
    assert (reader.seen["failed"], reader.seen["other"]) == (0, 0)
    with Reader({f"{base}/file": {b"layer"}}) as reader:
        world.manager().remove("x", lazy=True)
        time.sleep(0.05)
        (base / "file").unlink()
        time.sleep(0.05)
    assert reader.seen["other"] > 0
    assert reader.seen["failed"] > 0


def run_soak(minutes: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.crash.soak", "--minutes", str(minutes), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=minutes * 60 + 120,
        check=False,
    )


def test_soak_stays_flat(proof: Proof, tmp_path: Path) -> None:
    """A long, ordinary life with a reader: figures that must be flat."""
    picture = tmp_path / "soak.svg"
    minutes = proof.minutes or (_WHOLE if proof.whole else _QUICK)
    done = run_soak(minutes, "--out", str(picture))
    lines = done.stdout.splitlines()
    proof.count(sum(" flat: " in line or " GROWS: " in line for line in lines))
    proof.remark(f"{minutes:g} minutes")
    proof.remark(next(line for line in lines if "rounds of work" in line))
    assert done.returncode == 0, done.stdout + done.stderr
    ET.fromstring(picture.read_text())


def test_soak_finds_a_leak() -> None:
    done = run_soak(_QUICK, "--leak")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "soak: manager: descriptors grows" in done.stdout
