# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report: one table and one page from the records of any number of runs."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from harness.errors import HarnessError
from harness.page import page, spent_by_phase
from harness.report import main, rows, table
from harness.results import Outcome, Record, append, from_json, read
from harness.timings import Ledger, Phase

if TYPE_CHECKING:
    from pathlib import Path

PASSED = Record(
    test="tests/system/test_apply.py::test_apply",
    machine="vm",
    kernel="image",
    outcome=Outcome.PASSED,
    release="6.12.107+deb13-cloud-amd64",
    phases={"build": 30.0, "boot": 20.0, "restore": 0.4, "test": 2.0, "teardown": 0.1},
)
SKIPPED = replace(
    PASSED,
    test="tests/system/test_power.py::test_power_cut",
    machine="container",
    kernel="host",
    release="6.18.44",
    outcome=Outcome.SKIPPED,
    reason="container cannot do power-cut: it has no power of its own",
    phases={"restore": 0.5},
)
FAILED = replace(
    PASSED,
    test="tests/system/test_apply.py::test_remove[<b>]",
    kernel="6.1",
    release="6.1.0-56-cloud-amd64",
    outcome=Outcome.FAILED,
    reason="assert 1 == 2 & more",
    details="Traceback <of> it",
    findings=("warning (console): WARNING: <x>",),
    artefacts="build/artefacts/test_remove",
    reproduce="./nox -s system -- --kernel=6.1 'test_remove[<b>]'",
    phases={"restore": 0.3, "test": 70.0},
)
ALL = [PASSED, SKIPPED, FAILED]


class Checker(HTMLParser):
    """Finds what is not closed, and what would be loaded."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe"}
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# -- records -----------------------------------------------------------------------------------


def test_records_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "records"
    append(file, ALL[:2])
    append(file, ALL[2:])
    assert read(file) == ALL
    assert FAILED.seconds == pytest.approx(70.3)


def test_later_run_of_a_test_replaces_the_earlier(tmp_path: Path) -> None:
    again = replace(FAILED, outcome=Outcome.PASSED)
    append(tmp_path / "one", ALL)
    append(tmp_path / "two", [again])
    assert read(tmp_path / "one", tmp_path / "two") == [PASSED, SKIPPED, again]


def test_field_of_a_later_version_is_ignored() -> None:
    assert from_json(PASSED.to_json().replace("{", '{"new": 1, ', 1)) == PASSED


@pytest.mark.parametrize("line", ["", "{}", "[]", "3", '{"test": "x"', '{"outcome": "odd"}'])
def test_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(HarnessError, match="not a test record"):
        from_json(line)


# -- table -------------------------------------------------------------------------------------


def test_table_shows_kernels_by_machines_by_tests() -> None:
    assert table(ALL).splitlines() == [
        "KERNEL                              MACHINE    PASSED  FAILED  SKIPPED        TIME",
        "image (6.12.107+deb13-cloud-amd64)  vm              1       0        0      52.5 s",
        "host (6.18.44)                      container       0       0        1      0.50 s",
        "6.1 (6.1.0-56-cloud-amd64)          vm              0       1        0  1 min 10 s",
        "",
        "skipped:",
        "    1 on container, host: container cannot do power-cut: it has no power of its own",
        "",
        "failed:",
        "  tests/system/test_apply.py::test_remove[<b>] on vm, 6.1: assert 1 == 2 & more",
        "      kept in   build/artefacts/test_remove",
        "      again by  ./nox -s system -- --kernel=6.1 'test_remove[<b>]'",
    ]


def test_equal_reasons_are_counted() -> None:
    records = [replace(SKIPPED, test=f"test_{n}") for n in range(12)]
    assert "   12 on container, host: container cannot" in table(records)


def test_release_is_taken_from_whoever_knows_it() -> None:
    (row,) = rows([replace(PASSED, release=""), replace(PASSED, test="other")])
    assert row.kernel_text == "image (6.12.107+deb13-cloud-amd64)"
    assert row.counts[Outcome.PASSED] == 2


def test_table_of_nothing_is_a_heading() -> None:
    assert table([]).startswith("KERNEL")


# -- page --------------------------------------------------------------------------------------


def test_page_is_whole_and_loads_nothing() -> None:
    text = page(ALL, title="Tests & more")
    checker = Checker(text)
    shown = "".join(checker.text)
    for part in (
        "Tests & more: failed",
        "1 passed, 1 failed, 1 skipped",
        "test_remove[<b>]",
        "assert 1 == 2 & more",
        "Traceback <of> it",
        "WARNING: <x>",
        "build/artefacts/test_remove",
        "./nox -s system -- --kernel=6.1 'test_remove[<b>]'",
        "6.12.107+deb13-cloud-amd64",
        "1 \u00d7 container cannot do power-cut",
        "1 min 10 s",
    ):
        assert part in shown
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "url(" not in text


def test_page_without_failures_or_skips_has_no_such_parts() -> None:
    text = page([PASSED], title="Tests")
    Checker(text)
    assert "Failures" not in text
    assert "<h2>Skipped" not in text
    assert "Tests: passed" in text


def test_page_of_nothing_is_whole() -> None:
    Checker(page([], title="Tests"))


def test_bar_has_the_share_of_each_phase() -> None:
    text = page([replace(PASSED, phases={"build": 75.0, "test": 25.0})], title="Tests")
    assert '<i class="p-build" style="width:75.00%" title="build: 1 min 15 s">' in text
    assert '<i class="p-test" style="width:25.00%" title="test: 25.0 s">' in text
    assert 'class="p-boot" style' not in text


def test_every_phase_has_a_colour() -> None:
    text = page(ALL, title="Tests")
    for phase in Phase:
        assert f".p-{phase} {{ background: var(--{phase}) }}" in text
        assert f"--{phase}: #" in text


def test_time_is_added_up_by_phase() -> None:
    assert spent_by_phase(ALL) == {
        Phase.BUILD: 30.0,
        Phase.BOOT: 20.0,
        Phase.RESTORE: pytest.approx(1.2),
        Phase.TEST: 72.0,
        Phase.TEARDOWN: 0.1,
    }


# -- the command -------------------------------------------------------------------------------


def test_command_joins_files_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path / "one", ALL[:2])
    append(tmp_path / "two", ALL[2:])
    html = tmp_path / "out" / "page.html"
    files = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main([*files, "--html", str(html), "--title", "Nightly"]) == 1
    assert capsys.readouterr().out == f"{table(ALL)}\nreport: {html}\n"
    Checker(html.read_text())
    assert main(files[:1]) == 0


def test_command_refuses_what_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text("nonsense\n")
    assert main([str(tmp_path / "bad")]) == 2
    assert capsys.readouterr().err == "error: not a test record: 'nonsense'\n"
    assert main([str(tmp_path / "missing")]) == 2


# -- the ledger --------------------------------------------------------------------------------


def test_inner_phase_is_taken_off_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr("harness.timings.time.monotonic", lambda: next(clock))
    ledger = Ledger()
    with ledger.phase(Phase.RESTORE), ledger.phase(Phase.BUILD):
        pass
    assert ledger.take() == {Phase.BUILD: 3.0, Phase.RESTORE: 7.0}
    assert ledger.take() == {}


def test_phase_counts_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("harness.timings.time.monotonic", lambda: next(clock))
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError), ledger.phase(Phase.BOOT):
        raise ZeroDivisionError
    assert ledger.take() == {Phase.BOOT: 2.0}
