# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent: what runs inside a machine and does there what the host asks for.

    python3 -IS agent.py port:/dev/virtio-ports/NAME     a character device, opened again and again
    python3 -IS agent.py unix:/run/NAME                  listens on a socket, several clients
    python3 -IS agent.py stdio:                          one client, until end of file

One file, the standard library alone, loaded late where it is large: it starts in a slow guest.
This is the core: conversations and commands.  What else there is (``agent_files``,
``agent_watch``) the host sends with ``load`` when it first says hello, so it needs no new image.

Both directions are lines of JSON; empty lines mean nothing.  A client begins with an empty line
and ``{"op": "hello", "nonce": N}`` and ignores what comes until ``{"hello": N, ...}``.  That makes
a *conversation*.  A new hello ends the one before with all that runs for it: so a client can die,
or the whole machine be restored in mid-sentence, and the next client starts clean.  ``started``
tells a client that waits for an answer of an earlier agent that it will get none.

Every other line has an ``id`` of the client's choosing, answers carry it and may come out of order;
bytes are base64.  The last answer to an id has ``done``, and ``error`` (and ``errno``) if it
failed; lines that still come for it are ignored.  ``abort`` for a request kills what runs for it.

    run      argv, env, cwd, user, timeout, live (send output at once), input (whether ``data``
             lines follow, until ``end``) -> out, err (many times) ... done, rc, seconds, expired
    load     part, source -> done
"""

from __future__ import annotations

import _thread  # threading waits for each new thread, which doubles what one costs
import contextlib
import errno
import json
import os
import select
import signal
import sys
import time
from binascii import a2b_base64, b2a_base64, crc32

TYPE_CHECKING = False  # the real one is in a module that takes long to load
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import IO

VERSION = 1
CHUNK = 48 * 1024  # a multiple of 3, so that pieces of base64 can be joined
LINE_LIMIT = 16 * 1024 * 1024  # argv and environment of a command are 2 MB at the most
IDLE = 0.01  # a port without a host cannot be waited for: poll() returns at once with POLLHUP
IDLE_LIMIT = 0.2
AGENT = os.urandom(8).hex()
PATH = "/usr/local/bin:/usr/bin:/bin"
ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PIPE, DEVNULL = -1, -3  # subprocess's, which is not loaded yet

Message = dict[str, object]


class GoneError(Exception):
    """Nobody listens any more to what a job has to say."""


def text(message: Message, key: str, default: str | None = None) -> str:
    """Return a string of the message's."""
    value = message.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string")  # noqa: TRY004  # the input is wrong, not we
    return value


def base64(data: bytes | bytearray) -> str:
    """Return how *data* is written in a line."""
    return b2a_base64(data, newline=False).decode("ascii")


