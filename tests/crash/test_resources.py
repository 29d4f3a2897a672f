# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command needs and does not get, or gets bit by bit: all of it or nothing, and it says so.

After each: a documented exit code, one line of error, nothing left or everything done, and the next
command works.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
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
from tests.bus.conftest import COMMAND
from tests.crash.scarce import CODES, GROUPS, Done, command, installed, memory, script
from tests.mounts.conftest import PLAY, SOURCES, mount, snapshot, tree
from tests.mounts.processes import as_nobody
from tests.mounts.test_stream import apply as apply_stream
from tests.mounts.test_stream import reading, send

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
BASE = PLAY / "app"
SOURCE = SOURCES / "s"
LIFE = (
    ("apply", "x", SOURCE, BASE),
    ("list",),
    ("status", "x"),
    ("reset", "x", "--to", "applied"),
    ("dump",),
    ("doctor",),
    ("cleanup",),
    ("history",),
    ("report",),
    ("remove", "x"),
)


def furnish(world: World) -> dict[str, tuple[object, ...]]:
    """Make a base and a source of several sizes; return what the base is."""
    world.base("app", FILES)
    source = world.source("s", {"a": "new a", "sub/c": "new c", "empty/": ""})
    (source / "large").write_bytes(random.Random(1).randbytes(300_000))
    os.link(source / "large", source / "sub/linked")
    with (source / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    return snapshot(BASE)


def shows(source: Path = SOURCE) -> None:
    """Insist on the target showing all of the source."""
    for path in source.rglob("*"):
        if path.is_file():
            assert (BASE / path.relative_to(source)).read_bytes() == path.read_bytes(), path


def clean_error(done: Done, context: object) -> None:
    """Insist on a documented code and, if it failed, on one line that is no traceback."""
    assert done.code in CODES, (context, done)
    assert "Traceback" not in done.err, (context, done)
    if done.code and not done.out.endswith("would not work here\n"):  # the doctor's answer
        assert done.err.startswith("overlayd: "), (context, done)


def lives(world: World, proof: Proof, without: Callable[[], object], context: object) -> set[int]:
    """Try each command of a life without something; return the codes that came.

    Before each that needs an overlay there is one; after each either all was done or nothing.
    """
    before = snapshot(BASE)
    codes = set()
    for arguments in LIFE:
        verb = arguments[0]
        if verb != "apply" and not world.manager().list():
            world.apply("x", SOURCE, BASE)
        proof.count()
        done = command(*arguments, without=without)
        clean_error(done, (context, verb))
        codes.add(done.code)
        there = [overlay.record.name for overlay in world.manager().list()]
        if there:
            world.check_invariants()
            shows()
            assert (verb, done.code) != ("remove", 0), (context, done)
        else:
            assert verb in {"apply", "remove"}, (context, done)
            assert (verb, done.code) != ("apply", 0), (context, done)
            assert world.leftovers() == [], (context, verb)
            assert snapshot(BASE) == before, (context, verb)
    if world.manager().list():
        world.manager().remove("x")
    assert world.leftovers() == []
    assert snapshot(BASE) == before
    return codes


def limit(which: int, number: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (number, number))


def test_few_descriptors(world: World, proof: Proof) -> None:
    """Too few descriptors (RLIMIT_NOFILE)."""
    furnish(world)
    codes = set()
    for number in range(4, 33) if proof.whole else (5, 8, 11, 16):
        codes |= lives(world, proof, limit(resource.RLIMIT_NOFILE, number), number)
    assert 0 in codes
    assert codes - {0}
    program = script(Path("/run/overlayd-script"))
    # An interpreter of its own: sixteen are too few for a copy, and thirty-two enough for all.
    for number, code in ((16, 8), (32, 0)):
        proof.count(3)
        done = installed(program, *LIFE[0], env={}, prefix=f'ulimit -n {number}; exec "$@"')
        assert done.code == code, done
        clean_error(done, number)
        if code:
            assert world.leftovers() == []
            world.apply("x", SOURCE, BASE)
        for arguments in (LIFE[3], LIFE[-1]):
            done = installed(program, *arguments, env={}, prefix=f'ulimit -n {number}; exec "$@"')
            assert done.code == 0, done
        assert world.leftovers() == []


def test_no_writing_to_files(world: World, proof: Proof) -> None:
    """Files that may not grow (RLIMIT_FSIZE, SIGXFSZ)."""
    furnish(world)
    codes = set()
    sizes = (0, 1, 100, 1000, 4096, 8192, 100_000, 299_999, 300_000, 1 << 20, 2 << 20)
    for size in sizes if proof.whole else (0, 1000, 299_999):
        for disposition in (signal.SIG_IGN, signal.SIG_DFL) if proof.whole else (signal.SIG_IGN,):

            def without(size: int = size, disposition: signal.Handlers = disposition) -> None:
                signal.signal(signal.SIGXFSZ, disposition)
                limit(resource.RLIMIT_FSIZE, size)()

            if disposition is signal.SIG_IGN:  # as in every Python
                codes |= lives(world, proof, without, size)
            else:
                proof.count()
                done = command(*LIFE[0], without=without)
                assert done.code in {0, -signal.SIGXFSZ}, done
                if world.manager().list():
                    world.manager().remove("x")
                assert world.leftovers() == []
    assert codes - {0}


def test_little_memory(world: World, proof: Proof) -> None:
    """Too little address space (RLIMIT_AS)."""
    furnish(world)
    codes = set()
    for more in range(0, 6 << 20, (1 if proof.whole else 8) << 18):

        def without(more: int = more) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)()

        codes |= lives(world, proof, without, more)
    assert 0 in codes


