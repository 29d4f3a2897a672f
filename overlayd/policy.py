# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be overlaid: critical targets and flagged files.

Pure: what has to be looked up on the system comes in as facts.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from overlayd.model import is_within

if TYPE_CHECKING:
    from collections.abc import Callable

_WILD: Final = frozenset("*?[")
_PROGRAM_DIRECTORIES: Final = ("/usr/bin", "/usr/sbin")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a single existing file is that another file is to cover."""

    set_id: bool
    capabilities: bool
    needed: bool


def critical_reason(
    path: str,
    trees: tuple[str, ...],
    *,
    single_file: FileFacts | None = None,
    exists: Callable[[str], bool],
) -> str | None:
    """Say why *path* is critical, or return None.

    A path in one of *trees* is, and so is each ancestor of one, itself only.  ``exists`` is asked
    about a glob: below an ancestor that itself matched a wildcard (``/usr/lib/foo`` for
    ``/usr/lib/*/security``) the rest must be there.  ``single_file`` is given when one existing
    file is covered and nothing else.
    """
    parts = path.split("/")
    # One program may be tried; what makes it critical all the same comes below.
    program = single_file is not None and any(is_within(path, top) for top in _PROGRAM_DIRECTORIES)
    for tree, pattern in _split(trees):
        if not all(map(_matches, parts, pattern)):
            continue
        if len(parts) < len(pattern):
            wild = parts != pattern[: len(parts)]
            if not wild or exists("/".join([*map(glob.escape, parts), *pattern[len(parts) :]])):
                return f"{path} contains {tree}"
        elif not program:
            return f"{path} itself" if path == tree else f"{path} lies in {tree}"
    if single_file is None:
        return None
    for bad, reason in (
        (single_file.set_id, f"{path} is a set-id program"),
        (single_file.capabilities, f"{path} has file capabilities"),
        (single_file.needed, f"overlayd itself needs {path}"),
    ):
        if bad:
            return reason
    return None


def _matches(name: str, pattern: str) -> bool:
    """Match one component; nearly all are told apart without a pattern."""
    return name == pattern or (not _WILD.isdisjoint(pattern) and fnmatchcase(name, pattern))


@lru_cache(maxsize=8)
def _split(trees: tuple[str, ...]) -> tuple[tuple[str, list[str]], ...]:
    return tuple((tree, tree.split("/")) for tree in trees)


@lru_cache(maxsize=8)
def flag_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return one expression that matches whole file names that any of *patterns* flags."""
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
