# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private overlays of real users, with real logins and without."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ptrace
import pytest

from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.crash.tried import Proof
    from tests.system.guest import Guest

pytestmark = pytest.mark.allow_findings(
    "failed to set xattr on upper", "tmpfs before Linux 6.6 keeps no user.* attributes"
)
BASE = "/usr/share/base-files"
KILLING: Final = Path(__file__).with_name("killing.py")
TRACING: Final = Path(__file__).parents[1] / "crash/tracing.py"
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
    # Without MOVE_MOUNT_BENEATH (6.5) there is no way to what lies between.
    reset, then = ("", "root") if users.can("exchange by MOVE_MOUNT_BENEATH") else ("! ", "edit")
    for user in ("alice", "bob"):
        said = users.sh(
            f"""
            overlayd enter own -- cat {BASE}/mine
            overlayd enter own -- sh -c 'rm {BASE}/mine; echo edit > {BASE}/mine; cat {BASE}/mine'
            {reset}overlayd reset own >/dev/null
            overlayd enter own -- sh -c 'cat {BASE}/mine; sudo -n true 2>&1 || echo no sudo'
            """,
            user=user,
        ).splitlines()
        assert (said[:3], said[-1]) == ([user, "edit", then], "no sudo")
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
    fresh.machine.wait_for_unit("dbus.socket")
    assert fresh.listing(BASE) == before
    assert fresh.overlayd("list", user="alice").out == "no overlays\n"
    fresh.overlayd("apply", "own", "/var/tmp/of-alice", BASE, user="alice")
    assert fresh.sh(f"overlayd enter own -- cat {BASE}/mine", user="alice") == "alice"
    fresh.overlayd("remove", "own", user="alice")
    fresh.sh("rm -r /var/tmp/of-alice")


_FOOD = """
[Unit]
StartLimitIntervalSec=0
[Service]
Type=exec
ExecStart=/bin/sh -c "[ ! -e {0}/mine ] || exec 3< {0}/mine; exec sleep infinity"
"""


@pytest.fixture
def food(guest: Guest) -> Iterator[Guest]:
    """Give a machine with a service that uses what root may lay over the base."""
    guest.machine.copy_in(_FOOD.format(BASE).encode(), "/run/systemd/system/food.service")
    guest.sh("systemctl daemon-reload; systemctl start food")
    yield guest
    guest.sh("systemctl stop food; rm /run/systemd/system/food.service; systemctl daemon-reload")


@pytest.mark.once
def test_killed_command_leaves_a_service_that_starts(food: Guest, proof: Proof) -> None:
    """SIGKILL of what shows an overlay to a service, at each system call that changes anything."""
    place = "/var/tmp/killing"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(next(iter(ptrace.__path__)), "ptrace")
        tar.add(TRACING, "tests/crash/tracing.py")
    food.sh(f"mkdir {place}")
    food.machine.copy_in(packed.getvalue(), f"{place}/all.tar")
    food.machine.copy_in(KILLING, f"{place}/killing.py")
    food.sh(f"tar --directory={place} --extract --file={place}/all.tar")
    source = food.source("root", {"mine": "root\n"})
    every = 1 if proof.whole else 25
    command = ("python3", "-I", f"{place}/killing.py", place, source, BASE, "0", str(every))
    said = food.machine.run(command, timeout=1800).out
    killed = dict(json.loads(line) for line in said.splitlines())
    assert min(killed.values()) >= 1, killed
    proof.count(sum(killed.values()))
    food.sh(f"rm -r {place}")


@pytest.mark.once
def test_service_sees_a_single_file_and_what_a_reset_makes_of_it(food: Guest) -> None:
    base = food.sh(f"cat {BASE}/motd")
    source = food.source("file", {"motd": "root\n"})
    food.apply("file", f"{source}/motd", f"{BASE}/motd", "--private")
    seen = (
        f"systemctl restart food; nsenter -t $(systemctl show -P MainPID food) -m cat {BASE}/motd"
    )
    food.overlayd("attach", "file", "--unit", "food.service")
    for to, shows in (("base", base), ("applied", "root"), ("base", base), ("applied", "root")):
        food.overlayd("reset", "file", "--to", to)
        assert food.sh(seen) == shows
    food.overlayd("detach", "file", "--restart")
    assert food.sh(seen) == base
    food.overlayd("remove", "file")


@pytest.mark.once
def test_service_alone_sees_what_root_attaches_to_it(food: Guest) -> None:
    guest = food
    source = guest.source("root", {"mine": "root\n"})
    guest.apply("own", source, BASE, "--private")
    seen = f"nsenter -t $(systemctl show -P MainPID food) -m cat {BASE}/mine 2>&1 || true"
    assert "No such file" in guest.sh(seen)
    assert "next start" in guest.overlayd("attach", "own", "--unit", "food.service").out
    assert "No such file" in guest.sh(seen)
    guest.sh("systemctl restart food")
    assert guest.sh(seen) == "root"
    assert guest.sh(f"ls {BASE}/mine 2>/dev/null || echo none") == "none"
    assert guest.doctor()["problems"] == []
    # What uses it is named, and it stays.
    said = guest.overlayd("remove", "own", code=6).err
    assert "in use" in said
    assert guest.status("own").state == "active"
    # It is shown no more, though the service keeps it until it is started again.
    assert guest.overlayd("detach", "own", code=3).err
    guest.overlayd("attach", "own", "--unit", "food.service", "--restart")
    assert guest.sh(seen) == "root"
    # What it is shown follows a reset, from its next start on.
    guest.overlayd("reset", "own")
    guest.sh("systemctl restart food")
    assert "No such file" in guest.sh(seen)
    guest.overlayd("reset", "own", "--to", "applied")
    guest.sh("systemctl restart food")
    assert guest.sh(seen) == "root"
    guest.overlayd("detach", "own", "--unit", "food.service", "--restart")
    assert "No such file" in guest.sh(seen)
    clean = """
        ls /run/systemd/system/food.service.d 2>/dev/null
        ls -A /run/overlayd.private/shown
        grep -c overlayd: /proc/self/mountinfo
    """
    assert guest.sh(clean, check=False) == "0"
    # What is left when the keeper is killed is cleaned up.
    guest.overlayd("attach", "own", "--unit", "food.service")
    guest.sh(
        """
        pkill -KILL -f 'm [o]verlayd[.]holder'
        for _ in $(seq 100); do pgrep -f 'm [o]verlayd[.]holder' || break; sleep 0.1; done
        """
    )
    assert "what services were shown" in guest.overlayd("cleanup").out
    assert guest.sh(clean, check=False) == "0"
    guest.overlayd("apply", "own", source, BASE, "--private")
    for wrong, code in (("none.service", 3), ("../x.service", 5), ("food", 5)):
        guest.overlayd("attach", "own", "--unit", wrong, code=code)
    others = guest.overlayd("attach", "x", "--unit", "food.service", user="bob", code=7).err
    assert "only root" in others
    guest.overlayd("remove", "own")
