# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each user may have and do; who is at a limit is told so, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from jeepney import MessageFlag, new_method_call

from overlayd import stream
from overlayd.client import SERVICE
from overlayd.manager import memory
from overlayd.model import SourceKind
from overlayd.stream import Entry, Header, Type
from tests.bus.peer import ALLOW_OTHER, Peer, directory, waits_beside
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.bus.conftest import Bus
    from tests.bus.peer import Answer

READ_ONLY = {**ALLOW_OTHER, "read-only": ("b", True)}


def refused(answer: Answer, error: str, *words: str) -> None:
    assert answer.error == error, answer
    for word in words:
        assert word in answer.text, (word, answer.text)


@contextlib.contextmanager
def applying(peer: Peer, name: str, base: Path) -> Iterator[tuple[int, int]]:
    """Begin an apply of which only the header comes; give the call and the pipe."""
    reading, writing = peer.open_stream()
    try:
        os.write(writing, directory({"motd": "slow"})[: stream.HEADER.size])
        yield peer.begin_apply(name, base, reading), writing
    finally:
        with contextlib.suppress(OSError):
            os.close(writing)


def test_storage_of_a_user_is_limited_and_nobody_else_is_affected(bus: Bus) -> None:
    bases = [bus.base(f"lib{number}", {"motd": "base"}) for number in range(6)]
    bus.config.write_text('[limits]\nupper_size = "1M"\nupper_inodes = 100\n')
    bus.serve()
    hint = "in the configuration"
    with Peer("alice") as alice, Peer("bob") as bob, Peer("root") as root:
        bus.configure('[limits]\nupper_size = "1M"\n[users]\noverlays = 2\n')
        for number in range(2):
            assert not alice.apply(f"hers-{number}", bases[number], options=READ_ONLY).error
        third = alice.apply("hers-2", bases[2], options=READ_ONLY)
        refused(third, "Space", "overlays of one user", "2 of 2 in use", "users.overlays", hint)
        bus.configure('[limits]\nupper_size = "1M"\n[users]\nbytes = "3M"\n')
        large = {**ALLOW_OTHER, "size": ("t", 4 << 20)}
        answer = alice.apply("hers-2", bases[2], options=large)
        refused(answer, "Space", "storage of one user", "of 3M in use", "users.bytes", hint)
        bus.configure('[limits]\nupper_size = "1M"\nupper_inodes = 100\n[users]\ninodes = 104\n')
        answer = alice.apply("hers-2", bases[2])
        refused(answer, "Space", "files of one user", "4 of 104 in use", "users.inodes", hint)
        assert not bob.apply("his-0", bases[3]).error  # what alice has is not counted
        # 1 % of all memory, and root had nearly all of it.
        share = memory() // 100
        bus.configure('[limits]\nupper_size = "1M"\nmemory_share = 1\n[users]\nbytes = "9G"\n')
        most = {"size": ("t", share - (2 << 20))}
        assert not root.apply("roots", bases[4], options=most).error
        answer = bob.apply("his-1", bases[5], options=large)
        refused(answer, "Space", "storage of all", "limits.memory_share", hint)
        assert not root.remove("roots").error
        assert not bob.apply("his-1", bases[5], options=large).error
        used = alice.call("Limits").body[0]
        assert isinstance(used, dict)
        assert used["overlays"] == (2, 16)
        assert used["copies"] == (0xFFFFFFFFFFFFFFFF, 2)
    bus.check_invariants()


