# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a base depends on; the build itself is in test_image, where it is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import base
from harness.apt import Package
from harness.cache import key
from tests.harness.trees_of_debian import write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]


class OfferedPackages:
    """Stands in for APT: every package is there, in one version."""

    def __init__(self, directory: Path, version: str = "1") -> None:
        self.directory = directory
        self.version = version
        self.asked: list[str] = []

    def update(self) -> None:
        if not (self.directory / "updated").exists():
            write(self.directory / "updated")

    def closure(self, packages: Sequence[str]) -> tuple[Package, ...]:
        self.asked = list(packages)
        return tuple(
            Package(name=name, version=self.version, file=f"{name}.deb", size=1)
            for name in packages
        )


@pytest.fixture
def recipe(tmp_path: Path) -> base.Recipe:
    """Return a recipe with all that it reads."""
    write(tmp_path / "images/Containerfile", "FROM scratch\n")
    write(tmp_path / "images/packages", "# comment\none  two # three\n\nfour\n")
    write(tmp_path / "images/files/etc/conf", "conf")
    write(tmp_path / "other", "not part of it")
    return base.Recipe(context=tmp_path)


def digest(recipe: base.Recipe, version: str = "1") -> str:
    apt = OfferedPackages(recipe.context / f"apt-{version}", version)
    return key(*base.inputs(recipe, apt))  # type: ignore[arg-type]


def test_list_of_packages_has_comments(recipe: base.Recipe) -> None:
    assert base.package_names(recipe) == ["one", "two", "four"]


def test_packages_are_asked_for_with_what_every_debian_has(recipe: base.Recipe) -> None:
    apt = OfferedPackages(recipe.context / "apt")
    list(base.inputs(recipe, apt))  # type: ignore[arg-type]
    assert {"apt", "?essential", "one", "two", "four"} <= set(apt.asked)


def test_packages_are_worked_out_once_for_the_same_lists(recipe: base.Recipe) -> None:
    apt = OfferedPackages(recipe.context / "apt")
    first = list(base.inputs(recipe, apt))  # type: ignore[arg-type]
    apt.asked.clear()
    assert list(base.inputs(recipe, apt)) == first  # type: ignore[arg-type]
    assert apt.asked == []
    os.utime(apt.directory / "updated", (1, 1))
    apt.version = "2"
    assert list(base.inputs(recipe, apt)) != first  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Path], object]] = {
    "Containerfile": lambda top: write(top / "images/Containerfile", "FROM other\n"),
    "list of packages": lambda top: write(top / "images/packages", "one\n"),
    "copied file": lambda top: write(top / "images/files/etc/conf", "other"),
    "copied file's mode": lambda top: (top / "images/files/etc/conf").chmod(0o600),
    "copied file's name": lambda top: write(top / "images/files/etc/other", ""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_key_counts_all_that_the_build_sees(
    recipe: base.Recipe, change: Callable[[Path], object]
) -> None:
    before = digest(recipe)
    change(recipe.context)
    assert digest(recipe) != before


def test_key_counts_versions_and_nothing_beside_the_context(recipe: base.Recipe) -> None:
    before = digest(recipe)
    assert digest(recipe, "2") != before
    write(recipe.context / "other", "changed")
    assert digest(recipe) == before


def test_own_recipe_is_complete() -> None:
    recipe = base.Recipe(context=ROOT)
    names = base.package_names(recipe)
    assert {"linux-image-cloud-amd64", "ostree-boot", "cloud-init", "systemd"} <= set(names)
    text = (ROOT / recipe.containerfile).read_text()
    assert "FROM ${BASE} AS base\n" in text
    copied = [
        line.split()[1] for line in text.partition("AS image")[0].splitlines() if line[:4] == "COPY"
    ]
    assert all((ROOT / name).exists() for name in copied)
    assert all(name.startswith(recipe.files) for name in copied)


def test_mirror_of_this_machine_is_only_for_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERLAYD_APT_MIRROR", "http://mirror.invalid/debian")
    volumes = base.volumes("trixie", tmp_path)
    assert set(volumes) == {"/etc/apt/sources.list.d/debian.sources", base.APT_CONFIG}
    sources = volumes["/etc/apt/sources.list.d/debian.sources"].read_text()
    assert "URIs: http://mirror.invalid/debian\nSuites: trixie\n" in sources
    command = base.debian_of_its_own("trixie", tmp_path / "debian.tar", tmp_path)
    assert any("http://mirror.invalid/debian" in word for word in command)
    standard = (tmp_path / "debian.sources").read_text()
    assert "http://deb.debian.org/debian\n" in standard
    assert "mirror.invalid" not in standard
