# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that read while an overlay is exchanged: no failed open, and never the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system.guest import SOURCES

if TYPE_CHECKING:
    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
READER = Path(__file__).with_name("reader.py")

# $0: resets; $1: the overlay; $2: the file. One reader sees the mounts as all do; the other has a
# mount namespace of its own, which receives them, as services with PrivateTmp have. Both are nice:
# else the resets would wait for them most of the time.
_READ_AND_RESET = f"""
start() {{ "$@" & for _ in $(seq 600); do [ -s "$out" ] && return; sleep 0.05; done; exit 1; }}
rm -rf /run/exchange; mkdir /run/exchange; cd /run/exchange
for out in open own
do
    [ $out = own ] && apart="unshare --mount --propagation slave" || apart=
    start $apart nice python3 -IS {SOURCES}/reader.py "$2" stop $out
done
for _ in $(seq "$0"); do overlayd reset "$1" --to applied >/dev/null; done
touch stop; wait; tail -n 1 open; tail -n 1 own
"""


@pytest.mark.parametrize("covers", ["directory", "file"])
def test_readers_see_no_gap_while_an_overlay_is_reset(
    guest: Guest, rounds: int, request: pytest.FixtureRequest, covers: str
) -> None:
    resets = (4 if guest.emulated else 30) if rounds == 1 else (50 if guest.emulated else 200)
    source = guest.source("gap", {"motd": "overlay\n"})
    guest.machine.copy_in(READER, f"{SOURCES}/reader.py")
    where = (source, BASE) if covers == "directory" else (f"{source}/motd", f"{BASE}/motd")
    with guest.overlay("gap", *where):
        result = guest.machine.run(
            ["sh", "-euc", _READ_AND_RESET, str(resets), "gap", f"{BASE}/motd"], timeout=600
        )
    for reader, line in zip(("open", "own"), result.out.splitlines(), strict=True):
        opens, failed, other = map(int, line.split())
        request.node.user_properties.append((f"opens, {reader}", opens))
        assert (failed, other) == (0, 0), (reader, line)
        assert opens > 10 * resets
    assert guest.sh("grep -l overlayd: /proc/[0-9]*/mountinfo 2>/dev/null || echo none") == "none"
