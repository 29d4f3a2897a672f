# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is particular to this project about its machines: the image, and what to warm up."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import package
from harness.base import Recipe
from harness.cache import Cache, default_root, key
from harness.findings import Allow, Kind
from harness.fleet import Fleet
from harness.image import ImageInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.accel import Wanted

ROOT: Final = Path(__file__).parents[2]
_CACHE: Final = "OVERLAYD_CACHE"
WARM_UP: Final = "overlayd doctor; overlayd list; pkexec --version; python3 -c 'import json'"
ALLOWED: Final = (
    Allow(
        "maximum fs stacking depth exceeded",
        "overlayd doctor tries how many overlays can be stacked",
        Kind.OVERLAYFS,
    ),
)


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Build everything anew within the block, and keep nothing of it."""
    with tempfile.TemporaryDirectory(prefix="overlayd-cache-", dir="/var/tmp") as place:
        os.environ[_CACHE] = place  # of the processes that start from here as well
        try:
            yield
        finally:
            del os.environ[_CACHE]


def fleet(
    *,
    accelerator: Wanted = "auto",
    say: Callable[[str], None] = lambda _line: None,
) -> Fleet:
    """Return the machines with the tree as it is now."""
    kept = Cache(default_root())
    return Fleet(
        lambda: inputs(kept, say),
        kept,
        accelerator=accelerator,
        warm_up=WARM_UP,
        allowed=ALLOWED,
        say=say,
    )


@contextmanager
def inputs(kept: Cache, say: Callable[[str], None]) -> Iterator[ImageInputs]:
    """Give what the image is made of, the package of the tree built if need be."""

    def build(stage: Path) -> None:
        package.build(ROOT, stage)

    with kept.entry("package", key(*_sources()), build, say, label="overlayd") as entry:
        yield ImageInputs(
            name="overlayd",
            recipe=Recipe(context=ROOT),
            packages=tuple(entry.glob("*.deb")),
            files={"/usr/libexec/harness-agent": ROOT / "harness/agent.py"},
            seed=ROOT / "vm/cloud-init",
        )


def _sources() -> Iterator[str | Path]:
    yield Path(package.__file__)
    for file in package.inputs(ROOT):
        yield from (str(file.relative_to(ROOT)), file)
