# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names, sizes, paths by components, and text that is safe to print."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd.errors import RefusedError, shown
from overlayd.model import check_name, human_size, is_within, parse_size
from tests.unit.conftest import (
    absolute_paths,
    is_one_printable_line,
    make_record,
    overlay_names,
)

_FIRST = set(string.ascii_letters + string.digits)
_REST = _FIRST | set("_-")


@pytest.mark.parametrize("name", ["a", "0", "Fix_1-x", "z" * 64, "9_", "a-", "A" + "_" * 63])
def test_name_by_the_rules_is_accepted_as_it_is(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "_a",
            "-a",
            "--lazy",
            "a" * 65,
            "a b",
            "a.b",
            "a/b",
            "..",
            "a\n",
            "\na",
            "a\0",
            "a\r",
        ),
        *(
            "é",
            "aé",
            "\uff11",
            "a\uff11",
            "a²",
            "٣",
            "\uff41",
            "a\u202e",
            "a\udcff",
            "a:b",
            "a,b",
            "a\\b",
        ),
    ],
)
def test_name_against_the_rules_is_refused_on_one_line_with_the_rule(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_name(name)
    assert is_one_printable_line(caught.value.message)
    assert caught.value.hint is not None
    assert "1 to 64" in caught.value.hint


@given(overlay_names)
def test_every_name_the_rule_allows_is_accepted(name: str) -> None:
    assert check_name(name) == name


@given(st.text(alphabet=st.characters(blacklist_categories=()), max_size=70))
def test_names_are_accepted_exactly_by_the_rule(name: str) -> None:
    good = 1 <= len(name) <= 64 and name[0] in _FIRST and set(name) <= _REST
    if good:
        assert check_name(name) == name
        return
    with pytest.raises(RefusedError):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1K", 1024),
        ("512K", 512 * 1024),
        ("64M", 64 << 20),
        ("2G", 2 << 30),
        ("007K", 7168),
        ("1048576G", 1 << 50),
    ],
)
def test_size_is_a_number_of_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0K",
            "0",
            "-1",
            "-1M",
            "+1M",
            "1.5G",
            "",
            " ",
            "1T",
            "\uff11M",
            "٣M",
            "²K",
            "1",
            "M",
            "1 M",
        ),
        *(" 1M", "1M ", "1M\n", "\n1M", "1MB", "1m", "1KM", "0x1M", "1e3K", "1_0M", "1M\0"),
        *("1048577G", "999999999999999G", "9" * 16 + "K", "9" * 5000 + "K", "1\udcffM"),
    ],
)
def test_what_is_no_positive_whole_number_with_a_unit_is_refused(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_size(text)
    assert is_one_printable_line(caught.value.message)


@given(st.text(alphabet=st.characters(blacklist_categories=()), max_size=12))
def test_any_text_is_a_positive_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except RefusedError as error:
        message = error.message
    else:
        assert size > 0
        return
    assert is_one_printable_line(message)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1K"),
        (1536, "1.5K"),
        (1 << 20, "1M"),
        (64 << 20, "64M"),
        ((1 << 30) + (1 << 29), "1.5G"),
        (4 << 40, "4096G"),
    ],
)
def test_size_for_people_has_the_largest_unit_and_one_decimal(size: int, text: str) -> None:
    assert human_size(size) == text


@given(st.integers(1, 1023), st.sampled_from("KMG"))
def test_whole_units_are_written_the_way_they_are_read(number: int, unit: str) -> None:
    text = f"{number}{unit}"
    assert human_size(parse_size(text)) == text


@given(st.text(alphabet=st.characters(blacklist_categories=())) | absolute_paths)
def test_shown_text_is_always_one_printable_line(text: str) -> None:
    assert is_one_printable_line(shown(text))


@given(st.text(alphabet=string.printable[:95]))
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/usr/é", "/usr/é"),
        ("a\nb", r"a\nb"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\udcffb", r"a\xffb"),
        ("a\u202eb", r"a\u202eb"),
        ("a\u2028b", r"a\u2028b"),
        ("a\x85b", r"a\x85b"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_what_a_terminal_would_act_on_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("path", "tree", "expected"),
    [
        ("/usr/lib", "/usr/lib", True),
        ("/usr/lib/x", "/usr/lib", True),
        ("/usr/lib/x/y", "/usr/lib", True),
        ("/usr", "/usr/lib", False),
        ("/usr/share", "/usr/lib", False),
        ("/usr/lib", "/", True),
        ("/", "/", True),
        ("/usr/li", "/usr/lib", False),
    ],
)
def test_within_is_said_of_a_tree_and_what_lies_in_it(path: str, tree: str, expected: bool) -> None:  # noqa: FBT001
    assert is_within(path, tree) is expected


def test_usr_lib64_is_not_inside_usr_lib() -> None:
    assert not is_within("/usr/lib64", "/usr/lib")
    assert not is_within("/usr/lib64/x", "/usr/lib")
    assert not is_within("/usr/lib", "/usr/lib64")


@given(absolute_paths, absolute_paths)
def test_within_compares_components(path: str, tree: str) -> None:
    parts, top = path.split("/"), tree.split("/")
    assert is_within(path, tree) is (parts[: len(top)] == top)


def test_changing_a_record_leaves_the_old_one_as_it_was() -> None:
    before = make_record()
    after = before.with_(name="other", size=5)
    assert (before.name, before.size) == ("fix", 64 << 20)
    assert (after.name, after.size, after.uuid) == ("other", 5, before.uuid)
