# SPDX-License-Identifier: LGPL-2.1-or-later
"""Polkit that does not answer, is gone, or says what makes no sense: nobody gets anything by it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bus.conftest import PYTHON
from tests.bus.fake_polkit import ANSWERS
from tests.bus.peer import Peer, directory
from tests.mounts.conftest import mount
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
NAME = "org.freedesktop.PolicyKit1"
HOW = Path("/run/how")
ENVIRONMENT = {"PYTHONPATH": "/run/python/project:/run/python/site"}


def no_activation(bus: Bus) -> None:
    """End polkit, and let the bus not start it again when somebody calls it."""
    bus.stop("polkit", signal.SIGKILL)
    mount("services", "/usr/share/dbus-1/system-services", "tmpfs")
    bus.call(*BUS, "ReloadConfig")
    assert eventually(lambda: not bus.has_name(NAME), 10)


def pretend(bus: Bus, how: str) -> None:
    """Let a false polkit answer."""
    HOW.write_text(how)
    if bus.has_name(NAME):
        return
    env = {**ENVIRONMENT, "PYTHONHOME": "/run/python/prefix"}
    bus.start("polkit", *PYTHON, "-m", "tests.bus.fake_polkit", str(HOW), env=env)
    assert eventually(lambda: bus.has_name(NAME), 20), bus.log("polkit").read_text()


def test_answers_of_polkit_that_make_no_sense_are_no(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob:
        no_activation(bus)
        for how in ["error", "error with an answer", *ANSWERS]:
            pretend(bus, how)
            answer = alice.apply("hers", base)
            if how == "yes":
                assert not answer.error, answer
                continue
            assert answer.error == "NoPermission", (how, answer)
            assert "\x1b" not in answer.text
            assert (base / "motd").read_text() == "base"
            assert bus.leftovers() == []
        pretend(bus, "numbers")
        # Whoever may see only an outline does so now, too.
        assert "Source" not in bob.list().listed()["hers"]
        assert bob.remove("hers").error == "NoPermission"
    assert bus.processes["service"].poll() is None


def test_question_that_nobody_waits_for_is_taken_back(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    no_activation(bus)
    pretend(bus, "never")
    with Peer("alice") as alice:
        number, writing = alice.open_stream()
        os.write(writing, directory({"motd": "alice"}))
        alice.begin_apply("hers", base, number)
        assert eventually(lambda: "CheckAuthorization" in bus.log("polkit").read_text(), 10)
        os.close(writing)
    assert eventually(lambda: "CancelCheckAuthorization" in bus.log("polkit").read_text(), 10)


def test_polkit_that_is_gone_permits_nothing_and_is_asked_again_when_back(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob:
        assert not alice.apply("hers", base).error
        no_activation(bus)
        assert alice.apply("more", bus.base("other", {})).error == "NoPermission"
        assert bob.remove("hers").error == "NoPermission"
        assert "Source" not in bob.list().listed()["hers"]
        assert not alice.reset("hers").error  # one's own takes no polkit
        assert not alice.remove("hers").error
        pretend(bus, "late")
        began = time.monotonic()
        serial = bob.begin_apply("his", base, 0)
        assert bob.receive(serial).error == "NotFound"  # before anybody is asked
        assert time.monotonic() - began < 2
        assert not bob.apply("his", base).error
    assert bus.log("polkit").read_text().split().count("CheckAuthorization") == 2


def test_looks_are_not_kept_waiting_by_a_polkit_that_is_stopped(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice:
        assert not alice.apply("hers", base).error
        bus.processes["polkit"].send_signal(signal.SIGSTOP)
        try:
            slow = 0.0
            for _ in range(6):  # connections of which polkit was not asked yet
                with Peer("bob") as bob:
                    began = time.monotonic()
                    found = bob.list().listed()
                    slow += time.monotonic() - began
                    assert "Source" not in found["hers"]
            began = time.monotonic()
            assert "Source" in alice.list().listed()["hers"]
            assert time.monotonic() - began < 1.5
            assert slow < 4.0, slow
        finally:
            bus.processes["polkit"].send_signal(signal.SIGCONT)


def test_bus_that_is_gone_ends_the_service_and_what_it_was_about(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    service = bus.serve()
    bus.processes["polkit"].send_signal(signal.SIGSTOP)
    alice = Peer("alice")
    bob = Peer("bob")
    try:
        number, writing = alice.open_stream()
        alice.begin_apply("hers", base, number)
        other, more = bob.open_stream()
        bob.begin_apply("ask-me", bus.base("other", {}), other)
        time.sleep(0.3)
        bus.stop("dbus", signal.SIGKILL)
        assert service.wait(10) == 0
        os.close(writing)
        os.close(more)
    finally:
        bus.processes["polkit"].send_signal(signal.SIGCONT)
        alice.close()
        bob.close()
    assert bus.leftovers() == []
    assert "Traceback" not in bus.log("service").read_text()
