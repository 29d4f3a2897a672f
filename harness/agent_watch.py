# SPDX-License-Identifier: LGPL-2.1-or-later
"""A part of the agent: what is logged, what the service manager does, and the clock.

The host sends this source to ``agent``, which runs it once.

    follow   -> done; from then on {"event": "journal"|"kmsg", "entry": ...}
    signals  word -> ready; from then on ``signal`` after each change; done after ``abort``
    clock    now (nanoseconds or null), seed -> done
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import threading
import time
from binascii import a2b_base64

from harness.agent import OPS, ROOT_PATH, GoneError, Job, dumps, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.agent import Talk

SYSTEMD = "/run/systemd/system"
PERSISTENT = "/var/log/journal"
MONOTONIC = b'"__MONOTONIC_TIMESTAMP":"'
CURSOR = b'"__CURSOR":"'
FIELDS = (
    "MESSAGE,MESSAGE_ID,PRIORITY,SYSLOG_IDENTIFIER,UNIT,USER_UNIT,JOB_RESULT,_TRANSPORT,_COMM,_PID,"
    "_UID,_SYSTEMD_UNIT,COREDUMP_COMM,COREDUMP_EXE,COREDUMP_PID,COREDUMP_SIGNAL_NAME,COREDUMP_UNIT"
)
PRIVATE_BUS = "/run/systemd/private"
RNDRESEEDCRNG = 0x5207


class Follower:
    """What is logged, for all who asked and from the time they asked.

    It goes on while nobody listens: after a restore the next client gets what is new at once,
    without the start of another program.
    """

    def __init__(self) -> None:
        self.listeners: list[tuple[Talk, int]] = []
        self.running = False
        self.lock = threading.Lock()
        self.kernel_log = -1

    def add(self, talk: Talk) -> None:
        """Send *talk* what is logged from now on.

        :raises OSError: if nothing is logged here.
        """
        if not self.running:
            self.start()
        with self.lock:
            self.drain()
            since = time.monotonic_ns() // 1000
            self.listeners = [(old, at) for old, at in self.listeners if old.link.talk is old]
            self.listeners.append((talk, since))

    def start(self) -> None:
        """Choose the log: the journal where there is one, for it has the kernel's log as well."""
        if os.path.isdir(SYSTEMD) and any(
            os.access(f"{place}/journalctl", os.X_OK) for place in ROOT_PATH.split(":")
        ):
            work = self.read_journal
        else:
            self.kernel_log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self.kernel_log, 0, os.SEEK_END)
            work = self.read_kernel_log
        threading.Thread(target=work, daemon=True).start()
        self.running = True

    def send(self, lines: list[tuple[int, bytes]]) -> None:
        """Send the lines, each with its time in microseconds, to those who asked before."""
        for talk, since in self.listeners:
            with contextlib.suppress(GoneError):
                talk.write(b"".join(line for at, line in lines if at >= since))

    def read_journal(self) -> None:
        """Send what comes to the journal."""
        start = f"--since=@{int(time.time()) - 2}"  # early enough; entries have exact times
        while True:
            for lines in new_entries(start):
                events = [
                    (int(field(line, MONOTONIC) or 0), b'{"event":"journal","entry":%s}\n' % line)
                    for line in lines
                ]
                with self.lock:
                    self.send(events)
                start = "--after-cursor=" + field(lines[-1], CURSOR).decode()
            time.sleep(0.3)

    def read_kernel_log(self) -> None:
        """Send what comes to the kernel's log."""
        poller = select.poll()
        poller.register(self.kernel_log, select.POLLIN)
        while True:
            poller.poll()
            with self.lock:
                self.drain()

    def drain(self) -> None:
        """Send all that is in the kernel's log now.

        Its times are of another clock than ours: what comes before somebody asks has to be read by
        then.
        """
        while self.kernel_log >= 0:
            try:
                entry = os.read(self.kernel_log, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:  # overtaken: the next read goes on where it can
                    raise
                entry = "4,0,0,-;(lines were lost)"
            now = time.monotonic_ns() // 1000
            self.send([(now, dumps({"event": "kmsg", "entry": entry}))])


def field(line: bytes, name: bytes) -> bytes:
    """Return a string of the line without reading all of its JSON; b"" if it is not there."""
    _, _, rest = line.partition(name)
    return rest[: rest.find(b'"')]


def new_entries(start: str) -> Iterator[list[bytes]]:
    """Yield lines of ``journalctl`` as they come, until it ends or had better be started anew."""
    # What lies in /run moves to /var/log once that is mounted, where it would not be noticed.
    place = os.path.isdir(PERSISTENT)
    argv = ["journalctl", "-fqb", "--no-tail", "-ojson", f"--output-fields={FIELDS}", start]
    env = {"PATH": ROOT_PATH, "LANG": "C.UTF-8"}
    buffer = b""
    source, sink = os.pipe()
    with subprocess.Popen(  # noqa: S603  # no words of others
        argv, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.DEVNULL
    ) as process:
        os.close(sink)
        poller = select.poll()
        poller.register(source, select.POLLIN)
        while os.path.isdir(PERSISTENT) == place:
            if not poller.poll(1000):
                continue
            data = os.read(source, 65536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            if lines:
                yield lines
        process.kill()
    os.close(source)


FOLLOWER = Follower()


class Follow(Job):
    """Send what is logged from now on, for as long as the conversation lasts."""

    def _begin(self) -> None:
        FOLLOWER.add(self.talk)
        self.done()


class Signals(Job):
    """Tell whenever the service manager signals something in which a word occurs.

    Its private socket speaks D-Bus and sends every signal to whoever is connected.  The word is the
    object path of a unit, and that it occurs is all that is looked at.
    """

    def _begin(self) -> None:
        self.bus = socket.socket(socket.AF_UNIX)
        self.bus.settimeout(5)
        self.bus.connect(PRIVATE_BUS)
        uid = str(os.getuid()).encode().hex().encode()
        self.bus.sendall(b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % uid)
        self.bus.recv(4096)
        self.bus.settimeout(None)
        self.in_thread(self._work)

    def _work(self) -> None:
        word = text(self.message, "word").encode()
        self.talk.write(dumps({"id": self.ident, "ready": True}))
        before = b""
        while data := self.bus.recv(65536):
            if word in before + data:
                self.talk.write(dumps({"id": self.ident, "signal": True}))
            before = data[-len(word) :]
        self.done()

    def kill(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self.bus.shutdown(socket.SHUT_RDWR)


class Clock(Job):
    """Put right what a restore leaves wrong: the time, and random numbers all copies share."""

    def _begin(self) -> None:
        import fcntl  # noqa: PLC0415

        now = self.message.get("now")
        if isinstance(now, int):
            time.clock_settime_ns(time.CLOCK_REALTIME, now)
        if seed := text(self.message, "seed", ""):
            fd = os.open("/dev/urandom", os.O_WRONLY)
            try:
                os.write(fd, a2b_base64(seed))
                fcntl.ioctl(fd, RNDRESEEDCRNG)
            finally:
                os.close(fd)
        self.done()


OPS.update(follow=Follow, signals=Signals, clock=Clock)
