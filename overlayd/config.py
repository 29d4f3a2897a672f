# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: where it lies, how files override one another, what is accepted.

A file that cannot be understood whole is refused with file, key and reason: a limit that was
mistyped must not silently become the default.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd.errors import OverlaydError, RefusedError, from_oserror, shown
from overlayd.model import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

VENDOR: Final = Path("/usr/lib/overlayd/overlayd.toml")
LOCAL: Final = Path("/etc/overlayd/overlayd.toml")
DROP_INS: Final = Path("/etc/overlayd/overlayd.toml.d")
_DEFAULTS: Final = Path(__file__).with_name("overlayd.toml")
_MAX_BYTES: Final = 1 << 20
_USERS: Final = "users."
_MAX_DEPTH: Final = 200
"""Directory descriptors per level of a source are three; 600 stay below the usual limit of 1024."""

_MAX_DOTS: Final = 2048**2
"""The square of the dots in a line, all lines together: paths may have many, keys have one."""
_MAX_DAYS: Final = 36500
_MIN_HISTORY: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class UserLimits:
    """What each user other than root may have and do; sizes in bytes.

    ``bytes`` and ``inodes`` are what the storage of all his overlays may take together; ``calls``
    are those that the service answers in ten seconds, ``queued`` those that wait.
    """

    overlays: int
    bytes: int
    inodes: int
    source_size: int
    source_entries: int
    source_depth: int
    copies: int
    queued: int
    calls: int


class FlaggedAction(StrEnum):
    """What happens when a source holds flagged files."""

    IGNORE = "ignore"
    WARN = "warn"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be configured; sizes in bytes."""

    overlays: int
    upper_size: int
    upper_inodes: int
    source_size: int
    source_entries: int
    source_depth: int
    memory_reserve: int
    memory_share: int
    copies: int
    receive_seconds: int
    stall_seconds: int
    users: UserLimits
    critical_users: bool
    critical_trees: tuple[str, ...]
    flagged_patterns: tuple[str, ...]
    flagged_root: FlaggedAction
    flagged_users: FlaggedAction
    history_days: int
    history_size: int
    files: tuple[str, ...]


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1 << 40:
        return value
    reason = "must be a whole number from 1"
    raise ValueError(reason)


def _depth(value: object) -> int:
    if (depth := _count(value)) <= _MAX_DEPTH:
        return depth
    reason = f"must be at most {_MAX_DEPTH}"
    raise ValueError(reason)


def _percent(value: object) -> int:
    if (share := _count(value)) <= 100:  # noqa: PLR2004
        return share
    reason = "must be from 1 to 100"
    raise ValueError(reason)


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    reason = "must be true or false"
    raise ValueError(reason)


def _size(value: object) -> int:
    if isinstance(value, str):
        try:
            return parse_size(value)
        except RefusedError as error:
            reason = f"{error.message}: {error.hint}"
            raise ValueError(reason) from None
    reason = 'must be a string such as "64M"'
    raise ValueError(reason)


def _days(value: object) -> int:
    if (days := _count(value)) <= _MAX_DAYS:
        return days
    reason = f"must be at most {_MAX_DAYS}"
    raise ValueError(reason)


def _history_size(value: object) -> int:
    if (size := _size(value)) >= _MIN_HISTORY:
        return size
    reason = "must be at least 256K"
    raise ValueError(reason)


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    reason = "must be a list of strings"
    raise ValueError(reason)


def _trees(value: object) -> tuple[str, ...]:
    trees = _strings(value)
    for tree in trees:
        parts = tree.split("/")
        if parts[:2] != ["", "usr"] or any(part in {"", ".", ".."} for part in parts[1:]):
            reason = f"{shown(tree)!r} must be an absolute path under /usr without . and .."
            raise ValueError(reason)
    return trees


def _patterns(value: object) -> tuple[str, ...]:
    patterns = _strings(value)
    for pattern in patterns:
        if "/" in pattern:
            reason = f"{shown(pattern)!r} must match a file name, not a path"
            raise ValueError(reason)
    return patterns


def _action(value: object) -> FlaggedAction:
    if isinstance(value, str) and value in [*FlaggedAction]:
        return FlaggedAction(value)
    reason = f"must be one of {', '.join(FlaggedAction)}"
    raise ValueError(reason)


_KEYS: Final[Mapping[str, Mapping[str, tuple[str, Callable[[object], object]]]]] = {
    "limits": {
        "overlays": ("overlays", _count),
        "upper_size": ("upper_size", _size),
        "upper_inodes": ("upper_inodes", _count),
        "source_size": ("source_size", _size),
        "source_entries": ("source_entries", _count),
        "source_depth": ("source_depth", _depth),
        "memory_reserve": ("memory_reserve", _size),
        "memory_share": ("memory_share", _percent),
        "copies": ("copies", _count),
        "receive_seconds": ("receive_seconds", _count),
        "stall_seconds": ("stall_seconds", _count),
    },
    "users": {
        "overlays": ("users.overlays", _count),
        "bytes": ("users.bytes", _size),
        "inodes": ("users.inodes", _count),
        "source_size": ("users.source_size", _size),
        "source_entries": ("users.source_entries", _count),
        "source_depth": ("users.source_depth", _depth),
        "copies": ("users.copies", _count),
        "queued": ("users.queued", _count),
        "calls": ("users.calls", _count),
    },
    "critical": {"trees": ("critical_trees", _trees), "users": ("critical_users", _flag)},
    "flagged": {
        "patterns": ("flagged_patterns", _patterns),
        "root": ("flagged_root", _action),
        "users": ("flagged_users", _action),
    },
    "history": {"days": ("history_days", _days), "size": ("history_size", _history_size)},
}


def toml(text: str, name: str) -> dict[str, object]:
    """Return the tables of a TOML file in bounded time; *name* is the file's, for errors.

    :raises RefusedError: if it is none, or has keys of a thousand parts.
    """
    # What tomllib takes for a dotted key grows with the square of its parts, which lie on one line.
    if sum(line.count(".") ** 2 for line in text.split("\n")) > _MAX_DOTS:
        message = f"{name}: there are too many dots in a line"
        raise RefusedError(message)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{name}: not TOML: {error}"
        raise RefusedError(message) from None


def parse(text: str, name: str) -> dict[str, object]:
    """Return the settings in the TOML *text*; *name* is the file's, for errors.

    :raises RefusedError: with file, key and reason.
    """
    settings: dict[str, object] = {}
    for table, keys in toml(text, name).items():
        known = _KEYS.get(table)
        if known is None or not isinstance(keys, dict):
            message = f"{name}: [{shown(table)}]: no such table"
            raise RefusedError(message, hint=f"there are {', '.join(_KEYS)}")
        for key, value in keys.items():
            if key not in known:
                message = f"{name}: {table}.{shown(key)}: no such key"
                raise RefusedError(message, hint=f"[{table}] has {', '.join(known)}")
            field, getter = known[key]
            try:
                settings[field] = getter(value)
            except ValueError as error:
                message = f"{name}: {table}.{key}: {error}"
                raise RefusedError(message) from None
    return settings


def _read(path: Path, *, guard: bool) -> str:
    """Return the text of *path*; with *guard* only if nobody but root could have written it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    name = shown(str(path))
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            message = f"{name}: not a regular file"
            raise RefusedError(message)
        if guard and (facts.st_uid != 0 or facts.st_mode & 0o022):
            message = f"{name}: must belong to root and be writable by root alone"
            raise RefusedError(message, hint=f"chown root {name}; chmod go-w {name}")
        data = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _MAX_BYTES:
        message = f"{name}: larger than 1 MiB"
        raise RefusedError(message)
    try:
        return data.decode()
    except UnicodeDecodeError:
        message = f"{name}: not UTF-8"
        raise RefusedError(message) from None


