# SPDX-License-Identifier: LGPL-2.1-or-later
"""How little 'enter' loads, and when it leaves its words to the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from overlayd import entrance, homes
from overlayd.errors import NotFoundError


def test_entering_loads_nothing_that_takes_long() -> None:
    top = Path(entrance.__file__).parents[1]
    program = f"import sys; sys.path.insert(0, {str(top)!r}); from overlayd import entrance"
    # Without site, by which a measuring of coverage would load much of its own.
    command = [sys.executable, "-I", "-S", "-c", f"{program}; print(*sys.modules)"]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "overlayd.userns" in loaded
    slow = {"typing", "dataclasses", "inspect", "click", "subprocess", "overlayd.model"}
    assert slow.isdisjoint(loaded)


@pytest.mark.parametrize(
    "words",
    [
        *([], ["own"], ["own", "--"], ["--", "true"], ["--as-root", "own", "--", "true"]),
        *(["--help"], ["own", "-v", "--", "true"], ["own", "true"]),
    ],
)
def test_words_that_are_not_plain_are_left_to_the_command_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "opened", None)  # it would be called at once
    entrance.enter_at_once(words)


def test_completion_and_closed_streams_are_left_to_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(homes, "opened", None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        entrance.enter_at_once(["own", "--", "true"])
    monkeypatch.setitem(os.environ, "_OVERLAYD_COMPLETE", "bash_complete")
    entrance.enter_at_once(["own", "--", "true"])


def test_errors_are_left_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*, make: bool = False) -> None:
        raise NotFoundError(str(make))

    monkeypatch.setattr(homes, "opened", fails)
    entrance.enter_at_once(["own", "--", "true"])
