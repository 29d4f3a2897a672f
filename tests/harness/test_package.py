# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages are built as their inputs say, alike everywhere; and this project's own is in order."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import package
from harness.errors import BuildError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DEBIAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}

needs_dpkg = pytest.mark.skipif(
    not shutil.which("dpkg-buildpackage", path=DEBIAN["PATH"]), reason="needs dpkg-dev"
)

CONTROL = """\
Source: thing
Maintainer: Somebody <somebody@example.org>
Build-Depends: dpkg-dev
Rules-Requires-Root: no

Package: thing
Architecture: all
Description: a thing
"""
RULES = """\
#!/usr/bin/make -f
export DEB_BUILD_OPTIONS DEB_BUILD_PROFILES
tmp = debian/thing
binary:
	test "$(DEB_BUILD_PROFILES)" = nocheck
	mkdir -p $(tmp)/DEBIAN $(tmp)/usr/share
	cp -dp thing.txt link $(tmp)/usr/share
	python3 -c 'import sys; print(sys.executable)' >$(tmp)/usr/share/python
	env | sort | grep -v -e HOME= -e PWD= -e MAKE -e MFLAGS >$(tmp)/usr/share/environment
	dpkg-gencontrol -P$(tmp)
	dpkg-deb --build $(tmp) ..
"""
CHANGELOG = """\
thing (1.2-3) unstable; urgency=medium

  * First version.

 -- Somebody <somebody@example.org>  Mon, 02 Jan 2023 03:04:05 +0000
"""


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=tree, env=DEBIAN, check=True, capture_output=True)


