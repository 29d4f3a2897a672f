# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing to systemd's journal, in its native protocol: one datagram of fields per entry.

No library: the protocol is a few lines, and Python's binding is a package of its own.  A value is
written with its length wherever it holds a newline, so that no name or path can add a field.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

ADDRESS: Final = "/run/systemd/journal/socket"
IDENTIFIER: Final = "overlayd"
MAX_BYTES: Final = 64 << 10
"""What fits into a datagram on every kernel; larger entries would have to go by a descriptor."""


def encode(fields: Mapping[str, str]) -> bytes:
    """Return the datagram for *fields*, whose names are upper-case ASCII."""
    parts: list[bytes] = []
    for key, text in fields.items():
        value = as_bytes(text)
        if b"\n" in value:
            parts += [key.encode(), b"\n", len(value).to_bytes(8, "little"), value, b"\n"]
        else:
            parts += [key.encode(), b"=", value, b"\n"]
    return b"".join(parts)


def as_bytes(text: str) -> bytes:
    """Return the bytes that *text* stands for, whatever is in it."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace")


def send(fields: Mapping[str, str], *, address: str = ADDRESS) -> bool:
    """Write an entry; whether a journal has taken it.

    Never waits and never raises for what the journal does: one that is not there or does not keep
    up gets nothing.
    """
    data = encode({**fields, "SYSLOG_IDENTIFIER": IDENTIFIER})
    if len(data) > MAX_BYTES or not os.path.exists(address):
        return False
    import socket  # noqa: PLC0415  # takes longer to load than all of this, without a journal too

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            channel.sendto(data, address)
    except OSError:
        return False
    return True
