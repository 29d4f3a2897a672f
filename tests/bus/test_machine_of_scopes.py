# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two users with private overlays, and root with those that everybody sees; and commands killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
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

from tests.bus.conftest import USERS

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

WHO: Final = st.sampled_from(["alice", "bob"])
NAMES: Final = st.sampled_from(["one", "two"])
BASES: Final = ("a", "b")
LONG: Final = "OVERLAYD_LONG" in os.environ


@dataclass
class _Known:
    base: str
    text: str
    shown: str
    """What the file holds inside."""


class Scopes(RuleBasedStateMachine):
    """Applies, resets, removes and edits, in both scopes."""

    bus: Bus

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[tuple[str, str], _Known] = {}
        self.roots: dict[str, str] = {}

    def teardown(self) -> None:
        for who, name in self.own:
            self.bus.overlayd(who, "remove", name)
        for base in self.roots:
            self.bus.run("remove", f"root-{base}", "--lazy")
        assert [self.bus.holders(USERS[who]) for who in ("alice", "bob")] == [[], []]
        assert self.bus.leftovers() == []

    def beneath(self, base: str) -> str:
        """Return what everybody sees."""
        return self.roots.get(base, "base")

    @rule(who=WHO, name=NAMES, base=st.sampled_from(BASES), text=st.sampled_from("xyz"))
    def apply(self, who: str, name: str, base: str, text: str) -> None:
        source = self.bus.source_of(who, f"s{text}", {"motd": text})
        taken = (who, name) in self.own or any(
            known.base == base for (whose, _), known in self.own.items() if whose == who
        )
        code = 4 if taken else 0
        self.bus.overlayd(who, "apply", name, source, f"/usr/src/{base}", code=code)
        if not taken:
            self.own[who, name] = _Known(base, text, text)

    @rule(who=WHO, name=NAMES, version=st.sampled_from(["base", "applied"]))
    def reset(self, who: str, name: str, version: str) -> None:
        if (known := self.own.get((who, name))) is None:
            # 10: there is no service that could have one of that name.
            self.bus.overlayd(who, "reset", name, code=10)
            return
        self.bus.overlayd(who, "reset", name, "--to", version)
        known.shown = known.text if version == "applied" else self.beneath(known.base)

    @precondition(lambda self: self.own)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        who, name = data.draw(st.sampled_from(sorted(self.own)))
        known = self.own[who, name]
        # As a file of somebody else's cannot be written to, it is replaced.
        script = f"cd /usr/src/{known.base} && rm -f motd && printf edited > motd"
        self.bus.overlayd(who, "enter", name, "--", "sh", "-c", script)
        known.shown = "edited"

    @rule(who=WHO, name=NAMES)
    def remove(self, who: str, name: str) -> None:
        known = self.own.pop((who, name), None)
        self.bus.overlayd(who, "remove", name, code=10 if known is None else 0)

    @rule(base=st.sampled_from(BASES))
    def root(self, base: str) -> None:
        if self.roots.pop(base, None) is None:
            source = self.bus.source("root", {"motd": "root"})
            self.bus.run("apply", f"root-{base}", source, f"/usr/src/{base}")
            self.roots[base] = "root"
        else:
            # Private overlays may lie on it, which keep what they have.
            self.bus.run("remove", f"root-{base}", "--lazy")

    @invariant()
    def everybody_sees_what_is_his(self) -> None:
        for base in BASES:
            assert Path("/usr/src", base, "motd").read_text() == self.beneath(base)
        for who in ("alice", "bob"):
            own = {n: known for (whose, n), known in self.own.items() if whose == who}
            if not own:
                assert self.bus.holders(USERS[who]) == []
                continue
            paths = [f"/usr/src/{known.base}/motd" for known in own.values()]
            script = "for f; do cat $f; echo; done"
            seen = self.bus.overlayd(who, "enter", *own, "--", "sh", "-c", script, "sh", *paths)
            assert seen.stdout.split() == [known.shown for known in own.values()]


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_scopes_keep_out_of_each_other_s_way(bus: Bus) -> None:
    for base in BASES:
        bus.base(base, {"motd": "base"})
    machine = type("ScopesHere", (Scopes,), {"bus": bus})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60 if LONG else 3,
            stateful_step_count=25 if LONG else 8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_commands_killed_at_any_moment_leave_whole_overlays_or_none(bus: Bus) -> None:
    chance = random.Random(5)
    files = {f"file-{number}": "x" * 4096 for number in range(200)}
    base = bus.base("lib", {"motd": "base"})
    other = bus.base("other", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice", **files})
    bus.overlayd("bob", "apply", "his", bus.source_of("bob", "s", {"motd": "bob"}), base)
    bus.overlayd("alice", "apply", "kept", source, other)
    [holder] = bus.holders(USERS["alice"])
    killed, number, enough = 0, 0, 150 if LONG else 8
    while killed < enough:
        number += 1
        assert number < 10 * enough, "they end before they can be killed"
        there = "own" in names(bus, "alice")
        command = ["apply", "own", str(source), str(base)]
        if there:
            command = [["remove", "own"], ["reset", "own", "--to", "applied"]][number % 2]
        process = bus.start_overlayd("alice", *command, apart=True)
        time.sleep(chance.uniform(0.02, 0.25))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
        present = names(bus, "alice")
        assert present - {"own"} == {"kept"}
        if "own" in present:
            script = f"cat {base}/motd; ls {base} | wc -l"
            seen = bus.overlayd("alice", "enter", "own", "--", "sh", "-c", script).stdout
            assert seen in {"alice201\n", "base1\n"}, seen
    assert bus.holders(USERS["alice"]) == [holder]
    seen = bus.overlayd("bob", "enter", "his", "--", "cat", base / "motd").stdout
    assert seen == "bob"
    assert (base / "motd").read_text() == "base"
    inside = "ls /run/overlayd/records /run/overlayd/storage | grep -c -- -"
    count = bus.overlayd("alice", "enter", "kept", "--", "sh", "-c", inside).stdout
    assert int(count) == 2 * len(names(bus, "alice"))
    for name in names(bus, "alice"):
        bus.overlayd("alice", "remove", name)
    bus.overlayd("bob", "remove", "his")
    assert bus.holders(USERS["alice"]) == []


def names(bus: Bus, user: str) -> set[str]:
    """Return the names of a user's private overlays, all of which have to be active."""
    listed = json.loads(bus.overlayd(user, "list", "--json").stdout)
    assert {each["state"] for each in listed} <= {"active"}
    return {each["name"] for each in listed}
