# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is seen in an overlay: directories, files, new paths, edits, deletions, odd names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.system.guest import SOURCES

if TYPE_CHECKING:
    from tests.system.guest import Guest

BASE = "/usr/share/base-files"  # in every Debian, flat
NESTED = "/usr/share/terminfo"  # in every Debian, one level of directories
TEXT = {"motd": "Try me.\n", "new": "new\n", "sub/deep/file": "deep\n", "link": "-> new"}


def test_directory_is_merged_and_taken_back(guest: Guest) -> None:
    source = guest.source("merge", TEXT)
    before = guest.listing(BASE)
    with guest.overlay("merge", source, BASE) as overlay:
        assert (overlay.state, overlay.version, overlay.mount_point) == ("active", 1, BASE)
        during = guest.listing(BASE)
        seen = guest.sh(f"cat {BASE}/motd {BASE}/link {BASE}/sub/deep/file", user="alice")
        assert seen == "Try me.\nnew\ndeep"
        own = {".", "./motd", "./new", "./link", "./sub", "./sub/deep", "./sub/deep/file"}
        assert set(during) == set(before) | own
        assert {name: fact for name, fact in during.items() if name not in own} == {
            name: fact for name, fact in before.items() if name not in own
        }
    assert guest.listing(BASE) == before


def test_later_changes_of_the_source_do_not_show(guest: Guest) -> None:
    source = guest.source("later", TEXT)
    with guest.overlay("later", source, BASE):
        guest.sh(f"echo changed > {source}/motd; rm {source}/new; touch {source}/more")
        assert guest.sh(f"cat {BASE}/motd {BASE}/new; ls {BASE}/more 2>/dev/null || echo none") == (
            "Try me.\nnew\nnone"
        )


def test_file_covers_one_file_and_not_its_neighbours(guest: Guest) -> None:
    source = guest.source("one", {"file": "one\n"})
    before = guest.listing(BASE)
    with guest.overlay("one", f"{source}/file", f"{BASE}/motd") as overlay:
        assert overlay.mount_point == f"{BASE}/motd"
        during = guest.listing(BASE)
        assert {n for n in before if before[n] != during[n]} == {"./motd"}
        said = guest.sh(
            f"""
            cat {BASE}/motd
            echo more >> {BASE}/motd
            mv -f {source}/file {BASE}/motd || echo not over it
            rm -f {BASE}/motd || echo not away
            cat {BASE}/motd
            touch {BASE}/neighbour || echo not beside it
            """
        )
        assert said == "one\nnot over it\nnot away\none\nmore\nnot beside it"
        guest.overlayd("reset", "one", "--to", "applied")
        assert guest.sh(f"cat {BASE}/motd") == "one"
    assert guest.listing(BASE) == before


def test_file_goes_into_a_directory_under_its_own_name(guest: Guest) -> None:
    source = guest.source("into", {"tool": "#!/bin/sh\necho works\n"})
    guest.sh(f"chmod 755 {source}/tool")
    with guest.overlay("into", f"{source}/tool", BASE) as overlay:
        assert overlay.mount_point == BASE
        assert guest.sh(
            f"{BASE}/tool; ls {BASE} | wc -l; ls {BASE}/motd", user="alice"
        ).split() == [
            "works",
            str(len(guest.listing(BASE)) - 1),
            f"{BASE}/motd",
        ]
    assert "./tool" not in guest.listing(BASE)


def test_new_path_is_shown_by_the_nearest_parent_which_is_named(guest: Guest) -> None:
    source = guest.source("new", TEXT)
    before = guest.listing(BASE)
    said = guest.overlayd("apply", "new", source, f"{BASE}/far/away").out
    assert f"the overlay covers {BASE}, the nearest that exists" in said
    during = guest.listing(BASE)
    assert set(during) - set(before) == {
        "./far",
        *(f"./far/away{tail}" for tail in ("", "/motd", "/new", "/link")),
        *(f"./far/away/sub{tail}" for tail in ("", "/deep", "/deep/file")),
    }
    assert guest.sh(f"cat {BASE}/far/away/sub/deep/file", user="bob") == "deep"
    guest.overlayd("remove", "new")
    assert guest.listing(BASE) == before


def test_edits_last_until_reset(guest: Guest) -> None:
    source = guest.source("edits", {"l/linux": "mine\n", "l/own": "own\n"})
    before = guest.listing(NESTED)
    overlay = guest.apply("edits", source, NESTED)
    applied = guest.listing(NESTED)
    assert overlay.used_bytes is not None
    guest.sh(
        f"""
        cd {NESTED}
        echo edited >> l/own           # of the layer
        chmod 600 l/linux              # of the layer, over the base
        echo edited >> x/xterm         # of the base
        mkdir -p made/by/hand; echo made > made/by/hand/file
        mv d renamed                   # a directory of the base: dpkg does that
        rm x/xterm-color               # a whiteout
        rm -r s; mkdir s; echo opaque > s/only
        ln l/own l/second; ln -s own l/third
        """
    )
    edited = guest.listing(NESTED)
    assert edited["./l/own"] == edited["./l/second"] != applied["./l/own"]
    assert {n for n in edited if n.startswith("./renamed/")} == {
        n.replace("./d/", "./renamed/") for n in applied if n.startswith("./d/")
    }
    assert {n for n in edited if n.startswith("./s/")} == {"./s/only"}
    assert not {"./d", "./x/xterm-color"} & set(edited)
    status = guest.status("edits")
    assert status.used_bytes is not None
    assert status.used_bytes > overlay.used_bytes
    guest.overlayd("reset", "edits", "--to", "applied")
    assert guest.listing(NESTED) == applied
    guest.sh(f"echo again > {NESTED}/x/xterm; echo again > {NESTED}/again")
    assert "shows the base" in guest.overlayd("reset", "edits").out
    assert guest.listing(NESTED) == before
    guest.sh(f"echo writable > {NESTED}/x/xterm")  # the base's own files, too, stay editable
    guest.overlayd("remove", "edits")
    assert guest.listing(NESTED) == before


