# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a machine has after a layer was put on it, told without looking there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import live, manifest
from tests.harness.trees_of_debian import write

if TYPE_CHECKING:
    from pathlib import Path


def test_manifest_with_a_layer_is_that_of_both_together(tmp_path: Path) -> None:
    below, above, both = (tmp_path / name for name in ("below", "above", "both"))
    for name in ("bin/kept", "bin/gone", "share/whole/a", "share/whole/b", "share/who", "z y/x"):
        write(below / name, name)
        if name != "bin/gone" and "whole" not in name:
            write(both / name, name)
    for name in ("bin/new", "bin/kept", "share/whole/c", "share.d/é", "share/a b"):
        write(above / name, f"{name} above")
        write(both / name, f"{name} above")
    removed = ("/usr/bin/gone", "/usr/share/whole")
    lines = live.merged(manifest.lines(below), removed, manifest.lines(above))
    assert lines == list(manifest.lines(both))
