# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service is there, and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bus.conftest import Bus


def test_list_of_nothing(bus: Bus) -> None:
    bus.serve()
    assert bus.overlayd("alice", "list").stdout == "no overlays\n"
