# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records survive being written and read, and nothing else is believed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd import store
from overlayd.model import Layer, Options, Phase, Record, Tree
from overlayd.records import RecordError, decode, encode
from tests.unit.conftest import (
    UUID,
    absolute_paths,
    file_names,
    is_one_printable_line,
    make_record,
    overlay_names,
)

NUMBERS: Final = st.integers(0, (1 << 64) - 1)
TREES: Final = st.builds(Tree, version=NUMBERS, upper=NUMBERS, st_dev=NUMBERS, fsid=NUMBERS)
LAYERS: Final = st.builds(
    Layer, version=NUMBERS, source=absolute_paths, entries=NUMBERS, size=NUMBERS
)
BELOW_USR: Final = absolute_paths.map(lambda path: f"/usr{path}")

RECORDS: Final = st.builds(
    replace,
    st.just(make_record()),
    uuid=st.uuids().map(str),
    name=overlay_names,
    phase=st.sampled_from(Phase),
    owner=NUMBERS,
    session_id=st.none() | NUMBERS,
    source=absolute_paths,
    target=BELOW_USR,
    mount_point=BELOW_USR,
    entry=file_names.map(lambda name: name.decode("utf-8", "surrogateescape")) | st.just(""),
    options=st.builds(Options, *[st.booleans()] * 5),
    size=NUMBERS,
    inodes=NUMBERS,
    layers=st.lists(LAYERS, max_size=3).map(tuple),
    tree=st.none() | TREES,
    pending=st.none() | TREES,
    deployment=st.none() | st.text(st.characters(blacklist_characters="\0"), max_size=20),
)

JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def plain(record: Record | None = None) -> dict[str, object]:
    """Return the JSON object of a record, to be damaged."""
    found: dict[str, object] = json.loads(encode(record or make_record(pending=Tree(1, 2))))
    return found


def damaged(**changes: object) -> bytes:
    return json.dumps(plain() | changes).encode()


@pytest.mark.parametrize("path", ["", "..", "a/../..", "/etc", "a//b", "a\0", "\ud800", 1, None])
def test_writable_directory_that_leads_elsewhere_is_not_believed(path: object) -> None:
    options = json.loads(encode(make_record()))["options"] | {"writable_dirs": ["a", path]}
    with pytest.raises(RecordError, match="writable_dirs"):
        decode(damaged(options=options))


@given(RECORDS)
def test_record_comes_back_as_it_was_whatever_its_paths(record: Record) -> None:
    assert decode(encode(record)) == record


def test_byte_that_is_not_utf8_survives() -> None:
    record = make_record(source="/root/a\udcff\n\x01", target="/usr/\udce9", entry="\udc80")
    assert decode(encode(record)) == record


def test_record_with_the_longest_paths_is_read_again_by_the_store() -> None:
    path = ("/" + "\udcff" * 255) * 15 + "/" + "\udcff" * 254
    below = "/usr/" + path[5:]
    assert len(path) == 4095
    record = make_record(
        source=path, target=below, mount_point=below, layers=(Layer(1, path, 1, 1),)
    )
    data = encode(record)
    assert decode(data) == record
    assert len(data) <= store._MAX_RECORD


def _damage() -> list[tuple[str, object]]:
    """Return attributes and values that they must not have."""
    no_number: list[object] = [-1, 1.5, True, "1", [], {}, 1 << 64]
    no_text: list[object] = [1, True, [], {}, "a\0b", "x" * 5000, "\ud800"]
    no_path: list[object] = [
        *(None, 1, "", "/", "/etc", "/usrx", "usr/x", "/usr/../etc", "/usr/./x", "/usr/"),
        *("/usr//x", "/usr/x/..", "/usr/a\0", " /usr/x", "/USR/x"),
    ]
    no_tree: list[object] = [1, "x", [], {}, {"version": 1}, False]
    wrong: dict[str, list[object]] = {
        "owner": [None, *no_number],
        "size": [None, *no_number],
        "inodes": [None, *no_number],
        "session_id": no_number,
        "boot_id": [None, *no_text],
        "source": [None, *no_text],
        "created_at": [None, *no_text],
        "deployment": no_text,
        "target": no_path,
        "mount_point": no_path,
        "name": [None, *no_text, "", "-x", "a/b", "..", "a\n", "a" * 65, "é", "\udcff"],
        "uuid": [
            *(None, *no_text, "", UUID + "\n", UUID.upper(), UUID[:-1], "../" + UUID),
            UUID.replace("-", ""),
        ],
        "entry": [None, *no_text, ".", "..", "a/b", "/"],
        "phase": [None, *no_text, "", "Active", "lost", "active\n"],
        "scope": [None, *no_text, "", "shared", "SYSTEM"],
        "options": [None, [], 1, {}, {"read_only": True}],
        "layers": [None, {}, 1, "x", [1], [None], [{}], [{"version": 1}]],
        "tree": no_tree,
        "pending": no_tree,
    }
    return [(key, value) for key, values in wrong.items() for value in values]


