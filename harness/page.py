# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report as one page of HTML: nothing is loaded, nothing is run, a mail can carry it."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from harness.figures import seconds_text
from harness.results import Outcome
from harness.timings import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness.results import Record

SLOWEST = 15
"""Tests whose durations are shown in full."""

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --passed: #2a8f4d; --failed: #c8323c;
  --skipped: #8a8a8a; --build: #7a5ccc; --boot: #c77d1e; --restore: #1f8ea3; --test: #2a8f4d;
  --teardown: #8a8a8a; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: left;
  border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums } .matrix td.c { text-align: center }
.passed { color: var(--passed) } .failed { color: var(--failed); font-weight: 600 }
.skipped { color: var(--skipped) } code, pre { font: 13px/1.4 ui-monospace, monospace }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem; margin: .4rem 0 }
.bar { display: flex; height: 1.1rem; border-radius: 3px; overflow: hidden; min-width: 20rem }
.bar i { display: block } .key i { display: inline-block; width: .8rem; height: .8rem;
  border-radius: 2px; margin: 0 .35rem 0 1rem; vertical-align: -1px }
section.failure { border-left: 4px solid var(--failed); padding-left: 1rem; margin: 1.2rem 0 }
.small { font-size: 13px; opacity: .8 }
""" + "\n".join(f".p-{phase} {{ background: var(--{phase}) }}" for phase in Phase)

_SIGNS = {Outcome.PASSED: "✓", Outcome.FAILED: "✗", Outcome.SKIPPED: "-"}


def page(records: Sequence[Record], *, title: str) -> str:
    """Return the page for *records*: matrix, time, failures and skips."""
    counts = Counter(record.outcome for record in records)
    verdict = Outcome.FAILED if counts[Outcome.FAILED] else Outcome.PASSED
    summary = ", ".join(
        f'<span class="{outcome}">{counts[outcome]} {outcome}</span>' for outcome in Outcome
    )
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: {verdict}</title>',
        (
            '<meta http-equiv="Content-Security-Policy"'
            " content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{summary}</p>",
        *_failures(records),
        *_matrix(records),
        *_time(records),
        *_slowest(records),
        *_skips(records),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _cases(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Return machine and kernel of all records, with the release."""
    cases: dict[tuple[str, str], str] = {}
    for record in records:
        identity = (record.machine, record.kernel)
        cases[identity] = cases.get(identity) or record.release
    return cases


def _failures(records: Iterable[Record]) -> list[str]:
    parts: list[str] = []
    for record in records:
        if record.outcome is not Outcome.FAILED:
            continue
        where = f"{record.machine}, {record.kernel}" if record.machine else "no machine"
        parts.append(
            f'<section class="failure"><h3><code>{escape(record.test)}</code> on '
            f"{escape(where)}</h3><p>{escape(record.reason)}</p>"
        )
        parts.extend(f"<pre>{escape(finding)}</pre>" for finding in record.findings)
        if record.reproduce:
            parts.append(f"<p>Again by</p><pre>{escape(record.reproduce)}</pre>")
        if record.artefacts:
            parts.append(f"<p>Kept in <code>{escape(record.artefacts)}</code></p>")
        if record.details:
            parts.append(
                "<details><summary>What pytest says</summary>"
                f"<pre>{escape(record.details)}</pre></details>"
            )
        parts.append("</section>")
    return ["<h2>Failures</h2>", *parts] if parts else []


