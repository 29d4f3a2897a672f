# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which targets are critical and which files are flagged: decision 14 of the design."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd.policy import FileFacts, critical_reason, flag_pattern
from tests.unit.conftest import absolute_paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.config import Config

TREES = (
    *("/usr/bin", "/usr/sbin", "/usr/libexec", "/usr/lib/systemd", "/usr/lib/polkit-1"),
    *("/usr/lib/dbus-1.0", "/usr/lib/openssh", "/usr/lib/sudo", "/usr/lib/apt", "/usr/lib/dpkg"),
    *("/usr/lib/ostree", "/usr/lib/modules", "/usr/lib/firmware", "/usr/lib/udev"),
    *("/usr/lib/tmpfiles.d", "/usr/lib/sysusers.d", "/usr/lib/sysctl.d", "/usr/lib/pam.d"),
    *("/usr/lib/overlayd", "/usr/lib/*/security", "/usr/lib/python3*"),
    *("/usr/share/polkit-1", "/usr/share/dbus-1", "/usr/share/pam", "/usr/share/pam-configs"),
    *("/usr/share/sudo", "/usr/share/ca-certificates", "/usr/share/keyrings"),
    "/usr/share/overlayd",
)
"""As the design has them."""

CONCRETE = {
    "/usr/lib/*/security": "/usr/lib/x86_64-linux-gnu/security",
    "/usr/lib/python3*": "/usr/lib/python3.11",
}
PLAIN_FILE = FileFacts(set_id=False, capabilities=False, needed=False)


def machine(*directories: str) -> Callable[[str], bool]:
    """Return an ``exists`` for a machine that has *directories*, matched by components."""

    def exists(pattern: str) -> bool:
        parts = pattern.split("/")
        return any(
            len(parts) == len(path.split("/")) and all(map(fnmatchcase, path.split("/"), parts))
            for path in directories
        )

    return exists


def critical(
    path: str, *directories: str, trees: tuple[str, ...] = TREES, file: FileFacts | None = None
) -> str | None:
    return critical_reason(path, trees, single_file=file, exists=machine(*directories))


def test_default_configuration_has_the_trees_of_the_design(defaults: Config) -> None:
    assert sorted(defaults.critical_trees) == sorted(TREES)


@pytest.mark.parametrize("tree", TREES)
def test_tree_and_all_in_it_is_critical(tree: str) -> None:
    path = CONCRETE.get(tree, tree)
    for inner in (path, f"{path}/x", f"{path}/x/y z", f"{path}/.hidden"):
        assert critical(inner) is not None, inner


@pytest.mark.parametrize("tree", TREES)
def test_each_directory_above_a_tree_is_critical_and_only_itself(tree: str) -> None:
    path = CONCRETE.get(tree, tree)
    above = path.rpartition("/")[0]
    while above:
        assert critical(above, path) is not None, above
        if above not in {"/usr/bin", "/usr/lib"}:
            assert critical(f"{above}/zzz", path) is None
        above = above.rpartition("/")[0]


@pytest.mark.parametrize("tree", TREES)
def test_name_that_only_looks_like_a_tree_is_not_critical(tree: str) -> None:
    path = CONCRETE.get(tree, tree)
    folder, _, name = path.rpartition("/")
    lookalikes = [f"{folder}/x{name}", f"{folder}/{name[:-1]}", f"{folder}/{name.upper()}"]
    if not tree.endswith("*"):
        lookalikes += [f"{path}x", f"{path}-", f"{path}.d", f"{path}\n"]
    else:
        lookalikes[1] = "/usr/lib/python2.7"
    for lookalike in lookalikes:
        if lookalike in TREES:
            continue
        assert critical(lookalike, path) is None, lookalike
        assert critical(f"{lookalike}/x", path) is None, lookalike


@pytest.mark.parametrize(
    "path",
    [
        *("/usr/lib/systemdx", "/usr/share/foo", "/usr/share/pamx", "/usr/lib64", "/usr/binx"),
        *("/usr/local", "/usr/lib/x86_64-linux-gnu/securityx", "/usr/lib/security"),
        *("/usr/lib/a/b/security", "/usr/share/python3", "/usr/lib/python2", "/usr/src"),
        *("/usr/share/doc/usr/bin", "/usr/include", "/usr/games"),
    ],
)
def test_ordinary_directory_is_not_critical(path: str) -> None:
    assert critical(path) is None


def test_python_of_any_minor_version_is_critical() -> None:
    for name in ("python3", "python3.11", "python3.14", "python3-foo"):
        assert critical(f"/usr/lib/{name}/dist-packages") is not None


