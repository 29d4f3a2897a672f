# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives of Debian packages on this disk, so that APT can be real in tests without a network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.apt import Apt

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class DebArchive:
    """A flat archive of packages."""

    root: Path

    def __post_init__(self) -> None:
        self.root.mkdir()

    def add(
        self,
        name: str,
        version: str = "1",
        *,
        depends: str = "",
        files: dict[str, str] | None = None,
    ) -> None:
        """Put in a package."""
        tree = self.root / "build" / name
        (tree / "DEBIAN").mkdir(parents=True)
        fields = {"Package": name, "Version": version, "Architecture": "all", "Depends": depends}
        fields |= {"Maintainer": "nobody <nobody@example.org>", "Description": name}
        control = "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
        (tree / "DEBIAN/control").write_text(control)
        for file, text in (files or {}).items():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_text(text)
        file = f"{name}_{version.replace(':', '%3a')}_all.deb"
        deb = self.root / "pool" / file.replace("%3a", ".")
        deb.parent.mkdir(exist_ok=True)
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(deb)]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(tree)
        data = deb.read_bytes()
        fields |= {"Filename": f"./pool/{deb.name}", "Size": str(len(data))}
        fields["SHA256"] = hashlib.sha256(data).hexdigest()
        with (self.root / "Packages").open("a") as index:
            index.write("".join(f"{key}: {value}\n" for key, value in fields.items() if value))
            index.write("\n")


class LocalApt(Apt):
    """APT whose only source is an archive on this disk, which nobody signed."""

    def __init__(self, suite: str, directory: Path, *, archive: Path) -> None:
        super().__init__(suite, directory)
        self.archive = archive

    def _sources(self) -> str:
        return f"deb [trusted=yes] file:{self.archive} ./\n"
