# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tracebacks with the test's own frames only.

How the harness does what a test asked for is of no interest to who reads that a test failed.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HARNESS = Path(__file__).parent


def hide(error: BaseException, directories: Sequence[Path]) -> None:
    """Drop the frames of code beneath *directories* from *error*, its causes and its contexts.

    If nothing would be left, all stays: then it is the harness that failed.
    """
    prefixes = tuple(f"{directory}/" for directory in directories)
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.__traceback__ = _without(current.__traceback__, prefixes)
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions


def _without(
    traceback: types.TracebackType | None, prefixes: tuple[str, ...]
) -> types.TracebackType | None:
    kept = []
    link = traceback
    while link is not None:
        if not link.tb_frame.f_code.co_filename.startswith(prefixes):
            kept.append(link)
        link = link.tb_next
    result: types.TracebackType | None = None
    for link in reversed(kept):
        result = types.TracebackType(result, link.tb_frame, link.tb_lasti, link.tb_lineno)
    return result or traceback
