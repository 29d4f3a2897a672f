# SPDX-License-Identifier: LGPL-2.1-or-later
"""The monitor's protocol, against a monitor that a test writes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import MachineError
from harness.qmp import Event, Qmp, RefusedError, connect_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}


class Monitor:
    """QEMU's end: answers each command by what *answer* returns, a list of lines."""

    def __init__(self, answer: Callable[[dict[str, Any]], list[Any]]) -> None:
        self.near, self.far = socket.socketpair()
        self.seen: list[dict[str, Any]] = []
        self.answer = answer
        self.say(GREETING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def say(self, *lines: object) -> None:
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line).encode()
            self.far.sendall(data + b"\r\n")

    def _work(self) -> None:
        with self.far.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                request = json.loads(line)
                self.seen.append(request)
                if request["execute"] == "qmp_capabilities":
                    self.say({"return": {}, "id": request["id"]})
                else:
                    self.say(*self.answer(request))

    def close(self) -> None:
        self.far.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self.far.close()
        self.near.close()


@contextlib.contextmanager
def talking(answer: Callable[[dict[str, Any]], list[Any]]) -> Iterator[tuple[Qmp, Monitor]]:
    monitor = Monitor(answer)
    qmp = Qmp(monitor.near, timeout=5)
    try:
        yield qmp, monitor
    finally:
        qmp.close()
        monitor.close()


def returns(value: object) -> Callable[[dict[str, Any]], list[Any]]:
    return lambda request: [{"return": value, "id": request["id"]}]


def test_negotiates_and_passes_arguments_on() -> None:
    with talking(returns({"status": "running"})) as (qmp, monitor):
        assert qmp.command("query-status", {"command-line": "x"}) == {"status": "running"}
        assert [one["execute"] for one in monitor.seen] == ["qmp_capabilities", "query-status"]
        assert monitor.seen[1]["arguments"] == {"command-line": "x"}


def test_refusal_is_told_from_a_monitor_that_is_gone() -> None:
    def refuse(request: dict[str, Any]) -> list[Any]:
        return [{"error": {"class": "GenericError", "desc": "not now"}, "id": request["id"]}]

    with talking(refuse) as (qmp, monitor):
        with pytest.raises(RefusedError, match="QEMU refused migrate: not now"):
            qmp.command("migrate")
        monitor.far.shutdown(socket.SHUT_RDWR)
        with pytest.raises(MachineError) as caught:
            qmp.command("stop")
        assert not isinstance(caught.value, RefusedError)


def test_late_answer_is_not_taken_for_the_next_one() -> None:
    held: list[Any] = []

    def answer(request: dict[str, Any]) -> list[Any]:
        if request["execute"] == "slow":
            held.append({"return": "late", "id": request["id"]})
            return []
        return [*held, {"return": "mine", "id": request["id"]}]

    with talking(answer) as (qmp, _):
        with pytest.raises(MachineError, match=r"did not answer slow within 0 s"):
            qmp.command("slow", timeout=0.05)
        assert qmp.command("fast") == "mine"


def test_events_are_kept_until_asked_for_and_others_stay() -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [
            {"event": "STOP", "timestamp": {}},
            {"event": "RESET", "data": {"guest": True}},
            {"return": {}, "id": request["id"]},
        ]

    with talking(answer) as (qmp, monitor):
        qmp.command("stop")
        assert qmp.wait_event("RESET", timeout=1) == Event("RESET", {"guest": True})
        assert qmp.wait_event("STOP", "RESUME", timeout=1) == Event("STOP")
        assert qmp.wait_event("STOP", timeout=0.01) is None
        monitor.say({"event": "RESUME"})
        assert qmp.wait_event("RESUME", timeout=5) == Event("RESUME")


def test_messages_in_pieces_and_in_heaps() -> None:
    def answer(request: dict[str, Any]) -> list[Any]:
        return [b'{"event": "A"}\r\n{"event": "B"}', {"return": "x" * 200_000, "id": request["id"]}]

    with talking(answer) as (qmp, _):
        assert qmp.command("long") == "x" * 200_000
        assert qmp.wait_event("B", timeout=1) == Event("B")


def test_garbage_is_named() -> None:
    with (
        talking(lambda _request: [b"* not json"]) as (qmp, _),
        pytest.raises(MachineError, match=r"no message: b'\* not json"),
    ):
        qmp.command("stop")


def test_threads_wait_for_one_another() -> None:
    with talking(lambda request: [{"return": request["arguments"], "id": request["id"]}]) as (
        qmp,
        _,
    ):
        wrong: list[object] = []

        def ask(number: int) -> None:
            for count in range(50):
                arguments = {"n": number * 1000 + count}
                if (got := qmp.command("echo", arguments)) != arguments:
                    wrong.append(got)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not wrong


def test_connects_however_long_the_path_is(tmp_path: Path) -> None:
    directory = tmp_path / ("long," * 40)
    directory.mkdir()
    here = os.open(directory, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/qmp.sock")
            server.listen()
            with connect_unix(directory / "qmp.sock") as client, server.accept()[0] as accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
    finally:
        os.close(here)


def test_does_not_wait_for_a_qemu_that_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(MachineError, match="ended while it was started"):
        Qmp.open(tmp_path / "qmp.sock", alive=lambda: False, timeout=20)
    with pytest.raises(MachineError, match="opened no monitor"):
        Qmp.open(tmp_path / "qmp.sock", timeout=0.05)
    assert time.monotonic() - start < 5
