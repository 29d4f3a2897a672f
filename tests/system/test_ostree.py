# SPDX-License-Identifier: LGPL-2.1-or-later
"""The deployment beneath: OSTree sees nothing of overlays, and nothing of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import manifest
from harness.machine import Capability

if TYPE_CHECKING:
    from tests.system.guest import Guest

pytestmark = pytest.mark.needs(Capability.OSTREE)

BASE = "/usr/share/base-files"
NESTED = "/usr/share/terminfo"
_EDITS = f"""
echo edit >> {BASE}/profile; rm {BASE}/motd; mv {BASE}/info.dir {BASE}/renamed
mv {NESTED}/x {NESTED}/renamed; rm -r {NESTED}/l; chmod 700 {NESTED}/d; echo new > {NESTED}/new
"""


def test_deployment_is_named_and_unchanged_by_overlays(guest: Guest) -> None:
    status = guest.sh("ostree admin status")
    checksum = guest.sh("ostree admin status | sed -n 's/^\\* [^ ]* //p'")
    deployed = guest.sh('echo /sysroot/ostree/deploy/*/deploy/"$1"/usr', checksum)
    trees = f"{deployed}/share/base-files", f"{deployed}/share/terminfo"
    usr, beneath = guest.usr_of_the_commit(), [guest.listing(tree) for tree in trees]
    source = guest.source("edit", {"motd": "Try me.\n"})
    with (
        guest.overlay("one", source, BASE) as overlay,
        guest.overlay("two", source, NESTED),
    ):
        assert overlay.deployment is not None
        assert overlay.deployment.endswith(f"/{checksum}")
        guest.sh(_EDITS)
        assert guest.usr() != usr
        assert [guest.listing(tree) for tree in trees] == beneath
        assert guest.sh("ostree admin status") == status
        assert "Unlocked" not in status
        stateroot = overlay.deployment.split("/")[0]
        listed = guest.overlayd("list", "--os", stateroot).out
        assert listed == guest.overlayd("list").out
        guest.overlayd("apply", "other", source, "/usr/share/dpkg", "--os", "other", code=5)
    assert guest.usr() == usr
    assert guest.sh("ostree admin status") == status


def test_every_byte_of_the_commit_is_as_it_was(guest: Guest, rounds: int) -> None:
    if guest.emulated and rounds == 1:
        pytest.skip("reading all of /usr takes minutes in an emulated machine")
    guest.machine.copy_in(Path(manifest.__file__), "/run/manifest.py")
    digest = "python3 -IS /run/manifest.py /usr"
    before = guest.sh(digest, timeout=600)
    source = guest.source("edit", {"motd": "Try me.\n"})
    with guest.overlay("one", source, BASE), guest.overlay("two", source, NESTED):
        guest.sh(_EDITS)
        guest.sh("overlayd reset one; overlayd reset two --to applied")
    assert guest.sh(digest, timeout=600) == before
