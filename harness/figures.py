# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures as people write and read them."""

from __future__ import annotations

import re


def size_text(size: float) -> str:
    """Return *size* in bytes as people write it: ``0``, ``812 K``, ``1.4 G``."""
    unit = ""
    for larger in (" K", " M", " G", " T"):
        if size < 1000:  # noqa: PLR2004 - three digits fit
            break
        size, unit = size / 1024, larger
    return f"{size:.3g}{unit}"


def parse_size(text: str) -> int:
    """Return the bytes of a size as people write it: ``4G``, ``500 MiB``, ``0``.

    :raises ValueError: if it is none.
    """
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII
    )
    if not match:
        message = f"not a size: {text!r} (like 500M or 4G)"
        raise ValueError(message)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def age_text(seconds: float) -> str:
    """Return how long ago *seconds* are, in one unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def seconds_text(seconds: float) -> str:
    """Return a duration: ``0.31 s``, ``42.0 s``, ``3 min 05 s``."""
    if seconds < 10:  # noqa: PLR2004 - below, hundredths are worth reading
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"
