# SPDX-License-Identifier: LGPL-2.1-or-later
"""Batch files: many applies from one TOML file, and the file that would make them again."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from overlayd import config
from overlayd.errors import InterruptedByUserError, OverlaydError, RefusedError, from_oserror, shown
from overlayd.model import (
    DIRECTORIES,
    FLAGS,
    Options,
    Request,
    Scope,
    State,
    check_name,
    check_writable_dir,
    parse_size,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from overlayd.manager import Manager, Prepared
    from overlayd.model import Overlay
    from overlayd.progress import Progress

_STRINGS: Final = ("name", "source", "target")
_PRIVATE: Final = "private"
_MAX_BYTES: Final = 8 << 20


@dataclass(slots=True)
class Outcome:
    """What became of one overlay of a batch."""

    request: Request
    overlay: Overlay | None = None
    error: OverlaydError | None = None
    seconds: float = 0.0
    """How long the work on this overlay took."""
    bystander: bool = False
    """Whether nothing was wrong with this overlay of an atomic batch, but with another."""


class Applier(Protocol):
    """Whoever can apply an overlay: a manager, or a client of the service."""

    def apply(self, request: Request, progress: Progress) -> Overlay:
        """Make an overlay."""


def read(path: Path) -> list[Request]:
    """Read a batch file; a relative source is relative to the file's directory.

    :raises RefusedError: with the table's number and the key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise from_oserror(error, f"reading {shown(str(path))}") from None
    where = shown(str(path))
    if len(data) > _MAX_BYTES:
        message = f"{where}: larger than 8 MiB"
        raise RefusedError(message)
    try:
        tables = config.toml(data.decode(), where)
    except UnicodeDecodeError as error:
        message = f"{where}: not TOML: {error}"
        raise RefusedError(message) from None
    entries = tables.pop("overlay", None)
    if tables or not isinstance(entries, list) or not entries:
        extra = f"; {', '.join(map(shown, tables))} is unknown" if tables else ""
        message = f"{where}: must hold [[overlay]] tables and nothing else{extra}"
        raise RefusedError(message, hint="'overlayd dump' writes such a file")
    folder = os.path.dirname(os.path.abspath(path))
    requests = [
        _request(entry, f"{where}: overlay {number}", folder)
        for number, entry in enumerate(entries, 1)
    ]
    seen: set[str] = set()
    for request in requests:
        if request.name in seen:
            message = f"{where}: two overlays are named {request.name!r}"
            raise RefusedError(message)
        seen.add(request.name)
    return requests


def _request(entry: object, where: str, folder: str) -> Request:
    if not isinstance(entry, dict):
        message = f"{where}: must be a table"
        raise RefusedError(message)
    texts: dict[str, str] = {}
    flags: dict[str, bool] = {}
    directories: tuple[str, ...] = ()
    size = None
    for key, value in entry.items():
        if key in _STRINGS or key == "size":
            if not isinstance(value, str) or "\0" in value:
                message = f"{where}: {key} must be a string"
                raise RefusedError(message)
            texts[key] = value
        elif key in {*FLAGS, _PRIVATE}:
            if not isinstance(value, bool):
                message = f"{where}: {key} must be true or false"
                raise RefusedError(message)
            flags[key] = value
        elif key == DIRECTORIES:
            directories = _directories(value, where)
        else:
            message = f"{where}: {shown(key)}: no such key"
            known = (*_STRINGS, "size", *FLAGS, _PRIVATE, DIRECTORIES)
            raise RefusedError(message, hint=f"there are {', '.join(known)}")
    for key in _STRINGS:
        if not texts.get(key):
            message = f"{where}: {key} is missing"
            raise RefusedError(message)
    try:
        check_name(texts["name"])
        if "size" in texts:
            size = parse_size(texts["size"])
    except RefusedError as error:
        message = f"{where}: {error.message}"
        raise RefusedError(message, hint=error.hint) from None
    if size is not None and flags.get("read_only"):
        message = f"{where}: size is the room for edits, and read_only has none"
        raise RefusedError(message)
    if not texts["target"].startswith("/"):
        message = f"{where}: target must be an absolute path"
        raise RefusedError(message)
    private = flags.pop(_PRIVATE, False)
    if private and flags.get("allow_other"):
        message = f"{where}: an overlay is either private or everybody's: allow_other"
        raise RefusedError(message)
    return Request(
        name=texts["name"],
        source=os.path.join(folder, texts["source"]),
        target=texts["target"],
        options=Options(**flags, writable_dirs=directories),
        size=size,
        private=private,
    )


