# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users other than root: their calls start the service, and polkit says what they may."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.system.guest import Shown
from tests.system.terminal import at_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
MINE = "/var/tmp/sources-of-alice"
UNIT = "overlayd.service"
PASSWORD = "correct horse"
APPLY = ["overlayd", "apply", "hers", MINE, BASE, "--allow-other"]


@pytest.fixture
def hers(guest: Guest) -> Iterator[Guest]:
    """Give a machine in which alice has a source that only she can read."""
    guest.sh(
        f"mkdir {MINE}; echo hers > {MINE}/motd; echo secret > {MINE}/more; chmod 700 {MINE}",
        user="alice",
    )
    yield guest
    guest.sh(f"rm -rf {MINE}; systemctl reset-failed {UNIT} 2>/dev/null || true")


@pytest.fixture
def permitted(hers: Guest) -> Iterator[Guest]:
    """Give one in which polkit permits everything to alice."""
    hers.permit("alice")
    yield hers
    hers.permit("alice", permitted=False)


def apply_as_alice(guest: Guest, *options: str) -> Shown:
    answer = guest.overlayd(*APPLY[1:], "--json", *options, user="alice")
    return Shown.of(json.loads(answer.out))


def pid_of_service(guest: Guest) -> str:
    return guest.sh(f"systemctl show --property=MainPID --value {UNIT}")


@pytest.mark.once
def test_user_applies_with_the_administrator_s_password_and_takes_it_back_alone(
    hers: Guest,
) -> None:
    hers.sh('echo "admin:$1" | chpasswd', PASSWORD)
    before = hers.listing(BASE)
    wrong = at_terminal(hers.machine, "alice", APPLY, [("assword: ", "wrong")])
    assert (wrong.status, wrong.untyped) == (7, []), wrong.said
    assert "no administrator authenticated" in wrong.said
    assert hers.listing(BASE) == before
    assert hers.leftovers() == []
    right = at_terminal(hers.machine, "alice", APPLY, [("assword: ", PASSWORD)])
    assert (right.status, right.untyped) == (0, []), right.said
    # What she is asked about is what will be shown.
    assert "show everybody the overlay hers" in right.said
    assert f"on {BASE}" in right.said
    assert "2 files, 8K" in right.said
    assert hers.sh(f"cat {BASE}/motd", user="bob") == "hers"
    assert hers.sh(f"stat -c '%U:%G %a' {BASE}/motd {BASE}") == "root:root 644\nroot:root 755"
    [overlay] = hers.overlays()
    alice = int(hers.sh("id -u alice"))
    assert (overlay.name, overlay.owner) == ("hers", alice)
    said = hers.sh(
        f"""
        overlayd list
        overlayd remove hers 2>&1 && exit 1
        cat {BASE}/more
        """,
        user="bob",
    )
    assert "an administrator has to authenticate" in said
    assert said.endswith("secret")
    hers.sh("overlayd reset hers; overlayd remove hers", user="alice")
    assert hers.listing(BASE) == before
    hers.sh("usermod --lock admin")


@pytest.mark.once
def test_agent_of_a_desktop_is_asked_where_the_command_has_no_terminal(hers: Guest) -> None:
    hers.sh('echo "admin:$1" | chpasswd', PASSWORD)
    hers.apply("roots", hers.source("roots", {"motd": "root\n"}), BASE)
    # As a desktop's, it is there before, and a process of its own.
    script = """
        mkfifo "$1"
        pkttyagent --process $$ --notify-fd 3 3> "$1" &
        cat "$1"; rm "$1"
        exec overlayd remove roots < /dev/null
    """
    remove = ["sh", "-c", script, "sh", "/tmp/agent-is-there"]
    done = at_terminal(hers.machine, "alice", remove, [("assword: ", PASSWORD)])
    assert (done.status, done.untyped) == (0, []), done.said
    assert "remove the overlay roots" in done.said
    assert hers.overlays() == []
    hers.sh("usermod --lock admin")


def test_service_runs_in_the_host_s_mount_namespace_and_is_confined(hers: Guest) -> None:
    hers.overlayd("list", user="alice")
    said = hers.sh(
        f"""
        pid=$(systemctl show --property=MainPID --value {UNIT})
        for name in mnt pid user; do readlink /proc/$pid/ns/$name /proc/1/ns/$name; done
        grep -E '^(NoNewPrivs|Seccomp|CapBnd)' /proc/$pid/status | tr '\\n' ' '
        """
    ).splitlines()
    for kind, host in zip(said[:6:2], said[1:6:2], strict=True):
        assert kind == host
    assert "NoNewPrivs:\t1" in said[6]
    assert "Seccomp:\t2" in said[6]
    report = hers.sh(f"systemd-analyze security {UNIT} --no-pager | tail -n 1", timeout=120)
    match = re.search(r": (\d+\.\d) ", report)
    assert match is not None, report
    assert float(match[1]) <= 4.8, report


