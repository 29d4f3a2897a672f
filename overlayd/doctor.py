# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is wrong on this machine, with a hint each; and whether overlayd would work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from overlayd import __version__, features, history, mountinfo, reconcile, state, subids, userns
from overlayd.errors import KernelError, OverlaydError, shown
from overlayd.examine import memory_available
from overlayd.model import State, human_size
from overlayd.observer import Observer
from overlayd.render import columns
from overlayd.store import QUARANTINE, Store, quarantined

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.config import Config
    from overlayd.model import Overlay
    from overlayd.mountinfo import Table

_NEEDED: Final = {
    "openat2": "Linux 5.6 or newer",
    "new mount API": "Linux 5.2 or newer, and root with CAP_SYS_ADMIN",
    "writable overlay": "the kernel's overlay module: modprobe overlay",
    "read-only overlay": "the kernel's overlay module: modprobe overlay",
}
_EXCHANGES: Final = ("exchange by MOVE_MOUNT_BENEATH", "exchange by propagation")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; ``fatal`` if overlayd would not work because of it."""

    text: str
    hint: str
    fatal: bool


@dataclass(slots=True)
class Report:
    """What the doctor saw; ``service`` and its version are what users other than root have."""

    kernel: str
    service: str | None = None
    features: dict[str, str | None] = field(default_factory=dict)
    depth_left: int = 0
    limits: dict[str, str] = field(default_factory=dict)
    config_files: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether overlayd would work."""
        return not any(problem.fatal for problem in self.problems)

    def as_object(self) -> dict[str, object]:
        """Return the documented JSON object."""
        return {
            "ok": self.ok,
            "kernel": self.kernel,
            "service": self.service,
            "features": {name: reason is None for name, reason in self.features.items()},
            "depth_left": self.depth_left,
            "limits": self.limits,
            "config_files": list(self.config_files),
            "problems": [
                {"text": problem.text, "hint": problem.hint, "fatal": problem.fatal}
                for problem in self.problems
            ],
        }

    def as_text(self) -> str:
        """Return the report for people."""
        rows = [("kernel", self.kernel)]
        if self.service is not None:
            rows.append(("service", self.service))
        for name, why in self.features.items():
            rows.append((name, "yes" if why is None else f"no: {why}"))
        if self.features:
            rows.append(("overlays that can be stacked at /usr", str(self.depth_left)))
        rows += self.limits.items()
        rows.append(("configuration", ", ".join(self.config_files) or "defaults"))
        lines = [columns((f"{key}:", value) for key, value in rows), ""]
        for problem in self.problems:
            kind = "problem" if problem.fatal else "note"
            lines += [f"{kind}: {problem.text}", f"  hint: {problem.hint}"]
        lines.append("overlayd works here" if self.ok else "overlayd would not work here")
        return "\n".join(lines)

    def note(self, text: str, hint: str, *, fatal: bool = False) -> None:
        """Add a problem."""
        self.problems.append(Problem(text, hint, fatal))


class Service(Protocol):
    """The service as a user has it."""

    def about(self) -> tuple[str, bool]:
        """Return its version, and whether there is a polkit."""

    def list(self) -> list[Overlay]:
        """Return the overlays."""


def examine(config: Callable[[], Config]) -> Report:
    """Look at everything, as root; never raises for what it finds."""
    report = _report()
    _features(report)
    _config(report, config)
    _world(report)
    _history(report)
    return report


def examine_service(connect: Callable[[], Service], config: Callable[[], Config]) -> Report:
    """Look at what a user can look at; never raises for what it finds.

    What the service lacks is fatal only where there can be no private overlays either.
    """
    report = _report()
    _config(report, config)
    fatal = not _private(report)
    try:
        service = connect()
        report.service, has_polkit = service.about()
        overlays = service.list()
    except OverlaydError as error:
        report.note(error.message, error.hint or "use sudo", fatal=fatal)
        return report
    if report.service != __version__:
        report.note(
            f"the service is of release {report.service}, and this command of {__version__}",
            "systemctl stop overlayd.service: the next call starts the one that is installed",
        )
    if not has_polkit:
        report.note(
            "there is no polkit, so nobody can permit what you apply",
            "install the package polkitd, or use sudo",
            fatal=fatal,
        )
    table = mountinfo.read()
    for overlay in overlays:
        if overlay.record.owner == os.getuid():
            _state(report, overlay, table)
    return report


def _report() -> Report:
    kernel = os.uname()
    return Report(f"{kernel.sysname} {kernel.release} {kernel.machine}")


