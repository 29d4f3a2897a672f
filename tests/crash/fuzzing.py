# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that reads what others wrote, as one table of functions that take bytes.

Each function feeds the real reader and lets out what that may not raise: anything but the error
tree, or what its docstring says where it is no part of one.  :meth:`Target.open` sees to time,
memory, descriptors and threads as well.  ``test_fuzz`` and ``fuzz`` have the inputs.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pwd
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jeepney import HeaderFields, MessageType, new_error, new_method_return
from jeepney.low_level import Endianness, Header

from harness import agent, agent_files, mounts
from harness.errors import HarnessError
from overlayd import batch, config, duties, interface, mountinfo, policy, receiver, records, wire
from overlayd.calls import Call, Caller
from overlayd.errors import OverlaydError
from overlayd.framing import MAX_BODY, Framer, Incoming
from overlayd.model import SourceKind, check_writable_dir
from overlayd.progress import Progress
from overlayd.walker import Limits
from overlayd.writer import Writer
from tests.crash import seeds
from tests.harness.agents import Fake
from tests.unit.conftest import is_one_printable_line, open_fds, opened, time_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    Feed = Callable[[bytes], None]

CORPUS: Final = Path(__file__).with_name("corpus")
SECONDS: Final = 3.0
"""Of the processor's time, for one input; of the clock's many times that."""
ROOM: Final = 512 << 20
"""Bytes of address space that one input may take; each thread has 8 MiB of stack in it."""
_SETTLING: Final = 20.0
_LIMITS: Final = Limits(entries=1000, size=8 << 20, depth=40)
_LOADED: Final = (
    *(pwd, select, subprocess),
    *map(codecs.lookup, ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8-sig")),
)
"""What the agent and JSON load late, and could not find in the jail."""


@dataclass(frozen=True)
class Target:
    """Something that reads; *make* gives its function, which may use a directory.

    *any* makes inputs that have the form and hold anything.
    """

    make: Callable[[Path], Feed]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]
    any: Callable[[Random], bytes] | None = None

    def open(self, folder: Path) -> Feed:
        """Return the function that checks an input, within the empty directory *folder*."""
        feed = self.make(folder)

        def check(data: bytes) -> None:
            with bounded():
                feed(data)

        return check


def corpus(name: str) -> list[bytes]:
    """Return the inputs that are kept for a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes too long or too much, leaves something open, or fails on another thread."""
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    fds, threads = open_fds(), len(os.listdir(tasks))
    raised: list[BaseException] = []

    def note(error: BaseException | None) -> None:
        # What stays open is counted; when the collector comes upon it is its own affair.
        if error is not None and not isinstance(error, ResourceWarning):
            raised.append(error)
            os.kill(os.getpid(), signal.SIGALRM)  # whoever waits for that thread waits in vain

    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda args: note(args.exc_value)
    sys.unraisablehook = lambda args: note(args.exc_value)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    began = time.process_time()
    try:
        with time_limit(2 * SECONDS):
            yield
            # Before the alarm, which a reader may take for an error of its own.
            assert time.process_time() - began < SECONDS, f"it took longer than {SECONDS} s"
            until = time.monotonic() + _SETTLING
            while open_fds() > fds or len(os.listdir(tasks)) > threads:
                assert time.monotonic() < until, "something stays open"
                time.sleep(0.0005)
    except AssertionError:
        if raised:
            raise raised[0] from None
        raise
    finally:
        os.close(tasks)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        threading.excepthook, sys.unraisablehook = hooks
    if raised:
        raise raised[0]


@contextlib.contextmanager
def refusal(*others: type[Exception]) -> Iterator[None]:
    """Let an error of the tree pass, which can be shown to anybody, and *others*."""
    try:
        yield
    except OverlaydError as error:
        _check_line(error.message)
        _check_line(error.hint or "")
    except HarnessError:
        pass
    except others:
        pass


def _check_line(text: str) -> None:
    """Insist that *text* can go to any terminal."""
    assert is_one_printable_line(text), ascii(text)


# -- text ------------------------------------------------------------------------------------------


def _config(folder: Path) -> Feed:
    path = folder / "overlayd.toml"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        with refusal():
            config.load(path)

    return feed


def _batch(folder: Path) -> Feed:
    path = folder / "batch.toml"

    def feed(data: bytes) -> None:
        path.write_bytes(data)
        with refusal():
            assert batch.read(path)

    return feed


def _record(_folder: Path) -> Feed:
    def feed(data: bytes) -> None:
        try:
            record = records.decode(data)
        except records.RecordError as error:
            _check_line(str(error))
            return
        assert records.decode(records.encode(record)) == record
        for path in (record.source, record.target, record.mount_point, record.entry):
            assert b"\0" not in os.fsencode(path)
        for path in record.options.writable_dirs:
            check_writable_dir(path)

    return feed