@pytest.mark.once
def test_service_ends_when_nobody_calls_and_overlays_outlive_it(permitted: Guest) -> None:
    drop_in = f"/run/systemd/system/{UNIT}.d"
    permitted.sh(
        f"""
        systemctl stop {UNIT}
        mkdir -p {drop_in}
        printf '%s\\n' '[Service]' 'ExecStart=' \
            'ExecStart=/usr/bin/python3 -I -P -m overlayd.service 3' > {drop_in}/idle.conf
        systemctl daemon-reload
        """
    )
    try:
        made = apply_as_alice(permitted)
        permitted.sh(
            f"""
            state() {{ systemctl show --property=ActiveState --value {UNIT}; }}
            for _ in $(seq 300); do [ "$(state)" != inactive ] || break; sleep 0.2; done
            """
        )
        assert permitted.sh(f"systemctl show -p ActiveState,Result,NRestarts {UNIT}") == (
            "Result=success\nNRestarts=0\nActiveState=inactive"
        )
        assert permitted.sh(f"cat {BASE}/motd", user="bob") == "hers"
        assert permitted.status("hers").uuid == made.uuid
        permitted.overlayd("remove", "hers", user="alice")
    finally:
        permitted.sh(f"rm -r {drop_in}; systemctl daemon-reload; systemctl stop {UNIT}")


@pytest.mark.once
@pytest.mark.allow_findings("overlayd.service", "the test kills it")
def test_service_that_is_killed_leaves_overlays_alone_and_comes_back(
    permitted: Guest,
) -> None:
    before = permitted.listing(BASE)
    apply_as_alice(permitted)
    said = permitted.sh(
        f"""
        kill -KILL "$1"
        for _ in $(seq 100); do systemctl -q is-active {UNIT} || break; sleep 0.1; done
        systemctl reset-failed {UNIT}
        cat {BASE}/motd
        su alice -s /bin/sh -c 'cd /; overlayd list; overlayd remove hers'
        """,
        pid_of_service(permitted),
    )
    assert said.startswith("hers\n")
    assert said.endswith("hers: removed")
    assert permitted.listing(BASE) == before


def test_root_can_do_in_an_overlay_of_a_user_what_root_can(permitted: Guest) -> None:
    """An overlay has the rights of whoever mounted it, and the service has few."""
    apply_as_alice(permitted)
    said = permitted.sh(
        f"""
        cd {BASE}
        cp /usr/bin/true tool; chown alice:bob tool; chmod 6755 tool
        setfattr -n user.test -v value tool 2>/dev/null || true
        mknod null c 1 3; rm null; mkfifo pipe; rm pipe
        ln tool other; rm motd; mkdir -m 1777 all
        stat -c '%U:%G %a %h' tool all
        python3 -c 'import os; os.setxattr("tool", "security.capability",
            b"\\x01\\0\\0\\x02\\0\\x04\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0")'
        """
    )
    assert said == "alice:bob 6755 2\nroot:root 1777 2"
    permitted.overlayd("remove", "hers", user="alice")


@pytest.mark.once
def test_signals_tell_everybody_what_everybody_may_know(permitted: Guest) -> None:
    name = "org.projectatomic.aptostree.Overlay1"
    said = permitted.sh(
        f"""
        busctl call {name} /org/projectatomic/aptostree/Overlay1 \
            org.freedesktop.DBus.Peer Ping
        timeout 30 busctl monitor --json=short --match="type='signal',sender='{name}'" \
            > /run/signals 2>/dev/null &
        sleep 3
        su alice -s /bin/sh -c 'cd /; overlayd apply hers {MINE} {BASE} --allow-other' >/dev/null
        for _ in $(seq 50); do grep -q OverlayAdded /run/signals && break; sleep 0.2; done
        su alice -s /bin/sh -c 'cd /; overlayd reset hers' > /dev/null
        for _ in $(seq 50); do grep -q PropertiesChanged /run/signals && break; sleep 0.2; done
        su alice -s /bin/sh -c 'cd /; overlayd remove hers' > /dev/null
        for _ in $(seq 50); do grep -q OverlayRemoved /run/signals && break; sleep 0.2; done
        kill %1
        cat /run/signals; rm /run/signals
        """,
        timeout=120,
    )
    members = [json.loads(line)["member"] for line in said.splitlines()]
    told = {"OverlayAdded", "PropertiesChanged", "OverlayRemoved", "InterfacesAdded"}
    assert set(members) >= told
    assert MINE not in said


@pytest.mark.once
def test_history_tells_root_all_and_users_what_is_theirs(permitted: Guest) -> None:
    apply_as_alice(permitted)
    permitted.overlayd("remove", "hers", user="bob", code=7)
    permitted.overlayd("remove", "hers", user="alice")
    rows = json.loads(permitted.overlayd("history", "hers", "--json").out)[-3:]
    assert [(row["verb"], row["outcome"]) for row in rows] == [
        ("apply", "done"),
        ("remove", "no-permission"),
        ("remove", "done"),
    ]
    assert [row["rule"].rpartition(".")[2] for row in rows] == [
        "usroverlay",
        "manage-others",
        "owner",
    ]
    assert len(rows[0]["digest"]) == 64
    [theirs] = [
        row
        for row in json.loads(permitted.overlayd("history", "hers", "--json", user="bob").out)[-3:]
        if row["verb"] == "apply"
    ]
    assert not theirs["source"]
    assert not theirs["digest"]
    logged = permitted.sh(
        "journalctl --output=cat --no-pager MESSAGE_ID=3e746622692e4d79a937eb95bec5ca18 | tail -n 3"
    )
    assert "apply hers" in logged
