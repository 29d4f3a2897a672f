# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the layers of an image come together, with a base that takes no time.

The real base is built, and booted, by the tests in tests/system.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import base, commit, disk, image, layer, live, quickboot
from harness.apt import Apt, Package
from harness.cache import Cache
from harness.image import Image, ImageInputs
from harness.kernels import Kernel
from tests.harness.test_vmlinux import KERNEL, bzimage
from tests.harness.trees_of_debian import RELEASE, debian, write

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from harness.base import Recipe

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="deployments need root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("ostree", "mkfs.ext4", "qemu-img"))), reason="tools are missing"
    ),
]


@dataclass
class Workshop:
    """What is there to build from, and what was built."""

    cache: Cache
    inputs: ImageInputs
    done: list[str] = field(default_factory=list)

    def build(self, inputs: ImageInputs | None = None, kernel: Kernel | None = None) -> Image:
        with image.build(inputs or self.inputs, self.cache, kernel=kernel) as built:
            assert all(
                path.exists()
                for path in (built.disk, built.quick.kernel, built.quick.initrd, built.manifest)
            )
            return built


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Return a place where bases are tiny, and packages are what their files hold."""
    context = tmp_path / "context"
    write(context / "images/Containerfile", "FROM scratch\n")
    write(context / "images/packages", "one\n")
    write(context / "seed/user-data", "#cloud-config\n")
    write(context / "seed/meta-data", "instance-id: x\n")
    inputs = ImageInputs(
        name="small",
        recipe=base.Recipe(context=context),
        packages=(write(context / "one_1_all.deb", "one"),),
        seed=context / "seed",
        disk_size=64 << 20,
    )
    shop = Workshop(Cache(tmp_path / "cache"), inputs)

    def build_base(recipe: Recipe, out: Path, *, say: Callable[[str], object]) -> None:
        shop.done.append("base")
        say("base: no time")
        tree = debian(out / "work")
        write(tree / "etc/os-release", f'NAME="{recipe.containerfile}"\nID=small\n')
        bzimage(tree / f"boot/vmlinuz-{RELEASE}", gzip.compress(KERNEL))
        commit.arrange(tree)
        commit.init(out / "repo")
        commit.commit(out / "repo", base.REF, tree, subject="base", consume=True)
        command = ["ostree", f"--repo={out / 'repo'}", "checkout", "-H", base.REF, f"{out}/tree"]
        subprocess.run(command, check=True)

    def packages(
        below: Path, out: Path, debs: Sequence[Path], *, files: Mapping[str, Path]
    ) -> commit.Layer:
        shop.done.append("packages")
        assert (below / "usr/bin/tool").exists()
        for deb in debs:
            write(out / "tree/usr/bin" / deb.stem, deb.read_text(), mode=0o755)
        for name, path in files.items():
            write(out / "tree" / name.lstrip("/"), path.read_text())
        return commit.Layer(tree=out / "tree", removed=("/usr/bin/tool",))

    def other_kernel(_below: Path, out: Path, kernel: Kernel) -> commit.Layer:
        shop.done.append("kernel")
        modules = out / "tree/usr/lib/modules" / kernel.release
        write(modules / "initramfs.img", "other initramfs")
        shutil.copy(kernel.vmlinuz, modules / "vmlinuz")
        return commit.Layer(tree=out / "tree", removed=(f"/usr/lib/modules/{RELEASE}",))

    def quick(tree: Path, kernel: Path, _apt: Apt, file: Path) -> None:
        shop.done.append("files")
        assert (tree / "usr/bin/tool").exists()
        file.write_text(f"quick {kernel.name}")

    def update(apt: Apt) -> None:
        if not (apt.directory / "updated").exists():
            write(apt.directory / "updated")

    def closure(_apt: Apt, packages: Sequence[str]) -> tuple[Package, ...]:
        return tuple(Package(name=name, version="1", file="", size=1) for name in packages)

    monkeypatch.setattr(base, "build", build_base)
    monkeypatch.setattr(layer, "packages", packages)
    monkeypatch.setattr(layer, "kernel", other_kernel)
    monkeypatch.setattr(quickboot, "write", quick)
    monkeypatch.setattr(Apt, "update", update)
    monkeypatch.setattr(Apt, "closure", closure)
    return shop


def test_image_is_a_deployment_with_what_boots_it(shop: Workshop) -> None:
    built = shop.build()
    assert shop.done == ["base", "files", "packages"]
    assert built.release == RELEASE
    assert built.quick.kernel.read_bytes() == KERNEL
    assert built.plain.kernel.name == "vmlinuz"
    assert built.plain.initrd.read_text() == "initramfs"
    assert built.quick.initrd.read_text() == f"quick {RELEASE}"
    assert built.deployment == Path(f"ostree/deploy/debian/deploy/{built.commit}.0")
    assert built.seed
    assert b"#cloud-config" in built.seed.read_bytes()
    names = {line.rpartition(" ")[2] for line in built.manifest.read_text().splitlines()}
    assert "bin/one_1_all" in names
    assert "bin/tool" not in names


def test_quick_boot_has_the_plain_arguments_and_more(shop: Workshop) -> None:
    built = shop.build()
    assert built.quick.arguments.startswith(f"{built.plain.arguments} ")
    assert " ds=nocloud" in built.quick.arguments
    assert "console=ttyS0" in built.plain.arguments
    assert "ds=" not in built.plain.arguments


@pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices")
def test_digest_is_that_of_the_disk(shop: Workshop) -> None:
    built = shop.build()
    assert disk.digest(built.disk, built.deployment / "usr", disk_format="raw") == built.digest


def test_same_inputs_are_taken_from_the_cache(shop: Workshop) -> None:
    first = shop.build()
    shop.done.clear()
    assert shop.build() == first
    assert shop.done == []


def test_changed_package_leaves_the_base_alone(shop: Workshop) -> None:
    first = shop.build()
    shop.done.clear()
    shop.inputs.packages[0].write_text("changed")
    second = shop.build()
    assert shop.done == ["packages"]
    assert second.fingerprint != first.fingerprint
    assert second.digest != first.digest


@pytest.mark.parametrize("name", ["images/Containerfile", "images/packages"])
def test_changed_description_changes_the_base(shop: Workshop, name: str) -> None:
    shop.build()
    shop.done.clear()
    write(shop.inputs.recipe.context / name, "other\n")
    shop.build()
    assert shop.done == ["base", "files", "packages"]


def test_changed_seed_or_file_changes_the_image_alone(shop: Workshop) -> None:
    fingerprints = {shop.build().fingerprint}
    write(shop.inputs.recipe.context / "seed/user-data", "#cloud-config\nusers: []\n")
    fingerprints.add(shop.build().fingerprint)
    extra = write(shop.inputs.recipe.context / "extra", "extra")
    fingerprints.add(shop.build(replace(shop.inputs, files={"/usr/extra": extra})).fingerprint)
    assert len(fingerprints) == 3
    assert shop.done.count("base") == 1


def test_other_kernel_takes_the_place_of_the_own(shop: Workshop, tmp_path: Path) -> None:
    own = shop.build()
    kernel = Kernel(
        name="9.9",
        release="9.9-test",
        version="9.9-1",
        vmlinuz=bzimage(tmp_path / "vmlinuz", b"packed in an unknown way"),
        vmlinux=None,
        modules=tmp_path,
    )
    other = shop.build(kernel=kernel)
    assert other.release == "9.9-test"
    assert other.plain.initrd.read_text() == "other initramfs"
    assert other.quick.kernel == other.plain.kernel  # not to be unpacked
    text = other.manifest.read_text()
    assert "lib/modules/9.9-test" in text
    assert RELEASE not in text
    assert other.commit != own.commit
    shop.done.clear()
    shop.inputs.packages[0].write_text("changed")
    shop.build(kernel=kernel)
    assert shop.done == ["packages"]


def test_only_what_is_needed_stays_in_the_cache(shop: Workshop) -> None:
    built = shop.build()
    images, files = built.disk.parent.iterdir(), built.quick.initrd.parent.iterdir()
    assert {path.name for path in images} == {"disk.raw", "image.json", "manifest", "seed.iso"}
    assert {path.name for path in files} == {"initrd", "quick.initrd", "vmlinux", "vmlinuz"}
    assert json.loads((built.disk.parent / "image.json").read_text())["release"] == RELEASE


def test_failed_build_leaves_nothing(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_more: object) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(disk, "write", fail)
    with pytest.raises(OSError, match="no disk"):
        shop.build()
    assert {entry.kind for entry in shop.cache.list()} == {
        "base",
        "kernel-files",
        "layer",
    }
    assert not list((shop.cache.root / "stage").iterdir())


def test_layer_for_later_is_what_the_image_has_over_its_base(shop: Workshop) -> None:
    shop.build()
    shop.done.clear()
    with live.top(shop.inputs, shop.cache) as top:
        with tarfile.open(top.archive) as archive:
            names = set(archive.getnames())
        assert "./usr/bin/one_1_all" in names
        assert (top.removed, top.ref) == (("/usr/bin/tool",), "small/trixie")
        first = top.fingerprint
    assert shop.done == []
    shop.inputs.packages[0].write_text("changed")
    with live.top(shop.inputs, shop.cache) as top:
        assert top.fingerprint != first
