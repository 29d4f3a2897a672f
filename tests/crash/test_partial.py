# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read changes meanwhile, or comes and goes bit by bit: all of it or nothing.

A copy is what was there as it was read; after each the base is whole and nothing is left.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import syscalls as sc
from overlayd.errors import OverlaydError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.crash.life import BASE, LIFE, SOURCE, furnish, shows
from tests.crash.scarce import command, script
from tests.mounts.conftest import SOURCES, mount, snapshot, tree
from tests.mounts.test_stream import apply as apply_stream
from tests.mounts.test_stream import reading, send

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.tried import Proof
    from tests.mounts.conftest import World


class Moment(Progress):
    """A progress that does something at its n-th report."""

    def __init__(self, number: int, change: Callable[[], object]) -> None:
        super().__init__()
        self._left, self._change = number, change
        self.came = False

    def advance(self, entries: int, size: int) -> None:
        super().advance(entries, size)
        self._left -= 1
        if self._left == 0:
            self.came = True
            self._change()


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(1 << 20))


def becomes_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def becomes_a_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file shrinks": lambda s: os.truncate(s / "large", 10),
    "a file is emptied": lambda s: os.truncate(s / "large", 0),
    "a file grows": lambda s: grown(s / "large"),
    "a small file grows": lambda s: grown(s / "a"),
    "a sparse file is filled": lambda s: (s / "sparse").write_bytes(bytes(1 << 20)),
    "a file vanishes": lambda s: (s / "large").unlink(),
    "a file becomes a directory": lambda s: becomes_a_directory(s / "a"),
    "a directory vanishes": lambda s: shutil.rmtree(s / "sub"),
    "a directory becomes a link": lambda s: becomes_a_link(s / "sub"),
    "everything vanishes": shutil.rmtree,
    "it is exchanged": lambda s: (s.rename(f"{s}.old"), tree(s, {"other": "other"})),
    "it is unmounted": lambda s: sc.umount2(str(s.parent), sc.MNT_DETACH),
    "it is covered": lambda s: mount("cover", s, "tmpfs"),
    "files are added": lambda s: tree(s, {f"more{n}": "more" for n in range(300)}),
    "it fills up": lambda s: (s / "fill").write_bytes(bytes(8 << 20)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_source_that_changes_while_it_is_copied(world: World, proof: Proof, change: str) -> None:
    """Sources that shrink, grow or vanish at each moment of the copy."""
    before = furnish(world)
    reports = Moment(0, lambda: None)
    old = {path: path.read_bytes() for path in SOURCE.rglob("*") if path.is_file()}
    number, came = 0, True
    while came:
        number += 1
        shutil.rmtree(SOURCE, ignore_errors=True)
        source = SOURCES / f"on{number}/s"
        source.parent.mkdir()
        mount("source", source.parent, "tmpfs", "size=16M")
        for path, data in old.items():
            copy = source / path.relative_to(SOURCE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
        reports = Moment(number, lambda: CHANGES[change](source))  # noqa: B023
        try:
            world.manager().apply(Request("x", str(source), str(BASE)), reports)
        except OverlaydError as error:
            assert error.exit_code in {3, 5, 8}, (number, error)  # noqa: PT017
            assert snapshot(BASE) == before
        else:
            # What had been read by then is whole; so is what was read afterwards.
            for path, data in old.items():
                copy = BASE / path.relative_to(SOURCE)
                now = source / path.relative_to(SOURCE)
                if copy.is_file():
                    shown = copy.read_bytes()
                    assert shown in {data, now.read_bytes() if now.is_file() else data}
            world.manager().remove("x")
        assert world.leftovers() == []
        came = reports.came
        proof.count(came)
    assert number > 6


def test_copy_that_is_interrupted_all_the_time(world: World, proof: Proof) -> None:
    """Short reads and writes: a copy that signals interrupt all the time."""
    furnish(world)
    (SOURCE / "large").write_bytes(random.Random(2).randbytes(24 << 20))

    def without() -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)

    for _ in range(20 if proof.whole else 3):
        proof.count()
        done = command(*LIFE[0], without=without)
        assert done.code == 0, done
        shows()
        proof.count()
        assert command(*LIFE[-1], without=without).code == 0
        assert world.leftovers() == []


def test_stream_that_comes_bit_by_bit(world: World, proof: Proof) -> None:
    """Short reads and writes: a stream that comes byte by byte, or by odd pieces."""
    furnish(world)
    (SOURCE / "large").write_bytes(b"large" * 300)
    (SOURCE / "sparse").unlink()
    out, into = os.pipe()
    os.set_blocking(into, False)
    sender = threading.Thread(target=send, args=(SOURCE, into))
    sender.start()
    sender.join()
    os.close(into)
    with open(out, "rb") as pipe:
        data = pipe.read()
    generator = random.Random(proof.seed)
    proof.random = True
    for pieces in range(200 if proof.whole else 12):
        proof.count()
        near, far = socket.socketpair()

        def dribble(size: int = pieces, far: socket.socket = far) -> None:
            at = 0
            with far:
                far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                while at < len(data):
                    end = at + (generator.randint(1, 40) if size else 1)
                    far.sendall(data[at:end])
                    at = end

        thread = threading.Thread(target=dribble)
        thread.start()
        apply_stream(world, BASE, reading(near.detach()), str(SOURCE))
        thread.join()
        shows()
        world.manager().remove("sent")
        assert world.leftovers() == []


def test_output_and_batch_that_go_bit_by_bit(world: World, proof: Proof) -> None:
    """Short reads and writes: output to a reader of single bytes, a batch file from such a pipe."""
    furnish(world)
    expected = []
    for number in range(40):
        world.apply(f"n{number:02}", SOURCE / "a", world.base(f"b{number}", {}))
        expected.append(f"n{number:02}")
    program = script(Path("/run/overlayd-script"))
    reading_end, writing_end = os.pipe()
    fcntl.fcntl(writing_end, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([program, "list", "--json"], stdout=writing_end, env={})
    os.close(writing_end)
    with open(reading_end, "rb", buffering=0) as pipe:
        got = b""
        while byte := pipe.read(1):
            got += byte
    proof.count()
    assert process.wait() == 0
    assert [overlay["name"] for overlay in json.loads(got)] == expected
    text = f'[[overlay]]\nname = "x"\nsource = "{SOURCE}"\ntarget = "{BASE}"\n'
    process = subprocess.Popen([program, "batch", "/dev/stdin"], stdin=subprocess.PIPE, env={})
    assert process.stdin is not None
    for byte_ in text.encode():
        process.stdin.write(bytes([byte_]))
        process.stdin.flush()
    process.stdin.close()
    proof.count()
    assert process.wait() == 0
    shows()