def _mountinfo(_folder: Path) -> Feed:
    own = mountinfo.own_mount("/usr/share/app", "overlay", "overlayd:x")

    def feed(data: bytes) -> None:
        table = mountinfo.Table(data)
        with contextlib.suppress(ValueError):
            found = len([*table])
            assert sum(map(len, table.tagged.values())) <= found
            assert len(table.within("/")) == table.count("/") <= found
            assert [*table.changed([own], ["/usr"]).within("/usr/share/app")]
        with contextlib.suppress(ValueError):
            theirs = mounts.parse(data)
            assert len(theirs.below("/")) <= len(theirs.mounts)
            assert not theirs.added_since(theirs)
            theirs.at("/")
            with contextlib.suppress(LookupError):
                theirs.shown("/usr/share/app")

    return feed


# -- the stream ------------------------------------------------------------------------------------


def _stream(folder: Path) -> Feed:
    base, layer = folder / "base", folder / "layer"
    (base / "d/e").mkdir(parents=True)
    (base / "a").write_text("base")
    flagged = policy.flag_pattern(("*.so", "f"))

    def feed(data: bytes) -> None:
        layer.mkdir(0o700)
        near, far = socket.socketpair()
        near.settimeout(0)
        with far:
            far.sendall(data)
        listener = receiver.Receiver(
            near.detach(),
            limits=_LIMITS,
            flagged=flagged,
            seconds=SECONDS,
            patience=SECONDS,
            progress=Progress(),
        )
        try:
            with refusal(), opened(layer) as top, opened(base) as below:
                into = Writer("sent", _LIMITS, top)
                if single := listener.header().kind is SourceKind.FILE:
                    listener.single_file(into, top, "single")
                else:
                    listener.tree(into, below)
                found = _looked_at(layer)
                assert listener.received.entries == len(found) - single
        finally:
            listener.close()
            shutil.rmtree(layer)

    return feed


def _looked_at(layer: Path) -> list[str]:
    """Return the paths of all that is in a layer, and the layer's."""
    found = [str(layer)]
    for place, directories, files in os.walk(layer):
        found += [os.path.join(place, name) for name in directories + files]
    for path in found:
        facts = os.lstat(path)
        assert stat.S_IFMT(facts.st_mode) in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
        assert stat.S_ISLNK(facts.st_mode) or not facts.st_mode & 0o7022
        assert not any(name.startswith("trusted") for name in _attributes(path))
    return found


