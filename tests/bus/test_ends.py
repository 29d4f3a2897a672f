# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of the service, whenever and however it comes: no call is lost, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

from tests.bus.peer import Peer, directory
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

NAME = "org.projectatomic.aptostree.Overlay1"


def test_idle_exit_loses_no_call(bus: Bus) -> None:
    bus.config.write_text("[users]\ncalls = 1000000\n")
    base = bus.base("lib", {"motd": "base"})
    bus.serve(idle=0.2)
    with Peer("carol") as carol:
        assert not carol.apply("carols", base).error
    ended = threading.Event()
    statuses: list[int] = []

    def keep_starting() -> None:
        while not ended.is_set():
            statuses.append(bus.processes["service"].wait())
            if not ended.is_set():
                bus.serve(idle=0.2)

    keeper = threading.Thread(target=keep_starting)
    keeper.start()
    faults: list[object] = []
    answered = 0
    chance = random.Random(8)
    began = time.monotonic()

    def enough() -> bool:
        """Whether it was seen to end some times; a busy machine takes longer for that."""
        seconds = time.monotonic() - began
        return seconds > 60 or (seconds > 5 and len(statuses) > 2 and answered >= 3)

    with Peer("alice") as alice, Peer("bob") as bob:
        while not enough():
            serials = [(peer, peer.send("List", "a{sv}", ({},))) for peer in (alice, bob)]
            answers = [peer.receive(serial, 10) for peer, serial in serials]
            if any(answer.error == "ServiceUnknown" for answer in answers):
                time.sleep(0.005)
                continue
            faults += [each for each in answers if each.error or set(each.listed()) != {"carols"}]
            answered += 1
            # Most calls come about when it is about to go.
            time.sleep(max(0.0, chance.gauss(0.2, 0.005)))
    ended.set()
    keeper.join(30)
    assert faults == []
    assert len(statuses) > 2
    assert set(statuses) == {0}
    assert answered >= 3


def test_sigterm_ends_applies_that_wait_and_leaves_nothing(bus: Bus) -> None:
    bases = [bus.base(f"lib{number}", {"motd": "base"}) for number in range(3)]
    service = bus.serve()
    bus.processes["polkit"].send_signal(signal.SIGSTOP)
    with Peer("alice") as alice, Peer("root") as root, Peer("bob") as bob:
        reading, writing = root.open_stream()
        os.write(writing, directory({"motd": "x"})[:-20])
        from_root = root.begin_apply("waits-for-bytes", bases[0], reading)
        another, more = alice.open_stream()
        os.write(more, directory({"motd": "x"}))
        from_alice = alice.begin_apply("waits-for-polkit", bases[1], another)
        looks = [bob.send("List", "a{sv}", ({},)) for _ in range(5)]
        assert eventually(lambda: len(os.listdir(f"/proc/{service.pid}/task")) >= 5, 10)
        began = time.monotonic()
        service.send_signal(signal.SIGTERM)
        assert root.receive(from_root).error == "Interrupted"
        assert alice.receive(from_alice).error in {"Interrupted", "NoPermission"}
        assert service.wait(20) == 0
        seconds = time.monotonic() - began
        assert seconds < 3, seconds
        for serial in looks:
            assert not bob.receive(serial).error
        assert bob.list().error == "ServiceUnknown"
    bus.processes["polkit"].send_signal(signal.SIGCONT)
    for fd in (reading, writing, another, more):
        os.close(fd)
    assert bus.leftovers() == []
    assert "Traceback" not in bus.log("service").read_text()
    bus.serve()
    with Peer("alice") as alice:
        assert not alice.apply("hers", bases[0]).error


def test_sigkill_in_the_middle_of_an_apply_leaves_nothing_for_long(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    whole = directory({f"file-{number}": "x" * 5000 for number in range(8)})
    service = bus.serve()
    with Peer("alice") as alice:
        for number, delay in enumerate((0.0, 0.003, 0.006, 0.012, 0.025, 0.05)):
            then = "command" if number % 2 else "service"
            for sent in (len(whole) // 2, len(whole)):
                reading, writing = alice.open_stream()
                os.write(writing, whole[:sent])
                alice.begin_apply("hers", base, reading)
                time.sleep(delay)
                service.kill()
                service.wait()
                os.close(writing)
                if then == "service":
                    service = bus.serve()
                    left = set(alice.list().listed())
                else:
                    left = {each.record.name for each in bus.manager().list()}
                # Either all of it was done and noted, or none of it is there.
                if left:
                    assert left == {"hers"}
                    assert (base / "file-7").read_text() == "x" * 5000
                    bus.manager().remove("hers")
                assert bus.leftovers() == [], (delay, sent)
                assert not (base / "file-7").exists()
                if then == "command":
                    service = bus.serve()
                assert sent == len(whole) or not left
    with Peer("alice") as alice:
        assert not alice.apply("hers", base).error
        assert not alice.remove("hers").error
