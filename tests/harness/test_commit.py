# SPDX-License-Identifier: LGPL-2.1-or-later
"""What OSTree deploys: the layout of a Debian, of a layer over it, and commits of both."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import commit, manifest
from harness.errors import BuildError
from tests.harness.trees_of_debian import MODULES, PYC, RELEASE, debian, write

if TYPE_CHECKING:
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="keeps owners, makes devices")
needs_ostree = pytest.mark.skipif(not shutil.which("ostree"), reason="no ostree here")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a Debian that was arranged."""
    top = debian(tmp_path / "tree")
    commit.arrange(top)
    return top


def rules(tree: Path, name: str = "image") -> list[str]:
    """Return the rules for systemd-tmpfiles, without owners."""
    text = (tree / f"usr/lib/tmpfiles.d/ostree-{name}.conf").read_text()
    return [" ".join(line.split()[:3]) for line in text.splitlines()]


def test_what_is_not_the_same_everywhere_is_a_link_or_empty(tree: Path) -> None:
    links = {path.name: os.readlink(path) for path in tree.iterdir() if path.is_symlink()}
    assert links == {
        "home": "var/home",
        "root": "var/roothome",
        "opt": "var/opt",
        "srv": "var/srv",
        "mnt": "var/mnt",
        "media": "run/media",
        "ostree": "sysroot/ostree",
    }
    directories = {path.name for path in tree.iterdir() if not path.is_symlink()}
    assert directories == {"boot", "dev", "proc", "run", "sys", "sysroot", "tmp", "usr", "var"}
    assert not any(any((tree / name).iterdir()) for name in directories - {"usr"})
    assert os.readlink(tree / "usr/local") == "../var/usrlocal"
    assert (tree / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_kernel_and_initramfs_lie_where_ostree_looks(tree: Path) -> None:
    found = {path.name: path.read_text() for path in (tree / MODULES).iterdir()}
    assert found == {
        "vmlinuz": "kernel",
        "initramfs.img": "initramfs",
        "config": "config",
        "modules.dep": "",
    }
    assert commit.release(tree) == RELEASE


def test_etc_has_nothing_of_the_builder(tree: Path) -> None:
    assert {path.name for path in (tree / "usr/etc").iterdir()} == {"machine-id", "passwd"}
    assert (tree / "usr/etc/machine-id").read_text() == ""


def test_dpkg_database_is_with_what_it_describes(tree: Path) -> None:
    assert (tree / "usr/lib/sysimage/dpkg/status").read_text() == "status"
    text = (tree / "usr/lib/tmpfiles.d/ostree-image.conf").read_text()
    assert "L /var/lib/dpkg - - - - ../../usr/lib/sysimage/dpkg\n" in text


def test_var_is_made_anew_at_boot_without_caches_and_logs(tree: Path) -> None:
    assert set(rules(tree)) == {
        "d /var/cache 0755",
        "d /var/cache/apt 0755",
        "d /var/cache/debconf 0755",
        "C /var/cache/debconf/config.dat 0644",
        "d /var/lib/apt 0755",
        "d /var/lib/apt/lists 0755",
        "L /var/lib/dpkg -",
        "d /var/lib/pam 0755",
        "C /var/lib/pam/seen 0644",
        "d /var/lib/secret 0700",
        "d /var/mnt 0755",
        "d /var/opt 0755",
        "d /var/roothome 0755",
        "C /var/roothome/.profile 0644",
        "d /var/spool 0755",
        "L /var/spool/mail -",
        "d /var/usrlocal 0755",
        "d /var/usrlocal/bin 0755",
        "C /var/usrlocal/bin/own 0644",
    }
    assert (tree / "usr/share/factory/var/roothome/.profile").read_text() == "profile"


def test_rules_of_packages_follow_what_was_moved(tree: Path) -> None:
    text = (tree / "usr/lib/tmpfiles.d/home.conf").read_text()
    assert text == "# home\nQ /var/home 0755 - - -\nq /var/srv 0755 - - -\n"


def test_compiled_modules_fit_the_times_that_ostree_gives(tree: Path) -> None:
    cache = tree / "usr/lib/python3/__pycache__"
    times = {
        name: PYC.unpack((cache / f"{name}.pyc").read_bytes())[2] for name in ("timed", "hashed")
    }
    assert times == {"timed": 0, "hashed": 1234}  # the other is a part of a hash
    assert (cache / "short.pyc").read_bytes() == b"\xcb\r"
    assert {path.stat().st_mtime for path in cache.iterdir()} == {0}


def test_system_without_a_kernel_is_refused(tmp_path: Path) -> None:
    top = debian(tmp_path / "tree")
    shutil.rmtree(top / MODULES)
    with pytest.raises(BuildError, match=r"one kernel is wanted .* there are 0"):
        commit.arrange(top)


def test_kernel_without_an_initramfs_is_refused(tmp_path: Path) -> None:
    top = debian(tmp_path / "tree")
    (top / f"boot/initrd.img-{RELEASE}").unlink()
    with pytest.raises(BuildError, match=f"has no /boot/initrd.img-{RELEASE}"):
        commit.arrange(top)


def test_name_that_no_rule_can_have_is_refused(tmp_path: Path) -> None:
    top = debian(tmp_path / "tree")
    write(top / "var/lib/a b")
    with pytest.raises(BuildError, match="a name with a blank"):
        commit.arrange(top)


def uppers(top: Path) -> Path:
    """Make empty upper directories."""
    for name in ("upper", "etc", "var"):
        (top / name).mkdir(parents=True)
    return top


@needs_root
def test_layer_has_what_is_new_and_says_what_is_gone(tree: Path, tmp_path: Path) -> None:
    result = uppers(tmp_path / "result")
    write(result / "upper/usr/bin/new", "new", mode=0o755)
    os.mknod(result / "upper/usr/bin/tool", 0o020000, os.makedev(0, 0))
    write(result / "upper/usr/lib/python3/only", "replaced")
    os.setxattr(result / "upper/usr/lib/python3", "trusted.overlay.opaque", b"y")
    write(result / "upper/usr/share/doc/new/readme")
    os.setxattr(result / "upper/usr/share/doc/new", "trusted.overlay.opaque", b"y")
    os.setxattr(result / "upper/usr/bin/new", "trusted.overlay.origin", b"x")
    (result / "upper/etc").mkdir()
    write(result / "etc/new.conf", "conf")
    os.mknod(result / "etc/passwd", 0o020000, os.makedev(0, 0))
    layer = commit.arrange_layer(result, tree, tmp_path / "layer", "test")
    files = {path.relative_to(layer.tree) for path in layer.tree.rglob("*") if path.is_file()}
    assert set(map(str, files)) == {
        "usr/bin/new",
        "usr/etc/new.conf",
        "usr/lib/python3/only",
        "usr/share/doc/new/readme",
    }
    # The new directory hides nothing, so there is nothing to remove.
    assert set(layer.removed) == {"/usr/bin/tool", "/usr/etc/passwd", "/usr/lib/python3"}
    assert not [path for path in layer.tree.rglob("*") if os.listxattr(path)]


@needs_root
def test_layer_brings_its_part_of_var_and_renews_the_base(tree: Path, tmp_path: Path) -> None:
    result = uppers(tmp_path / "result")
    write(result / "var/lib/new/data", "data", mode=0o600)
    write(result / "var/lib/pam/seen", "seen again")
    write(result / "var/log/new.log", "log")
    layer = commit.arrange_layer(result, tree, tmp_path / "layer", "test")
    factory = layer.tree / "usr/share/factory/var/lib"
    assert (factory / "new/data").read_text() == "data"
    assert (factory / "pam/seen").read_text() == "seen again"
    assert rules(layer.tree, "test") == ["d /var/lib/new 0755", "C /var/lib/new/data 0600"]


def test_layers_lie_over_the_base_which_stays_as_it_is(tree: Path, tmp_path: Path) -> None:
    before = manifest.digest(manifest.lines(tree))
    top, out = tmp_path / "top", tmp_path / "out"
    write(top / "usr/bin/new", "new", mode=0o4755)
    write(top / "usr/lib/python3/only", "only")
    write(top / "usr/share/factory/var/roothome/.profile", "other")
    removed = ("/usr/bin/tool", "/usr/lib/python3")
    write(tmp_path / "next/usr/bin/new", "newer")
    layers = [commit.Layer(tree=top, removed=removed), commit.Layer(tree=tmp_path / "next")]
    commit.combine(tree, layers, out)
    assert [path.name for path in (out / "usr/bin").iterdir()] == ["new"]
    assert (out / "usr/bin/new").read_text() == "newer"
    assert [path.name for path in (out / "usr/lib/python3").iterdir()] == ["only"]
    assert (out / "usr/share/factory/var/roothome/.profile").read_text() == "other"
    assert (out / MODULES / "vmlinuz").samefile(tree / MODULES / "vmlinuz")
    assert manifest.digest(manifest.lines(tree)) == before


@needs_root
@needs_ostree
def test_commit_has_the_tree_as_it_is(tree: Path, tmp_path: Path) -> None:
    repo, out = tmp_path / "repo", tmp_path / "out"
    os.chown(tree / "usr/bin/tool", 7, 8)
    (tree / "usr/bin/tool").chmod(0o4755)
    os.setxattr(tree / "usr/bin/tool", "user.kept", b"yes")
    before = manifest.digest(manifest.lines(tree))
    commit.init(repo)
    checksum = commit.commit(repo, "base", tree, subject="base", consume=True)
    assert not tree.exists()
    subprocess.run(["ostree", f"--repo={repo}", "checkout", checksum, out], check=True)
    assert manifest.digest(manifest.lines(out)) == before


@needs_root
@needs_ostree
def test_equal_trees_have_equal_contents_whenever_they_are_made(tmp_path: Path) -> None:
    repo, checksums = tmp_path / "repo", set()
    commit.init(repo)
    for name in ("one", "two"):
        top = debian(tmp_path / name)
        commit.arrange(top)
        commit.commit(repo, name, top, subject=name)
        command = ("ostree", f"--repo={repo}", "ls", "--checksum", "--dironly", name, "/")
        checksums.add(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(checksums) == 1