def _private(report: Report) -> bool:
    """Say whether this user can have private overlays, by what works in a namespace of his."""
    found, error = _probe_inside()
    if error:
        report.features["private overlays"] = error.message
        report.note(f"no private overlays: {error.message}", error.hint or "use --allow-other")
        return False
    works = found.works("writable overlay") and found.works("read-only overlay")
    report.features = {
        "private overlays": None if works else found.results.get("writable overlay"),
        "subordinate uids": subids.missing(),
        **found.results,
    }
    report.depth_left = found.depth_left
    return works


def _probe_inside() -> tuple[features.Features, OverlaydError | None]:
    """Try what a user can do in a namespace of his own, in a child."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        answer: dict[str, object]
        try:
            try:
                userns.begin(others=False)
                found = features.probe()
                answer = {"results": found.results, "depth": found.depth_left}
            except OverlaydError as error:
                answer = {"message": error.message, "hint": error.hint}
            except BaseException as error:  # noqa: BLE001  # the child must not go on
                answer = {"message": repr(error), "hint": None}
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        told = json.loads(file.read() or b'{"message": "the child was ended", "hint": null}')
    os.waitpid(child, 0)
    if "message" in told:
        return features.Features({}, 0), KernelError(told["message"], hint=told["hint"])
    return features.Features(told["results"], told["depth"]), None


def _features(report: Report) -> None:
    try:
        found = features.probe()
    except OSError as error:
        report.note(f"no mount namespace to try things in: {error}", "run as root", fatal=True)
        return
    report.features = found.results
    report.depth_left = found.depth_left
    for name, hint in _NEEDED.items():
        if not found.works(name):
            report.note(f"{name} does not work: {found.results.get(name)}", hint, fatal=True)
    if not any(map(found.works, _EXCHANGES)):
        report.note("a live overlay cannot be exchanged", "reset will fail", fatal=True)
    if not found.depth_left:
        report.note(
            "the kernel can lay no overlay on /usr",
            "it lies on two stacked file systems already; /usr must lie on one at most",
            fatal=True,
        )


def _config(report: Report, config: Callable[[], Config]) -> None:
    try:
        loaded = config()
        available = memory_available()
    except OverlaydError as error:
        report.note(error.message, error.hint or "mend the file", fatal=True)
        return
    report.config_files = loaded.files
    report.limits = {
        "overlays": str(loaded.overlays),
        "upper_size": human_size(loaded.upper_size),
        "upper_inodes": str(loaded.upper_inodes),
        "source_size": human_size(loaded.source_size),
        "source_entries": str(loaded.source_entries),
        "source_depth": str(loaded.source_depth),
        "memory_reserve": human_size(loaded.memory_reserve),
        "memory_available": human_size(available),
    }
    if available <= loaded.memory_reserve:
        report.note(
            f"{human_size(available)} of memory is available,"
            f" and {human_size(loaded.memory_reserve)} of it is to be kept",
            "free memory, or lower limits.memory_reserve",
            fatal=True,
        )


def _history(report: Report) -> None:
    try:
        history.read(limit=1)
    except OverlaydError as error:
        report.note(f"history: {error.message}", error.hint or "see docs/history.md")


def _state(report: Report, overlay: Overlay, table: Table) -> None:
    """Say if an overlay does not show what it should."""
    record = overlay.record
    if overlay.state is State.LOST:
        report.note(
            f"{record.name}: its mount is gone from {shown(record.mount_point)}",
            f"overlayd remove {record.name}",
        )
    elif overlay.state is State.COVERED:
        by = ", ".join(shown(m.mount_point) for m in table.covering(record.mount_point))
        report.note(
            f"{record.name}: something is mounted over {shown(record.mount_point)}",
            f"findmnt {by or shown(record.mount_point)}",
        )


def _world(report: Report) -> None:
    def warn(text: str) -> None:
        report.note(text, "'overlayd cleanup' deletes what is in quarantine")

    store = Store(warn)
    try:
        overlays = Observer(warn=warn).list()
        records = store.records() if store.exists() else []
    except OverlaydError as error:
        report.note(error.message, error.hint or "see the documentation", fatal=True)
        return
    table = mountinfo.read()
    for overlay in overlays:
        record = overlay.record
        _state(report, overlay, table)
        for part in state.missing_storage(record):
            report.note(
                f"{record.name}: its storage {part} was unmounted; what needs it fails",
                f"overlayd remove {record.name}, then apply it again",
            )
    for mount in reconcile.leftovers(table, records):
        whose = (
            "'overlayd cleanup' removes it"
            if reconcile.proven(mount)
            else "it cannot be proven to be overlayd's; to end it, unmount it"
        )
        report.note(
            f"a mount tagged {shown(mount.source)} without a record: {shown(mount.mount_point)}",
            whose,
        )
    for name in quarantined():
        report.note(
            f"a record could not be believed: {QUARANTINE}/{shown(name)}",
            "'overlayd cleanup' deletes it",
        )