def test_umask_does_not_show(world: World, proof: Proof) -> None:
    """Umask of 0777."""
    furnish(world)
    seen = []
    for mask in (0o022, 0o777):
        proof.count()
        done = command(*LIFE[0], without=lambda mask=mask: os.umask(mask))  # type: ignore[misc]
        assert done.code == 0, done
        seen.append({path: facts for path, facts in snapshot(BASE).items() if path != str(BASE)})
        world.manager().remove("x")
    modes = [{path: facts[0] for path, facts in each.items()} for each in seen]
    assert modes[0] == modes[1]
    assert lives(world, proof, lambda: os.umask(0o777), "umask 0777") == {0}
    sc.umount2("/run/overlayd", sc.MNT_DETACH)
    assert lives(world, proof, lambda: os.umask(0o777), "the first command of a boot") == {0}


def test_signals_that_are_ignored_or_blocked(world: World, proof: Proof) -> None:
    """Signals that are ignored or blocked on entry."""
    furnish(world)
    every = sorted(set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGALRM})

    def ignore(numbers: list[signal.Signals]) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    ways: dict[str, Callable[[], object]] = {
        "SIGCHLD ignored": lambda: ignore([signal.SIGCHLD]),
        "SIGPIPE ignored": lambda: ignore([signal.SIGPIPE]),
        "all ignored": lambda: ignore(every),
        "all blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, every),
    }
    for name, without in ways.items():
        assert lives(world, proof, without, name) == {0}, name


@pytest.mark.parametrize("streams", ["0", "1", "2", "01", "02", "12", "012"])
def test_closed_streams(world: World, proof: Proof, streams: str) -> None:
    """Standard streams that are closed, each way."""
    furnish(world)
    program = script(Path("/run/overlayd-script"))
    closing = " ".join(f"{stream}>&-" for stream in streams)
    life = LIFE if proof.whole else (LIFE[0], LIFE[-1])
    for arguments in (*life, ("status", "x")):
        proof.count()
        done = installed(program, *arguments, env={}, prefix=f'exec "$@" {closing}')
        assert done.code == (3 if arguments[0] == "status" and "x" not in names(world) else 0)
        assert "Traceback" not in done.err
        if "2" in streams:
            assert done.err == ""
        if arguments[0] == "apply":
            shows()
    assert world.leftovers() == []


def names(world: World) -> set[str]:
    return {overlay.record.name for overlay in world.manager().list()}


HOSTILE: dict[str, dict[str, str]] = {
    "none": {},
    "PYTHONPATH": {"PYTHONPATH": "/run/evil"},
    "PYTHONHOME": {"PYTHONHOME": "/run/evil"},
    "PYTHONSTARTUP": {"PYTHONSTARTUP": "/run/evil/click.py"},
    "PYTHONINSPECT": {"PYTHONINSPECT": "1"},
    "PYTHONOPTIMIZE": {"PYTHONOPTIMIZE": "2", "PYTHONDEBUG": "1", "PYTHONVERBOSE": "1"},
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "utf-16", "PYTHONUTF8": "0"},
    "PYTHONWARNINGS": {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
    "PYTHONMALLOC": {"PYTHONMALLOC": "nonsense", "PYTHONHASHSEED": "nonsense"},
    "PYTHONBREAKPOINT": {"PYTHONBREAKPOINT": "click.x", "PYTHONPLATLIBDIR": "/run/evil"},
    "LD_PRELOAD": {"LD_PRELOAD": "/run/evil/none.so"},
    "LD_LIBRARY_PATH": {"LD_LIBRARY_PATH": "/run/evil"},
    "TMPDIR": {"TMPDIR": "/nowhere", "TEMP": "/nowhere", "HOME": "/nowhere"},
    "LANG": {"LANG": "C", "LC_ALL": "tr_TR"},
    "LC_ALL": {"LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr", "TZ": ":/run/evil"},
    "COLUMNS": {"COLUMNS": "0", "LINES": "0", "TERM": ""},
    "columns": {"COLUMNS": "-1", "LINES": "many", "TERM": "\x1b[31m"},
    "PATH": {"PATH": "", "IFS": "/", "SHELL": "/run/evil", "USER": "evil", "LOGNAME": "evil"},
    "SUDO": {"SUDO_UID": "1000", "SUDO_USER": "alice", "XDG_RUNTIME_DIR": "/run/evil"},
}


