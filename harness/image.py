# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image that machines are booted from: built in layers, each of which is cached.

    base            a Containerfile's base stage, committed               minutes, once
    kernel-layer    another kernel with its initramfs, over the base      a quarter of one, once
    layer           packages and files, over the base                     a second, for each change
    kernel-files    what boots a disk with base and kernel                seconds, once
    image           base, kernel and layer: one commit,                   seconds, for each change
                    deployed on a disk

The image is an ordinary one.  It can be booted in two ways: *plain*, with the initramfs and the
arguments that it has itself, and *quick* (:mod:`harness.quickboot`).
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import base, commit, disk, layer, manifest, quickboot, seed, vmlinux
from harness.apt import Apt
from harness.cache import key
from harness.programs import Timer, need_root
from harness.qemu import TUNING
from harness.trees import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from harness.base import Recipe
    from harness.cache import Cache
    from harness.disk import Deployment
    from harness.kernels import Kernel

    Say = Callable[[str], None]

CONSOLE: Final = "console=ttyS0"
NOCLOUD: Final = "ds=nocloud"
"""Spares cloud-init the search for other clouds; only the machine's arguments say so."""

_HERE: Final = Path(__file__).parent
_LAYER_BUILDERS: Final = ("layer.py", "commit.py")
_FILES_BUILDERS: Final = ("image.py", "quickboot.py", "initramfs.py", "elf.py", "vmlinux.py")
_BUILDERS: Final = (*_LAYER_BUILDERS, "image.py", "disk.py", "manifest.py", "seed.py")
_DESCRIPTION: Final = "image.json"
_REMOVED: Final = "removed.json"


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """What an image is made of.

    :ivar name: in names of its parts, OSTree's refs among them.
    :ivar packages: real packages, installed last.
    :ivar files: copied before that: what is at a path here, by its path in the image.
    :ivar seed: a directory with the files of a NoCloud seed (:mod:`harness.seed`).
    :ivar stateroot: OSTree's name for the operating system.
    :ivar disk_size: bytes; what is not written takes no room here.
    """

    name: str
    recipe: Recipe
    packages: tuple[Path, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    seed: Path | None = None
    stateroot: str = "debian"
    disk_size: int = disk.SIZE

    @property
    def ref(self) -> str:
        """OSTree's name for what is deployed."""
        return f"{self.name}/{self.recipe.suite}"

    @property
    def subject(self) -> str:
        """The first line of the commit's message."""
        return " ".join([self.name, *(path.stem for path in self.packages)])


@dataclass(frozen=True, kw_only=True)
class Boot:
    """What a machine is started with, besides the disk."""

    kernel: Path
    initrd: Path
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """A disk and what boots it; nothing of it may be written to.

    :ivar disk: raw, sparse; put an overlay on it.  It has to be the first virtio disk.
    :ivar seed: raw, read-only, for a second disk, at least until cloud-init has run.
    :ivar quick: boots fast, for tests.
    :ivar plain: the kernel and initramfs of the deployment, and its arguments.
    :ivar commit: OSTree's checksum.
    :ivar release: the kernel's, ``uname -r``.
    :ivar deployment: where the deployment is on the disk.
    :ivar manifest: the lines of ``/usr`` (:mod:`harness.manifest`), and
    :ivar digest: their digest, which :func:`harness.disk.digest` finds as long as nobody wrote.
    :ivar fingerprint: equal for images that are the same in every respect.
    """

    name: str
    disk: Path
    seed: Path | None
    quick: Boot
    plain: Boot
    commit: str
    release: str
    deployment: Path
    manifest: Path
    digest: str
    fingerprint: str


@contextmanager
def build(
    inputs: ImageInputs,
    cache: Cache,
    *,
    kernel: Kernel | None = None,
    say: Say = lambda _line: None,
) -> Iterator[Image]:
    """Give the image of *inputs*, with *kernel* in the place of its own, for as long as the block.

    What is missing in *cache* is built, which needs root; with a warm cache no network is needed.
    *say* gets a line for each step that takes long.

    :raises BuildError: if something cannot be built.
    :raises HostError: if this machine lacks something for it.
    """
    apt = Apt(inputs.recipe.suite, cache.root / "apt", say=say)
    base_key = key(*base.inputs(inputs.recipe, apt))
    kernel_key = _kernel_key(base_key, kernel)

    @contextmanager
    def below() -> Iterator[tuple[Path, list[commit.Layer]]]:
        """Give the base, and the layer with the kernel if it is another."""
        with ExitStack() as stack:
            built = stack.enter_context(base_entry(inputs.recipe, cache, base_key, say))
            layers = []
            if kernel is not None:
                made = _kernel_entry(built, kernel, cache, kernel_key, say)
                layers.append(stack.enter_context(made))
            yield built, layers

    def make_files(stage: Path) -> None:
        with below() as (built, layers):
            tree = layers[0].tree if layers else built / "tree"
            _write_files(built / "tree", tree / commit.MODULES / commit.release(tree), apt, stage)

    def make_image(stage: Path) -> None:
        with below() as (built, layers), layer_entry(inputs, cache, base_key, say) as above:
            _assemble(inputs, built, [*layers, *above], stage, say)

    release = kernel.release if kernel else ""
    label = " ".join([inputs.name, release, *(path.stem for path in inputs.packages)])
    files_label = f"{release or 'own kernel'} of {inputs.name}"
    files_key = key(base_key, kernel_key, *_sources(_FILES_BUILDERS))
    image_key = key(*_inputs(inputs, base_key, kernel_key))
    with (
        cache.entry("kernel-files", files_key, make_files, say, label=files_label) as files,
        cache.entry("image", image_key, make_image, say, label=label) as entry,
    ):
        yield _loaded(inputs.name, entry, files, key(files_key, image_key))


@contextmanager
def base_entry(recipe: Recipe, cache: Cache, base_key: str, say: Say) -> Iterator[Path]:
    """Give the built *recipe* (:mod:`harness.base`), for as long as the block."""

    def make(stage: Path) -> None:
        base.build(recipe, stage, say=say)

    label = f"{recipe.containerfile} {recipe.suite}"
    with cache.entry("base", base_key, make, say, label=label) as entry:
        yield entry


@contextmanager
def layer_entry(
    inputs: ImageInputs, cache: Cache, base_key: str, say: Say
) -> Iterator[tuple[commit.Layer, ...]]:
    """Give what packages and files of *inputs* are over the base: one layer, or none if none."""
    if not inputs.packages and not inputs.files:
        yield ()
        return

    def make(stage: Path) -> None:
        with base_entry(inputs.recipe, cache, base_key, say) as below:
            made = layer.packages(below / "tree", stage, inputs.packages, files=inputs.files)
        _keep_removed(stage, made)

    parts = (base_key, *_sources(_LAYER_BUILDERS), *_contents(inputs))
    label = " ".join(path.stem for path in inputs.packages) or "files"
    with cache.entry("layer", key(*parts), make, say, label=label) as entry:
        yield (_kept_layer(entry),)


@contextmanager
def _kernel_entry(
    below: Path, kernel: Kernel, cache: Cache, kernel_key: str, say: Say
) -> Iterator[commit.Layer]:
    def make(stage: Path) -> None:
        _keep_removed(stage, layer.kernel(below / "tree", stage, kernel))

    label = f"{kernel.release}, with an initramfs"
    with cache.entry("kernel-layer", kernel_key, make, say, label=label) as entry:
        yield _kept_layer(entry)


def _keep_removed(stage: Path, made: commit.Layer) -> None:
    (stage / _REMOVED).write_text(json.dumps(made.removed), encoding="utf-8")


def _kept_layer(entry: Path) -> commit.Layer:
    removed = json.loads((entry / _REMOVED).read_text(encoding="utf-8"))
    return commit.Layer(tree=entry / "tree", removed=tuple(removed))


def _kernel_key(base_key: str, kernel: Kernel | None) -> str:
    if kernel is None:
        return ""
    return key(base_key, kernel.release, kernel.version, *_sources(_LAYER_BUILDERS))


def _inputs(inputs: ImageInputs, base_key: str, kernel_key: str) -> Iterator[str | bytes | Path]:
    yield from (base_key, kernel_key, inputs.name, inputs.stateroot, str(inputs.disk_size))
    yield from _sources(_BUILDERS)
    yield from _contents(inputs)
    if inputs.seed:
        for name, data in sorted(seed.read(inputs.seed).items()):
            yield from (name, data)


def _contents(inputs: ImageInputs) -> Iterator[str | Path]:
    """Yield what tells one layer of packages and files from another."""
    for path in inputs.packages:
        yield from (path.name, path)
    for name, path in sorted(inputs.files.items()):
        yield from (name, path)


def _sources(names: Iterable[str]) -> list[Path]:
    return [_HERE / name for name in names]


def _write_files(tree: Path, modules: Path, apt: Apt, out: Path) -> None:
    """Write what boots a disk with *tree*, if *modules* are its kernel's."""
    shutil.copy(modules / "vmlinuz", out / "vmlinuz")
    shutil.copy(modules / "initramfs.img", out / "initrd")
    if unpacked := vmlinux.unpacked(out / "vmlinuz"):
        (out / "vmlinux").write_bytes(unpacked)
    quickboot.write(tree, modules, apt, out / "quick.initrd")


def _assemble(
    inputs: ImageInputs, below: Path, layers: list[commit.Layer], out: Path, say: Say
) -> None:
    """Make the image of the base in *below* and the *layers* over it, in *out*."""
    need_root("building an image")
    timed = Timer(say, "image")
    work = out / "work"
    sysroot = work / "sysroot"
    for directory in (work, sysroot):
        directory.mkdir()
    try:
        repo = disk.make_sysroot(sysroot, inputs.stateroot, below / "repo")
        if not any(each.removed for each in layers):
            commit.commit_over(repo, inputs.ref, base.REF, layers, subject=inputs.subject)
        else:
            commit.combine(below / "tree", layers, work / "tree")
            commit.commit(repo, inputs.ref, work / "tree", subject=inputs.subject)
        timed("the commit")
        deployed = disk.deploy(sysroot, inputs.stateroot, inputs.ref, drop=[base.REF])
        timed("the deployment")
        _describe(inputs, sysroot / deployed.root, deployed, out)
        timed("its manifest")
        disk.write(sysroot, out / "disk.raw", size=inputs.disk_size)
        timed("the disk")
    finally:
        remove_tree(work)


def _describe(inputs: ImageInputs, root: Path, deployed: Deployment, out: Path) -> None:
    """Write everything but the disk; *root* is where the deployment is now."""
    lines = list(manifest.lines(root / "usr"))
    (out / "manifest").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if inputs.seed:
        seed.write(seed.read(inputs.seed), out / "seed.iso")
    description = _Description(
        commit=deployed.checksum,
        release=commit.release(root),
        deployment=str(deployed.root),
        digest=manifest.digest(lines),
        arguments=deployed.arguments,
    )
    text = json.dumps(asdict(description), indent=4)
    (out / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What an entry knows of itself besides its files."""

    commit: str
    release: str
    deployment: str
    digest: str
    arguments: str


def _loaded(name: str, entry: Path, files: Path, fingerprint: str) -> Image:
    text = (entry / _DESCRIPTION).read_text(encoding="utf-8")
    known = _Description(**json.loads(text))
    unpacked, packed, iso = files / "vmlinux", files / "vmlinuz", entry / "seed.iso"
    plain = f"{known.arguments} {CONSOLE}"
    quick = " ".join([plain, TUNING, *quickboot.ARGUMENTS, *([NOCLOUD] if iso.exists() else [])])
    return Image(
        name=name,
        disk=entry / "disk.raw",
        seed=iso if iso.exists() else None,
        quick=Boot(
            kernel=unpacked if unpacked.exists() else packed,
            initrd=files / "quick.initrd",
            arguments=quick,
        ),
        plain=Boot(kernel=packed, initrd=files / "initrd", arguments=plain),
        commit=known.commit,
        release=known.release,
        deployment=Path(known.deployment),
        manifest=entry / "manifest",
        digest=known.digest,
        fingerprint=fingerprint,
    )
