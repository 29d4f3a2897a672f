# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command needs and does not get: it does all or nothing, and says so.

After each: a documented exit code, one line of error, nothing left or everything done, and the next
command works.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import syscalls as sc
from tests.bus.conftest import COMMAND
from tests.crash.life import BASE, LIFE, SOURCE, furnish, shows
from tests.crash.scarce import CODES, GROUPS, Done, command, installed, memory, script
from tests.mounts.conftest import snapshot, tree
from tests.mounts.processes import as_nobody

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World


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
