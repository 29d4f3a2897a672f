# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the pytest plugin does with a failure: keep it, say how to see it again, wait with --sit."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness import artefacts
from harness.errors import HarnessError
from harness.guard import Verdict
from harness.session import STATE, case_of, name_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.guard import Guard


VERDICT: Final = pytest.StashKey[Verdict]()
"""Of a test: what its machines logged."""
FAILED: Final = pytest.StashKey[bool]()
_KEPT: Final = pytest.StashKey[dict[str, "Kept"]]()


@dataclass(frozen=True)
class Kept:
    """What was kept of a failure; *place* is empty if nothing could be."""

    place: str
    reproduce: str
    text: str
    verdict: Verdict


def keep(item: pytest.Item, when: str, error: str, verdict: Verdict) -> Kept:
    """Keep what there is to know of a failure in the part *when* of a test, and wait with --sit.

    Done once for each part: it is called while the machine is there, and when pytest reports it.
    """
    done = item.stash.setdefault(_KEPT, {})
    if when not in done:
        done[when] = _keep(item, when, error, verdict)
    return done[when]


def _keep(item: pytest.Item, when: str, error: str, verdict: Verdict) -> Kept:
    config, case = item.config, case_of(item)
    command = config.getini("harness_command") or "python -m pytest"
    again = artefacts.reproduce(command, case, item.nodeid, _options(config))
    if case is None:
        return Kept("", again, f"again by: {again}", verdict)
    state = config.stash[STATE]
    guard = next(reversed(state.guards_of(item)), None)
    name = f"{name_of(item)} {case.id}" + (" teardown" if when == "teardown" else "")
    place = str(artefacts.folder(config.getoption("--artefacts"), name))
    texts = {
        "error.txt": error,
        "findings.txt": str(verdict),
        "mountinfo.before": guard.before if guard is not None else "",
        "reproduce.txt": f"{again}\n",
    }
    answers: Sequence[Mapping[str, str | Sequence[str]]] = []
    if guard is not None:
        answers = item.ihook.pytest_harness_collect(machine=guard.machine)
    try:
        artefacts.collect(
            Path(place),
            guard.machine if guard is not None else None,
            texts={name: text for name, text in texts.items() if text},
            commands={name: command for answer in answers for name, command in answer.items()},
        )
    except (OSError, HarnessError) as problem:
        kept = Kept("", again, f"again by: {again}\nnothing kept: {problem}", verdict)
    else:
        kept = Kept(place, again, f"again by: {again}\nkept in: {place}", verdict)
    if guard is not None and config.getoption("--sit") and not state.sat:
        state.sat = True
        _sit(item, guard, error, again)
    return kept


def _options(config: pytest.Config) -> list[str]:
    accel = config.getoption("--accel")
    return [] if accel == "auto" else [f"--accel={accel}"]


def _sit(item: pytest.Item, guard: Guard, error: str, again: str) -> None:
    """Keep the machine until the developer has seen enough."""
    enter = item.config.stash[STATE].provider.enter(guard.machine)
    text = (
        f"\n\n{error}\n\n{item.nodeid} failed; its machine waits.\n"
        f"  enter it: {enter}\n  again by: {again}\n"
    )
    item.session.shouldstop = "--sit"
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        sys.stderr.write(text)
        with suppress(KeyboardInterrupt, EOFError):
            if sys.stdin is not None and sys.stdin.isatty():
                input("  Enter ends it. ")
            else:
                sys.stderr.write("  Ctrl-C ends it.\n")
                sys.stderr.flush()
                threading.Event().wait()
