# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be overlaid: critical targets and flagged files.

Pure: what has to be looked up on the system comes in as facts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from overlayd.model import is_within

if TYPE_CHECKING:
    from collections.abc import Callable

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
    for tree in trees:
        pattern = tree.split("/")
        depth = min(len(parts), len(pattern))
        if not all(map(fnmatchcase, parts[:depth], pattern[:depth])):
            continue
        if len(parts) < len(pattern):
            wild = parts != pattern[: len(parts)]
            if not wild or exists("/".join(parts + pattern[len(parts) :])):
                return f"{path} contains {tree}"
        elif single_file is None or not any(is_within(path, top) for top in _PROGRAM_DIRECTORIES):
            return f"{path} is {tree}" if path == tree else f"{path} lies in {tree}"
    if single_file is not None:
        if single_file.set_id:
            return f"{path} is a set-id program"
        if single_file.capabilities:
            return f"{path} has file capabilities"
        if single_file.needed:
            return f"overlayd itself needs {path}"
    return None


@lru_cache(maxsize=8)
def flag_pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return one expression that matches whole file names that any of *patterns* flags."""
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