def test_read_only_overlay_takes_no_edits(guest: Guest) -> None:
    source = guest.source("ro", TEXT)
    with guest.overlay("ro", source, BASE, "--read-only"):
        said = guest.sh(
            f"cat {BASE}/motd; for f in motd new fresh; do echo x 2>&1 >> {BASE}/$f; done 2>&1 "
            "| grep -c 'Read-only file system'",
            check=False,
        )
        assert said == "Try me.\n3"
        guest.overlayd("reset", "ro")
        assert "./new" not in guest.listing(BASE)


def test_odd_names_hard_links_holes_and_times_arrive_whole(guest: Guest) -> None:
    place = f"{SOURCES}/odd"
    guest.sh(
        r"""
        mkdir -p "$1"; cd "$1"
        for name in 'a b' 'a:b' 'a,b' 'a\b' "$(printf 'new\nline')" "$(printf 'not\377utf8')" \
            '-dash' '..dots' "$(printf '%0253d' 0)" '$(touch x)' '`x`' 'tab	tab' '*'
        do echo content > "./$name"; mkdir "./$name.d"; done
        echo linked > one; ln one two; ln one 'a b.d/three'
        truncate -s 8M sparse; printf x >> sparse
        ln -s /nowhere dangling; ln -s "$(printf 'odd\ntarget')" 'odd link'
        : > empty
        touch -d 2001-02-03T04:05:06 one; touch -h -d 2002-02-03T04:05:06 dangling
        find . -depth -type d -exec touch -d 2003-02-03T04:05:06 {} +
        """,
        place,
    )
    source = guest.listing(place)
    before = set(guest.listing(BASE))
    with guest.overlay("odd", place, BASE):
        during = guest.listing(BASE)
        assert {n: during[n] for n in source if n != "."} == {
            n: fact for n, fact in source.items() if n != "."
        }
        assert set(during) == set(source) | before
        facts = guest.sh(
            f"cd {BASE}; stat -c '%h %i' one two 'a b.d/three' | uniq | wc -l; "
            "stat -c %h one; test $(stat -c %b sparse) -lt 64 && echo sparse"
        )
        assert facts.split() == ["1", "3", "sparse"]
    assert set(guest.listing(BASE)) == before


def test_full_overlay_says_so_and_can_be_reset(guest: Guest) -> None:
    source = guest.source("full", TEXT)
    with guest.overlay("full", source, BASE, "--size", "1M"):
        said = guest.sh(
            f"head -c 4M /dev/zero > {BASE}/big; echo later > {BASE}/later", check=False
        )
        assert not said
        assert "1M of 1M" in guest.overlayd("list").out
        assert guest.sh(f"df --output=avail {BASE} | tail -1").strip() == "0"
        guest.overlayd("reset", "full", "--to", "applied")
        assert guest.sh(f"echo fits > {BASE}/fits; cat {BASE}/fits {BASE}/motd") == "fits\nTry me."


@pytest.mark.once
@pytest.mark.parametrize("where", ["/etc", "/usr/local/share"])
def test_targets_outside_of_usr_are_refused(guest: Guest, where: str) -> None:
    source = guest.source("outside", TEXT)  # OSTree's /usr/local is a link into /var
    said = guest.overlayd("apply", "outside", source, where, code=5).err
    assert "not under /usr" in said


@pytest.mark.once
def test_dump_and_batch_bring_the_same_overlays_again(guest: Guest) -> None:
    one, two = guest.source("batch1", TEXT), guest.source("batch2", {"xterm": "two\n"})
    guest.overlayd("apply", "one", one, BASE, "--size", "8M")
    guest.overlayd("apply", "two", f"{two}/xterm", f"{NESTED}/x/xterm", "--read-only")
    table = guest.overlayd("list").out
    guest.sh("overlayd dump > /var/tmp/overlays.toml; overlayd remove one; overlayd remove two")
    answer = json.loads(guest.overlayd("batch", "/var/tmp/overlays.toml", "--json").out)
    assert [(item["name"], item["overlay"]["state"]) for item in answer] == [
        ("one", "active"),
        ("two", "active"),
    ]
    assert guest.overlayd("list").out == table
    assert guest.sh(f"cat {BASE}/motd {NESTED}/x/xterm") == "Try me.\ntwo"
    guest.sh("overlayd remove one; overlayd remove two")