def describe(error: Exception) -> str:
    """Return one line for *error*."""
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    where = f"{os.fsdecode(error.filename)[:200]}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def dumps(message: Message) -> bytes:
    """Return the line for *message*."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Job:
    """One request."""

    def __init__(self, talk: Talk, ident: int, message: Message) -> None:
        self.talk = talk
        self.ident = ident
        self.message = message
        self.lock = _thread.allocate_lock()
        self.killed = False
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; on the reader's thread, as is :meth:`take`."""
        self.guarded(self._begin)

    def take(self, op: str, message: Message) -> None:
        """Take a line that belongs to the request."""
        self.guarded(lambda: self._take(op, message))

    def _begin(self) -> None:
        self.in_thread(self._work)

    def _take(self, op: str, message: Message) -> None:
        """Ignore it."""

    def _work(self) -> None:
        """Do what takes time, on a thread of its own."""

    def in_thread(self, work: Callable[[], None]) -> None:
        """Run *work*; whatever it raises is the answer."""
        _thread.start_new_thread(self.guarded, (work,))

    def guarded(self, work: Callable[[], None]) -> None:
        """Run *work* here; whatever it raises is the answer."""
        try:
            try:
                work()
            except GoneError:
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is, the host is to know
                self.done(error=describe(error), errno=getattr(error, "errno", None))
        except GoneError:
            self.kill()

    def done(self, **fields: object) -> None:
        """Send the last answer."""
        self.kill()
        self.talk.jobs.pop(self.ident, None)
        self.talk.write(dumps({"id": self.ident, "done": True, **fields}))

    def spawn(
        self, argv: list[str], stdin: int | IO[bytes], stderr: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, as the message's user, in its cwd and env."""
        import pwd  # noqa: PLC0415
        import subprocess  # noqa: PLC0415

        env = {"PATH": ROOT_PATH, "LANG": "C.UTF-8", "HOME": "/root", "SHELL": "/bin/sh"}
        user, uid, gid, groups = text(self.message, "user", ""), None, None, None
        if user:
            try:
                who = pwd.getpwnam(user)
            except KeyError:
                raise ValueError(f"no user {user!r}") from None
            uid, gid, groups = who.pw_uid, who.pw_gid, os.getgrouplist(user, who.pw_gid)
            env |= {"HOME": who.pw_dir, "SHELL": who.pw_shell or "/bin/sh"}
            if uid:
                env["PATH"] = PATH
            if os.path.isdir(f"/run/user/{uid}"):
                env["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
        env |= {"USER": user or "root", "LOGNAME": user or "root"}
        more = self.message.get("env") or {}
        if not isinstance(more, dict):
            raise ValueError("'env' must be an object")  # noqa: TRY004  # as in text()
        with self.lock:
            if self.killed:
                raise ValueError("killed before it began")
            self.process = subprocess.Popen(  # noqa: S603  # what this program is for
                argv,
                env=env | more,
                cwd=text(self.message, "cwd", "/"),
                stdin=stdin,
                stdout=PIPE,
                stderr=stderr,
                user=uid,
                group=gid,
                extra_groups=groups,
                start_new_session=True,
                umask=0o022,
            )
        return self.process

    def kill(self) -> None:
        """Kill the process group, if there is one whose leader was not waited for yet."""
        with self.lock:
            self.killed = True
            if self.process is not None and self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)


class Run(Job):
    """A command with its input and output."""

    def _begin(self) -> None:
        self.stdin: int | IO[bytes] = DEVNULL
        if self.message.get("input"):
            self.stdin = os.fdopen(os.memfd_create("stdin"), "wb")
        else:
            self.in_thread(self._work)

    def _take(self, op: str, message: Message) -> None:
        if isinstance(self.stdin, int) or self.stdin.closed:
            return  # nothing was announced, or it is complete
        if op == "data":
            self.stdin.write(a2b_base64(text(message, "data")))
        elif op == "end":
            self.stdin.seek(0)
            self.in_thread(self._work)

    def kill(self) -> None:
        """Drop the input as well."""
        super().kill()
        if not isinstance(self.stdin, int):
            self.stdin.close()

    def _work(self) -> None:
        started = time.monotonic()
        argv, timeout = self.message.get("argv"), self.message.get("timeout", 60)
        if not isinstance(argv, list) or not argv or not isinstance(timeout, (int, float)):
            raise ValueError("'argv' must be a list of strings, 'timeout' a number")
        try:
            process = self.spawn(argv, self.stdin, PIPE)
        except OSError as error:
            # What a shell would say and return.
            rc = 127 if error.errno == errno.ENOENT else 126
            said = os.fsencode(describe(error) + "\n")
            self.done(rc=rc, err=base64(said), seconds=0.0, expired=False)
            return
        finally:
            if not isinstance(self.stdin, int):
                self.stdin.close()
        rest, expired = self.pump(process, started + timeout)
        seconds = time.monotonic() - started
        tail = {name: base64(data) for name, data in rest.items() if data}
        self.done(rc=process.returncode, seconds=seconds, expired=expired, **tail)

    def pump(
        self, process: subprocess.Popen[bytes], deadline: float
    ) -> tuple[dict[str, bytearray], bool]:
        """Send what the command writes until it ends; return what is left to send.

        It ends with its first process: what that left behind may keep the pipes open.
        """
        streams = [("out", process.stdout), ("err", process.stderr)]
        pipes = {stream.fileno(): name for name, stream in streams if stream}
        held = {name: bytearray() for name, _ in streams}
        ended, expired = os.pidfd_open(process.pid), False
        poller = select.poll()
        for fd in (*pipes, ended):
            poller.register(fd, select.POLLIN)
        ready: list[int] = []
        try:
            while ended not in ready:
                if deadline <= time.monotonic():
                    if expired:
                        raise ValueError("killed, but it does not die")
                    expired, deadline = True, time.monotonic() + 10
                    self.kill()
                ready = [fd for fd, _ in poller.poll((deadline - time.monotonic()) * 1000 + 1)]
                for fd in ready:
                    if fd != ended and not self.read(fd, pipes[fd], held[pipes[fd]]):
                        poller.unregister(fd)
                        del pipes[fd]
            with self.lock:
                process.poll()  # its id may be another's now: kill() is to know
            for fd, name in pipes.items():
                os.set_blocking(fd, False)
                with contextlib.suppress(BlockingIOError):  # one read: all that a pipe can hold
                    self.read(fd, name, held[name], 1 << 20)
        finally:
            os.close(ended)
            for _, stream in streams:
                if stream:
                    stream.close()
        return held, expired

    def read(self, fd: int, name: str, held: bytearray, size: int = 65536) -> bool:
        """Read once and send what makes whole pieces; whether the pipe is still open."""
        data = os.read(fd, size)
        held += data
        while len(held) >= (1 if self.message.get("live") else CHUNK):
            piece = b2a_base64(held[:CHUNK], newline=False)
            del held[:CHUNK]
            self.talk.write(b'{"id":%d,"%s":"%s"}\n' % (self.ident, name.encode(), piece))
        return bool(data)


class Load(Job):
    """Take in a part that the host has and this file has not."""

    def _begin(self) -> None:
        part, source = text(self.message, "part"), text(self.message, "source")
        exec(compile(source, f"<{part}>", "exec"), {"__name__": part})  # noqa: S102  # the host's
        PARTS[part] = source
        self.done()


OPS: dict[str, Callable[[Talk, int, Message], Job]] = {"run": Run, "load": Load}
PARTS: dict[str, str] = {}


class Talk:
    """A conversation: the requests of one client, from its hello until it goes or another's."""

    def __init__(self, link: Link, nonce: str) -> None:
        self.link = link
        self.nonce = nonce
        self.jobs: dict[int, Job] = {}

    def write(self, data: bytes) -> None:
        """Send whole lines; wait for the host if need be.

        :raises GoneError: if the conversation is over.
        """
        self.link.write(self, data)

    def handle(self, line: bytes) -> None:
        """Do what a client's line asks for."""
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("no object")  # noqa: TRY004, TRY301  # one place for all
        except (ValueError, RecursionError):
            if self.nonce:
                self.write(dumps({"garbage": line[:80].decode("ascii", "replace")}))
            return
        op, ident = message.get("op"), message.get("id")
        if op == "hello":
            self.link.greet(text(message, "nonce"))
        elif self.nonce and isinstance(ident, int) and isinstance(op, str):
            if op in {"entry", "data", "end", "abort"}:
                if (known := self.jobs.get(ident)) and op == "abort":
                    known.kill()
                elif known:
                    known.take(op, message)
                return
            if op not in OPS:
                error = f"unknown operation {op!r}"
                self.write(dumps({"id": ident, "done": True, "error": error}))
                return
            self.jobs[ident] = job = OPS[op](self, ident, message)
            job.start()

    def end(self) -> None:
        """Kill what runs for it."""
        for job in tuple(self.jobs.values()):
            job.kill()


class Link:
    """A stream to the host; of the conversations on it the last one counts."""

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.lock = _thread.allocate_lock()
        self.talk = Talk(self, "")

    def write(self, talk: Talk, data: bytes) -> None:
        """Write *data* if *talk* is still the conversation."""
        rest = memoryview(data)
        with self.lock:
            while rest:
                if self.talk is not talk:
                    raise GoneError
                try:
                    rest = rest[os.write(self.sink, rest) :]
                except BlockingIOError:
                    self.wait_for_room()
                except OSError:  # the reader finds out
                    raise GoneError from None

    def wait_for_room(self) -> None:
        """Wait until the host has read something, or a moment: the conversation may end."""
        poller = select.poll()
        poller.register(self.sink, select.POLLOUT)
        if any(not event & select.POLLOUT for _, event in poller.poll(100)):
            time.sleep(IDLE)  # no host: POLLHUP does not wait

    def greet(self, nonce: str) -> None:
        """Answer a hello; one that is not a repetition begins a new conversation."""
        if nonce != self.talk.nonce:
            self.change(Talk(self, nonce))
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot_id = file.read().strip()
        answer = {
            "hello": nonce,
            "version": VERSION,
            "agent": AGENT,
            "boot_id": boot_id,
            "kernel": os.uname().release,
            "clock": time.time(),
            "uptime": time.monotonic(),
            "parts": {part: crc32(source.encode()) for part, source in PARTS.items()},
        }
        # The line before it may have been broken off, by us or by a restore.
        self.talk.write(b"\n" + dumps(answer))

    def change(self, talk: Talk) -> None:
        """End the conversation in favour of *talk*."""
        before, self.talk = self.talk, talk
        before.end()

    def serve(self, *, port: bool = False) -> None:
        """Read and do until the stream is gone, then close it.

        On a *port*, end of file is a host that left and may come again.
        """
        poller = select.poll()
        poller.register(self.source, select.POLLIN)
        buffer, skip, idle = bytearray(), False, IDLE
        while True:
            ready = poller.poll()
            try:
                data = os.read(self.source, 65536)
            except BlockingIOError:
                if not all(event & select.POLLIN for _, event in ready):
                    time.sleep(IDLE)
                continue
            except OSError:
                data, port = b"", False
            if not data:
                buffer.clear()
                self.change(Talk(self, ""))
                if not port or any(event & select.POLLERR for _, event in ready):
                    self.close()
                    return
                time.sleep(idle)
                idle = min(2 * idle, IDLE_LIMIT)
                continue
            idle = IDLE
            buffer += data
            if b"\n" not in data:
                if len(buffer) > LINE_LIMIT:
                    buffer.clear()
                    skip = True
                continue
            *lines, rest = buffer.split(b"\n")
            buffer = rest
            for line in lines:
                if line.strip() and not skip:
                    with contextlib.suppress(GoneError, ValueError, OSError):
                        self.talk.handle(bytes(line))
                skip = False

    def close(self) -> None:
        """Close the stream once nobody writes to it any more."""
        with self.lock:
            for fd in {self.source, self.sink}:
                os.close(fd)


def serve_port(path: str) -> None:
    """Open the device whenever it is there; it may come late, and vanish."""
    while True:
        try:
            # An earlier agent may still have it: EBUSY.
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            time.sleep(0.1)
            continue
        with contextlib.suppress(OSError):
            os.write(fd, b"\n" + dumps({"started": AGENT}))
        Link(fd, fd).serve(port=True)
        time.sleep(0.1)


def serve_socket(path: str) -> None:
    """Serve each client that connects, on a thread of its own."""
    import socket  # noqa: PLC0415

    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    os.umask(0o177)
    server.bind(path)
    os.umask(0o022)
    server.listen()
    while True:
        connection, _ = server.accept()
        fd = connection.detach()
        os.set_blocking(fd, False)
        _thread.start_new_thread(Link(fd, fd).serve, ())


def main(where: str) -> None:
    """Serve what *where* names."""
    os.umask(0o022)
    os.chdir("/")
    sys.modules.setdefault("harness.agent", sys.modules[__name__])  # what parts import from
    kind, _, path = where.partition(":")
    if kind == "port":
        serve_port(path)
    elif kind == "unix":
        serve_socket(path)
    elif kind == "stdio":
        Link(0, 1).serve()
    else:
        raise SystemExit(f"not port:PATH, unix:PATH or stdio: but {where!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
