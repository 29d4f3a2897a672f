# SPDX-License-Identifier: LGPL-2.1-or-later
"""Look for inputs that break what reads them, for as long as one likes; root.

    python -m tests.crash.fuzz --minutes N [--keep] [--tried FILE] [TARGET...]

Each target gets a like share of the time, in a child of its own: guided by coverage where atheris
can be had (CPython 3.11 to 3.13), else by chance alone.  What breaks goes to ``corpus/TARGET`` as
``crash-…``, and the exit code is 1.  What was of interest lies in ``build/fuzz/TARGET`` and is
where the next run begins; with ``--keep`` the smallest of it go to ``corpus`` for ``test_fuzz``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from tests.crash.tried import Tried

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.crash.fuzzing import Target

ROOT: Final = Path(__file__).parents[2]
CORPUS: Final = Path(__file__).with_name("corpus")
FOUND: Final = ROOT / "build/fuzz"
NAMES: Final = (
    *("config", "batch", "record", "mountinfo", "stream", "bus", "properties", "answers", "agent"),
)
KEPT: Final = 32
"""Inputs of a target that are kept, and their largest size in bytes; crashes are not counted."""
KEPT_SIZE: Final = 640
_LATE: Final = 180.0
"""Seconds that a child may take longer: to load, and to choose what is of interest."""
_RUNS: Final = re.compile(r"^stat::number_of_executed_units: *([0-9]+)", re.MULTILINE)
_READ: Final = ["overlayd", "harness", "jeepney", "tomllib", "json"]
"""Packages in which coverage guides."""
_MEMORY_MB: Final = 2048


def main(arguments: Sequence[str]) -> int:
    """Fuzz each target in turn; return the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Look for inputs that break readers.")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1, help="of what is random")
    parser.add_argument("--tried", default="", help="file to which what was tried is added")
    parser.add_argument("--keep", action="store_true", help="add what is of interest to the corpus")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}")
    options = parser.parse_args(arguments)
    if options.child:
        _child(options.child, options.minutes * 60, options.seed)
        return 0
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        _say("atheris cannot be had for this Python: by chance alone")
    names = options.targets or NAMES
    failed = [name for name in names if not _fuzz(name, options, options.minutes / len(names))]
    return 1 if failed else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # a program


def _fuzz(name: str, options: argparse.Namespace, minutes: float) -> bool:
    """Fuzz one target; return whether nothing was found."""
    before = _crashes(name)
    (FOUND / name).mkdir(parents=True, exist_ok=True)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    words = ["--child", name, "--minutes", str(minutes), "--seed", str(options.seed)]
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.fuzz", *words], cwd=ROOT, stdout=said, stderr=said
        )
        try:
            code = child.wait(minutes * 60 + _LATE)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    seconds = time.monotonic() - began
    tried = max([int(number) for number in _RUNS.findall(text)], default=0)
    held = code == 0
    _say(f"{name}: {tried} inputs in {seconds:.0f} s, {tried / seconds:.0f} a second")
    if not held:
        _say(text[-6000:])
        _say(f"{name}: FAILED with {code}: {', '.join(sorted(_crashes(name) - before))}")
    if options.keep:
        keep(name)
    if options.tried:
        _report(options, name, tried, seconds, held=held)
    return held


def _report(
    options: argparse.Namespace, name: str, tried: int, seconds: float, *, held: bool
) -> None:
    """Add what was tried to a file."""
    Tried(
        fault="Inputs found by coverage or chance",
        case=name,
        tried=tried,
        held=tried if held else tried - 1,
        seed=options.seed,
        seconds=seconds,
        whole=True,
        remarks=[f"{tried / seconds:.0f} inputs a second"],
    ).add(options.tried)


def _crashes(name: str) -> set[str]:
    return {path.name for path in (CORPUS / name).glob("crash-*")}


def keep(name: str) -> None:
    """Take over a few dozen of the smallest that were of interest into the corpus."""
    inputs = sorted((path.stat().st_size, path) for path in (FOUND / name).glob("*"))
    there = [path for path in (CORPUS / name).glob("*") if not path.name.startswith("crash-")]
    small = [path for size, path in inputs if 0 < size <= KEPT_SIZE]
    # Every so many of them: the smallest alone do not lead far.
    step = max(1, len(small) // max(1, KEPT - len(there)))
    for path in small[::step][: max(0, KEPT - len(there))]:
        shutil.copyfile(path, CORPUS / name / path.name)


# -- in the child ----------------------------------------------------------------------------------


def _child(name: str, seconds: float, seed: int) -> None:
    """Fuzz in this process until the time is over; it may end with the process."""
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        target, folder = _opened(name)
        _by_chance(name, target, folder, seconds, seed)
        return
    with atheris.instrument_imports(include=_READ):
        target, folder = _opened(name)
    check = target.open(folder)
    begin = folder.parent / "begin"
    begin.mkdir()
    for number, data in enumerate(target.seeds):
        (begin / f"seed-{number}").write_bytes(data)
    if target.any is not None:
        for number in range(200):
            (begin / f"any-{number}").write_bytes(target.any(Random(seed * 1000 + number)))
    words = folder.parent / "words"
    lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in target.words]
    words.write_text("".join(f'"{line}"\n' for line in lines if line))
    flags = [
        *(f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-dict={words}", "-max_len=65536"),
        *(
            "-timeout=0",
            "-report_slow_units=1000",
            f"-rss_limit_mb={_MEMORY_MB}",
            "-print_final_stats=1",
            "-reload=0",
        ),
        *(f"-artifact_prefix={CORPUS / name}/", "-verbosity=1"),
    ]
    folders = [str(FOUND / name), str(begin), str(CORPUS / name)]
    atheris.Setup([sys.argv[0], *flags, *folders], check)
    atheris.Fuzz()


def _opened(name: str) -> tuple[Target, Path]:
    """Enter a world of its own; return the target, and an empty directory there."""
    from tests.crash import fuzzing  # noqa: PLC0415  # instrumented, if it is to be
    from tests.mounts.conftest import enter_new_world  # noqa: PLC0415

    enter_new_world()
    folder = Path("/run/fuzz") / name
    folder.mkdir(parents=True)
    return fuzzing.TARGETS[name], folder


def _by_chance(name: str, target: Target, folder: Path, seconds: float, seed: int) -> None:
    """Change what is there, again and again."""
    from tests.crash import fuzzing, seeds  # noqa: PLC0415  # for root alone

    check, random = target.open(folder), Random(seed)
    kept = [*target.seeds, *fuzzing.corpus(name)]
    until, tried = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        data = random.choice(kept)
        if target.any is not None and random.random() < 0.5:
            data = target.any(random)
        size = random.randrange(5)
        made = [
            (random.randrange(seeds.KINDS), random.randrange(1 << 16), random.randrange(1 << 16))
            for _ in range(size)
        ]
        data = seeds.changed(data, made, kept, target.words)
        tried += 1
        try:
            check(data)
        except BaseException:
            digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            (CORPUS / name / f"crash-{digest}").write_bytes(data)
            raise
    _say(f"stat::number_of_executed_units: {tried}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
