# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list of mutants fits the code: what each replaces is there, once."""

import pytest

from tests.crash.mutants import ROOT, Mutant, load

MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_one_place_and_still_compiles(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    compile(mutant.applied(text), mutant.file, "exec")
    for word in mutant.tests.split():
        if word.startswith("tests/"):
            assert (ROOT / word).is_file()


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
