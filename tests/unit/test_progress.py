# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting, and stopping."""

from __future__ import annotations

import pytest

from overlayd.errors import InterruptedByUserError
from overlayd.progress import Progress


def test_steps_and_expectations_add_up() -> None:
    progress = Progress()
    progress.expect(3, 100)
    progress.expect(2, 50)
    progress.advance(1, 0)
    progress.advance(0, 70)
    assert (progress.entries, progress.size) == (1, 70)
    assert (progress.total_entries, progress.total_size) == (5, 150)


def test_nothing_is_raised_before_somebody_asks_to_stop() -> None:
    progress = Progress()
    progress.check()
    progress.advance(1, 1)


def test_stop_is_heard_at_the_next_step_and_each_time_after() -> None:
    progress = Progress()
    progress.stop()
    for _ in range(2):
        with pytest.raises(InterruptedByUserError):
            progress.check()
        with pytest.raises(InterruptedByUserError):
            progress.advance(1, 1)


def test_what_was_done_counts_even_if_it_was_the_last_step() -> None:
    progress = Progress()
    progress.stop()
    with pytest.raises(InterruptedByUserError):
        progress.advance(1, 10)
    assert (progress.entries, progress.size) == (1, 10)
