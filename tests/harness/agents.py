# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real agents as child processes, the streams they are reached by, and a machine made of one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from harness import conversation
from harness.channel import AGENT, Channel
from harness.conversation import PARTS
from harness.errors import MachineError
from harness.machine import Capability, Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

    from harness.machine import RebootMode

# Debian's own, which every user may run; an environment's may lie in root's home.
PYTHON = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
AS_A_PORT = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("harness.agent", sys.argv[1])
sys.modules["harness.agent"] = agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
source = os.open(sys.argv[2], os.O_RDONLY | os.O_NONBLOCK)
sink = os.open(sys.argv[3], os.O_RDWR | os.O_NONBLOCK)
agent.Link(source, sink).serve(port=True)
"""


def eventually(condition: Callable[[], object], timeout: float = 10) -> None:
    """Wait for *condition*."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_in(path: Path) -> int:
    """Return the process id that a command writes into *path*."""
    eventually(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


class Agent:
    """An agent that listens on a socket, from a copy of its source that every user can read."""

    def __init__(self, changes: Mapping[str, str] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="agent-"))
        self.directory.chmod(0o755)
        self.source = self.directory / "agent.py"
        text = AGENT.read_text(encoding="utf-8")
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        self.source.write_text(text, encoding="utf-8")
        self.path = self.directory / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def where(self) -> str:
        return f"unix:{self.path}"

    def command(self) -> list[str]:
        return [PYTHON, "-IS", str(self.source), self.where]

    def start(self) -> Self:
        self.process = subprocess.Popen(self.command(), start_new_session=True)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.path))
        except OSError:
            connection.close()
            raise
        return connection

    def status(self, name: str) -> int:
        """Return a figure of /proc/PID/status."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise LookupError(name)

    def cpu(self) -> float:
        """Return the seconds of CPU that the agent has had."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Port:
    """What QEMU is to a serial port: it passes bytes to and fro for one client at a time.

    Bytes for a client that left are lost, as those that QEMU had already taken.
    """

    def __init__(self, source: int, sink: Callable[[], int], *, hang_up: bool) -> None:
        self._source = source
        self._open_sink = sink
        self._sink = -1
        self._hang_up = hang_up
        self._client: socket.socket | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> socket.socket:
        """Return a new client's socket; the client before is cut off."""
        self.disconnect()
        if self._sink < 0:
            self._sink = self._open_sink()
        mine, theirs = socket.socketpair()
        self._client = mine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, args=(mine, self._stop))
        self._thread.start()
        return theirs

    def disconnect(self) -> None:
        """Cut the client off; where *hang_up*, the agent notices."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._hang_up and self._sink >= 0:
            os.close(self._sink)
            self._sink = -1

    def _pass_on(self, client: socket.socket, stop: threading.Event) -> None:
        poller = select.poll()
        poller.register(client, select.POLLIN)
        poller.register(self._source, select.POLLIN)
        while not stop.is_set():
            for fd, _ in poller.poll(20):
                try:
                    if fd == self._source:
                        client.sendall(os.read(fd, 65536))
                    elif data := client.recv(4096):
                        self._write(data, stop)
                    else:
                        poller.unregister(client)
                except OSError:
                    return

    def _write(self, data: bytes, stop: threading.Event) -> None:
        """Write to the agent, or wait for one that is there."""
        while data and not stop.is_set():
            try:
                if self._sink < 0:
                    self._sink = self._open_sink()
                data = data[os.write(self._sink, data) :]
            except BlockingIOError:
                select.select([], [self._sink], [], 0.02)
            except BrokenPipeError:
                os.close(self._sink)
                self._sink = -1
            except OSError:
                time.sleep(0.02)


class PtyAgent(Agent):
    """An agent on a pseudo-terminal: a device with two ends that can vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.device = self.directory / "device"
        self.master = -1
        self.port: Port | None = None

    @property
    def where(self) -> str:
        return f"port:{self.device}"

    def plug_in(self) -> None:
        """Make the device."""
        self.master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(self.master, False)
        self.device.symlink_to(os.ttyname(slave))
        self.slave = slave
        self.port = Port(self.master, lambda: os.dup(self.master), hang_up=False)

    def unplug(self) -> None:
        """Have the device vanish."""
        if self.port is not None:
            self.port.disconnect()
            os.close(self.port._sink) if self.port._sink >= 0 else None
            os.close(self.master)
            os.close(self.slave)
            self.device.unlink()
            self.port = None

    def connect(self) -> socket.socket:
        if self.port is None:
            raise FileNotFoundError(2, "no device")
        return self.port.connect()

    def remove(self) -> None:
        self.kill()
        self.unplug()
        super().remove()


