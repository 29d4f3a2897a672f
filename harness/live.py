# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages put into a machine that runs: a change is tried in seconds, without a new image.

An image without the packages is booted and frozen once.  A machine restored from that gets what
:func:`harness.layer.packages` would put into the image's commit, and then has the same ``/usr``,
byte for byte, as one booted from an image with them; :attr:`Top.digest` is that of both.  Only
OSTree does not know of it: it shows the commit without packages, and what was laid over it counts
as a change to the deployment, one that survives a reboot.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import base, layer, manifest
from harness.apt import Apt
from harness.cache import key
from harness.image import base_entry
from harness.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from harness.cache import Cache
    from harness.image import Image, ImageInputs, Say
    from harness.machine import Machine

_PLACE: Final = "/run/harness-layer"
_TIMEOUT: Final = 120.0  # seconds
_SOURCES: Final = ("live.py", "layer.py", "commit.py", "manifest.py")

# In a mount namespace of its own /usr can be written to, and nobody else sees that.  Files are
# replaced, never overwritten: OSTree's repository has them, too.
_APPLY: Final = rf"""
set -eu
mount -o remount,bind,rw /usr
for path; do rm -rf "$path"; done
mkdir {_PLACE}
cd {_PLACE}
tar --extract --file={_PLACE}.tar --numeric-owner --xattrs --xattrs-include='*'
cp -a --remove-destination usr/. /usr
[ ! -d usr/etc ] || cp -a --remove-destination usr/etc/. /etc
cd /
rm -r {_PLACE} {_PLACE}.tar
"""


@dataclass(frozen=True, kw_only=True)
class Top:
    """Packages and files as a layer over an image, to be put into machines of that.

    :ivar archive: a tar archive of the layer.
    :ivar removed: absolute paths that go before it is unpacked.
    :ivar manifest: the lines of ``/usr`` with the layer (:mod:`harness.manifest`), and
    :ivar digest: their digest.
    :ivar fingerprint: equal for layers that are the same, over the same image.
    """

    archive: Path
    removed: tuple[str, ...]
    manifest: Path
    digest: str
    fingerprint: str


@contextmanager
def top(
    inputs: ImageInputs, cache: Cache, below: Image, *, say: Say = lambda _line: None
) -> Iterator[Top]:
    """Give the packages and files of *inputs* as a layer over *below*, for as long as the block.

    *below* is an image of the same recipe without them; its kernel may be any.

    :raises BuildError: if they cannot be installed.
    """
    apt = Apt(inputs.recipe.suite, cache.root / "apt", say=say)
    base_key = key(*base.inputs(inputs.recipe, apt))
    name = key(below.fingerprint, *_inputs(inputs))

    def make(stage: Path) -> None:
        with base_entry(inputs.recipe, cache, base_key, say) as built:
            _make(inputs, below, built / "tree", stage)

    label = " ".join(path.stem for path in inputs.packages)
    with cache.entry("live-layer", name, make, say, label=label) as entry:
        removed, digest = json.loads((entry / "layer.json").read_text(encoding="utf-8"))
        yield Top(
            archive=entry / "layer.tar",
            removed=tuple(removed),
            manifest=entry / "manifest",
            digest=digest,
            fingerprint=name,
        )


def put_on(machine: Machine, layer: Top) -> None:
    """Put *layer* into a running machine of the image it was made for; it stays there.

    :raises CommandError: if that fails.
    """
    machine.copy_in(layer.archive, f"{_PLACE}.tar")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _APPLY, "sh"]
    machine.run([*command, *layer.removed], timeout=_TIMEOUT)
    # As at the next boot.
    machine.run("systemd-tmpfiles --create --prefix=/var; systemctl daemon-reload", check=False)


def merged(below: Iterable[str], removed: Iterable[str], above: Iterable[str]) -> list[str]:
    """Return the lines of a manifest of ``/usr`` with a layer over it."""
    lines = {manifest.path(line): line for line in below}
    for gone in removed:
        inner = gone.removeprefix("/usr/")
        for path in [path for path in lines if path == inner or path.startswith(f"{inner}/")]:
            del lines[path]
    lines |= {manifest.path(line): line for line in above}
    return [lines[path] for path in sorted(lines, key=lambda path: path.split("/"))]


def _inputs(inputs: ImageInputs) -> Iterator[str | Path]:
    yield from (Path(__file__).with_name(name) for name in _SOURCES)
    for path in inputs.packages:
        yield from (path.name, path)
    for name, path in sorted(inputs.files.items()):
        yield from (name, path)


def _make(inputs: ImageInputs, below: Image, tree: Path, out: Path) -> None:
    work = out / "work"
    work.mkdir()
    made = layer.packages(tree, work, inputs.packages, files=inputs.files)
    archive = ["tar", "--create", f"--file={out / 'layer.tar'}", f"--directory={made.tree}"]
    options = ("--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*")
    run([*archive, *options, "."], what="packing the layer")
    known = below.manifest.read_text(encoding="utf-8").splitlines()
    lines = merged(known, made.removed, manifest.lines(made.tree / "usr"))
    text = "".join(f"{line}\n" for line in lines)
    (out / "manifest").write_text(text, encoding="utf-8")
    description = [made.removed, manifest.digest(lines)]
    (out / "layer.json").write_text(json.dumps(description), encoding="utf-8")
    run(["rm", "-rf", work], what="removing the layer")
