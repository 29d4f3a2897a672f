# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two users and an administrator do as they please, and a model says what comes of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from overlayd import mountinfo
from tests.bus.conftest import USERS
from tests.bus.peer import Peer
from tests.mounts.conftest import RUN, snapshot

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

WHO: Final = st.sampled_from(["alice", "bob", "carol"])
NAMES: Final = st.sampled_from(["one", "two", "three", "no-one", "later-one"])
WRONG: Final = st.sampled_from(["", "..", "a/b", "\n", "x" * 300, "one\u202e", "-one"])
BASES: Final = ("a", "b", "c")
LONG: Final = "OVERLAYD_LONG" in os.environ


@dataclass
class _Known:
    owner: str
    base: str
    text: str
    edited: bool = False
    version: int = 1


def shown(base: Path) -> dict[str, tuple[object, ...]]:
    return snapshot(base)


def kept() -> tuple[object, ...]:
    """Return what a denied call must not change: trees, mounts, records."""
    records = RUN / "records"
    files = {path.name: path.read_bytes() for path in records.iterdir()} if records.exists() else {}
    mounts = {mount.mount_id for each in mountinfo.read().tagged.values() for mount in each}
    return [shown(Path("/usr/src") / base) for base in BASES], mounts, files


class Users(RuleBasedStateMachine):
    """Applies, resets, removes and looks, by whoever."""

    bus: Bus
    peers: dict[str, Peer]

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, _Known] = {}
        self.before: tuple[object, ...] = ()

    def teardown(self) -> None:
        with Peer("root") as root:
            for name in self.known:
                assert not root.remove(name).error
        assert self.bus.leftovers() == []

    @rule(who=WHO, name=NAMES, base=st.sampled_from(BASES), text=st.text("xyz", max_size=3))
    def apply(self, who: str, name: str, base: str, text: str) -> None:
        before = kept()
        answer = self.peers[who].apply(name, f"/usr/src/{base}", {"motd": text})
        taken = name in self.known or any(each.base == base for each in self.known.values())
        if taken:
            assert answer.error == "Exists", answer
        elif who != "carol" and name.startswith(("no-", "later-")):
            assert answer.error == "NoPermission", answer
        else:
            assert answer.properties(1)["Owner"] == USERS[who]
            self.known[name] = _Known(who, base, text)
            return
        assert kept() == before

    @rule(who=WHO, name=WRONG, base=st.sampled_from([*BASES, "../../etc", "a/../b", ""]))
    def apply_what_makes_no_sense(self, who: str, name: str, base: str) -> None:
        before = kept()
        assert self.peers[who].apply(name, f"/usr/src/{base}").error == "Refused"
        answer = self.peers[who].apply("fine", "/usr/src/a", data=b"junk" * 20)
        assert answer.error in {"Refused", "Exists"}, answer
        assert self.peers[who].apply("fine", "/usr/src/a", options={}).error == "Refused"
        assert kept() == before

    @rule(who=WHO, name=NAMES, version=st.integers(0, 2))
    def reset(self, who: str, name: str, version: int) -> None:
        before = kept()
        answer = self.peers[who].reset(name, version)
        known = self.known.get(name)
        if known is None:
            assert answer.error == "NotFound", answer
        elif who not in {known.owner, "carol"}:
            assert answer.error == "NoPermission", answer
        elif version > 1:
            assert answer.error == "NotFound", answer
        else:
            assert answer.properties()["Version"] == version
            known.edited, known.version = False, version
            return
        assert kept() == before

    @rule(who=WHO, name=NAMES, lazy=st.booleans())
    def remove(self, who: str, name: str, *, lazy: bool) -> None:
        before = kept()
        answer = self.peers[who].remove(name, lazy=lazy)
        known = self.known.get(name)
        if known is None:
            assert answer.error == "NotFound", answer
        elif who not in {known.owner, "carol"}:
            assert answer.error == "NoPermission", answer
        else:
            assert answer.properties()["State"] == "removed"
            del self.known[name]
            return
        assert kept() == before

    @rule(who=WHO, name=NAMES)
    def look(self, who: str, name: str) -> None:
        before = kept()
        listed = self.peers[who].list().listed()
        assert set(listed) == set(self.known)
        for each, known in self.known.items():
            assert ("Source" in listed[each]) == (who in {known.owner, "carol"})
        answer = self.peers[who].call("Status", "s", (name,))
        assert (answer.error == "") == (name in self.known)
        assert kept() == before

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        Path("/usr/src", self.known[name].base, "motd").write_text("edited")
        self.known[name].edited = True

    @invariant()
    def every_base_shows_what_it_should(self) -> None:
        at = {known.base: known for known in self.known.values()}
        for base in BASES:
            text = "base"
            if (known := at.get(base)) is not None:
                text = known.text if known.version else "base"
                text = "edited" if known.edited else text
            assert Path("/usr/src", base, "motd").read_text() == text, base


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_nobody_changes_what_is_not_his(bus: Bus) -> None:
    bus.config.write_text("[users]\ncalls = 1000000\n")
    for base in BASES:
        bus.base(base, {"motd": "base"})
    bus.serve()
    pid = bus.processes["service"].pid
    peers = {user: Peer(user) for user in ("alice", "bob", "carol")}
    machine = type("UsersHere", (Users,), {"bus": bus, "peers": peers})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200 if LONG else 12,
            stateful_step_count=30 if LONG else 15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
    for peer in peers.values():
        peer.close()
    assert bus.processes["service"].pid == pid
    assert bus.processes["service"].poll() is None
