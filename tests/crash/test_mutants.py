# SPDX-License-Identifier: LGPL-2.1-or-later
"""Without one of its undos, locks or checks a test of overlayd fails: a sample, or all of them."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.crash.mutants import load, workshop
from tests.mounts.conftest import leave_world

if TYPE_CHECKING:
    from tests.crash.tried import Proof

SAMPLE = 6


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests that are to fail need root")
def test_some_test_fails_of_each_mutant(proof: Proof) -> None:
    """An undo, a lock or a check removed, or two steps swapped."""
    mutants = load()
    if not proof.whole:
        proof.random = True
        quick = [mutant for mutant in mutants if mutant.quick]
        mutants = random.Random(proof.seed).sample(quick, SAMPLE)
    leave_world()  # what earlier tests left mounted there would puzzle those
    with workshop() as place:
        for mutant in mutants:
            proof.count()
            assert not place.survives(mutant), f"no test fails of {mutant.name}"