def _matrix(records: Sequence[Record]) -> list[str]:
    cases = _cases(records)
    found = {(record.test, record.machine, record.kernel): record for record in records}
    head = "".join(
        f"<th>{escape(machine or 'no machine')}<br>{escape(kernel)}"
        f'<br><span class="small">{escape(release)}</span></th>'
        for (machine, kernel), release in cases.items()
    )
    parts = [f'<h2>Matrix</h2><table class="matrix"><tr><th>Test</th>{head}</tr>']
    total = ["<tr><th>Passed, failed, skipped</th>"]
    for machine, kernel in cases:
        counts = Counter(
            record.outcome
            for record in records
            if (record.machine, record.kernel) == (machine, kernel)
        )
        numbers = " ".join(f'<span class="{each}">{counts[each]}</span>' for each in Outcome)
        total.append(f'<td class="c">{numbers}</td>')
    parts.append("".join([*total, "</tr>"]))
    for test in dict.fromkeys(record.test for record in records):
        cells: list[str] = []
        for machine, kernel in cases:
            record = found.get((test, machine, kernel))
            if record is None:
                cells.append("<td></td>")
                continue
            tip = record.reason or seconds_text(record.seconds)
            cells.append(
                f'<td class="c {record.outcome}" title="{escape(tip)}">'
                f"{_SIGNS[record.outcome]}</td>"
            )
        parts.append(f"<tr><td><code>{escape(test)}</code></td>{''.join(cells)}</tr>")
    return [*parts, "</table>"]


def _time(records: Sequence[Record]) -> list[str]:
    key = "".join(f'<i class="p-{phase}"></i>{phase}' for phase in Phase)
    parts = [
        (
            f'<h2>Where the time went</h2><p class="key">{key}</p>'
            '<table><tr><th>Machine</th><th class="n">Sum</th><th>Shares</th></tr>'
        )
    ]
    groups = [("all", list(records))]
    for machine, kernel in _cases(records):
        chosen = [r for r in records if (r.machine, r.kernel) == (machine, kernel)]
        groups.append((f"{machine or 'no machine'} {kernel}".strip(), chosen))
    for name, chosen in groups:
        spent = spent_by_phase(chosen)
        parts.append(
            f'<tr><td>{escape(name)}</td><td class="n">{seconds_text(sum(spent.values()))}</td>'
            f"<td>{_bar(spent)}</td></tr>"
        )
    return [*parts, "</table>"]


def spent_by_phase(records: Sequence[Record]) -> dict[Phase, float]:
    """Return the seconds that *records* took, by phase."""
    return {
        phase: sum(record.phases.get(phase.value, 0.0) for record in records) for phase in Phase
    }


def _bar(spent: dict[Phase, float]) -> str:
    total = sum(spent.values()) or 1.0
    pieces = "".join(
        f'<i class="p-{phase}" style="width:{100 * seconds / total:.2f}%" '
        f'title="{phase}: {seconds_text(seconds)}"></i>'
        for phase, seconds in spent.items()
        if seconds > 0
    )
    return f'<div class="bar">{pieces}</div>'


def _slowest(records: Sequence[Record]) -> list[str]:
    chosen = sorted(records, key=lambda record: record.seconds, reverse=True)[:SLOWEST]
    parts = [
        (
            '<h2>Slowest tests</h2><table><tr><th>Test</th><th>On</th><th class="n">Time</th>'
            "<th>Shares</th></tr>"
        )
    ]
    parts.extend(
        f"<tr><td><code>{escape(record.test)}</code></td>"
        f"<td>{escape(f'{record.machine} {record.kernel}')}</td>"
        f'<td class="n">{seconds_text(record.seconds)}</td>'
        f"<td>{_bar(spent_by_phase([record]))}</td></tr>"
        for record in chosen
    )
    return [*parts, "</table>"]


def _skips(records: Iterable[Record]) -> list[str]:
    reasons: dict[str, list[Record]] = {}
    for record in records:
        if record.outcome is Outcome.SKIPPED:
            reasons.setdefault(record.reason or "no reason given", []).append(record)
    if not reasons:
        return []
    parts = ["<h2>Skipped</h2>"]
    for reason, skipped in sorted(reasons.items(), key=lambda item: -len(item[1])):
        tests = "".join(
            f"<li><code>{escape(record.test)}</code> on {escape(record.machine)} "
            f"{escape(record.kernel)}</li>"
            for record in skipped
        )
        parts.append(
            f"<details><summary>{len(skipped)} &times; {escape(reason)}</summary>"
            f"<ul>{tests}</ul></details>"
        )
    return parts
