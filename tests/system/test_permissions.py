# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modes, owners and set-id programs; what root, an owner and another user may do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.system.guest import SOURCES

if TYPE_CHECKING:
    from tests.system.guest import Guest

# OSTree's copy of /etc holds directories that are not root:root 755.
GUARDED = "/usr/etc"
FLAT = "/usr/share/base-files"
BIN = "/usr/bin"


ADDED = {"./ssl/private/added", "./polkit-1/rules.d/added", "./added", "./ssl/private/own"}


def _hostile_source(guest: Guest) -> tuple[str, dict[str, str]]:
    """Make a source with every directory of the base, with other modes, owners and times.

    Return it and the base's listing.
    """
    before = guest.listing(GUARDED)
    assert not before["./ssl/private"].startswith("d 755 ")
    assert " 0:0 " not in before["./polkit-1/rules.d"]
    place = f"{SOURCES}/merge"
    guest.sh(
        f"""
        mkdir -p {place}; cd {GUARDED}
        find . -type d -printf '%p\\0' | (cd {place}; xargs -0 mkdir -p ./ssl/private/own)
        cd {place}; echo added | tee ./ssl/private/added ./polkit-1/rules.d/added >added
        chown -R alice:bob .; chmod 1777 . ./ssl ./ssl/private; chmod 700 ./polkit-1/rules.d
        chmod 2770 ./ssl/private/own
        """
    )
    return place, before


def test_merged_directories_keep_mode_and_owner(guest: Guest) -> None:
    source, before = _hostile_source(guest)
    bare = guest.listing(GUARDED, times=False)
    with guest.overlay("merge", source, GUARDED):
        applied = guest.listing(GUARDED)
        assert set(applied) == set(before) | ADDED
        assert {name: applied[name] for name in before} == before
        assert applied["./ssl/private/own"].startswith("d 770 0:0 ")  # no set-id bit, and root's
        assert applied["./added"].startswith("f 644 0:0 ")

        guest.sh(f"cd {GUARDED}; echo x > ssl/private/edit; echo x > polkit-1/rules.d/edit")
        edited = guest.listing(GUARDED, times=False)
        assert set(edited) - set(applied) == {"./ssl/private/edit", "./polkit-1/rules.d/edit"}
        assert {name: edited[name] for name in before} == bare

        guest.overlayd("reset", "merge", "--to", "applied")
        assert guest.listing(GUARDED) == applied
        guest.overlayd("reset", "merge")
        assert guest.listing(GUARDED) == before
    assert guest.listing(GUARDED) == before


def test_merged_directories_keep_their_owner_even_if_owners_are_preserved(guest: Guest) -> None:
    source, before = _hostile_source(guest)
    with guest.overlay("merge", source, GUARDED, "--preserve-owner", "--read-only"):
        applied = guest.listing(GUARDED)
        assert {name: applied[name] for name in before} == before
        alice, bob = guest.sh("id -u alice; id -g bob").split()
        assert applied["./ssl/private/own"].startswith(f"d 770 {alice}:{bob} ")
        assert applied["./added"].startswith(f"f 644 {alice}:{bob} ")
    assert guest.listing(GUARDED) == before


def test_users_may_what_modes_say(guest: Guest) -> None:
    source = guest.source("modes", {"all": "all\n", "secret": "secret\n", "mine": "mine\n"})
    guest.sh(f"cd {source}; chmod 600 secret mine; chown alice mine; chown bob:bob secret")
    attempt = f"""
        cd {FLAT}
        for file in all secret mine; do cat $file 2>/dev/null || echo "not $file"; done
        for file in all secret mine . motd
        do test -w $file && echo "writes $file"; done
        rm -f motd all; touch new; mv all other; chmod 777 all; mkdir directory; ls | wc -l
    """
    count = len(guest.listing(FLAT)) - 1 + 3
    with guest.overlay("modes", source, FLAT):
        for user in "alice", "bob":
            seen = guest.sh(attempt, user=user, check=False)
            assert seen.split("\n") == ["all", "not secret", "not mine", str(count)]
    with guest.overlay("modes", source, FLAT, "--preserve-owner"):
        seen = guest.sh(f"{attempt} echo edited > mine; cat mine", user="alice", check=False)
        assert seen.split("\n") == [
            *("all", "not secret", "mine", "writes mine"),
            *(str(count), "edited"),
        ]
        seen = guest.sh(attempt, user="bob", check=False)
        assert seen.split("\n") == ["all", "secret", "not mine", "writes secret", str(count)]


def test_set_id_bits_of_a_source_are_dropped(guest: Guest) -> None:
    guest.sh(
        f"""
        mkdir -p {SOURCES}/setid; cd {SOURCES}/setid
        cp /usr/bin/id plain; cp /usr/bin/id suid; cp /usr/bin/id sgid
        chown root:root *; chmod 755 plain; chmod 4755 suid; chmod 2755 sgid
        """
    )
    with guest.overlay("setid", f"{SOURCES}/setid", FLAT, "--preserve-owner"):
        said = guest.sh(
            f"cd {FLAT}; stat -c '%a %n' suid sgid; ./suid -u; ./sgid -g; id -u; id -g",
            user="alice",
        ).split("\n")
        assert said[:2] == ["755 suid", "755 sgid"]
        assert said[2:4] == said[4:]


def test_set_id_programs_of_the_base_go_on_working_under_an_overlay(guest: Guest) -> None:
    source = guest.source("bin", {"hello": "#!/bin/sh\necho hello\n"})
    rule = 'polkit.addRule(function(a, s) { if (s.user == "alice") return polkit.Result.YES; });'
    guest.sh(
        f"""
        chmod 755 {source}/hello
        cp -a /etc/shadow /etc/shadow.kept; echo bob:secret | chpasswd
        echo '{rule}' > /etc/polkit-1/rules.d/00-alice.rules
        setpriv --reuid alice --clear-groups pkexec true  # what it starts runs from the base now
        """
    )
    try:
        overlay = guest.apply("bin", source, BIN, "--allow-critical")
        assert overlay.mount_point == BIN
        said = guest.sh(
            """
            hello
            passwd -S alice | cut -d' ' -f1    # reads /etc/shadow
            echo secret | su bob -c 'id -un' 2>/dev/null
            pkexec id -u
            test -u /usr/bin/su && findmnt -no FSTYPE -T /usr/bin/su
            """,
            user="alice",
        )
        assert said.split("\n") == ["hello", "alice", "bob", "0", "overlay"]
        assert "nosuid" not in guest.sh(f"findmnt -no OPTIONS {BIN}")
    finally:
        guest.sh("mv /etc/shadow.kept /etc/shadow; rm -f /etc/polkit-1/rules.d/00-alice.rules")
    # Nothing but overlayd itself, which runs from here, may use it by now.
    guest.overlayd("remove", "bin")
    assert guest.sh("hello 2>/dev/null || passwd -S alice | cut -d' ' -f1", user="alice") == "alice"
