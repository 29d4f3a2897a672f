# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private APT root, against an archive of our own on this disk: real APT, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from harness import apt
from harness.apt import Apt, unpack
from harness.errors import BuildError, HostError
from tests.harness.archives import DebArchive, LocalApt

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not shutil.which("apt-get") or not shutil.which("dpkg-deb"), reason="APT is not here"
)


@pytest.fixture
def archive(tmp_path: Path) -> DebArchive:
    """Return an archive that has ``app``, which needs ``lib``, which needs ``data``."""
    tmp_path.chmod(0o755)
    archive = DebArchive(tmp_path / "archive")
    archive.add("app", "1:2.0-1", depends="lib (>= 1)", files={"usr/bin/app": "the program"})
    archive.add("lib", depends="data", files={"usr/lib/lib": "the library"})
    archive.add("data")
    archive.add("other")
    return archive


@pytest.fixture
def local(archive: DebArchive, tmp_path: Path) -> LocalApt:
    """Return APT for that archive."""
    return LocalApt("stable", tmp_path / "apt", archive=archive.root)


def test_closure_has_what_a_package_needs_and_nothing_else(local: Apt) -> None:
    assert [(p.name, p.version) for p in local.closure(["app"])] == [
        ("app", "1:2.0-1"),
        ("data", "1"),
        ("lib", "1"),
    ]


def test_closure_does_not_depend_on_what_was_fetched_before(local: Apt, tmp_path: Path) -> None:
    before = local.closure(["app"])
    local.download(["app"], tmp_path / "debs")
    assert local.closure(["app"]) == before


def test_download_fetches_packages_that_can_be_unpacked(local: Apt, tmp_path: Path) -> None:
    files = local.download(["app"], tmp_path / "debs")
    assert [file.name.split("_")[0] for file in files] == ["app", "data", "lib"]
    unpack(files, tmp_path / "tree")
    assert (tmp_path / "tree/usr/bin/app").read_text() == "the program"
    assert (tmp_path / "tree/usr/lib/lib").read_text() == "the library"


def test_download_can_choose(local: Apt, tmp_path: Path) -> None:
    (file,) = local.download(["app"], tmp_path, only=lambda package: package.name == "lib")
    assert file.name == "lib_1_all.deb"


def test_versions_of_several_packages(local: Apt) -> None:
    assert local.versions(["lib", "app"]) == {"app": "1:2.0-1", "lib": "1"}
    assert local.candidate("app") == "1:2.0-1"


def test_package_that_is_not_there_is_named(local: Apt) -> None:
    with pytest.raises(BuildError, match="no such package in stable: gone"):
        local.versions(["lib", "gone"])
    with pytest.raises(BuildError, match=r"stable: .*gone"):
        local.closure(["gone"])


def test_broken_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.deb").write_text("nonsense")
    with pytest.raises(BuildError, match=r"cannot unpack broken\.deb"):
        unpack([tmp_path / "broken.deb"], tmp_path / "tree")


def test_lists_are_fetched_again_only_when_they_are_old(
    local: LocalApt, archive: DebArchive
) -> None:
    said: list[str] = []
    local._say = said.append
    local.versions(["app"])
    archive.add("late")
    again = LocalApt("stable", local.directory.parent, archive=archive.root)
    again._say = said.append
    again.update()
    assert len(said) == 1
    long_ago = time.time() - 100_000
    os.utime(local.directory / "updated", (long_ago, long_ago))
    again.update()
    assert again.candidate("late") == "1"
    assert len(said) == 2


def test_old_lists_serve_when_the_mirror_is_out_of_reach(
    local: LocalApt, archive: DebArchive, tmp_path: Path
) -> None:
    local.update()
    archive.root.rename(tmp_path / "away")
    said: list[str] = []
    local._say = said.append
    local.update(max_age=0)
    assert "are old" in said[-1]
    assert [package.name for package in local.closure(["lib"])] == ["data", "lib"]


def test_mirror_out_of_reach_without_lists_is_an_error_with_a_hint(
    local: LocalApt, archive: DebArchive, tmp_path: Path
) -> None:
    archive.root.rename(tmp_path / "away")
    with pytest.raises(BuildError, match="cannot fetch the package lists of stable") as caught:
        local.closure(["app"])
    assert apt.MIRROR_VARIABLE in str(caught.value.hint)


def test_another_mirror_makes_lists_stale(local: LocalApt, archive: DebArchive) -> None:
    local.update()
    other = DebArchive(archive.root.with_name("other"))
    other.add("app", "3")
    local.archive = other.root
    local.update()
    assert local.candidate("app") == "3"


def test_nothing_of_this_machine_s_apt_is_read_but_how_to_reach_mirrors(local: LocalApt) -> None:
    local.update()
    env = {**os.environ, "APT_CONFIG": str(local.directory / "apt.conf")}
    dump = subprocess.run(
        ["apt-config", "dump"], env=env, capture_output=True, text=True, check=True
    ).stdout
    places = [line for line in dump.splitlines() if line.startswith("Dir::") and "/var/" in line]
    assert not [line for line in places if "Dir::State::status" in line]
    assert "Post-Invoke" not in dump
    for setting in apt.acquire_settings():
        assert f"{setting};" in dump.splitlines()


def test_mirror_can_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(apt.MIRROR_VARIABLE, "http://mirror.example.org/debian")
    assert apt.machine_mirror() == "http://mirror.example.org/debian"
    assert apt.machine_mirror(apt.SECURITY) == ""


def test_mirror_is_that_of_the_archive_with_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(apt.MIRROR_VARIABLE, raising=False)
    listing = "Docker CE|http://d/\nDebian-Security|http://s/\nDebian|http://m/\n"
    monkeypatch.setattr(apt, "_targets", lambda: listing)
    assert apt.machine_mirror() == "http://m/"
    assert apt.machine_mirror(apt.SECURITY) == "http://s/"
    assert apt.machine_mirror("Ubuntu") == ""


def test_first_mirror_of_a_list_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(apt.MIRROR_VARIABLE, raising=False)
    (tmp_path / "mirrors").write_text("# near\n\nhttp://near/debian priority:1\nhttp://far/\n")
    listing = f"Debian|mirror+file:{tmp_path}/mirrors/\n"
    monkeypatch.setattr(apt, "_targets", lambda: listing)
    assert apt.machine_mirror() == "http://near/debian"


def test_security_archive_comes_with_a_release_but_not_with_sid_or_a_mirror_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(apt.MIRROR_VARIABLE, raising=False)
    monkeypatch.setattr(apt, "_targets", lambda: "Debian|http://m/\nDebian-Security|http://s/\n")
    sources = Apt("bookworm", tmp_path)._sources().splitlines()
    assert [line.split("] ")[1] for line in sources] == [
        "http://m/ bookworm main",
        "http://s/ bookworm-security main",
    ]
    assert len(Apt("sid", tmp_path)._sources().splitlines()) == 1
    own = Apt("bookworm", tmp_path, mirror="http://own/")._sources()
    assert own.endswith("http://own/ bookworm main\n")
    assert own.count("\n") == 1


def test_machine_without_apt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get is missing"):
        Apt("stable", tmp_path).update()
