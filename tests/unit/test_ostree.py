# SPDX-License-Identifier: LGPL-2.1-or-later
"""The booted deployment, from files like those of a booted machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from overlayd import ostree
from overlayd.errors import RefusedError
from overlayd.ostree import Deployment, booted, check_stateroot
from tests.unit.conftest import is_one_printable_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHECKSUM = "ab" * 32
ARGUMENT = f"ostree=/ostree/boot.1/debian/{CHECKSUM}/0"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a machine that was booted from OSTree with the kernel arguments given."""

    def boot(arguments: str) -> None:
        (tmp_path / "cmdline").write_text(arguments, encoding="utf-8")
        (tmp_path / "booted").touch()

    monkeypatch.setattr(ostree, "_BOOTED", str(tmp_path / "booted"))
    monkeypatch.setattr(ostree, "_CMDLINE", str(tmp_path / "cmdline"))
    monkeypatch.setattr(ostree, "_SYSROOT", str(tmp_path / "sysroot"))
    return boot


def test_deployment_is_what_the_kernel_argument_leads_to(
    machine: Callable[[str], None], tmp_path: Path
) -> None:
    machine(f"root=UUID=1 rw {ARGUMENT} quiet\n")
    assert booted() == Deployment("debian", None), "no physical root to look at"
    entry = tmp_path / f"sysroot/ostree/boot.1/debian/{CHECKSUM}/0"
    entry.parent.mkdir(parents=True)
    entry.symlink_to(f"../../../deploy/debian/deploy/{'cd' * 32}.1")
    assert str(booted()) == f"debian/{'cd' * 32}.1"


def test_argument_without_the_mark_in_run_means_no_deployment(
    machine: Callable[[str], None], tmp_path: Path
) -> None:
    machine(ARGUMENT)
    (tmp_path / "booted").unlink()
    assert booted() is None


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "quiet",
        "ostree=",
        "ostree=/",
        "ostree=/ostree/boot.1/debian",
        f"ostree=/ostree/boot.1/debian/{CHECKSUM}/0/more",
        f"ostree=/other/boot.1/debian/{CHECKSUM}/0",
        f"ostree=/ostree/deploy/debian/{CHECKSUM}/0",
        f"no{ARGUMENT}",
    ],
)
def test_malformed_argument_means_no_deployment(
    machine: Callable[[str], None], arguments: str
) -> None:
    machine(arguments)
    assert booted() is None


def test_booted_stateroot_is_accepted() -> None:
    check_stateroot("debian", Deployment("debian", f"{CHECKSUM}.0"))


@pytest.mark.parametrize("name", ["other", "", "Debian", "debian ", "deb", "a\nb\udcff"])
def test_other_stateroot_is_refused_naming_the_booted_one(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_stateroot(name, Deployment("debian", f"{CHECKSUM}.0"))
    assert "'debian'" in caught.value.message
    assert is_one_printable_line(caught.value.message)


def test_machine_without_ostree_has_no_stateroot_to_name() -> None:
    with pytest.raises(RefusedError, match="not booted from OSTree"):
        check_stateroot("debian", None)
