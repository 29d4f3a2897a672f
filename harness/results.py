# SPDX-License-Identifier: LGPL-2.1-or-later
"""What came of each test, as plain records: lines of JSON that several runs can write into.

The plugin writes them, the report reads them; they are the only thing that the two share.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from harness.errors import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Outcome(StrEnum):
    """What came of a test; an expected failure counts as passed, an error as failed."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Record:
    """One test on one machine.

    :ivar test: its name, without the machine.
    :ivar machine: the kind of machine; empty for a test without one.
    :ivar kernel: as it was asked for; *release* is what it turned out to be.
    :ivar reason: why it was skipped, or how it failed, in one line.
    :ivar details: what there is to say about a failure.
    :ivar findings: what the machine's logs had against it.
    :ivar phases: seconds by phase.
    :ivar artefacts: the folder with what is left of a failure, and *reproduce* the command.
    """

    test: str
    machine: str
    kernel: str
    outcome: Outcome
    release: str = ""
    reason: str = ""
    details: str = ""
    findings: tuple[str, ...] = ()
    phases: dict[str, float] = field(default_factory=dict)
    artefacts: str = ""
    reproduce: str = ""

    @property
    def seconds(self) -> float:
        """All time that went into it."""
        return sum(self.phases.values())

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def from_json(line: str) -> Record:
    """Return the record of a line; what a later version added is ignored.

    :raises HarnessError: if it is none.
    """
    try:
        values = json.loads(line)
        known = {item.name for item in dataclasses.fields(Record)}
        values = {name: value for name, value in values.items() if name in known}
        values["outcome"] = Outcome(values["outcome"])
        values["findings"] = tuple(values.get("findings", ()))
        return Record(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"not a test record: {line[:80]!r}"
        raise HarnessError(message) from error


def append(path: Path, records: Iterable[Record]) -> None:
    """Add *records* to the file, in one write."""
    text = "".join(record.to_json() + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read(*paths: Path) -> list[Record]:
    """Return the records of all files; of a test that ran several times on a case, the last.

    :raises HarnessError: if a line is none.
    :raises OSError: if a file cannot be read.
    """
    records: dict[tuple[str, str, str], Record] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                record = from_json(line)
                identity = (record.test, record.machine, record.kernel)
                records.pop(identity, None)
                records[identity] = record
    return list(records.values())