def _attributes(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


# -- the bus ---------------------------------------------------------------------------------------


def _bus(_folder: Path) -> Feed:
    to_do = duties.Duties(None)  # type: ignore[arg-type]  # root calls, and nobody is asked

    def feed(data: bytes) -> None:
        framer = Framer()
        with contextlib.suppress(ValueError):
            came = framer.feed(data[: len(data) // 2], []) + framer.feed(data[len(data) // 2 :], [])
            for message in came:
                _call(to_do, message)
        framer.close()
        to_do.lines.forget(seeds.SENDER)

    return feed


def _call(to_do: duties.Duties, message: Incoming) -> None:
    """Have a call done as ``Service`` does, by root; or read the body of what is none."""
    path, member = message.field(HeaderFields.path), message.field(HeaderFields.member)
    method = interface.find(path, message.field(HeaderFields.interface), member)
    try:
        body = message.parse()
    except ValueError:
        return
    is_call = message.header.message_type is MessageType.method_call and message.length <= MAX_BODY
    if method is None or not is_call or message.field(HeaderFields.signature) != method.takes:
        return
    call = Call(message, method, Caller(seeds.SENDER, 0, os.getpid()), body)
    fds = array("i")
    try:
        result = to_do.do(call)
        new_method_return(message, method.gives, result).serialise(1, fds=fds)
    except OverlaydError as error:
        _check_line(error.message)
        name, text = wire.error_name(error), wire.error_text(error)
        new_error(message, name, "s", (text,)).serialise(1, fds=fds)
    finally:
        message.close()


def _properties(_folder: Path) -> Feed:
    def feed(data: bytes) -> None:
        fields: dict[HeaderFields, object] = {HeaderFields.signature: "a{sv}"}
        header = Header(Endianness.little, 2, 0, 1, len(data), 1, fields)
        try:
            (found,) = Incoming(header, data, len(data), []).parse()
        except ValueError:
            return
        assert isinstance(found, dict)
        with contextlib.suppress(ValueError):
            overlay = wire.from_wire(found)
            assert wire.from_wire(wire.to_wire(overlay, full=True)).state == overlay.state
        with contextlib.suppress(ValueError):
            attempt = wire.attempt_from_wire(found)
            wire.attempt_to_wire(attempt)

    return feed


# -- the agent and its host ------------------------------------------------------------------------


def _answers(folder: Path) -> Feed:
    """Have a hostile machine answer the host's run, get or follow, as the first byte says."""
    place = folder / "fetched"

    def feed(data: bytes) -> None:
        op = {b"g": "get", b"f": "follow"}.get(data[:1], "run")
        fake = Fake()
        saying = threading.Thread(target=_say, args=(fake, op, data[1:]))
        place.mkdir()
        try:
            fake.greet()
            saying.start()
            with refusal(*([OSError] if op == "get" else [])):
                if op == "run":
                    fake.channel.run(["true"], timeout=0)
                elif op == "get":
                    fake.channel.get("/there", place / "here")
                else:
                    fake.channel.follow(lambda event: _check_event(str(event)))
            while fake.channel._socket is not None:  # all of it is to be read
                time.sleep(0.0002)
        finally:
            fake.channel.close()
            saying.join()
            fake.close()
            beside = set(os.listdir(place)) - {"here"}
            shutil.rmtree(place)
        assert not beside, beside

    return feed


def _check_event(text: str) -> None:
    assert text.startswith("[")


def _say(fake: Fake, op: str, data: bytes) -> None:
    fake.expect(op)
    with contextlib.suppress(BrokenPipeError):
        fake.say(data)
        fake.mine.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def _jailed(jail: Path) -> Iterator[None]:
    """Let this thread, and those that it starts, see nothing but *jail*; they end before it leaves.

    If they do not, this process ends: none may ever see what is outside.
    """
    # The kernel knows of a thread at once, Python when it begins.
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    threads = len(os.listdir(tasks))
    outside, before = (os.open(path, os.O_PATH | os.O_DIRECTORY) for path in ("/", "."))
    os.chroot(jail)
    os.chdir("/")
    try:
        yield
    finally:
        alarms = {signal.SIGALRM, signal.SIGPROF}
        signal.pthread_sigmask(signal.SIG_BLOCK, alarms)
        until = time.monotonic() + _SETTLING
        while len(os.listdir(tasks)) > threads:
            if time.monotonic() > until:
                os.write(2, b"the agent's threads do not end\n")
                os._exit(70)
            time.sleep(0.0005)
        os.fchdir(outside)
        os.chroot(".")
        os.fchdir(before)
        for fd in (outside, before, tasks):
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, alarms)


def _agent(folder: Path) -> Feed:
    """Have a hostile host ask an agent, which has nothing to run and an empty tree to write to.

    Not to ``load``, which takes a program of the host's by design, nor to set the clock.
    """
    jail = folder / "jail"
    boot_id = jail / "proc/sys/kernel/random/boot_id"
    given = {"run": agent.Run, "put": agent_files.put, "get": agent_files.get}

    def feed(data: bytes) -> None:
        boot_id.parent.mkdir(parents=True)
        boot_id.write_text("boot\n")
        before = dict(agent.OPS)
        agent.OPS.clear()
        agent.OPS.update(given)
        ours, host = socket.socketpair()
        said = os.memfd_create("said")
        try:
            with host, _jailed(jail):
                host.sendall(data)
                host.shutdown(socket.SHUT_WR)
                agent.Link(ours.detach(), os.dup(said)).serve()
            for line in os.pread(said, 1 << 24, 0).split(b"\n"):
                assert not line or isinstance(json.loads(line), dict)
        finally:
            os.close(said)
            agent.OPS.clear()
            agent.OPS.update(before)
            shutil.rmtree(jail)

    return feed


TARGETS: Final = {
    "config": Target(_config, seeds.CONFIG, seeds.TOML_WORDS),
    "batch": Target(_batch, seeds.BATCH, seeds.TOML_WORDS),
    "record": Target(_record, seeds.RECORDS, seeds.JSON_WORDS, seeds.any_record),
    "mountinfo": Target(_mountinfo, seeds.MOUNTS, seeds.MOUNT_WORDS),
    "stream": Target(_stream, seeds.STREAMS, seeds.STREAM_WORDS, seeds.any_stream),
    "bus": Target(_bus, seeds.CALLS, seeds.CALL_WORDS, seeds.any_call),
    "properties": Target(_properties, seeds.PROPERTIES, seeds.CALL_WORDS),
    "answers": Target(_answers, seeds.ANSWERS, seeds.JSON_WORDS),
    "agent": Target(_agent, seeds.REQUESTS, seeds.JSON_WORDS),
}
