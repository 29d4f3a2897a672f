# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every method there is, called by somebody who may not, with arguments that make no sense."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import pytest
from jeepney import MessageType, new_method_call
from jeepney.fds import FileDescriptor

from overlayd import interface, wire
from overlayd.bus import BUS
from tests.bus.peer import Peer, directory, resident, threads_and_fds
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bus.conftest import Bus
    from tests.bus.peer import Answer

NOWHERE: Final = f"{interface.OVERLAYS}/00000000_0000_4000_8000_000000000000"
ANYONE: Final = {
    (wire.MANAGER, "OpenStream"),
    (wire.MANAGER, "List"),
    (wire.MANAGER, "Status"),
    (wire.MANAGER, "Limits"),
    (wire.MANAGER, "History"),
    (interface.OBJECTS, "GetManagedObjects"),
    (interface.PROPERTIES, "Get"),
    (interface.PROPERTIES, "GetAll"),
    (interface.INTROSPECTABLE, "Introspect"),
    (interface.PEER, "Ping"),
    (interface.PEER, "GetMachineId"),
}
"""All that whoever likes may call."""
VALID: Final[dict[str, tuple[object, ...]]] = {
    "List": ({},),
    "Status": ("hers",),
    "History": ({},),
    "Get": (wire.OVERLAY, "Name"),
    "GetAll": ("",),
    "Remove": ("hers", True),
    "Reset": ("hers", 0),
    "Cleanup": (False,),
}
LARGE: Final = {"as", "ay"}
BOUND: Final = 2.0
"""Seconds within which another user is answered, whatever is thrown at the service."""
MEMORY: Final = 48 << 20
"""Bytes that the service may grow by meanwhile."""
_LIMITS: Final = """<busconfig>
  <limit name="max_message_size">134217728</limit>
  <limit name="max_incoming_bytes">268435456</limit>
  <limit name="max_outgoing_bytes">268435456</limit>
  <limit name="max_message_unix_fds">253</limit>
  <limit name="max_incoming_unix_fds">1024</limit>
  <limit name="max_outgoing_unix_fds">1024</limit>
</busconfig>
"""


def permit_large_messages(bus: Bus) -> None:
    """Let the bus pass the largest messages that there can be."""
    Path("/etc/dbus-1/system.d/large.conf").write_text(_LIMITS)
    where = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    bus.call(*where, "ReloadConfig")


def nodes(peer: Peer, path: str = "/") -> Iterator[tuple[str, str, str, str]]:
    """Walk the introspection data: path, interface, method, signature."""
    xml = str(peer.call("Introspect", at=(path, interface.INTROSPECTABLE)).body[0])
    root = ET.fromstring(xml)
    for each in root.iter("interface"):
        for method in each.iter("method"):
            kinds = [a.get("type", "") for a in method.iter("arg") if a.get("direction") == "in"]
            yield path, each.get("name", ""), method.get("name", ""), "".join(kinds)
    for node in root.findall("node"):
        yield from nodes(peer, f"{path.rstrip('/')}/{node.get('name')}")


def nested(depth: int) -> tuple[str, object]:
    """Return a variant in a variant, and so on."""
    value: tuple[str, object] = ("s", "deep")
    for _ in range(depth):
        value = ("v", value)
    return value


def junk(pipe: int) -> list[tuple[str, tuple[object, ...]]]:
    """Return arguments that no method takes, or that make no sense for those that take them."""
    control = "".join(map(chr, range(1, 32))) + "\u202e\u2028\x7f"
    long = "x" * 10_000
    return [
        ("", ()),
        ("s", (long,)),
        ("s", (control,)),
        ("i", (-1,)),
        ("as", (["word"] * 100_000,)),
        ("v", (nested(40),)),
        ("a{sv}", ({"draining": nested(40), control: ("s", long)},)),
        ("a{sv}", ({"draining": ("s", "yes")},)),
        ("a{sv}", ({f"option-{number}": ("u", number) for number in range(5000)},)),
        ("su", (long, 0xFFFFFFFF)),
        ("sb", (control, True)),
        ("ss", (control, long)),
        ("h", (pipe,)),
        ("sssta{sv}", (control, control, control, 1 << 63, {})),
        ("sssta{sv}", ("hers", long * 10, "/usr", 0, {"size": nested(40)})),
        ("s" * 60, tuple("x" * 60)),
        ("ay", (bytes(4 << 20),)),
    ]


