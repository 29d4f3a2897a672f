# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hundreds of overlays at a time, and what they cost systemd, which makes a unit of each mount."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.system.guest import Guest

MANY = 500
FEWER = 25
"""In an emulated machine, unless more rounds are asked for: 500 take minutes there."""

# Directories without others in them do not nest.  Not where programs have files mapped.
_TARGETS = "find /usr/share /usr/lib/modules -xdev -type d -links 2 | sort | head -n $1"
# Seconds of CPU that process 1 has used, and of the clock that a reload and a listing take.
_COST = """
cpu() { awk -v ticks="$(getconf CLK_TCK)" '{ print ($14 + $15) / ticks }' /proc/1/stat; }
clock() { awk '{ print $1 }' /proc/uptime; }
a=$(clock); systemctl daemon-reload; b=$(clock); systemctl list-units --all >/dev/null; c=$(clock)
echo "$a $b $c $(cpu)"
"""

_UNMOUNT = """
import ctypes, os, sys
for target in sys.argv[1:]:
    ctypes.CDLL(None).umount2(os.fsencode(target), 0)
"""
_AFTER = """
for _ in $(seq 600)
do systemctl list-units -t mount | grep -q overlayd-storage || break; sleep 0.1; done
systemctl list-units --all -t mount | grep -c '/run/overlayd/'
"""


@pytest.mark.once
def test_hundreds_of_overlays_and_what_they_cost_process_1(
    guest: Guest, rounds: int, request: pytest.FixtureRequest
) -> None:
    count = FEWER if guest.emulated and rounds == 1 else MANY
    source = guest.source("many", {"overlayd-was-here": "yes\n"})
    targets = guest.sh(_TARGETS, str(count)).split("\n")
    assert len(targets) == count
    tables = "\n".join(
        f'[[overlay]]\nname = "n{number}"\nsource = "{source}"\nsize = "1M"\n'
        f"target = {json.dumps(target)}\nallow_critical = true\n"
        for number, target in enumerate(targets)
    )
    guest.machine.copy_in(tables.encode(), "/run/many.toml")
    before = _cost(guest)
    applied = guest.overlayd("batch", "/run/many.toml", timeout=1500)
    try:
        assert len(applied.out.splitlines()) == count
        seen = guest.sh('for t; do cat "$t/overlayd-was-here"; done | grep -c yes', *targets)
        assert seen == str(count)
        assert {o.state for o in guest.overlays()} == {"active"}
        listed = guest.overlayd("list")
        with_them = _cost(guest)
        # One of many is taken back like a single one.
        guest.overlayd("reset", "n1")
        guest.overlayd("remove", "n1")
    finally:
        # Unmounted overlays are lost, and cleanup takes those. umount(8) would read all of the
        # mount table for each.
        guest.machine.run(["python3", "-c", _UNMOUNT, *targets])
        cleaned = guest.overlayd("cleanup", timeout=1500)
    assert len(cleaned.out.splitlines()) == count - 1
    after = guest.sh(_AFTER, check=False, timeout=120)
    assert int(after) <= 1, after  # the stage
    for what, seconds in {
        "overlays": count,
        "apply, s": applied.seconds,
        "list, s": listed.seconds,
        "cleanup, s": cleaned.seconds,
        "daemon-reload before, s": before[0],
        "daemon-reload with them, s": with_them[0],
        "list-units with them, s": with_them[1],
        "process 1, CPU s": with_them[2] - before[2],
    }.items():
        request.node.user_properties.append((what, round(seconds, 3)))
    # Generous: an overlay costs three mounts, and systemd a few ms of work for each.
    assert with_them[2] - before[2] < (2.0 if guest.emulated else 0.1) * count
    assert applied.seconds < (3.0 if guest.emulated else 0.2) * count


def _cost(guest: Guest) -> tuple[float, float, float]:
    """Return the seconds of a reload and of listing units, and process 1's of CPU so far."""
    a, b, c, cpu = map(float, guest.sh(_COST, timeout=120).split())
    return b - a, c - b, cpu
