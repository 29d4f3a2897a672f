# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private overlays of real users, with real logins and without."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
# As a login does it: a session of logind's, a manager of the user's own, a runtime directory.
_LOGIN = "systemd-run --quiet --pipe --wait --uid=alice -p PAMName=login -- sh -euc"


@pytest.fixture
def users(guest: Guest) -> Iterator[Guest]:
    """Give a machine in which two users have sources; what they apply is gone afterwards."""
    for user in ("alice", "bob"):
        guest.sh(f"mkdir /var/tmp/of-{user}; echo {user} > /var/tmp/of-{user}/mine", user=user)
    yield guest
    guest.sh(
        """
        pkill -f 'm [o]verlayd[.]holder' || true
        for _ in $(seq 100); do pgrep -f 'm [o]verlayd[.]holder' || break; sleep 0.1; done
        rm -rf /var/tmp/of-alice /var/tmp/of-bob /tmp/overlayd-*
        """
    )


def test_users_see_their_own_and_root_s_beneath_and_nobody_else_does(users: Guest) -> None:
    before = users.listing(BASE)
    for user in ("alice", "bob"):
        users.overlayd("apply", "own", f"/var/tmp/of-{user}", BASE, user=user)
    users.apply("roots", users.source("roots", {"mine": "root\n"}), BASE)
    assert users.sh(f"cat {BASE}/mine") == "root"
    for user in ("alice", "bob"):
        said = users.sh(
            f"""
            overlayd enter own -- cat {BASE}/mine
            overlayd enter own -- sh -c 'rm {BASE}/mine; echo edit > {BASE}/mine; cat {BASE}/mine'
            overlayd reset own >/dev/null
            overlayd enter own -- sh -c 'cat {BASE}/mine; sudo -n true 2>&1 || echo no sudo'
            """,
            user=user,
        ).splitlines()
        assert (said[:3], said[-1]) == ([user, "edit", "root"], "no sudo")
    listed = json.loads(users.overlayd("list", "--json", user="alice").out)
    assert [(each["name"], each["scope"]) for each in listed] == [
        ("own", "private"),
        ("roots", "system"),
    ]
    users.overlayd("remove", "roots")
    for user in ("alice", "bob"):
        users.overlayd("remove", "own", user=user)
    assert users.sh("pgrep -f 'm [o]verlayd[.]holder' || echo none") == "none"
    assert users.listing(BASE) == before


@pytest.mark.once
def test_one_shot_form_ends_with_its_program(users: Guest) -> None:
    said = users.sh(
        f"overlayd run /var/tmp/of-alice:{BASE} -- sh -c 'cat {BASE}/mine; exit 3' || echo $?",
        user="alice",
    )
    assert said == "alice\n3"
    assert users.sh("pgrep -f 'm [o]verlayd[.]holder' || echo none") == "none"


@pytest.mark.once
def test_overlay_of_a_login_goes_with_it(users: Guest) -> None:
    script = f"""
        overlayd apply own /var/tmp/of-alice {BASE} >/dev/null
        overlayd enter own -- cat {BASE}/mine
        cat $XDG_RUNTIME_DIR/overlayd/holder.json; echo
        grep -o overlayd-holder.*scope /proc/$(pgrep -f "m [o]verlayd[.]holder")/cgroup
    """
    said = users.sh(f"{_LOGIN} '{script}'", timeout=120).splitlines()
    assert said[0] == "alice"
    assert json.loads(said[1])["pid"]
    assert said[2].startswith("overlayd-holder-")
    users.sh(
        """
        for _ in $(seq 300); do pgrep -f 'm [o]verlayd[.]holder' || exit 0; sleep 0.1; done
        exit 1
        """,
        timeout=60,
    )
    assert users.overlayd("list", user="alice").out == "no overlays\n"


@pytest.mark.needs(Capability.REBOOT)
@pytest.mark.once
def test_reboot_leaves_nothing_of_it(fresh: Guest) -> None:
    before = fresh.listing(BASE)
    fresh.sh("mkdir /var/tmp/of-alice; echo alice > /var/tmp/of-alice/mine", user="alice")
    fresh.overlayd("apply", "own", "/var/tmp/of-alice", BASE, user="alice")
    fresh.machine.reboot()
    assert fresh.listing(BASE) == before
    assert fresh.overlayd("list", user="alice").out == "no overlays\n"
    fresh.overlayd("apply", "own", "/var/tmp/of-alice", BASE, user="alice")
    assert fresh.sh(f"overlayd enter own -- cat {BASE}/mine", user="alice") == "alice"
    fresh.overlayd("remove", "own", user="alice")
    fresh.sh("rm -r /var/tmp/of-alice")