def test_source_of_a_user_is_limited_whatever_it_announces(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.config.write_text(
        '[users]\nsource_size = "64K"\nsource_entries = 10\nsource_depth = 3\ncalls = 1000\n'
    )
    bus.serve()

    def lying(entries: int, size: int, *frames: bytes) -> bytes:
        head = stream.pack_header(Header(SourceKind.DIRECTORY, entries, size))
        return b"".join([head, stream.pack_enter(Entry(b"root", 0o755, 0)), *frames])

    deep = [stream.pack_enter(Entry(b"d", 0o755, 0))] * 4
    file = stream.pack_file(Entry(b"f", 0o644, 0, size=1 << 20))
    data = [stream.pack_data(number * 20000, 20000) + bytes(20000) for number in range(3)]
    many = [stream.pack_file(Entry(b"%02d" % number, 0o644, 0)) for number in range(20)]
    with Peer("alice") as alice:
        for stream_of, error, *words in (
            (directory({"f": "x" * 65537}), "Space", "64K", "users.source_size"),
            (directory({str(n): "" for n in range(10)}), "Space", "10", "users.source_entries"),
            (lying(5, 0, *deep), "Refused", "deeper than 3", "users.source_depth"),
            (lying(1 << 63, 0), "Space", "entries"),
            (lying(1, 1 << 63), "Space", "bytes"),
            (lying(2, 8192, file, *data), "Refused", "announced"),
            (lying(3, 0, *many), "Refused", "announced"),
            (lying(2, 0, stream.pack(Type.LEAVE), stream.pack_end(2, 0)), "Refused"),
            (lying(2, 0, file)[:-3], "Refused", "broke off"),
        ):
            answer = alice.apply("hers", base, data=stream_of)
            assert answer.error == error, (words, answer)
            for word in words:
                assert word in answer.text or word in {"entries", "bytes"}, (word, answer.text)
            assert bus.leftovers() == []
    assert (base / "motd").read_text() == "base"


def test_source_that_stalls_or_dribbles_ends_in_time(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.config.write_text("[limits]\nstall_seconds = 1\nreceive_seconds = 2\n")
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob:
        with applying(alice, "hers", base) as (serial, _):
            answer = alice.receive(serial, 10)
            refused(answer, "Busy", "1 seconds", "limits.stall_seconds")
            assert answer.seconds < 3
        with applying(bob, "his", base) as (serial, writing):
            began = time.monotonic()
            rest = directory({"motd": "slow"})[stream.HEADER.size :]
            for number in range(40):
                with contextlib.suppress(BrokenPipeError):
                    os.write(writing, rest[number : number + 1])
                time.sleep(0.1)
                if time.monotonic() - began > 3.2:
                    break
            refused(bob.receive(serial, 10), "Busy", "2 seconds", "limits.receive_seconds")
        assert bus.leftovers() == []
        assert not bob.apply("his", base).error


def test_copies_and_queues_are_each_user_s_own(bus: Bus) -> None:
    bases = [bus.base(f"lib{number}", {"motd": "base"}) for number in range(8)]
    bus.config.write_text("[limits]\ncopies = 3\n[users]\ncopies = 2\nqueued = 2\n")
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob, contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(applying(alice, f"hers-{number}", bases[number]))
            for number in range(5)
        ]
        answer = alice.receive(slow[4][0], 5)  # two under way, two wait
        refused(answer, "Space", "2 of your calls are waiting", "users.queued")
        assert not bob.list().error
        assert not bob.apply("his", bases[6]).error
        with applying(bob, "his-1", bases[7]) as (serial, writing):
            time.sleep(0.3)
            with Peer("carol") as carol:  # three sources are being received: alice's and bob's
                answer = carol.apply("carols", bases[5])
                refused(answer, "Busy", "3 sources", "limits.copies")
            os.write(writing, directory({"motd": "slow"})[stream.HEADER.size :])
            assert not bob.receive(serial).error
        for number in range(4):
            serial, writing = slow[number]
            os.write(writing, directory({"motd": "slow"})[stream.HEADER.size :])
            assert not alice.receive(serial).error, number
    assert bus.overlayd("carol", "list").stdout.count("hers-") == 4


def test_calls_in_ten_seconds_are_each_user_s_own(bus: Bus) -> None:
    bus.config.write_text("[users]\ncalls = 20\n")
    bus.serve()
    with Peer("alice") as alice, Peer("alice") as again, Peer("bob") as bob, Peer("root") as root:
        for number in range(20):
            assert not (alice if number % 2 else again).list().error
        for peer in (alice, again):
            refused(peer.list(), "Space", "20 calls in 10 seconds", "users.calls")
            refused(peer.remove("x"), "Space", "20 calls in 10 seconds", "users.calls")
        assert not bob.list().error
        for _ in range(30):
            assert not root.list().error


def test_configuration_that_is_broken_refuses_applies_and_nothing_else(bus: Bus) -> None:
    bases = [bus.base(f"lib{number}", {"motd": "base"}) for number in range(3)]
    service = bus.serve(idle=2.0)
    with Peer("alice") as alice:
        assert not alice.apply("one", bases[0]).error
        assert not alice.apply("two", bases[1]).error
        with applying(alice, "three", bases[2]) as (serial, writing):
            bus.configure("[users]\ncalls = true\n")
            # Neither of these takes a configuration; what is counted is as it was before.
            assert not alice.list().error
            assert not alice.remove("one").error
            os.write(writing, directory({"motd": "slow"})[stream.HEADER.size :])
            refused(alice.receive(serial), "Refused", "overlayd.toml", "users.calls")
            refused(alice.apply("more", bases[0]), "Refused", "overlayd.toml", "users.calls")
        bus.configure("")
        assert set(alice.list().listed()) == {"two"}
        assert not alice.remove("two").error
    assert service.wait(20) == 0  # nothing is in any queue
    assert bus.leftovers() == []


def test_storms_of_two_users_do_not_keep_a_third_waiting(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    service = bus.serve()
    with Peer("carol") as carol:
        assert not carol.apply("carols", base).error
    who = ("alice", "bob")
    storms = [partial(storm, user, number, base) for user in who for number in range(4)]
    waits = waits_beside(storms)
    assert waits[-1] < 3.0, waits[-5:]
    assert waits[len(waits) // 2] < 0.5
    assert service.poll() is None
    with Peer("carol") as carol:
        assert eventually(lambda: set(carol.list().listed()) == {"carols"}, 10)


def storm(user: str, number: int, base: Path) -> None:
    """Call as fast as can be, in a process of its own; the fourth does not wait for answers."""
    peer = Peer(user)
    while True:
        if number == 0:
            peer.list()
        elif number == 1:
            peer.apply("no-way", base)
        elif number == 2:
            with Peer(user) as fresh:
                fresh.call("History", "a{sv}", ({},))
        else:
            for _ in range(100):
                last = peer.send("Status", "s", ("carols",))
            peer.receive(last)


def test_flood_of_calls_that_want_no_answer_keeps_nobody_waiting_for_long(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    service = bus.serve()
    with Peer("carol") as carol:
        assert not carol.apply("carols", base).error
    waits = waits_beside([partial(flood, "bob")] * 2)
    assert waits[-1] < 2.0, waits[-5:]
    assert service.poll() is None


def flood(user: str) -> None:
    """Call as fast as the bus takes it, and want no answers."""
    peer = Peer(user)
    call = new_method_call(SERVICE, "Status", "s", ("carols",))
    call.header.flags |= MessageFlag.no_reply_expected
    many = b"".join(call.serialise(number) for number in range(1, 1001))
    while True:
        peer.connection.sock.sendall(many)
