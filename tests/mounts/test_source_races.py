# SPDX-License-Identifier: LGPL-2.1-or-later
"""A source of somebody hostile, who exchanges what is in it while root applies it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from overlayd.errors import OverlaydError
from tests.mounts.conftest import tree

if TYPE_CHECKING:
    from tests.mounts.conftest import World

ROUNDS = 20_000 if "OVERLAYD_LONG" in os.environ else 150
OWNER = 65534
DIRECTORIES = ("directory", "inner/directory", "either")
ENDS = ("", ".other")
_EXCHANGE = """
import ctypes, os, random, sys, time
renameat2 = ctypes.CDLL(None).renameat2
names = [path.encode() for path in sys.argv[2:]]
os.setresgid(*[int(sys.argv[1])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
pairs = list(zip(names[::2], names[1::2]))
print("ready", flush=True)
while True:
    for one, other in pairs:
        renameat2(-100, one, -100, other, 2)
        time.sleep(random.random() / 1000)
"""


def contents(place: Path) -> set[str]:
    """Return what the files of a tree hold; links are not followed."""
    found = set()
    for folder, _, files in os.walk(place):
        for path in (Path(folder, name) for name in files):
            if not path.is_symlink():
                found.add(path.read_text())
    return found


def test_what_is_exchanged_for_links_in_a_source_is_never_read_through_them(world: World) -> None:
    secret = world.source("secret", {"motd": "outside", "deep/motd": "outside"})
    base = world.base("lib", {"base": "base"})
    files = {"motd": "inside", "deep/motd": "inside"}
    source = tree(
        secret.parent / "theirs",
        {
            # A directory and a file in turn with a link to the same outside; and with one another.
            **{f"{name}/{path}": text for name in DIRECTORIES for path, text in files.items()},
            "a/motd": "inside",
            "file": "inside",
            "either.other": "inside",
            "directory.other": f"-> {secret}",
            "inner/directory.other": f"-> {secret}/deep",
            "file.other": f"-> {secret}/motd",
        },
    )
    exchanged = [source / f"{name}{end}" for name in (*DIRECTORIES, "file") for end in ENDS]
    for path in [source, *source.rglob("*")]:
        os.chown(path, OWNER, OWNER, follow_symlinks=False)
    process = subprocess.Popen(
        [sys.executable, "-ISc", _EXCHANGE, str(OWNER), *map(str, exchanged)],
        stdout=subprocess.PIPE,
        text=True,
    )
    seen: dict[str, int] = {}
    links = 0
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in range(ROUNDS):
            place = source if number % 2 else source / "inner"
            try:
                world.apply("theirs", place, base)
            except OverlaydError as error:
                seen[error.code] = seen.get(error.code, 0) + 1
                assert world.leftovers() == []
            else:
                seen["done"] = seen.get("done", 0) + 1
                assert contents(base) <= {"inside", "base"}
                links += (base / "directory").is_symlink()
                world.manager().remove("theirs")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert seen.keys() == {"done", "refused"}, seen
    assert min(seen.values()) > ROUNDS // 20, seen
    assert links, "it was never another one"
    assert world.leftovers() == []
