# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was tried of one kind of fault, as a line of JSON; :mod:`tests.crash.page` reads them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Tried:
    """So many faults of a kind, how many of them held, and by which seed, if by any."""

    fault: str
    case: str
    tried: int
    held: int
    seed: int | None
    seconds: float
    whole: bool
    remarks: list[str]

    def add(self, file: str) -> None:
        """Add it to a file, to which others may add at the same time."""
        line = asdict(self) | {"seconds": round(self.seconds, 1)}
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, json.dumps(line).encode() + b"\n")
        os.close(fd)
