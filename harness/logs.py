# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a machine logs, as events: entries of the journal, or of the kernel's log without one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")
_INFO: Final = 6
_MAX_DIGITS: Final = 20
"""Of a number that somebody means."""


@dataclass(frozen=True)
class LogEvent:
    """One entry.

    :ivar priority: 0 (emergency) to 7 (debug).
    :ivar identifier: who says it: ``kernel``, ``systemd``, the name of a program.
    :ivar unit: the unit it is about or comes from; may be empty.
    :ivar monotonic: the machine's monotonic time, seconds.
    :ivar fields: all that was sent of a journal entry; see systemd.journal-fields(7).
    """

    source: Literal["journal", "kmsg"]
    message: str
    priority: int = _INFO
    identifier: str = ""
    unit: str = ""
    monotonic: float = 0.0
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def kernel(self) -> bool:
        """Whether the kernel says it."""
        return self.source == "kmsg" or self.fields.get("_TRANSPORT") == "kernel"

    def __str__(self) -> str:
        """Return the line that ``journalctl -o short-monotonic`` would have."""
        return f"[{self.monotonic:12.6f}] {self.identifier or '?'}: {self.message}"


def from_journal(entry: Mapping[str, object]) -> LogEvent:
    """Return the event for an entry as ``journalctl -o json`` writes it."""
    fields = {name: _text(value) for name, value in entry.items()}
    return LogEvent(
        source="journal",
        message=fields.get("MESSAGE", ""),
        priority=_number(fields.get("PRIORITY", ""), _INFO) & 7,
        identifier=fields.get("SYSLOG_IDENTIFIER") or fields.get("_COMM", ""),
        unit=fields.get("UNIT") or fields.get("_SYSTEMD_UNIT", ""),
        monotonic=_number(fields.get("__MONOTONIC_TIMESTAMP", ""), 0) / 1e6,
        fields=fields,
    )


def from_kmsg(entry: str) -> LogEvent:
    """Return the event for a record of ``/dev/kmsg``: ``priority,number,microseconds,…;message``.

    What the kernel appends on lines of their own (``SUBSYSTEM=``) is dropped.
    """
    head, _, text = entry.partition(";")
    numbers = [*head.split(","), "", "", ""]
    message = text.split("\n", 1)[0]
    return LogEvent(
        source="kmsg",
        message=_ESCAPE.sub(lambda match: chr(int(match[1], 16)), message),
        priority=_number(numbers[0], _INFO) & 7,
        identifier="kernel",
        monotonic=_number(numbers[2], 0) / 1e6,
    )


def _text(value: object) -> str:
    """Return a field; no text comes as a list of numbers, and what is repeated as a list."""
    if isinstance(value, list):
        if all(isinstance(each, int) for each in value):
            return bytes(each & 0xFF for each in value).decode("utf-8", "replace")
        return "\n".join(map(_text, value))
    return "" if value is None else str(value)


def _number(text: str, default: int) -> int:
    plain = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) if plain else default
