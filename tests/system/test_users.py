# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ordinary users get without an administrator: they see what everybody may, and no more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.system.guest import RUN

if TYPE_CHECKING:
    from tests.system.guest import Guest

BASE = "/usr/share/base-files"


@pytest.mark.once
def test_ordinary_users_see_what_there_is_and_change_nothing(guest: Guest) -> None:
    source = guest.source("theirs", {"motd": "theirs\n"})
    guest.apply("theirs", source, BASE)
    before = guest.listing(BASE)
    said = guest.sh(
        f"""
        for command in "list" "status theirs" "status --limits" "history" "report" "dump" \
            "apply mine {source} /usr/share/doc --allow-other --size 1M" \
            "reset theirs" "remove theirs --lazy" "cleanup"
        do overlayd $command >/dev/null 2>&1; printf '%s ' "$?"; done
        overlayd status theirs --json
        """,
        user="alice",
        check=False,
    )
    codes, _, status = said.partition("{")
    assert codes.split() == ["0"] * 6 + ["7"] * 4
    assert json.loads("{" + status)["source"] is None
    assert guest.listing(BASE) == before
    assert [overlay.name for overlay in guest.overlays()] == ["theirs"]
    guest.overlayd("remove", "theirs")


@pytest.mark.once
def test_ordinary_users_get_help_the_version_and_an_honest_doctor(guest: Guest) -> None:
    said = guest.sh("overlayd --version; overlayd --help; overlayd apply --help", user="alice")
    assert said.startswith("overlayd")
    assert "--allow-critical" in said
    report = json.loads(guest.overlayd("doctor", "--json", user="alice").out)
    assert (report["ok"], report["problems"]) == (True, [])
    assert (report["features"]["private overlays"], report["service"]) == (True, said.split()[2])


@pytest.mark.once
def test_errors_come_as_json_when_asked_for(guest: Guest) -> None:
    error = json.loads(guest.overlayd("status", "none", "--json", user="bob", code=3).err)["error"]
    assert (error["code"], error["hint"]) == ("not-found", "'overlayd list' shows what there is")


def test_storage_and_records_are_closed_to_users(guest: Guest) -> None:
    source = guest.source("closed", {"secret": "secret\n"})
    guest.sh(f"chmod 600 {source}/secret")
    with guest.overlay("closed", source, BASE):
        said = guest.sh(
            f"ls {RUN} || cat {RUN}/world.json || ls {RUN}/storage/* || cat {BASE}/secret "
            f"|| umount {BASE} || mount -o remount,suid {BASE} || echo none",
            user="alice",
            check=False,
        )
        assert said == "none"