@pytest.mark.parametrize(("key", "value"), _damage())
def test_wrong_attribute_is_named(key: str, value: object) -> None:
    with pytest.raises(RecordError) as caught:
        decode(damaged(**{key: value}))
    assert key in str(caught.value)
    assert is_one_printable_line(str(caught.value))


def _places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of every value inside *value*."""
    found = [path] if path else []
    items: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


def _holder(value: object, path: tuple[str | int, ...]) -> dict[str | int, object]:
    for key in path[:-1]:
        value = value[key]  # type: ignore[index]
    return value  # type: ignore[return-value]


@pytest.mark.parametrize(
    "path",
    [p for p in _places(plain()) if p[-1] not in {0, "digest", "writable_dirs"}],
    ids=lambda p: ".".join(map(str, p)),
)
def test_missing_attribute_is_named(path: tuple[str | int, ...]) -> None:
    value = copy.deepcopy(plain())
    del _holder(value, path)[path[-1]]
    with pytest.raises(RecordError, match=rf"{path[-1]}' is missing"):
        decode(json.dumps(value).encode())


@given(st.sampled_from(_places(plain())), JSON)
def test_any_json_in_any_place_is_believed_or_a_record_error(
    path: tuple[str | int, ...], bad: object
) -> None:
    value = copy.deepcopy(plain())
    _holder(value, path)[path[-1]] = bad
    _believed_or_not(json.dumps(value).encode())


@given(JSON)
def test_any_json_is_believed_or_a_record_error(value: object) -> None:
    _believed_or_not(json.dumps(value).encode())


@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_error(data: bytes) -> None:
    with pytest.raises(RecordError):
        decode(data)


@given(st.integers(0, len(encode(make_record())) - 1))
def test_record_that_is_cut_is_a_record_error(length: int) -> None:
    with pytest.raises(RecordError):
        decode(encode(make_record())[:length])


def _believed_or_not(data: bytes) -> None:
    try:
        record = decode(data)
    except RecordError as error:
        message = str(error)
    else:
        assert decode(encode(record)) == record
        return
    assert is_one_printable_line(message)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"x"', "not an object"),
        (b"{}", "schema"),
    ],
    ids=["empty", "cut", "not UTF-8", "deep", "digits", "array", "null", "string", "bare"],
)
def test_what_is_no_record_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason) as caught:
        decode(data)
    assert is_one_printable_line(str(caught.value))


@pytest.mark.parametrize("schema", [0, 2, 1000])
def test_record_of_another_schema_is_refused_with_both_numbers(schema: int) -> None:
    with pytest.raises(RecordError, match=f"of schema {schema}.*knows 1"):
        decode(damaged(schema=schema))


@pytest.mark.parametrize("schema", [None, "1", 1.0, True])
def test_schema_must_be_a_whole_number(schema: object) -> None:
    with pytest.raises(RecordError, match="schema"):
        decode(damaged(schema=schema))


def test_attribute_that_a_newer_program_added_does_no_harm() -> None:
    assert decode(damaged(new=1)) == make_record(pending=Tree(1, 2))


def test_error_says_which_layer_is_wrong() -> None:
    layer = {"version": 1, "source": "/a", "entries": 1, "size": 1}
    with pytest.raises(RecordError, match=r"layers\[1\]\.entries"):
        decode(damaged(layers=[layer, layer | {"entries": -1}]))