def test_wildcard_stands_for_one_component() -> None:
    trees = ("/usr/lib/*/security",)
    assert critical("/usr/lib/arm/security", trees=trees) is not None
    assert critical("/usr/lib/arm/x/security", trees=trees) is None
    assert critical("/usr/lib/security", trees=trees) is None


def test_directory_matched_by_a_wildcard_is_critical_only_if_the_rest_is_there() -> None:
    assert critical("/usr/lib/arm", "/usr/lib/arm/security") is not None
    assert critical("/usr/lib/foo", "/usr/lib/arm/security") is None


def test_wildcard_characters_in_the_name_of_a_target_stand_for_themselves() -> None:
    assert critical("/usr/lib/[x]", "/usr/lib/[x]/security") is not None
    assert critical("/usr/lib/[x]", "/usr/lib/x/security") is None
    assert critical("/usr/lib/a*", "/usr/lib/ab/security") is None


def test_reason_names_the_target_and_the_tree() -> None:
    assert critical("/usr/bin") == "/usr/bin itself"
    assert critical("/usr/bin/x/y") == "/usr/bin/x/y lies in /usr/bin"
    assert critical("/usr/share") == "/usr/share contains /usr/share/polkit-1"
    assert critical("/usr/lib/python3.11") == "/usr/lib/python3.11 lies in /usr/lib/python3*"


@pytest.mark.parametrize("path", ["/usr/bin/tool", "/usr/sbin/tool"])
def test_ordinary_program_alone_is_not_critical(path: str) -> None:
    assert critical(path, file=PLAIN_FILE) is None
    assert critical(path) is not None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (FileFacts(set_id=True, capabilities=False, needed=False), "set-id"),
        (FileFacts(set_id=False, capabilities=True, needed=False), "capabilities"),
        (FileFacts(set_id=False, capabilities=False, needed=True), "overlayd itself needs"),
    ],
)
def test_program_with_power_is_critical(facts: FileFacts, reason: str) -> None:
    for path in ("/usr/bin/tool", "/usr/sbin/tool"):
        assert reason in (critical(path, file=facts) or "")


@pytest.mark.parametrize(
    "path", ["/usr/libexec/x", "/usr/lib/systemd/systemd", "/usr/lib/arm/security/pam_unix.so"]
)
def test_single_file_in_another_critical_tree_is_critical(path: str) -> None:
    assert critical(path, file=PLAIN_FILE) is not None


def test_single_file_elsewhere_is_not_critical() -> None:
    assert critical("/usr/share/foo/file", file=PLAIN_FILE) is None
    assert critical("/usr/binx/file", file=PLAIN_FILE) is None


def test_without_trees_nothing_is_critical() -> None:
    assert critical("/usr", trees=()) is None


@given(st.lists(absolute_paths.map(lambda path: f"/usr{path}"), max_size=4), absolute_paths)
def test_trees_without_wildcards_make_critical_what_shares_their_components(
    trees: list[str], path: str
) -> None:
    plain = tuple(tree for tree in trees if not set("*?[") & set(tree))
    target = f"/usr{path}"
    parts = target.split("/")
    expected = any(
        parts[: len(tree.split("/"))] == tree.split("/") or tree.split("/")[: len(parts)] == parts
        for tree in plain
    )
    assert (critical(target, trees=plain) is not None) is expected


@pytest.mark.parametrize(
    "name",
    [
        *("a.so", ".so", "x.dll", "x.exe", "a b.sh", "x.py", "x.rb", "x.pl", "x.conf", "x.config"),
        *("x.ini", "x.cfg", "a\nb.so", "\udcff.so", "a.so.so"),
    ],
)
def test_file_that_deserves_a_look_is_flagged(defaults: Config, name: str) -> None:
    assert flag_pattern(defaults.flagged_patterns).match(name)


@pytest.mark.parametrize(
    "name", ["so", "a.sox", "a.so.1", "a.so\n", "x.pyc", "xconf", "x.confx", "x.so/", "", "x.c"]
)
def test_other_file_is_not_flagged(defaults: Config, name: str) -> None:
    assert not flag_pattern(defaults.flagged_patterns).match(name)


def test_no_patterns_flag_nothing() -> None:
    assert not flag_pattern(()).match("")
    assert not flag_pattern(()).match("x.so")


@given(st.lists(st.text(min_size=1, max_size=5), max_size=4), st.text(max_size=6))
def test_name_is_flagged_if_any_pattern_matches_all_of_it(patterns: list[str], name: str) -> None:
    expected = any(fnmatchcase(name, pattern) for pattern in patterns)
    assert bool(flag_pattern(tuple(patterns)).match(name)) is expected
