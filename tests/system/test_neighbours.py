# SPDX-License-Identifier: LGPL-2.1-or-later
"""overlayd beside others that lay overlays on /usr: systemd-sysext and ``ostree admin unlock``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
OTHER = "/usr/share/common-licenses"
EXTENSION = "/usr/share/overlayd-extension"
TEXT = {"motd": "Try me.\n"}

_EXTEND = f"""
mkdir -p /run/extensions/tried/usr/lib/extension-release.d /run/extensions/tried{EXTENSION}
echo ID=_any > /run/extensions/tried/usr/lib/extension-release.d/extension-release.tried
echo "$0" > /run/extensions/tried{EXTENSION}/file
mkdir -p /run/extensions/tried{OTHER}; echo "$0" > /run/extensions/tried{OTHER}/extended
"""


class Extension:
    """A system extension of the test's own."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def sysext(self, verb: str, content: str = "") -> None:
        """Run systemd-sysext, after having given the extension new content."""
        if content:
            self.guest.machine.run(["sh", "-euc", _EXTEND, content])
        self.guest.sh(f"systemd-sysext {verb} 2>&1")

    def close(self) -> None:
        """Unmerge and remove it."""
        self.guest.sh("systemd-sysext unmerge 2>/dev/null; rm -rf /run/extensions", check=False)


@pytest.fixture
def extension(guest: Guest) -> Iterator[Extension]:
    """Give a way to merge an extension; it is unmerged at the end."""
    extension = Extension(guest)
    yield extension
    extension.close()


def test_overlay_lies_on_a_merged_extension(guest: Guest, extension: Extension) -> None:
    source = guest.source("ext", {"file": "mine\n", "more": "mine\n"})
    before = guest.doctor()["depth_left"]
    assert isinstance(before, int)
    extension.sysext("merge", "one")
    assert guest.doctor()["depth_left"] == before - 1
    with guest.overlay("ext", source, EXTENSION):
        assert guest.sh(f"cat {EXTENSION}/file {EXTENSION}/more") == "mine\nmine"
        guest.overlayd("reset", "ext")
        assert guest.sh(f"cat {EXTENSION}/file; ls {EXTENSION}") == "one\nfile"
    assert guest.sh(f"cat {EXTENSION}/file") == "one"
    extension.sysext("unmerge")
    assert guest.doctor()["depth_left"] == before


def test_overlay_outlives_merge_refresh_and_unmerge_of_extensions(
    guest: Guest, extension: Extension
) -> None:
    source = guest.source("ext", TEXT)
    overlay = guest.apply("ext", source, BASE)
    guest.apply("both", source, OTHER)
    for verb, content in ("merge", "one"), ("refresh", "two"), ("unmerge", ""):
        extension.sysext(verb, content)
        assert guest.sh(f"cat {BASE}/motd {OTHER}/motd") == "Try me.\nTry me."
        assert [(o.name, o.state) for o in guest.overlays()] == [
            ("both", "active"),
            ("ext", "active"),
        ]
        if content:
            # systemd moves the mounts along; a reset finds the base as it is now.
            guest.overlayd("reset", "both", "--to", "applied")
            assert guest.sh(f"cat {OTHER}/motd {OTHER}/extended") == f"Try me.\n{content}"
    assert guest.status("ext").uuid == overlay.uuid
    guest.sh("overlayd remove ext; overlayd remove both")


def test_overlay_on_what_only_an_extension_has_is_lost_with_it(
    guest: Guest, extension: Extension
) -> None:
    source = guest.source("ext", TEXT)
    extension.sysext("merge", "one")
    guest.apply("ext", source, EXTENSION)
    # systemd-sysext itself fails half-way, as it has no place left for the mount.
    guest.sh("systemd-sysext unmerge 2>&1", check=False)
    assert guest.status("ext").state == "lost"
    guest.overlayd("remove", "ext")
    assert guest.overlays("--all") == []


def test_usr_itself_is_no_target_while_an_extension_is_merged(
    guest: Guest, extension: Extension
) -> None:
    source = guest.source("ext", {"share/x/y": "x\n"})
    extension.sysext("merge", "one")
    said = guest.overlayd("apply", "usr", source, "/usr", "--allow-critical", code=5).err
    assert "TARGET /usr is a mount point" in said
    assert "overlay of sysext" in said


@pytest.mark.needs(Capability.OSTREE)
def test_overlays_before_and_after_ostree_admin_unlock(fresh: Guest) -> None:
    source = fresh.source("unlock", TEXT)
    before = fresh.listing(BASE)
    depth = fresh.doctor()["depth_left"]
    fresh.apply("early", source, BASE)
    fresh.sh("ostree admin unlock")
    assert "Unlocked: development" in fresh.sh("ostree admin status")
    # What was there is beneath now, and nobody pretends otherwise.
    assert fresh.listing(BASE) == before
    assert fresh.status("early").state == "covered"
    for command in (["remove", "early"], ["remove", "early", "--lazy"], ["reset", "early"]):
        assert "something is mounted over" in fresh.overlayd(*command, code=6).err
    report = fresh.doctor()
    assert report["ok"]
    assert report["depth_left"] == depth - 1  # type: ignore[operator]
    assert "early: something is mounted over" in str(report["problems"])
    # A new one lies on the unlocked /usr, and edits of that are its base.
    fresh.sh(f"echo unlocked > {OTHER}/unlocked")
    with fresh.overlay("late", source, OTHER):
        assert fresh.sh(f"cat {OTHER}/motd {OTHER}/unlocked") == "Try me.\nunlocked"
        fresh.sh(f"rm {OTHER}/unlocked; echo edited > {OTHER}/edited")
        fresh.overlayd("reset", "late")
        assert fresh.sh(f"cat {OTHER}/unlocked; ls {OTHER}/edited || true") == "unlocked"
    # With a merged extension on top there is no depth left: said beforehand, and when tried.
    extension = Extension(fresh)
    extension.sysext("merge", "one")
    report = fresh.doctor()
    assert (report["ok"], report["depth_left"]) == (False, 0)
    said = fresh.overlayd("apply", "third", source, OTHER, code=9).err
    assert "the kernel stacks two file systems at most" in said
    extension.close()
    # A reboot would end it; so does who takes the mount away, and the overlay is as it was.
    fresh.sh("umount --lazy /usr")
    assert fresh.status("early").state == "active"
    fresh.overlayd("remove", "early")
    assert fresh.listing(BASE) == before
