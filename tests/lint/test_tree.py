# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shape of the tree: what no linter checks."""

import subprocess
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LICENSE_LINE = "SPDX-License-Identifier: LGPL-2.1-or-later"
MAX_LINES = 500


def source_files() -> list[Path]:
    """Return the Python and shell files git tracks, and those it would track after ``git add``."""
    listing = subprocess.run(
        [
            *("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"),
            *("--cached", "--others", "--exclude-standard", "--", "*.py", "*.sh"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = set(listing.split("\0")) - {""}
    return sorted(path for name in names if (path := ROOT / name).is_file())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", source_files(), ids=relative)
def test_source_names_its_license_within_five_lines(path: Path) -> None:
    with path.open(encoding="utf-8") as lines:
        assert any(LICENSE_LINE in line for line in islice(lines, 5))


@pytest.mark.parametrize("path", sorted(ROOT.glob("overlayd/**/*.py")), ids=relative)
def test_module_is_not_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it, {MAX_LINES} is the limit"
