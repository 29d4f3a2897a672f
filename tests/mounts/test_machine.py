# SPDX-License-Identifier: LGPL-2.1-or-later
"""A state machine: random commands and edits on real mounts, held against a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlayd.errors import ExistsError, NotFoundError
from tests.mounts.conftest import PLAY, WAYS, World, enter_new_world, tree

if TYPE_CHECKING:
    from pathlib import Path

    from overlayd.overlayfs import Exchange

NAMES = st.sampled_from(["n1", "n2", "n3"])
TARGETS = st.sampled_from(["t1", "t2", "t1/in", "t3"])
FILES = st.sampled_from(["a", "b", "in/c", "in/d"])
TEXTS = st.text("xyz", max_size=8)
DRAWN_WAYS = st.sampled_from([None, *WAYS])

BASE = {
    "t1": {"a": "base", "in/c": "base"},
    "t2": {"b": "base", "in/d": "base"},
    "t3": {"a": "base", "b": "base", "in/c": "base"},
}
Contents = dict[str, str]


def base_of(target: str) -> Contents:
    top, _, inner = target.partition("/")
    files = BASE[top]
    if inner:
        prefix = inner + "/"
        files = {n.removeprefix(prefix): t for n, t in files.items() if n.startswith(prefix)}
    return dict(files)


def contents(folder: Path) -> Contents:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Overlays(RuleBasedStateMachine):
    """Model: per name its target, what was applied and what shows."""

    number: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        enter_new_world()
        self.world = World()
        for name, files in BASE.items():
            tree(PLAY / name, files)
        self.model: dict[str, tuple[str, Contents, Contents]] = {}

    def taken(self, target: str) -> bool:
        others = [there for there, _, _ in self.model.values()]
        return any(
            target == other or target.startswith(other + "/") or other.startswith(target + "/")
            for other in others
        )

    @rule(name=NAMES, place=TARGETS, files=st.dictionaries(FILES, TEXTS, max_size=4))
    def apply(self, name: str, place: str, files: Contents) -> None:
        Overlays.number += 1
        source = self.world.source(f"s{Overlays.number}", files)
        if name in self.model or self.taken(place):
            try:
                self.world.apply(name, source, PLAY / place)
            except ExistsError:
                return
            raise AssertionError
        self.world.apply(name, source, PLAY / place)
        applied = base_of(place) | files
        self.model[name] = (place, applied, dict(applied))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), file=FILES, text=TEXTS)
    def edit(self, data: st.DataObject, file: str, text: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        target, _, shown = self.model[name]
        path = PLAY / target / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        shown[file] = text

    @precondition(lambda self: any(shown for _, _, shown in self.model.values()))
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        full = sorted(name for name, (_, _, shown) in self.model.items() if shown)
        name = data.draw(st.sampled_from(full))
        target, _, shown = self.model[name]
        file = data.draw(st.sampled_from(sorted(shown)))
        (PLAY / target / file).unlink()
        del shown[file]

    @rule(name=NAMES, version=st.sampled_from([0, 1]), way=DRAWN_WAYS)
    def reset(self, name: str, version: int, way: Exchange | None) -> None:
        manager = self.world.manager(way=way)
        if name not in self.model:
            try:
                manager.reset(name, version)
            except NotFoundError:
                return
            raise AssertionError
        overlay = manager.reset(name, version)
        assert overlay.record.tree is not None
        assert overlay.record.tree.version == version
        target, applied, _ = self.model[name]
        self.model[name] = (target, applied, dict(applied) if version else base_of(target))

    @rule(name=NAMES, lazy=st.booleans())
    def remove(self, name: str, *, lazy: bool) -> None:
        if name not in self.model:
            try:
                self.world.manager().remove(name, lazy=lazy)
            except NotFoundError:
                return
            raise AssertionError
        self.world.manager().remove(name, lazy=lazy)
        del self.model[name]

    @invariant()
    def what_shows_is_what_the_model_says(self) -> None:
        overlays = {o.record.name: o for o in self.world.manager().list()}
        assert set(overlays) == set(self.model)
        for name, (target, _, shown) in self.model.items():
            assert overlays[name].state == "active"
            assert contents(PLAY / target) == shown
        for name, files in BASE.items():
            if not self.taken(name):
                assert contents(PLAY / name) == files

    def teardown(self) -> None:
        if os.path.exists("/run/overlayd/records"):
            self.world.check_invariants()
        for name in self.model:
            self.world.manager().remove(name)
        assert self.world.leftovers() == []


TestOverlays = Overlays.TestCase
TestOverlays.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
