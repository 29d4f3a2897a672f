# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service is killed at each system call while it does what a user calls for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from jeepney import DBusAddress, new_method_call

from overlayd import service, wire
from tests.bus.peer import Answer, Peer
from tests.crash import tracing
from tests.crash.forked import forked
from tests.crash.scenes import Stage
from tests.crash.tracing import Do

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus
    from tests.crash.conftest import Proof
    from tests.crash.tracing import Act, Outcome, Point

_IDLE: Final = 0.2
"""Seconds without a call after which the service ends."""
_CALLS: Final = {
    number: name
    for number, name in tracing.CHANGING.items()
    if name not in {"sendmsg", "sendto", "writev"}  # what is said, as often as it takes
}
_BUS: Final = DBusAddress(
    "/org/freedesktop/DBus", bus_name="org.freedesktop.DBus", interface="org.freedesktop.DBus"
)


@dataclass(frozen=True)
class Called:
    """What alice calls for, and whether she has an overlay by then."""

    call: Callable[[Peer, Stage], Answer]
    there: bool


CALLED: Final = {
    "apply": Called(lambda alice, stage: alice.apply("x", stage.root, {"a": "hers"}), there=False),
    "reset": Called(lambda alice, _stage: alice.reset("x", 0), there=True),
    "remove": Called(lambda alice, _stage: alice.remove("x"), there=True),
}


def ask(called: Called, stage: Stage) -> int:
    """Call once there is a service, in a child; return where it tells the error, if any."""
    reading, writing = os.pipe2(os.O_CLOEXEC)

    def told() -> None:
        with contextlib.suppress(TimeoutError, OSError), Peer("alice") as alice:
            owned = new_method_call(_BUS, "NameHasOwner", "s", (wire.NAME,))
            while not alice.connection.send_and_get_reply(owned).body[0]:
                time.sleep(0.005)
            os.write(writing, json.dumps(called.call(alice, stage).error).encode())

    forked(told)
    os.close(writing)
    return reading


def serve(called: Called, stage: Stage, act: Callable[[Point], Act]) -> tuple[Outcome, str | None]:
    """Run the service for one call of alice's; return how it ended, and what she was told."""
    answer = ask(called, stage)
    outcome = tracing.run(lambda: sys.exit(service.main([str(_IDLE)])), act, calls=_CALLS)
    with open(answer, encoding="ascii") as file:
        told = file.read()
    return outcome, json.loads(told) if told else None


def prepare(called: Called, stage: Stage) -> None:
    """Bring everything to where the call finds it."""
    stage.clear()
    if called.there:
        outcome, told = serve(CALLED["apply"], stage, tracing.nothing)
        assert told == "", outcome
        (stage.root / "a").write_text("edited")


@pytest.mark.parametrize("name", CALLED)
def test_service_is_killed_at_each_system_call(bus: Bus, proof: Proof, name: str) -> None:
    """SIGKILL of the service at each system call that changes anything."""
    tracing.need()
    stage, called = Stage(bus), CALLED[name]
    prepare(called, stage)
    before = stage.view()
    whole, told = serve(called, stage, tracing.nothing)
    assert (whole.code, told) == (0, ""), (whole.said, told)
    after = stage.view()
    step = 1 if proof.whole else 5
    for number in itertools.count(proof.seed % step, step):
        prepare(called, stage)
        outcome, told = serve(called, stage, tracing.at(number, Do.KILL))
        if outcome.acted is None:
            assert (outcome.code, told) == (0, "")
            break
        proof.count()
        assert told in {"", "NoReply", "ServiceUnknown", "NameHasNoOwner"}, told
        try:
            stage.check(before, after)
            if told == "":
                stage.check(after)
        except BaseException as error:
            error.add_note(f"killed before {outcome.acted}, and told {told}")
            raise
    stage.clear()
