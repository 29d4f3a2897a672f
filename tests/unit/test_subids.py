# SPDX-License-Identifier: LGPL-2.1-or-later
"""Maps of subordinate uids: whole, without overlaps, and the user's own stays."""

from __future__ import annotations

import itertools
import os
import pwd
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from overlayd import subids

if TYPE_CHECKING:
    from pathlib import Path

_RANGES = st.lists(st.tuples(st.integers(1, 2**31), st.integers(1, 70_000)), max_size=5)


@given(st.integers(1, 100_000), _RANGES)
def test_map_gives_every_id_once_and_one_s_own_to_itself(
    own: int, given: list[tuple[int, int]]
) -> None:
    found = subids.mapping(own, given)
    assert found[0] == (own, own, 1)
    inside = sorted((first, count) for first, _, count in found)
    for (first, count), (later, _) in itertools.pairwise(inside):
        assert first + count <= later
    assert all(count > 0 for _, _, count in found)
    assert sum(count for _, _, count in found[1:]) == sum(count for _, count in given)
    if given:
        assert found[1][:2] == (0, given[0][0])
    # What lies inside is without gaps but for one's own.
    end = max(first + count for first, count in inside)
    assert end in {sum(count for _, count in inside), own + 1}


def test_file_of_ranges_is_read_as_if_anybody_had_written_it(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    name = pwd.getpwuid(os.getuid()).pw_name
    file.write_bytes(
        f"{name}:100:5\n# {name}:1:1\n{os.getuid()}:200:6\nother:300:7\n{name}:-1:5\n{name}:1\n"
        f"{name}:400:0\n{name}:x:9\n:::\n".encode()
        + b"\xff:1:1\n"
    )
    assert subids.ranges(str(file), os.getuid()) == [(100, 5), (200, 6)]
    assert subids.ranges(str(tmp_path / "none"), os.getuid()) == []
