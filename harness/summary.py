# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of the pytest plugin that looks at results, in the process that prints them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness import results
from harness.errors import HarnessError
from harness.page import page
from harness.report import table
from harness.results import Outcome, Record

if TYPE_CHECKING:
    from pathlib import Path


def outcome_of(report: pytest.TestReport) -> Outcome:
    """Return what came of one phase of a test."""
    if report.failed:
        return Outcome.FAILED
    if report.skipped and not hasattr(report, "wasxfail"):
        return Outcome.SKIPPED
    return Outcome.PASSED


def reason_of(report: pytest.TestReport) -> str:
    """Return in one line why a test was skipped or failed; empty if it passed."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ").strip()
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    text = text.strip().removeprefix("Failed: ")
    line = (text.splitlines() or [""])[0]
    return line if report.when == "call" else f"in {report.when}: {line}"


def joined(one: Record, other: Record) -> Record:
    """Return one record for two phases of the same test, the first first."""
    worst = max(one, other, key=lambda record: _WORSE.index(record.outcome))
    phases = dict(one.phases)
    for name, seconds in other.phases.items():
        phases[name] = phases.get(name, 0.0) + seconds
    return replace(worst, phases=phases, release=one.release or other.release)


_WORSE = (Outcome.PASSED, Outcome.SKIPPED, Outcome.FAILED)


class Summary:
    """Collects records; prints the table and writes the files at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._records: dict[tuple[str, str, str], Record] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the record that came with *report*, in this process or from xdist's."""
        line = getattr(report, "harness", None)
        if not isinstance(line, str):
            return
        record = results.from_json(line)
        identity = (record.test, record.machine, record.kernel)
        # A test that is run again (pytest-rerunfailures, -p flaky) begins with its setup.
        if report.when != "setup" and identity in self._records:
            record = joined(self._records[identity], record)
        self._records[identity] = record

    def pytest_sessionfinish(self) -> None:
        """Write the results."""
        records = list(self._records.values())
        file: Path | None = self._config.getoption("--records")
        html: Path | None = self._config.getoption("--html-report")
        try:
            if file is not None:
                results.append(file, records)
                records = results.read(file)
            if html is not None:
                html.parent.mkdir(parents=True, exist_ok=True)
                html.write_text(page(records, title="System tests"), encoding="utf-8")
        except (HarnessError, OSError) as error:
            raise pytest.UsageError(f"results: {error}") from None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table."""
        if any(record.machine for record in self._records.values()):
            terminalreporter.section("machines")
            terminalreporter.write(table(list(self._records.values())))
            if (html := self._config.getoption("--html-report")) is not None:
                terminalreporter.write_line(f"report: {html}")