@pytest.mark.parametrize("which", HOSTILE)
def test_hostile_environment(world: World, proof: Proof, which: str) -> None:
    """Hostile environments of the installed command."""
    furnish(world)
    tree(Path("/run/evil"), dict.fromkeys(("click.py", "overlayd.py", "sitecustomize.py"), EVIL))
    program = script(Path("/run/overlayd-script"))
    for arguments in LIFE if proof.whole else (LIFE[0], LIFE[8], LIFE[-1]):
        proof.count()
        done = installed(program, *arguments, env=HOSTILE[which])
        assert done.code == 0, (arguments, done)
        assert "Traceback" not in done.err
        if arguments[0] == "apply":
            shows()
    assert not Path("/run/evil-was-here").exists()
    assert world.leftovers() == []


EVIL = "open('/run/evil-was-here', 'w')\n"


def test_directory_that_is_gone_or_not_to_be_read(world: World, proof: Proof) -> None:
    """Working directories that are gone or may not be read."""
    furnish(world)
    place = Path("/run/here")

    def gone() -> None:
        place.mkdir()
        os.chdir(place)
        place.rmdir()

    assert lives(world, proof, gone, "gone") == {0}
    place.mkdir(0)
    os.chdir(place)
    for arguments, code in ((("--version",), 0), (("list",), 10), (("apply", "x", "a", "b"), 7)):
        proof.count()
        done = as_nobody(*arguments)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr


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


def test_memory_that_ends_in_the_middle(world: World, proof: Proof) -> None:
    """A control group that runs out of memory in the middle (SIGKILL)."""
    before = furnish(world)
    if not os.access(f"{GROUPS}/cgroup.procs", os.W_OK):
        pytest.skip("there is no hierarchy of memory control groups (v1) to make one in")
    for number in range(48):
        (SOURCE / f"block{number:02}").write_bytes(bytes(1 << 20))
    world.apply("beside", SOURCE / "a", world.base("beside", {}))
    killed = 0
    sizes = range(1 << 20, 60 << 20, 1 << 20) if proof.whole else (2 << 20, 9 << 20, 33 << 20)
    for size in sizes:
        try:
            with memory(size) as enter:
                done = command(*LIFE[0], without=enter)
        except OSError as error:
            if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
                pytest.skip(f"no control group can be made: {error}")
            raise
        proof.count()
        assert done.code in {0, -signal.SIGKILL, 8}, done
        killed += done.code < 0
        there = names(world)
        world.check_invariants()
        assert there == {"beside", "x"} or (there == {"beside"} and done.code != 0), done
        if "x" in there:  # it may have been killed when all was done
            shows()
            world.manager().remove("x")
        assert snapshot(BASE) == before
        world.apply("x", SOURCE / "a", BASE)
        world.manager().remove("x")
    assert killed


def test_few_processes_for_private_ones(bus: Bus, proof: Proof) -> None:
    """Too few processes for private overlays (RLIMIT_NPROC)."""
    source = bus.source_of("alice", "s", {"motd": "alice"})
    base = bus.base("lib", {"motd": "base"})
    codes = set()
    for number in range(1, 8) if proof.whole else (1, 3):
        for arguments in (
            ("apply", "own", source, base),
            ("list",),
            ("enter", "own", "--", "cat", base / "motd"),
            ("remove", "own"),
        ):
            proof.count()
            argv = ["prlimit", f"--nproc={number}:{number}", *COMMAND, *map(str, arguments)]
            done = bus.as_user("alice", *argv, code=None)
            codes.add(done.returncode)
            assert "Traceback" not in done.stderr, done
            assert done.returncode in CODES, done
        bus.overlayd("alice", "remove", "--all", code=None)
        bus.overlayd("alice", "apply", "own", source, base)
        bus.overlayd("alice", "remove", "own")
    assert codes - {0}