def _directories(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        message = f"{where}: {DIRECTORIES} must be an array of strings"
        raise RefusedError(message)
    try:
        return tuple(map(check_writable_dir, value))
    except RefusedError as error:
        message = f"{where}: {error.message}"
        raise RefusedError(message, hint=error.hint) from None


def run(
    requests: Sequence[Request],
    applier: Callable[[], Applier],
    progress: Progress,
    *,
    jobs: int,
    atomic: Callable[[], Manager] | None = None,
) -> list[Outcome]:
    """Apply *requests*, copying *jobs* of them at a time; say what became of each.

    With *atomic* managers nothing is shown before everything is copied, and if one fails none
    stays.
    """
    outcomes = [Outcome(request) for request in requests]
    if atomic is not None:
        _atomic(outcomes, atomic, progress, jobs)
        return outcomes

    def one(outcome: Outcome) -> None:
        with _timed(outcome):
            outcome.overlay = applier().apply(outcome.request, progress)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, outcomes))
    return outcomes


@contextlib.contextmanager
def _timed(outcome: Outcome) -> Iterator[None]:
    """Add the time that this takes, and keep the error that ends it."""
    start = time.monotonic()
    try:
        yield
    except OverlaydError as error:
        outcome.error = error
    except OSError as error:
        outcome.error = from_oserror(error, f"applying {outcome.request.name}")
    finally:
        outcome.seconds += time.monotonic() - start


def _atomic(
    outcomes: Sequence[Outcome], manager: Callable[[], Manager], progress: Progress, jobs: int
) -> None:
    prepared: dict[int, Prepared] = {}

    def one(index: int) -> None:
        outcome = outcomes[index]
        if any(other.error is not None for other in outcomes):
            return
        with _timed(outcome):
            prepared[index] = manager().prepare(outcome.request, progress)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(len(outcomes))))
    failed = any(outcome.error is not None for outcome in outcomes)
    for index, outcome in enumerate(outcomes):
        if failed:
            break
        with _timed(outcome):
            outcome.overlay = prepared.pop(index).commit()
        failed = outcome.error is not None
    if not failed:
        return
    for waiting in prepared.values():
        waiting.abandon()
    for outcome in outcomes:
        if outcome.overlay is not None:
            # Lazily: somebody may have looked into it in the moment it was there.
            try:
                manager().remove(outcome.request.name, lazy=True)
            except OverlaydError as error:
                outcome.error = error
            outcome.overlay = None
        if outcome.error is None:
            message = "not applied, as another overlay of the batch failed"
            outcome.error = RefusedError(message)
            outcome.bystander = True


def dump(overlays: Sequence[Overlay]) -> str:
    """Return the batch file that makes *overlays* again, without what was edited since.

    :raises RefusedError: for a path that TOML cannot hold.
    """
    import tomli_w  # noqa: PLC0415  # only this command needs it

    tables: list[dict[str, str | bool | list[str]]] = []
    for overlay in overlays:
        record = overlay.record
        if overlay.state is State.DRAINING or not record.source:  # or it is not for us to know
            continue
        # A file that was laid into a directory was asked for with that directory as TARGET.
        table: dict[str, str | bool | list[str]] = {
            "name": record.name,
            "source": record.source,
            "target": record.target,
        }
        for key, value in table.items():
            try:
                str(value).encode()
            except UnicodeEncodeError:
                message = f"{record.name}: {key} {shown(str(value))} is not UTF-8, TOML is"
                raise RefusedError(message) from None
        table |= {flag: True for flag in FLAGS if getattr(record.options, flag)}
        if record.scope is Scope.PRIVATE:
            table[_PRIVATE] = True
        if record.options.writable_dirs:
            table[DIRECTORIES] = [*record.options.writable_dirs]
        if record.size:
            table["size"] = f"{-(-record.size // 1024)}K"
        tables.append(table)
    head = "# overlays, as 'overlayd batch' reads them; what was edited in them is not here\n"
    # One table each by hand: tomli_w writes short tables inline.
    return head + "".join(f"\n[[overlay]]\n{tomli_w.dumps(table)}" for table in tables)


def worst(outcomes: Sequence[Outcome]) -> OverlaydError | None:
    """Return the error that decides the exit code: an interruption, else the first cause."""
    errors = [o.error for o in outcomes if o.error is not None and not o.bystander]
    interrupted = [error for error in errors if isinstance(error, InterruptedByUserError)]
    return (interrupted or errors or [None])[0]
