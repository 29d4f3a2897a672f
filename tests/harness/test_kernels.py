# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels out of packages, in both shapes that Debian gives them, from an archive of our own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from harness import kernels, vmlinux
from harness.cache import Cache
from harness.errors import BuildError
from tests.harness.archives import DebArchive, LocalApt

if TYPE_CHECKING:
    from pathlib import Path

    from harness.apt import Apt

pytestmark = pytest.mark.skipif(
    not shutil.which("apt-get") or not shutil.which("dpkg-deb"), reason="APT is not here"
)

OLD = "6.1.0-50-cloud-amd64"
NEW = "7.2.13+deb14-cloud-amd64"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DebArchive:
    """Return an archive that every suite's kernels come from."""
    tmp_path.chmod(0o755)
    archive = DebArchive(tmp_path / "archive")

    def local(suite: str, directory: Path, **_: object) -> Apt:
        return LocalApt(suite, directory, archive=archive.root)

    monkeypatch.setattr(kernels, "Apt", local)
    # What is no kernel at all cannot be unpacked either.
    monkeypatch.setattr(vmlinux, "unpacked", lambda _file: None)
    return archive


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Return an empty cache."""
    return Cache(tmp_path / "cache")


def old_kernel(archive: DebArchive, version: str = "6.1.176-1") -> None:
    """Offer a kernel as Debian 12 and 13 do: one package, its kernel in /boot."""
    archive.add(kernels.META_PACKAGE, version, depends=f"linux-image-{OLD}")
    archive.add(
        f"linux-image-{OLD}",
        version,
        depends="kmod",
        files={f"boot/vmlinuz-{OLD}": version, f"lib/modules/{OLD}/modules.builtin": ""},
    )
    archive.add("kmod", files={"usr/bin/kmod": ""})


def test_kernel_of_one_package(archive: DebArchive, cache: Cache) -> None:
    old_kernel(archive)
    with kernels.fetch("6.1", cache) as kernel:
        assert (kernel.name, kernel.release, kernel.version) == ("6.1", OLD, "6.1.176-1")
        assert kernel.vmlinuz.read_text() == "6.1.176-1"
        assert kernel.vmlinux is None
        assert kernel.modules.name == OLD
        assert (kernel.modules / "modules.builtin").exists()
        assert sorted(file.name for file in kernel.vmlinuz.parent.iterdir()) == [
            "modules",
            "vmlinuz",
        ]


def test_kernel_of_several_packages(archive: DebArchive, cache: Cache) -> None:
    modules = f"usr/lib/modules/{NEW}"
    needs = f"linux-binary-{NEW}, linux-modules-{NEW}, linux-base"
    archive.add(kernels.META_PACKAGE, "7.2.13-1", depends=f"linux-image-{NEW}")
    archive.add(f"linux-image-{NEW}", "7.2.13-1", depends=needs)
    archive.add(f"linux-binary-{NEW}", "7.2.13-1", files={f"{modules}/vmlinuz": "kernel"})
    archive.add(f"linux-modules-{NEW}", "7.2.13-1", files={f"{modules}/modules.builtin": ""})
    archive.add("linux-base", "4.17", files={"usr/bin/linux-version": ""})
    with kernels.fetch("unstable", cache) as kernel:
        assert kernel.release == NEW
        assert kernel.vmlinuz.read_text() == "kernel"
        assert (kernel.modules / "modules.builtin").exists()


def test_kernel_is_fetched_once_until_there_is_a_newer_one(
    archive: DebArchive, cache: Cache
) -> None:
    old_kernel(archive)
    with kernels.fetch("6.1", cache) as kernel:
        first = kernel.vmlinuz
    shutil.rmtree(archive.root / "pool")  # the lists know of what is not there any more
    with kernels.fetch("6.1", cache) as kernel:
        assert kernel.vmlinuz == first
    (archive.root / "Packages").unlink()
    (cache.root / "apt/bookworm/updated").unlink()
    old_kernel(archive, "6.1.192-2")
    with kernels.fetch("6.1", cache) as kernel:
        assert kernel.vmlinuz.read_text() == "6.1.192-2"


def test_unknown_kernel_is_refused_with_those_there_are(cache: Cache) -> None:
    with (
        pytest.raises(BuildError, match=r"no such kernel: 5\.10") as caught,
        kernels.fetch("5.10", cache),
    ):
        pass
    assert caught.value.hint == "there are 6.1, 6.12, unstable"


@pytest.mark.parametrize("depends", ["", "linux-image-amd64"])
def test_meta_package_without_a_kernel_is_an_error(
    archive: DebArchive, cache: Cache, depends: str
) -> None:
    archive.add(kernels.META_PACKAGE, depends=depends)
    archive.add("linux-image-amd64")
    with pytest.raises(BuildError, match="depends on no kernel"), kernels.fetch("6.1", cache):
        pass


def test_package_without_a_kernel_is_an_error(archive: DebArchive, cache: Cache) -> None:
    archive.add(kernels.META_PACKAGE, depends=f"linux-image-{OLD}")
    archive.add(f"linux-image-{OLD}", files={f"lib/modules/{OLD}/modules.builtin": ""})
    with pytest.raises(BuildError, match="have no kernel or no"), kernels.fetch("6.1", cache):
        pass
    assert not cache.list()