def let_go(answer: Answer) -> None:
    """Close what came with an answer."""
    for value in answer.body:
        if isinstance(value, FileDescriptor):
            value.close()


@contextlib.contextmanager
def watched(bus: Bus) -> Iterator[None]:
    """See to it that the service lives on, does not grow, and answers carol meanwhile."""
    pid = bus.processes["service"].pid
    before, (threads, fds) = resident(pid), threads_and_fds(pid)
    slowest: list[float] = []
    ended = threading.Event()
    carol = Peer("carol")

    def call() -> None:
        while True:
            began = time.monotonic()
            carol.list()
            slowest.append(time.monotonic() - began)
            if ended.wait(0.05):
                return

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield
    finally:
        ended.set()
        caller.join()
        carol.close()
    assert bus.processes["service"].poll() is None
    with Peer("carol") as again:
        assert not again.list().error
    assert slowest
    assert max(slowest) < BOUND
    assert resident(pid, "VmHWM") - before < MEMORY
    assert eventually(lambda: threads_and_fds(pid) <= (threads, fds), 10), threads_and_fds(pid)


def patient(bus: Bus) -> None:
    """Let users call as often as they like; that they may not is for other tests."""
    bus.config.write_text("[users]\ncalls = 1000000\n")


def test_each_method_of_the_introspection_data_is_denied_or_on_the_list(bus: Bus) -> None:
    patient(bus)
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice:
        assert not alice.apply("hers", base).error
    with Peer("bob") as bob:
        there = [*nodes(bob)]
        assert {path for path, *_ in there} >= {"/", "/org", wire.PATH, interface.OVERLAYS}
        assert {(i, name) for _, i, name, _ in there} == {
            (method.interface, method.name) for method in interface.METHODS
        }
        for path, owner, name, signature in there:
            body = VALID.get(name, ())
            if owner == wire.OVERLAY:
                body = body[1:]
            if name == "Apply":
                answer = bob.apply("no-way", bus.base("other", {}))
            else:
                answer = bob.call(name, signature, body, at=(path, owner))
                let_go(answer)
            denied = answer.error == "NoPermission"
            assert denied == ((owner, name) not in ANYONE), (path, owner, name, answer)
    assert (base / "motd").read_text() == "alice"


def test_junk_is_answered_by_errors_and_keeps_nobody_waiting(bus: Bus) -> None:
    patient(bus)
    bus.serve()
    pipe, other = os.pipe()
    seen: set[tuple[str, str]] = set()
    with Peer("alice") as alice, watched(bus):
        there = [*nodes(alice), ("/etc", "", "List", ""), (NOWHERE, wire.OVERLAY, "Remove", "b")]
        for path, owner, name, takes in there:
            for signature, body in junk(pipe):
                if signature == takes == "" or (signature in LARGE and (owner, name) in seen):
                    continue
                answer = alice.call(name, signature, body, at=(path, owner))
                let_go(answer)
                expected = {"InvalidArgs", "LimitsExceeded", "UnknownMethod"}
                if signature == takes:
                    expected = {"Refused", "NotFound", "InvalidArgs", "LimitsExceeded"}
                    if name == "GetAll":
                        expected.add("")
                assert answer.error in expected, (path, name, signature, answer.error)
                if answer.error:
                    assert not any(ord(c) < 32 and c != "\n" for c in answer.text), answer.text
            seen.add((owner, name))
        for path in ("/", wire.PATH, NOWHERE, "/etc"):
            for owner, name in (("", "Set"), (interface.PROPERTIES, "Set"), ("a.b", "List")):
                answer = alice.call(name, "ssv", ("a", "b", ("s", "")), at=(path, owner))
                assert answer.error == "UnknownMethod"
    os.close(pipe)
    os.close(other)
    assert bus.leftovers() == []


