# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service is killed at each system call, or one of them fails, while a user calls."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import select
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from jeepney import DBusAddress, new_method_call

from overlayd import service, wire
from tests.bus.peer import Answer, Peer
from tests.crash import tracing
from tests.crash.forked import forked
from tests.crash.scenes import Stage
from tests.crash.test_errno import cases, failing
from tests.crash.tracing import Do

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus
    from tests.crash.tracing import Act, Outcome, Point
    from tests.crash.tried import Proof

_IDLE: Final = 0.2
"""Seconds without a call after which the service ends."""
_CALLS: Final = {
    number: name
    for number, name in tracing.CHANGING.items()
    if name not in {"sendmsg", "sendto", "writev"}  # what is said, as often as it takes
}
_NO_ANSWER: Final = {"NoReply", "ServiceUnknown", "NameHasNoOwner"}
"""What the bus says of a service that ended."""
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


def ask(called: Called, stage: Stage) -> tuple[int, int]:
    """Call once there is a service, in a child.

    Returns where the child tells the error, if any, and what is closed when the service has ended.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    ended, serving = os.pipe2(os.O_CLOEXEC)

    def told() -> None:
        os.close(serving)
        with contextlib.suppress(TimeoutError, OSError), Peer("alice") as alice:
            owned = new_method_call(_BUS, "NameHasOwner", "s", (wire.NAME,))
            while not alice.connection.send_and_get_reply(owned).body[0]:
                if select.select([ended], [], [], 0.005)[0]:
                    return
            os.write(writing, json.dumps(called.call(alice, stage).error).encode())

    forked(told)
    os.close(writing)
    os.close(ended)
    return reading, serving


def serve(
    called: Called, stage: Stage, act: Callable[[Point], Act], calls: dict[int, str]
) -> tuple[Outcome, str | None]:
    """Run the service for one call of alice's; return how it ended, and what she was told."""
    answer, serving = ask(called, stage)
    outcome = tracing.run(lambda: sys.exit(service.main([str(_IDLE)])), act, calls=calls)
    os.close(serving)
    with open(answer, encoding="ascii") as file:
        told = file.read()
    return outcome, json.loads(told) if told else None


def prepare(called: Called, stage: Stage) -> None:
    """Bring everything to where the call finds it."""
    stage.clear()
    if called.there:
        outcome, told = serve(CALLED["apply"], stage, tracing.nothing, _CALLS)
        assert told == "", outcome
        (stage.root / "a").write_text("edited")


@pytest.mark.parametrize("name", CALLED)
def test_service_is_killed_at_each_system_call(bus: Bus, proof: Proof, name: str) -> None:
    """SIGKILL of the service at each system call that changes anything."""
    tracing.need()
    stage, called = Stage(bus), CALLED[name]
    prepare(called, stage)
    before = stage.view()
    whole, told = serve(called, stage, tracing.nothing, _CALLS)
    assert (whole.code, told) == (0, ""), (whole.said, told)
    after = stage.view()
    step = 1 if proof.whole else 5
    for number in itertools.count(proof.seed % step, step):
        prepare(called, stage)
        outcome, told = serve(called, stage, tracing.at(number, Do.KILL), _CALLS)
        if outcome.acted is None:
            assert (outcome.code, told) == (0, "")
            break
        proof.count()
        assert told in {"", *_NO_ANSWER}, told
        try:
            stage.check(before, after)
            if told == "":
                stage.check(after)
        except BaseException as error:
            error.add_note(f"killed before {outcome.acted}, and told {told}")
            raise
    stage.clear()


@pytest.mark.parametrize("name", CALLED)
def test_each_call_of_the_service_fails(bus: Bus, proof: Proof, name: str) -> None:
    """An errno from each system call of the service that changes or says anything."""
    tracing.need()
    proof.random = True
    stage, called = Stage(bus), CALLED[name]
    prepare(called, stage)
    before = stage.view()
    whole, told = serve(called, stage, tracing.nothing, tracing.CHANGING)
    assert (whole.code, told) == (0, ""), (whole.said, told)
    after = stage.view()
    problems: list[str] = []
    step = 1 if proof.whole else 8
    for number, error in [*cases(whole.points, proof.seed, whole=False)][proof.seed % step :: step]:
        prepare(called, stage)
        outcome, told = serve(called, stage, failing(number, error), tracing.CHANGING)
        if outcome.acted is None:
            continue
        proof.count()
        try:
            # Either it answers, or it has ended: with an error if it did so before it had its name,
            # and the bus starts it again if it could say nothing any more.
            assert told is not None or outcome.code or outcome.acted.call == "sendmsg"
            assert outcome.code in {0, *range(3, 11)}
            assert not any(word in outcome.said for word in ("Traceback", "Error("))
            stage.check(*([after] if told == "" else [before, after]))
            if stage.view() == before:
                _, told = serve(called, stage, tracing.nothing, _CALLS)
                assert told == ""
                stage.check(after)
        except AssertionError as problem:
            what = f"{errno.errorcode[error]} of {outcome.acted}"
            problems.append(f"{what}: {told}, {outcome.code}, {outcome.said}: {problem}")
    stage.clear()
    assert not problems, "\n".join(problems)
