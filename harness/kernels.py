# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's kernels, unpacked from their packages; none is installed here."""

from __future__ import annotations

import contextlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import vmlinux
from harness.apt import Apt, unpack
from harness.cache import key
from harness.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.apt import Package
    from harness.cache import Cache

SUITES: Final = {"6.1": "bookworm", "6.12": "trixie", "unstable": "sid"}
"""The suites whose kernels these are; the last one's changes all the time."""
META_PACKAGE: Final = "linux-image-cloud-amd64"
"""For virtual machines: few drivers, and virtio among them."""

_RELEASE: Final = re.compile(r"linux-image-(\d.*)")
_BUILDERS: Final = (Path(__file__), Path(__file__).with_name("vmlinux.py"))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and its modules, as files on this machine."""

    name: str
    """What it was asked for by: ``6.12``."""
    release: str
    """What ``uname -r`` will say."""
    version: str
    """Of its package."""
    vmlinuz: Path
    vmlinux: Path | None
    """The same kernel, not compressed, which starts a second earlier; None if it cannot be had."""
    modules: Path
    """What would be ``/lib/modules/RELEASE``."""


@contextlib.contextmanager
def fetch(
    name: str, cache: Cache, *, say: Callable[[str], None] = lambda _line: None
) -> Iterator[Kernel]:
    """Give the newest kernel of this *name* (a key of ``SUITES``), for as long as the block.

    It is taken from *cache* unless the suite has a newer one; package lists that cannot be fetched
    serve as they are, so with a warm cache no network is needed.
    """
    if name not in SUITES:
        raise BuildError(f"no such kernel: {name}", hint=f"there are {', '.join(SUITES)}")
    apt = Apt(SUITES[name], cache.root / "apt", say=say)
    closure = apt.closure([META_PACKAGE])
    release = _release(closure)
    parts = [package for package in closure if package.name.endswith(f"-{release}")]

    def build(stage: Path) -> None:
        with tempfile.TemporaryDirectory(dir=stage) as scratch:
            files = apt.download([META_PACKAGE], Path(scratch), only=parts.__contains__)
            tree = Path(scratch, "tree")
            unpack(files, tree)
            _arrange(tree, release, stage)
        if unpacked := vmlinux.unpacked(stage / "vmlinuz"):
            (stage / "vmlinux").write_bytes(unpacked)

    names = [f"{package.name}={package.version}" for package in parts]
    label = f"kernel {release}"
    with cache.entry("kernel", key(*_BUILDERS, *names), build, say, label=label) as entry:
        yield Kernel(
            name=name,
            release=release,
            version=next(package.version for package in parts),
            vmlinuz=entry / "vmlinuz",
            vmlinux=entry / "vmlinux" if (entry / "vmlinux").exists() else None,
            modules=entry / "modules" / release,
        )


def _release(closure: tuple[Package, ...]) -> str:
    """Return the release of the kernel that the meta package depends on."""
    for package in closure:
        if found := _RELEASE.fullmatch(package.name):
            return found[1]
    raise BuildError(f"{META_PACKAGE} depends on no kernel", hint="has Debian renamed it?")


def _arrange(unpacked: Path, release: str, stage: Path) -> None:
    """Put a kernel where the entry has it, wherever its packages did: that differs by suite."""
    found = [d / "lib/modules" / release for d in (unpacked / "usr", unpacked)]
    modules = next((place for place in found if place.is_dir()), None)
    images = [unpacked / "boot" / f"vmlinuz-{release}"]
    images += [modules / "vmlinuz"] if modules else []
    image = next((place for place in images if place.is_file()), None)
    if modules is None or image is None:
        raise BuildError(f"the packages of {release} have no kernel or no modules")
    (stage / "modules").mkdir()
    image.rename(stage / "vmlinuz")
    modules.rename(stage / "modules" / release)