def write(path: Path, text: str = "", *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def make_project(tree: Path) -> Path:
    """Make a project whose package takes no time to build."""
    write(tree / "debian/control", CONTROL)
    write(tree / "debian/rules", RULES, mode=0o755)
    write(tree / "debian/changelog", CHANGELOG)
    write(tree / "debian/not-packaged", "# none of these\ntests\n")
    write(tree / "thing.txt", "A thing.\n")
    write(tree / "tests/test_thing.py")
    write(tree / ".gitignore", "/build/\n/.gitignore\n")
    write(tree / "build/result")
    (tree / "link").symlink_to("thing.txt")
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    return tree


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def names(tree: Path) -> list[str]:
    return [str(path.relative_to(tree)) for path in package.inputs(tree)]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def unpacked(deb: Path, into: Path) -> Path:
    subprocess.run(["dpkg-deb", "--raw-extract", deb, into], env=DEBIAN, check=True)
    return into


# What counts


def test_inputs_are_the_files_of_git_but_those_the_project_excludes(project: Path) -> None:
    packaging = [f"debian/{name}" for name in ("changelog", "control", "not-packaged", "rules")]
    assert names(project) == [*packaging, "link", "thing.txt"]


def test_new_file_is_an_input_and_a_removed_one_is_not(project: Path) -> None:
    write(project / "new")
    (project / "thing.txt").unlink()
    assert "new" in names(project)
    assert "thing.txt" not in names(project)


def test_everything_is_an_input_unless_the_project_excludes_it(project: Path) -> None:
    (project / "debian/not-packaged").unlink()
    assert "tests/test_thing.py" in names(project)


def test_inputs_do_not_depend_on_a_hook_of_git_that_calls(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent")
    assert "thing.txt" in names(project)


def test_tree_without_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="files of"):
        package.inputs(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a tree away")
def test_root_may_build_the_tree_of_a_user(project: Path) -> None:
    os.chown(project, 12345, 12345)
    os.chown(project / ".git", 12345, 12345)
    assert "thing.txt" in names(project)


# Building


@needs_dpkg
def test_package_holds_the_tree_as_it_is_now(project: Path, tmp_path: Path) -> None:
    write(project / "thing.txt", "Not committed.\n")
    deb = package.build(project, tmp_path / "out")
    assert deb == tmp_path / "out" / "thing_1.2-3_all.deb"
    content = unpacked(deb, tmp_path / "content")
    assert (content / "usr/share/thing.txt").read_text() == "Not committed.\n"
    assert os.readlink(content / "usr/share/link") == "thing.txt"


@needs_dpkg
def test_build_leaves_the_source_tree_alone(project: Path, tmp_path: Path) -> None:
    before = sorted(project.rglob("*"))
    package.build(project, tmp_path / "out")
    assert sorted(project.rglob("*")) == before


@needs_dpkg
def test_same_inputs_give_the_same_bytes(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = package.build(project, tmp_path / "out")
    other = make_project(tmp_path / "with a space" / "other name")
    (other / "thing.txt").chmod(0o660)
    os.utime(other / "thing.txt", (1, 1))
    scratch = tmp_path / "elsewhere"
    scratch.mkdir()
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setenv("DEB_BUILD_OPTIONS", "noopt")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    mask = os.umask(0o077)
    try:
        second = package.build(other, tmp_path / "out two")
    finally:
        os.umask(mask)
    assert digest(first) == digest(second)


@needs_dpkg
def test_package_is_built_by_the_python_of_debian(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "bin/python3", "#!/bin/sh\nexit 1\n", mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    content = unpacked(package.build(project, tmp_path / "out"), tmp_path / "content")
    assert (content / "usr/share/python").read_text() == "/usr/bin/python3\n"


@needs_dpkg
def test_suffix_is_appended_to_the_version(project: Path, tmp_path: Path) -> None:
    deb = package.build(project, tmp_path, version_suffix="+try.1")
    assert deb.name == "thing_1.2-3+try.1_all.deb"


def test_suffix_that_no_version_has_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="not a part of a Debian version"):
        package.build(project, tmp_path, version_suffix="-1 x")


def test_project_without_packaging_is_refused(project: Path, tmp_path: Path) -> None:
    (project / "debian/changelog").unlink()
    with pytest.raises(BuildError, match="no debian/changelog"):
        package.build(project, tmp_path)


@needs_dpkg
def test_failed_build_says_what_the_tools_said(project: Path, tmp_path: Path) -> None:
    write(project / "debian/rules", "#!/usr/bin/make -f\nbinary:\n\techo so sad; false\n")
    with pytest.raises(BuildError, match=r"building the package of project failed") as caught:
        package.build(project, tmp_path / "out")
    assert any("so sad" in note for note in caught.value.__notes__)
    assert not (tmp_path / "out").exists()


@needs_dpkg
def test_build_without_a_package_is_a_failure(project: Path, tmp_path: Path) -> None:
    write(project / "debian/rules", "#!/usr/bin/make -f\nbinary:\n")
    with pytest.raises(BuildError, match=r"one package was to be built .*: none"):
        package.build(project, tmp_path / "out")


@needs_dpkg
def test_missing_build_dependency_is_named_with_the_way_to_get_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    control = CONTROL.replace("dpkg-dev", "dpkg-dev, no-such-thing (>= 7), for-tests <!nocheck>")
    write(project / "debian/control", control)
    with pytest.raises(HostError) as caught:
        package.build(project, tmp_path)
    assert caught.value.message.endswith(": no-such-thing (>= 7)")
    assert caught.value.hint is not None
    assert "build-dep" in caught.value.hint


@needs_dpkg
def test_interrupted_build_leaves_no_process(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Whoever holds the pipe open keeps its reader waiting.
    write(project / "debian/rules", f"#!/usr/bin/make -f\nbinary:\n\tsleep 300 >{fifo}\n")
    ended = threading.Event()

    def read_to_the_end() -> None:
        fifo.read_bytes()
        ended.set()

    threading.Thread(target=read_to_the_end, daemon=True).start()
    monkeypatch.setattr(package, "_TIMEOUT", 2.0)
    with pytest.raises(BuildError, match="took over 2 s"):
        package.build(project, tmp_path / "out")
    assert ended.wait(10)


# The package of this project


def test_version_of_the_package_is_that_of_the_program() -> None:
    text = (ROOT / "overlayd/__init__.py").read_text(encoding="utf-8")
    (version,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    heading = (ROOT / "debian/changelog").read_text(encoding="utf-8").partition("\n")[0]
    assert heading.startswith(f"overlayd ({version}) ")


def test_change_of_a_test_or_the_harness_needs_no_new_package() -> None:
    roots = {name.partition("/")[0] for name in names(ROOT)}
    assert roots >= {"overlayd", "data", "docs", "debian", "pyproject.toml", "README.md"}
    assert not roots & {"tests", "harness", "benchmarks", "demo", "tools", "noxfile.py"}


@pytest.fixture(scope="session")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the package of this tree, where it can be built without installing anything."""
    check = ["dpkg-checkbuilddeps", "-P", "nocheck", str(ROOT / "debian/control")]
    try:
        subprocess.run(check, env=DEBIAN, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs dpkg-dev")
    except subprocess.CalledProcessError as error:
        pytest.skip(os.fsdecode(error.stderr).strip())
    out = tmp_path_factory.mktemp("package")
    yield package.build(ROOT, out)
    shutil.rmtree(out)


def test_build_by_hand_leaves_the_tree_as_it_was(deb: Path, tmp_path: Path) -> None:
    del deb  # that it can be built here
    tree = tmp_path / "tree"
    for name in ("overlayd", "data", "docs", "debian", "tests/unit"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("ARCHITECTURE.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for cache in tree.rglob("__pycache__"):
        shutil.rmtree(cache)
    write(tree / ".nox/unit/big")  # no part of the source, but not for the build to remove
    before = {path: digest(path) for path in tree.rglob("*") if path.is_file()}
    env = {**DEBIAN, "DEB_BUILD_OPTIONS": "nocheck", "DEB_BUILD_PROFILES": "nocheck"}
    for command in (["dpkg-buildpackage", "-us", "-uc"], ["debian/rules", "clean"]):
        subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)
    assert {path: digest(path) for path in tree.rglob("*") if path.is_file()} == before
    (archive,) = tmp_path.glob("overlayd_*.tar.xz")
    listing = subprocess.run(["tar", "tf", archive], check=True, capture_output=True, text=True)
    assert "/tests/unit/" in listing.stdout
    assert ".nox" not in listing.stdout


def test_package_holds_the_program_and_nothing_of_its_development(
    deb: Path, tmp_path: Path
) -> None:
    content = unpacked(deb, tmp_path / "content")
    found = {
        str(path.relative_to(content))
        for path in content.rglob("*")
        if not path.is_dir() and "DEBIAN" not in path.parts
    }
    modules = "usr/lib/python3/dist-packages/overlayd/"
    installed = {name.removeprefix(modules) for name in found if name.startswith(modules)}
    assert installed == {path.name for path in ROOT.glob("overlayd/*.*")}
    assert {name for name in found if not name.startswith("usr/lib/python3/")} == {
        "usr/bin/overlayd",
        "usr/lib/overlayd/overlayd.toml",
        "usr/lib/systemd/system/overlayd-soft-reboot.service",
        "usr/lib/systemd/system/overlayd.service",
        "usr/lib/tmpfiles.d/overlayd.conf",
        "usr/share/dbus-1/system-services/org.projectatomic.aptostree.Overlay1.service",
        "usr/share/dbus-1/system.d/org.projectatomic.aptostree.Overlay1.conf",
        "usr/share/polkit-1/actions/org.projectatomic.aptostree.usroverlay.policy",
        "usr/lib/systemd/system/soft-reboot.target.wants/overlayd-soft-reboot.service",
        "usr/share/bash-completion/completions/overlayd",
        "usr/share/fish/vendor_completions.d/overlayd.fish",
        *(f"usr/share/man/man{p.suffix[1:]}/{p.name}.gz" for p in ROOT.glob("data/man/*")),
        "usr/share/zsh/vendor-completions/_overlayd",
        *(
            f"usr/share/doc/overlayd/{name}"
            for name in ("ARCHITECTURE.md", "README.md", "SECURITY.md", "changelog.gz", "copyright")
        ),
        *(f"usr/share/doc/overlayd/docs/{path.name}" for path in ROOT.glob("docs/*.md")),
    }
    assert not (content / "DEBIAN/conffiles").exists()
    assert (content / "etc/overlayd/overlayd.toml.d").is_dir()


def test_defaults_of_the_package_are_those_of_the_program(deb: Path, tmp_path: Path) -> None:
    content = unpacked(deb, tmp_path / "content")
    installed = (content / "usr/lib/overlayd/overlayd.toml").read_bytes()
    assert installed == (ROOT / "overlayd/overlayd.toml").read_bytes()


def test_package_needs_what_the_project_says_it_needs(deb: Path) -> None:
    field = ["dpkg-deb", "--field", str(deb), "Depends"]
    listing = subprocess.run(field, env=DEBIAN, check=True, capture_output=True, text=True).stdout
    assert {item.split()[0] for item in listing.split(", ")} == {
        "python3-click",
        "python3-jeepney",
        "python3-tomli-w",
        "python3:any",
    }
    assert "python3:any (>= 3.11~)" in listing


def test_lintian_finds_no_fault_with_the_package(deb: Path) -> None:
    if not shutil.which("lintian", path=DEBIAN["PATH"]):
        pytest.skip("needs lintian")
    lintian = ["lintian", "--allow-root", "--fail-on=error,warning", "--tag-display-limit=0"]
    done = subprocess.run(
        [*lintian, str(deb)], env=DEBIAN, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
