# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON as documented, and text that no name or path can break."""

from __future__ import annotations

import json
import os
import pwd

import pytest
from hypothesis import given

from overlayd import render
from overlayd.errors import BusyError, OverlaydError
from overlayd.model import Layer, Options, State, Tree
from tests.unit.conftest import absolute_paths, is_one_printable_line, make_overlay

HOSTILE = "/usr/a\nb\x1b[2J\udcff\u202e"
NO_USER = 4_000_000_000


def test_overlay_object_has_exactly_the_documented_keys() -> None:
    found = render.overlay_object(make_overlay(session_id=3, deployment="debian/abc.0"))
    assert found == {
        "name": "fix",
        "uuid": "3f0c8a52-1111-4222-8333-abcdefabcdef",
        "target": "/usr/share/app",
        "source": "/root/app",
        "owner": 0,
        "session_id": 3,
        "scope": "system",
        "state": "active",
        "version": 1,
        "created_at": "2024-05-06T07:08:09Z",
        "mount_point": "/usr/share/app",
        "mount_id": 77,
        "layers": [
            {
                "version": 1,
                "source": "/root/app",
                "entries": 3,
                "size_bytes": 8192,
                "digest": None,
            }
        ],
        "options": {
            "read_only": False,
            "allow_other": False,
            "default_permissions": False,
            "writable_dirs": [],
        },
        "storage": {
            "size_bytes": 64 << 20,
            "used_bytes": 12288,
            "inodes": 1000,
            "used_inodes": 4,
        },
        "deployment": "debian/abc.0",
    }


@pytest.mark.parametrize("state", State)
def test_overlay_object_has_the_same_keys_in_every_state(state: State) -> None:
    whole = render.overlay_object(make_overlay())
    overlay = make_overlay(state, tree=None)
    found = render.overlay_object(type(overlay)(overlay.record, state, None, None))
    assert found.keys() == whole.keys()
    assert (found["version"], found["mount_id"], found["storage"]) == (None, None, None)
    assert json.loads(render.as_json(found))["state"] == state.value


def test_options_are_those_of_the_overlay() -> None:
    options = Options(read_only=True, allow_other=True, default_permissions=True)
    found = render.overlay_object(make_overlay(options=options))
    assert found["options"] == {
        **dict.fromkeys(["read_only", "allow_other", "default_permissions"], True),
        "writable_dirs": [],
    }


def test_error_object_has_exactly_the_documented_keys() -> None:
    error = BusyError("it is busy", hint="wait")
    assert render.error_object(error) == {
        "error": {"code": "busy", "message": "it is busy", "hint": "wait"}
    }
    assert render.error_object(OverlaydError("x"))["error"] == {
        "code": "internal",
        "message": "x",
        "hint": None,
    }


@given(absolute_paths)
def test_json_is_ascii_and_gives_every_path_back(path: str) -> None:
    text = render.as_json(render.overlay_object(make_overlay(target=path)))
    assert text.isascii()
    found = json.loads(text)
    assert found["target"] == path
    assert os.fsencode(found["target"]) == os.fsencode(path)


def test_table_has_one_line_per_overlay_whatever_their_paths() -> None:
    overlays = [make_overlay(name=name, target=HOSTILE) for name in ("a", "b")]
    lines = render.overlay_table(overlays).split("\n")
    assert len(lines) == 3
    assert lines[0].split() == ["NAME", "STATE", "VERSION", "OWNER", "EDITS", "TARGET"]
    assert all(map(is_one_printable_line, lines))


def test_table_of_nothing_says_so() -> None:
    assert render.overlay_table([]) == "no overlays"


def test_table_shows_edits_or_that_there_can_be_none() -> None:
    writable = make_overlay()
    read_only = make_overlay(options=Options(read_only=True))
    lost = type(writable)(writable.record, State.LOST, None, None)
    text = render.overlay_table([writable, read_only, lost])
    first, second, third = text.split("\n")[1:]
    assert "12K of 64M" in first
    assert "read-only" in second
    assert third.split()[1:5] == ["lost", "1", pwd.getpwuid(0).pw_name, "-"]


def test_columns_are_aligned_without_spaces_at_the_end() -> None:
    assert render.columns([("a", "bbb"), ("cccc", "d")]) == "a     bbb\ncccc  d"


@given(absolute_paths)
def test_details_have_one_line_per_fact_whatever_the_paths(path: str) -> None:
    overlay = make_overlay(
        source=path,
        target=path,
        mount_point=path,
        layers=(Layer(1, path, 1, 1), Layer(2, path, 1, 1)),
        deployment="debian/abc.0",
    )
    lines = render.overlay_details(overlay).split("\n")
    assert [line.split(":")[0] for line in lines] == [
        *("name", "state", "target", "source", "version", "owner", "created", "mounted on"),
        *("edits", "layer 1", "layer 2", "deployment", "uuid"),
    ]
    assert all(map(is_one_printable_line, lines))


def test_details_of_a_lost_overlay_without_a_tree_are_printed_too() -> None:
    overlay = make_overlay(State.LOST, tree=None)
    assert "lost" in render.overlay_details(overlay)


@given(absolute_paths)
def test_answer_to_apply_is_one_line_and_names_what_is_covered_beyond_the_target(
    path: str,
) -> None:
    lines = render.applied(make_overlay(source=path, target=path, mount_point=path)).split("\n")
    assert len(lines) == 1
    wider = make_overlay(target=f"/usr{path}", mount_point="/usr/share")
    first, second = render.applied(wider).split("\n")
    assert is_one_printable_line(first)
    assert second == "the overlay covers /usr/share, the nearest that exists"


def test_answer_to_apply_says_whether_it_can_be_edited() -> None:
    assert render.applied(make_overlay()).endswith("3 entries, 8K, writable")
    read_only = make_overlay(options=Options(read_only=True), tree=Tree(1, 0))
    assert render.applied(read_only).endswith("read-only")


def test_user_without_a_name_is_shown_by_number() -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(NO_USER)
    assert render.user_name(NO_USER) == str(NO_USER)
    assert render.user_name(0) == pwd.getpwuid(0).pw_name


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.TerminalProgress(enabled=False)
    progress._next = min(progress._next, float("inf"))
    progress.advance(1000, 1 << 30)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_while_a_copy_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    progress = render.TerminalProgress(enabled=True)
    progress.advance(1, 1)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_progress_of_a_long_copy_is_one_line_that_is_cleared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = render.TerminalProgress(enabled=True)
    progress.expect(20, 4 << 20)
    progress._next = 0
    progress.advance(10, 1 << 20)
    drawn = capsys.readouterr()
    assert drawn.out == ""
    assert "1M of 4M, 10 of 20 entries" in drawn.err
    assert "\n" not in drawn.err
    progress.close()
    assert capsys.readouterr().err == "\r\x1b[K"
    progress.close()
    assert capsys.readouterr().err == ""
