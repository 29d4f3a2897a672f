# SPDX-License-Identifier: LGPL-2.1-or-later
"""overlayd beside systemd: its mount units, its reloads, and its services' mount namespaces."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
OTHER = "/usr/share/common-licenses"
TEXT = {"motd": "Try me.\n"}


def unit_of(guest: Guest, path: str) -> str:
    """Return the name of the mount unit for a path, which systemd has by then."""
    guest.wait_for_mount_units()
    return guest.sh('systemd-escape --path --suffix=mount "$1"', path)


def test_overlay_whose_mount_unit_was_stopped_is_lost_and_can_be_removed(guest: Guest) -> None:
    source = guest.source("stop", TEXT)
    before = guest.listing(BASE)
    overlay = guest.apply("stop", source, BASE)
    guest.sh('echo edited > "$1/edit"; systemctl stop "$2"', BASE, unit_of(guest, BASE))
    assert guest.status("stop").state == "lost"
    assert guest.listing(BASE) == before
    report = guest.doctor()
    assert report["ok"]
    assert f"stop: its mount is gone from {BASE}" in str(report["problems"])
    said = guest.overlayd("reset", "stop", code=3).err
    assert "hint: overlayd remove stop" in said
    kept = f"/run/overlayd/storage/{overlay.uuid}/upper.1/upper/edit"  # docs/recovery.md says so
    assert guest.sh(f"cat {kept}") == "edited"
    guest.overlayd("remove", "stop")
    assert guest.overlays("--all") == []


def test_cleanup_removes_what_was_unmounted(guest: Guest) -> None:
    source = guest.source("lost", TEXT)
    guest.apply("one", source, BASE)
    guest.apply("two", source, OTHER)
    guest.sh('systemctl stop "$1"; umount "$2"', unit_of(guest, BASE), OTHER)
    assert {overlay.state for overlay in guest.overlays()} == {"lost"}
    said = guest.overlayd("cleanup").out
    assert f"one: its mount is gone from {BASE}" in said
    assert f"two: its mount is gone from {OTHER}" in said


def test_overlay_outlives_reload_and_reexecution_of_systemd(guest: Guest) -> None:
    source = guest.source("reload", TEXT)
    with guest.overlay("reload", source, BASE) as overlay:
        guest.sh(f"echo edited > {BASE}/edit; systemctl daemon-reload; systemctl daemon-reexec")
        assert guest.sh(f"cat {BASE}/motd {BASE}/edit") == "Try me.\nedited"
        status = guest.status("reload")
        assert (status.state, status.uuid) == ("active", overlay.uuid)
        unit = unit_of(guest, BASE)
    # The unit goes with the mount.
    assert (
        guest.sh(
            'for _ in $(seq 200); do systemctl -q is-active "$1" || break; sleep 0.05; done; '
            'systemctl is-active "$1" || true',
            unit,
        )
        == "inactive"
    )


def test_other_mount_namespaces_are_refused_and_told_the_way_in(guest: Guest) -> None:
    source = guest.source("ns", TEXT)
    run = "systemd-run --quiet --pipe --wait -p PrivateTmp=yes sh -c"
    before = guest.listing(BASE)
    # Before there is any, it would be an overlay that nobody else sees.
    said = guest.sh(f"{run} 'overlayd apply other {source} {OTHER} 2>&1; echo $?'")
    assert "another mount namespace" in said
    assert said.endswith("\n9")
    guest.apply("ns", source, BASE)
    look = "'overlayd list 2>&1; echo $?'"
    said = guest.sh(f"{run} {look}; unshare -m sh -c {look}")
    assert said.count("another mount namespace") == 2
    assert [line for line in said.split("\n") if line.isdigit()] == ["9", "9"]
    hint = re.search(r"hint: (nsenter --target \d+ --mount) overlayd", said)
    assert hint, said
    # The way in works, from there.
    said = guest.sh(f"{run} '{hint[1]} overlayd list; {hint[1]} overlayd remove ns'")
    assert "ns    active" in said
    assert said.endswith("ns: removed")
    assert guest.listing(BASE) == before
    assert guest.overlays("--all") == []