def defaults() -> Config:
    """Return the built-in configuration.

    :raises OverlaydError: if the package is incomplete.
    """
    return _with_defaults([], guard=False)


def load(file: Path | None = None) -> Config:
    """Return the configuration: the defaults, then *file* alone if given, else the machine's.

    :raises OverlaydError: for anything that cannot be read or understood.
    """
    if file is not None:
        return _with_defaults([file], guard=False)
    drop_ins = sorted(DROP_INS.glob("*.toml")) if DROP_INS.is_dir() else []
    chain = [path for path in (VENDOR, LOCAL, *drop_ins) if path.exists()]
    return _with_defaults(chain, guard=True)


def _with_defaults(chain: Sequence[Path], *, guard: bool) -> Config:
    try:
        # Not importlib.resources, which takes longer to load than all of this.
        defaults = _DEFAULTS.read_text("utf-8")
    except OSError as error:
        raise from_oserror(error, "reading the defaults") from None
    settings = parse(defaults, "the defaults")
    used: list[str] = []
    for path in chain:
        try:
            text = _read(path, guard=guard)
        except OSError as error:
            raise from_oserror(error, f"reading {shown(str(path))}") from None
        settings.update(parse(text, shown(str(path))))
        used.append(str(path))
    users = {
        key.removeprefix(_USERS): settings.pop(key) for key in [*settings] if key.startswith(_USERS)
    }
    try:
        return Config(
            **settings,  # type: ignore[arg-type]
            users=UserLimits(**users),  # type: ignore[arg-type]
            files=tuple(used),
        )
    except TypeError as error:  # a default is missing: a fault of the package
        message = f"the defaults are incomplete: {error}"
        raise OverlaydError(message) from error