def test_variants_as_deep_as_the_bus_passes_them_are_answered_by_errors(bus: Bus) -> None:
    patient(bus)
    bus.serve()
    passed = set()
    with watched(bus):
        for depth in range(56, 70):
            with Peer("alice") as alice:
                for name, signature, body in (
                    ("List", "v", (nested(depth),)),
                    ("List", "a{sv}", ({"draining": nested(depth)},)),
                    ("History", "a{sv}", ({"name": nested(depth)},)),
                ):
                    try:
                        answer = alice.call(name, signature, body)
                    except OSError:  # the bus hangs up on who sends what is deeper
                        break
                    assert answer.error in {"InvalidArgs", "Refused"}, answer
                    passed.add(depth)
    assert max(passed) >= 60, passed


def test_messages_of_128_mib_and_253_descriptors_are_passed_over(bus: Bus) -> None:
    patient(bus)
    permit_large_messages(bus)
    bus.serve()
    with Peer("alice") as alice, watched(bus):
        half = bytes((64 << 20) - 512)  # no message of D-Bus is longer than both and its header
        for name in ("List", "Apply", "Nothing"):
            answer = alice.call(name, "ayay", (half, half))
            assert answer.error in {"InvalidArgs", "LimitsExceeded", "UnknownMethod"}, answer
        del half
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(253)]
        for name, signature in (("List", "ah"), ("Apply", "ah"), ("Nothing", "ah")):
            for _ in range(8):
                answer = alice.call(name, signature, (fds,))
                assert answer.error in {"InvalidArgs", "UnknownMethod"}, answer
        for fd in fds:
            os.close(fd)
    with Peer("bob") as bob:
        assert not bob.list().error


def test_headers_that_are_long_or_hold_unknown_fields_do_not_end_the_service(bus: Bus) -> None:
    patient(bus)
    permit_large_messages(bus)
    bus.serve()
    with Peer("alice") as alice, watched(bus):
        for length in (60_000, 70_000, 2 << 20):
            path = "/" + "x" * length
            alice.send("List", "a{sv}", ({},), at=(path, wire.MANAGER))
        # What comes after is read as if nothing had been.
        assert not alice.list().error


def test_line_is_for_one_apply_of_the_caller_who_asked_for_it(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.config.write_text("[limits]\nstall_seconds = 1\n[users]\nqueued = 3\n")
    bus.serve()
    whole = directory({"motd": "x"})
    with Peer("alice") as alice, Peer("alice") as again, Peer("bob") as bob:
        for number in (0, 1, 77, (1 << 64) - 1):
            assert alice.receive(alice.begin_apply("hers", base, number)).error == "NotFound"
        number, writing = alice.open_stream()
        os.write(writing, whole)
        for other in (bob, again):
            assert other.receive(other.begin_apply("his", base, number)).error == "NotFound"
        # Nothing comes from the other side, and nothing said there matters.
        assert not alice.receive(alice.begin_apply("hers", base, number)).error
        assert os.read(writing, 1) == b""
        os.close(writing)
        assert alice.receive(alice.begin_apply("more", base, number)).error == "NotFound"
        assert not alice.remove("hers").error
        kept = [alice.open_stream()[1] for _ in range(5)]
        answer = again.call("OpenStream")
        assert (answer.error, "users.queued" in str(answer.body)) == ("Space", True)
        bobs_number, bobs = bob.open_stream()
        assert bobs_number
        for fd in (*kept, bobs):
            os.close(fd)
    assert bus.leftovers() == []


def test_nobody_but_root_can_be_the_service(bus: Bus) -> None:
    for user in ("alice", "carol", "root"):
        with Peer(user) as peer:
            request = new_method_call(BUS, "RequestName", "su", (wire.NAME, 4))
            reply = peer.connection.send_and_get_reply(request, timeout=10)
            allowed = reply.header.message_type is MessageType.method_return
            assert allowed == (user == "root")
    assert bus.told() == []


def test_method_that_does_not_say_who_may_call_it_cannot_be_made() -> None:
    place = interface.Place.MANAGER
    for nobody in (None, "", "anyone", 0):
        with pytest.raises(TypeError, match="does not say who may call it"):
            interface.Method("a.b", "C", (), (), nobody, place)  # type: ignore[arg-type]
