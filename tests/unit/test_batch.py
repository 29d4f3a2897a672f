# SPDX-License-Identifier: LGPL-2.1-or-later
"""Batch files: what is read, what is refused and how, and that a dump can be read back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayd.batch import Outcome, dump, read, worst
from overlayd.errors import (
    BusyError,
    InterruptedByUserError,
    NotFoundError,
    RefusedError,
    SpaceError,
)
from overlayd.model import FLAGS, Options, Request, State
from tests.unit.conftest import (
    absolute_paths,
    is_one_printable_line,
    make_overlay,
    overlay_names,
    time_limit,
)

if TYPE_CHECKING:
    from overlayd.errors import OverlaydError
    from overlayd.model import Overlay

GOOD = 'name = "fix"\nsource = "/root/app"\ntarget = "/usr/share/app"\n'
one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def given_file(folder: Path, text: str) -> list[Request]:
    """Write *text* into a file and read it."""
    path = folder / "batch.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read(path)


def test_every_key_is_read(tmp_path: Path) -> None:
    text = f"[[overlay]]\n{GOOD}" + "".join(f"{flag} = true\n" for flag in FLAGS)
    text += 'writable_dirs = ["one", "two/deep"]\nprivate = false\n'
    assert given_file(tmp_path, text) == [
        Request(
            name="fix",
            source="/root/app",
            target="/usr/share/app",
            options=Options(
                read_only=True,
                allow_other=True,
                default_permissions=True,
                preserve_owner=True,
                allow_critical=True,
                writable_dirs=("one", "two/deep"),
            ),
        )
    ]
    (request,) = given_file(tmp_path, f'[[overlay]]\n{GOOD}size = "64M"\nprivate = true\n')
    assert (request.size, request.private) == (64 << 20, True)
    with pytest.raises(RefusedError, match="either private or everybody's"):
        given_file(tmp_path, f"[[overlay]]\n{GOOD}allow_other = true\nprivate = true\n")


@pytest.mark.parametrize("value", ['"one"', "[1]", "true", '["/one"]', '["a/../b"]', '[""]'])
def test_directories_are_paths_beneath_the_target(tmp_path: Path, value: str) -> None:
    with pytest.raises(RefusedError, match=r"writable_dirs|beneath TARGET"):
        given_file(tmp_path, f"[[overlay]]\n{GOOD}writable_dirs = {value}\n")


def test_what_is_left_out_has_the_defaults_of_apply(tmp_path: Path) -> None:
    (request,) = given_file(tmp_path, f"[[overlay]]\n{GOOD}")
    assert (request.options, request.size) == (Options(), None)


def test_overlays_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "".join(f"[[overlay]]\n{GOOD}".replace('"fix"', f'"{name}"') for name in "cab")
    assert [request.name for request in given_file(tmp_path, text)] == ["c", "a", "b"]


def test_relative_source_is_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    text = f"[[overlay]]\n{GOOD}".replace("/root/app", "trees/app")
    (tmp_path / "sub/batch.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "sub/batch.toml", Path("sub/batch.toml")):
        assert read(path)[0].source == f"{tmp_path}/sub/trees/app"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", r"must hold \[\[overlay\]\]"),
        ("overlay = []", r"must hold \[\[overlay\]\]"),
        ("overlay = 1", r"must hold \[\[overlay\]\]"),
        (f"[overlay]\n{GOOD}", r"must hold \[\[overlay\]\]"),
        (f"[[overlays]]\n{GOOD}", "overlays is unknown"),
        (f"x = 1\n[[overlay]]\n{GOOD}", "x is unknown"),
        ("overlay = [1]", "overlay 1: must be a table"),
        ("[[overlay]]", "overlay 1: name is missing"),
        (f"[[overlay]]\n{GOOD}[[overlay]]\n", "overlay 2: name is missing"),
        ('[[overlay]]\nname = "a"\ntarget = "/usr/a"', "overlay 1: source is missing"),
        ('[[overlay]]\nname = "a"\nsource = "/a"', "overlay 1: target is missing"),
        (f"[[overlay]]\n{GOOD.replace('fix', '')}", "overlay 1: name is missing"),
        (f"[[overlay]]\n{GOOD.replace('/root/app', '')}", "overlay 1: source is missing"),
        (f"[[overlay]]\n{GOOD.replace('fix', 'a b')}", "overlay 1: 'a b' is not"),
        (f"[[overlay]]\n{GOOD.replace('/usr/share/app', 'usr/a')}", "overlay 1: target must be"),
        (f"[[overlay]]\n{GOOD}size = 64", "overlay 1: size must be a string"),
        (f'[[overlay]]\n{GOOD}size = "64"', "overlay 1: '64' is not a size"),
        (f'[[overlay]]\n{GOOD}size = ""', "overlay 1: '' is not a size"),
        (f'[[overlay]]\n{GOOD}read_only = "yes"', "overlay 1: read_only must be true or false"),
        (f"[[overlay]]\n{GOOD}read_only = 1", "overlay 1: read_only must be true or false"),
        (f"[[overlay]]\n{GOOD}readonly = true", "overlay 1: readonly: no such key"),
        (f'[[overlay]]\n{GOOD}"a\\nb" = 1', r"overlay 1: a\\nb: no such key"),
        ('[[overlay]]\nname = 1\nsource = "/a"\ntarget = "/usr/a"', "name must be a string"),
        ('[[overlay]]\nname = "a"\nsource = "/\\u0000"', "source must be a string"),
        (f"[[overlay]]\n{GOOD}[[overlay]]\n{GOOD}", "two overlays are named 'fix'"),
        ("[[overlay", "not TOML"),
        (f"a{'.a' * 8000} = 1", "too many dots"),
        ("\ud800", "not TOML"),
    ],
)
def test_mistake_is_refused_with_file_and_table(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(RefusedError, match=where) as caught:
        given_file(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path}/batch.toml: ")
    assert is_one_printable_line(caught.value.message)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000], ids=["digits", "brackets"])
def test_toml_that_python_gives_up_on_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(RefusedError, match="not TOML"):
        given_file(tmp_path, f"overlay = {value}")


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=re.escape(f"{tmp_path}/none")):
        read(tmp_path / "none")


def test_file_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="larger than 8 MiB"):
        given_file(tmp_path, "#" * ((8 << 20) + 1))


def test_long_file_is_read_in_a_time_that_does_not_explode(tmp_path: Path) -> None:
    text = "overlay = [" + "".join(
        f'{{name="n{number}",source="/s",target="/usr/t"}},' for number in range(20_000)
    )
    with time_limit(5):
        assert len(given_file(tmp_path, text + "]")) == 20_000


@one_file
@given(text=st.text(alphabet=st.characters(blacklist_categories=()), max_size=80))
def test_any_text_is_read_or_refused_and_nothing_else(tmp_path: Path, text: str) -> None:
    _requests_or_refusal(tmp_path, text)


_keys = st.sampled_from(["name", "source", "target", "size", "read_only", "allow_other"])
_values = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fix", "/root/app", "/usr/share/app", "1M", ""])
    | st.lists(st.booleans(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.booleans(), max_size=2)
    | st.dates()
)


@one_file
@given(
    tables=st.lists(
        st.dictionaries(_keys | st.text(max_size=4), _values, max_size=7), min_size=1, max_size=3
    ),
    extra=st.dictionaries(st.text(max_size=3), _values, max_size=1),
)
def test_any_toml_is_read_or_refused_and_nothing_else(
    tmp_path: Path, tables: list[dict[str, object]], extra: dict[str, object]
) -> None:
    _requests_or_refusal(tmp_path, tomli_w.dumps({"overlay": tables} | extra))


def _requests_or_refusal(folder: Path, text: str) -> None:
    try:
        requests = given_file(folder, text)
    except RefusedError as error:
        message = error.message
    else:
        assert len({request.name for request in requests}) == len(requests) > 0
        return
    assert is_one_printable_line(message)


_utf8_paths = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=20
).map(lambda text: f"/{text}")


@one_file
@given(
    overlays=st.lists(
        st.builds(
            lambda name, source, target, options, size: make_overlay(
                name=name,
                source=source,
                target=f"/usr{target}",
                options=options,
                size=0 if options.read_only else size * 1024,
            ),
            overlay_names,
            _utf8_paths,
            _utf8_paths,
            st.builds(Options, *[st.booleans()] * 5),
            st.integers(1, 1 << 40),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda overlay: overlay.record.name,
    )
)
def test_dump_is_read_back_as_the_requests_that_made_the_overlays(
    tmp_path: Path, overlays: list[Overlay]
) -> None:
    assert given_file(tmp_path, dump(overlays)) == [
        Request(
            name=overlay.record.name,
            source=overlay.record.source,
            target=overlay.record.target,
            options=overlay.record.options,
            size=overlay.record.size or None,
        )
        for overlay in overlays
    ]


def test_dump_has_one_block_for_each_overlay_that_has_its_name() -> None:
    text = dump([make_overlay(name="a"), make_overlay(State.DRAINING, name="b")])
    assert text.count("[[overlay]]") == 1
    assert 'name = "a"' in text


def test_dump_of_nothing_is_a_comment() -> None:
    assert dump([]).startswith("#")
    assert dump([]).count("\n") == 1


def test_path_that_toml_cannot_hold_is_refused_with_name_and_key() -> None:
    for key in ("source", "target"):
        with pytest.raises(RefusedError, match=f"fix: {key} .*not UTF-8") as caught:
            dump([make_overlay(State.ACTIVE, **{key: "/usr/a\udcff\n"})])
        assert is_one_printable_line(caught.value.message)


@given(absolute_paths)
def test_dump_of_any_path_works_or_is_refused(path: str) -> None:
    try:
        text = dump([make_overlay(source=path)])
    except RefusedError as error:
        text = error.message
        assert any(0xDC80 <= ord(char) <= 0xDCFF for char in path)
        assert is_one_printable_line(text)
    assert text


def test_interruption_decides_over_an_earlier_error_and_the_first_error_else() -> None:
    request = Request("a", "/s", "/usr/t")
    errors: list[OverlaydError | None] = [None, SpaceError("x"), BusyError("y")]
    outcomes = [Outcome(replace(request), error=error) for error in errors]
    assert worst(outcomes) is errors[1]
    interruption = InterruptedByUserError("z")
    assert worst([*outcomes, Outcome(request, error=interruption)]) is interruption
    assert worst([Outcome(request)]) is None
    assert worst([]) is None