class FifoAgent(Agent):
    """An agent on two named pipes, which are to it what a virtio port is.

    Reading gives end of file, and poll does not wait, while there is no host; it can come again.
    Writing gives EAGAIN once some data is under way that no host takes.
    """

    def __init__(self, *, hang_up: bool = True) -> None:
        super().__init__()
        self.towards, self.back = self.directory / "in", self.directory / "out"
        os.mkfifo(self.towards)
        os.mkfifo(self.back)
        self.keep = os.open(self.back, os.O_RDWR | os.O_NONBLOCK)
        self.port = Port(self.keep, self._open, hang_up=hang_up)

    def _open(self) -> int:
        return os.open(self.towards, os.O_WRONLY | os.O_NONBLOCK)  # ENXIO while there is no agent

    def command(self) -> list[str]:
        files = (self.source, self.towards, self.back)
        return [PYTHON, "-ISc", AS_A_PORT, *map(str, files)]

    def connect(self) -> socket.socket:
        return self.port.connect()

    def remove(self) -> None:
        self.port.disconnect()
        os.close(self.keep)
        if self.port._sink >= 0:
            os.close(self.port._sink)
        super().remove()


class Client:
    """A client that speaks the protocol by hand."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        self.connection = connection
        self._file = connection.makefile("rb")

    def send(self, *messages: dict[str, object] | bytes) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
            self.connection.sendall(data)

    def receive(self) -> dict[str, object]:
        """Return the next line that is a message."""
        while line := self._file.readline():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    return message
        raise EOFError

    def hello(self, nonce: str = "n") -> dict[str, object]:
        """Begin a conversation; skip what is left of another."""
        self.send(b"\n", {"op": "hello", "nonce": nonce})
        while (message := self.receive()).get("hello") != nonce:
            pass
        return message

    def last(self, ident: int) -> dict[str, object]:
        """Return the last answer to a request, skip all else."""
        while not ((message := self.receive()).get("id") == ident and message.get("done")):
            pass
        return message

    def close(self) -> None:
        self._file.close()
        self.connection.close()


HELLO = {"version": 1, "agent": "a", "boot_id": "b", "kernel": "k", "clock": 1.0, "uptime": 1.0}


class Fake:
    """The other end of a socket, which says whatever a test wants."""

    def __init__(self) -> None:
        self.mine, self.theirs = socket.socketpair()
        self.mine.settimeout(10)
        self.file = self.mine.makefile("rb")
        self.channel = Channel(lambda: self.theirs)

    def expect(self, op: str) -> dict[str, object]:
        while line := self.file.readline():
            if line.strip():
                message: dict[str, object] = json.loads(line)
                if message["op"] == op:
                    return message
        raise EOFError

    def say(self, *lines: dict[str, object] | bytes) -> None:
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            self.mine.sendall(data)

    def greet(self, **more: object) -> None:
        """Answer a hello and what is loaded, on a thread."""

        def answer() -> None:
            nonce = self.expect("hello")["nonce"]
            self.say(b"\n", {**HELLO, "hello": nonce, **more})
            with contextlib.suppress(EOFError):  # it did not like our hello
                for _ in conversation.PARTS:
                    self.say({"id": self.expect("load")["id"], "done": True})

        threading.Thread(target=answer, daemon=True).start()
        self.channel.hello(10)

    def close(self) -> None:
        self.channel.close()
        self.file.close()
        self.mine.close()
        self.theirs.close()


class LocalMachine(Machine):
    """This machine, by way of a real agent; a reboot starts that anew, and so does a power cut."""

    lacks: ClassVar[Mapping[Capability, str]] = {Capability.CONSOLE: "there is no screen"}

    def __init__(self, workdir: Path, capabilities: frozenset[Capability] = frozenset()) -> None:
        super().__init__("local", workdir=workdir, capabilities=capabilities)
        self.programs = workdir / "bin"
        self.programs.mkdir()
        boot_id = '"/proc/sys/kernel/random/boot_id"'
        path = 'ROOT_PATH = "'
        own_boot_id = 'os.path.join(os.path.dirname(__file__), "boot_id")'
        self.agent = Agent({boot_id: own_boot_id, path: f"{path}{self.programs}:"})
        self.boot_id = self.agent.directory / "boot_id"
        self.boot_id.write_text("first\n")
        self.agent.start()
        self._channel = Channel(self.agent.connect)
        self.next_boot_id = "second\n"

    @property
    def channel(self) -> Channel:
        return self._channel

    def change_part(self, patch: pytest.MonkeyPatch, changes: Mapping[str, str]) -> None:
        """Have the agent sent another source of what watches; before the first hello."""
        part = self.workdir / "watch.py"
        text = PARTS["watch"].read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        part.write_text(text, encoding="utf-8")
        patch.setitem(PARTS, "watch", part)

    def program(self, name: str, script: str) -> None:
        """Have a program of this name in the machine, before all others."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def close(self) -> None:
        self._channel.close()
        if self.agent.directory.exists():
            self.agent.remove()

    def _reboot(self, mode: RebootMode) -> None:
        self.agent.kill()
        if mode == "system":
            self.boot_id.write_text(self.next_boot_id)
        self.agent.start()

    def _power_cut(self) -> None:
        self.agent.kill()

    def _start(self) -> None:
        self.agent.start()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Freeze a process, which is to have no idea of what happens meanwhile."""
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: "State:\tT" in Path(f"/proc/{process.pid}/status").read_text())


def in_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run *work* on a thread; the list gets what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except MachineError as error:
            raised.append(error)

    threading.Thread(target=run, daemon=True).start()
    return raised
