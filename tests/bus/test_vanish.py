# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers that are gone before they are answered."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bus.peer import Peer, directory, threads_and_fds
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

ROUNDS = 1000 if "OVERLAYD_LONG" in os.environ else 200


def test_callers_who_vanish_leave_neither_overlays_nor_anything_else(bus: Bus) -> None:
    bus.config.write_text("[users]\ncalls = 1000000\nqueued = 1000\ncopies = 8\n")
    base = bus.base("lib", {"motd": "base"})
    other = bus.base("other", {"motd": "base"})
    service = bus.serve()
    chance = random.Random(4)
    with Peer("alice") as alice:
        assert not alice.list().error
        assert alice.apply("no-way", base).error == "NoPermission"
    threads, fds = threads_and_fds(service.pid)
    whole = directory({f"file-{number}": "x" * 4096 for number in range(8)})
    for number in range(ROUNDS):
        # Of a name that is denied at last no overlay may appear, however far it gets.
        name = f"later-{number}" if number % 2 else f"hers-{number}"
        peer = Peer("alice" if number % 4 < 2 else "bob")
        reading, writing = peer.open_stream()
        peer.begin_apply(name, other if number % 50 == 21 else base, reading)
        cut = chance.randrange(len(whole)) if number % 3 and number % 50 != 21 else len(whole)
        os.write(writing, whole[:cut])
        if number % 50 == 21:  # once with certainty after the last question was begun
            assert eventually(lambda name=name: asked_at_last(bus, name), 10)  # type: ignore[misc]
        else:
            time.sleep(chance.uniform(0, 0.02))
        peer.close()
        os.close(writing)
        if number % 20 == 0:
            remove_what_was_in_time(bus)
    assert eventually(lambda: threads_and_fds(service.pid) <= (threads, fds), 20), (
        threads_and_fds(service.pid),
        (threads, fds),
    )
    remove_what_was_in_time(bus)
    assert bus.leftovers() == []
    assert (base / "motd").read_text() == "base"
    assert service.poll() is None
    with Peer("bob") as bob:
        assert not bob.apply("his", base).error


def asked_at_last(bus: Bus, name: str) -> bool:
    return any(each["name"] == name and each["digest"] for each in bus.told())


def remove_what_was_in_time(bus: Bus) -> None:
    """Remove overlays that were authorized before their caller went."""
    authorized = {each["name"] for each in bus.told() if each["digest"]}
    with Peer("root") as root:
        for name in root.list().listed():
            assert name.startswith("hers-")
            assert name in authorized
            assert root.remove(name, lazy=True).error in {"", "NotFound", "Busy"}


def test_caller_who_vanishes_while_polkit_is_silent_is_not_waited_for(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    service = bus.serve()
    with Peer("carol") as carol:
        assert not carol.list().error
    threads, fds = threads_and_fds(service.pid)
    polkit = bus.processes["polkit"]
    polkit.send_signal(19)
    try:
        alice = Peer("alice")
        reading, writing = alice.open_stream()
        os.write(writing, directory({"motd": "alice"}))
        os.close(writing)
        alice.begin_apply("hers", base, reading)
        assert eventually(lambda: threads_and_fds(service.pid)[0] > threads, 5)
        alice.close()
        began = time.monotonic()
        assert eventually(lambda: threads_and_fds(service.pid) <= (threads, fds), 10)
        assert time.monotonic() - began < 2
    finally:
        polkit.send_signal(18)
    with Peer("alice") as alice:
        assert not alice.apply("hers", base).error
    assert Path(base, "motd").read_text() == "alice"
