# SPDX-License-Identifier: LGPL-2.1-or-later
"""The realistic case: the image booted by its own initramfs, with nothing masked or left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.fleet import Fleet
from harness.provider import HOST_KERNEL, Case
from harness.session import STATE
from harness.watch import boot_findings
from tests.system import project
from tests.system.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = "/usr/share/base-files"


@pytest.fixture
def untuned(machine_case: Case, rounds: int, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """Give a VM that was booted without anything that makes it fast."""
    if machine_case.kernel == HOST_KERNEL:
        pytest.skip("a container boots in seconds as it is")
    if rounds == 1:
        pytest.skip("an untuned boot takes a minute without KVM; --rounds=2 has it")
    fleet = request.config.stash[STATE].provider
    assert isinstance(fleet, Fleet)
    with fleet.cold(machine_case.kernel) as machine:
        machine.start()
        yield Guest(machine)


def test_untuned_image_comes_up_whole_and_takes_overlays(untuned: Guest) -> None:
    state = untuned.sh("systemctl is-system-running --wait", check=False, timeout=240)
    assert state == "running", untuned.sh("systemctl --failed --no-legend")
    assert boot_findings(untuned.machine, project.ALLOWED) == ()
    usr = untuned.usr()
    source = untuned.source("plain", {"motd": "Try me.\n"})
    with untuned.overlay("plain", source, BASE):
        assert untuned.sh(f"cat {BASE}/motd", user="alice") == "Try me."
        untuned.sh(f"echo edit >> {BASE}/motd; overlayd reset plain --to applied")
        assert untuned.sh(f"cat {BASE}/motd") == "Try me."
    assert untuned.leftovers() == []
    assert untuned.usr() == usr
    assert untuned.doctor()["ok"]
