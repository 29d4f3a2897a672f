# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever is read, it is understood or refused: in bounded time and memory, leaving nothing open.

What was found once is kept in ``corpus``; ``python -m tests.crash.fuzz`` looks for more.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.crash import fuzzing, seeds
from tests.crash.fuzzing import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.crash.tried import Proof

pytestmark = pytest.mark.usefixtures("world")
QUICK: Final = 200
WHOLE: Final = 10_000
"""Inputs of a target."""

changes = st.lists(
    st.tuples(st.integers(0, seeds.KINDS - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
    max_size=4,
)


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_understood_or_refused_in_bounded_time_and_memory(
    name: str, tmp_path: Path, proof: Proof
) -> None:
    """Inputs of any kind."""
    target = TARGETS[name]
    check = target.open(tmp_path)
    kept = [*target.seeds, *fuzzing.corpus(name)]
    proof.random = True

    @hypothesis.seed(proof.seed)
    @hypothesis.settings(
        max_examples=WHOLE if proof.whole else QUICK, database=None, derandomize=False
    )
    @hypothesis.given(st.sampled_from(kept), changes, st.none() | st.integers(0, 1 << 32))
    def change(kept_one: bytes, made: Sequence[seeds.Change], anew: int | None) -> None:
        if anew is not None and target.any is not None:
            kept_one = target.any(Random(anew))
        proof.count()
        check(seeds.changed(kept_one, made, kept, target.words))

    change()


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_is_not_found_again(name: str, tmp_path: Path, proof: Proof) -> None:
    """Inputs that are kept, and valid ones."""
    check = TARGETS[name].open(tmp_path)
    for data in [*TARGETS[name].seeds, *fuzzing.corpus(name)]:
        proof.count()
        check(data)
