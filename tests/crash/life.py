# SPDX-License-Identifier: LGPL-2.1-or-later
"""A base and a source of several sizes, and each command that an overlay meets in its life."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

from tests.mounts.conftest import PLAY, SOURCES, snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
BASE = PLAY / "app"
SOURCE = SOURCES / "s"
LIFE = (
    ("apply", "x", SOURCE, BASE),
    ("list",),
    ("status", "x"),
    ("reset", "x", "--to", "applied"),
    ("dump",),
    ("doctor",),
    ("cleanup",),
    ("history",),
    ("report",),
    ("remove", "x"),
)


def furnish(world: World) -> dict[str, tuple[object, ...]]:
    """Make a base and a source of several sizes; return what the base is."""
    world.base("app", FILES)
    source = world.source("s", {"a": "new a", "sub/c": "new c", "empty/": ""})
    (source / "large").write_bytes(random.Random(1).randbytes(300_000))
    os.link(source / "large", source / "sub/linked")
    with (source / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    return snapshot(BASE)


def shows(source: Path = SOURCE) -> None:
    """Insist on the target showing all of the source."""
    for path in source.rglob("*"):
        if path.is_file():
            assert (BASE / path.relative_to(source)).read_bytes() == path.read_bytes(), path
