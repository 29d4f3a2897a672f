# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compile in advance what a Python program will import on a bare kernel.

Without KVM a compilation takes ten times as long in the guest, and pytest, which compiles in its
own way whatever asserts something, needs a minute before its first test.  So the guest's own
interpreter runs on this machine first, with a command that imports the same (``-m pytest
--collect-only``), and what it compiled goes along.

The interpreter needs nothing of this machine: it is started by its own loader, with its own
libraries.  What it compiles names files where they will be in the guest, and the time of its
source, which an archive does not have: both are put right afterwards.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.initramfs import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MULTIARCH: Final = "usr/lib/x86_64-linux-gnu"
LOADER: Final = f"{MULTIARCH}/ld-linux-x86-64.so.2"
_TIMEOUT: Final = 120.0

# $1: where the compiled files are; $2: the prefixes that names of files lose.
_TRANSLATE: Final = """
import marshal, os, sys

def moved(code):
    name = code.co_filename
    for prefix in sys.argv[2:]:
        name = name.removeprefix(prefix)
    constants = tuple(moved(c) if hasattr(c, "co_filename") else c for c in code.co_consts)
    return code.replace(co_filename=name, co_consts=constants)

for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            head, code = file.read(16), marshal.load(file)
        with open(path, "wb") as file:
            file.write(head[:8] + bytes(4) + head[12:] + marshal.dumps(moved(code)))
"""


def python(root: Path) -> list[str]:
    """Return the beginning of a command that runs the interpreter in *root* on this machine."""
    libraries = root / MULTIARCH
    interpreter = next((root / "usr/bin").glob("python3.*[0-9]"))
    return [str(root / LOADER), "--library-path", str(libraries), str(interpreter)]


def environment(root: Path) -> dict[str, str]:
    """Return the environment for such a command."""
    return {"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}


def precompile(
    root: Path, files: Archive, argv: Sequence[str], *, cwd: str, say: Callable[[str], None]
) -> Archive:
    """Return what is compiled when *argv* is run by the interpreter in *root*.

    *files* has what is imported besides the libraries of *root*, and *cwd* is a directory there.
    If the command fails, that is told, and what it has compiled until then is taken.
    """
    found = Archive()
    with tempfile.TemporaryDirectory() as scratch:
        tree, compiled = Path(scratch, "tree"), Path(scratch, "compiled")
        compiled.mkdir()
        files.extract(tree)
        done = subprocess.run(  # noqa: S603
            [*python(root), "-s", "-X", f"pycache_prefix={compiled}", *argv],
            env=environment(root),
            cwd=tree / cwd.lstrip("/"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
        if done.returncode != 0:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            say(f"precompiling: {' '.join(argv)}: {''.join(last) or 'failed'}")
        subprocess.run(  # noqa: S603
            [*python(root), "-sS", "-c", _TRANSLATE, str(compiled), str(tree), str(root)],
            env=environment(root),
            check=True,
            timeout=_TIMEOUT,
        )
        for prefix in (tree, root):
            below = compiled / str(prefix).lstrip("/")
            for file in sorted(below.rglob("*.pyc")):
                place = file.relative_to(below)
                name = f"{place.parent}/__pycache__/{place.name}"
                found.file(name, file.read_bytes())
    return found
