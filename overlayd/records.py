# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records as JSON, read as if somebody else had written them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, TypeVar

from overlayd.errors import RefusedError
from overlayd.model import (
    DIRECTORIES,
    FLAGS,
    UUID,
    Layer,
    Options,
    Phase,
    Record,
    Scope,
    Tree,
    check_name,
    check_writable_dir,
    is_within,
)

if TYPE_CHECKING:
    from enum import StrEnum

SCHEMA: Final = 1
_MAX_NUMBER: Final = 1 << 64
_MAX_PATH: Final = 4096
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode

_E = TypeVar("_E", bound="StrEnum")


class RecordError(Exception):
    """A record that cannot be believed, and why."""


class _Reader:
    """Typed access to one JSON object; errors say which attribute of which object."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise RecordError(f"{where or 'it'} is not an object")
        self._value = value
        self._where = where

    def _get(self, key: str) -> object:
        try:
            return self._value[key]
        except KeyError:
            raise self.error(key, "is missing") from None

    def error(self, key: str, reason: str) -> RecordError:
        where = f"{self._where}.{key}" if self._where else key
        return RecordError(f"attribute '{where}' {reason}")

    def number(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER:
            return value
        raise self.error(key, "must be a whole number from 0")

    def number_or_none(self, key: str) -> int | None:
        return None if self._get(key) is None else self.number(key)

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if isinstance(value, bool):
            return value
        raise self.error(key, "must be true or false")

    def string(self, key: str) -> str:
        value = self._get(key)
        if isinstance(value, str) and len(value) <= _MAX_PATH and _can_be_named(value):
            return value
        raise self.error(key, "must be a string")

    def string_if_there(self, key: str) -> str:
        """Return a string that records of an earlier release do not have."""
        return self.string(key) if key in self._value else ""

    def string_or_none(self, key: str) -> str | None:
        return None if self._get(key) is None else self.string(key)

    def below_usr(self, key: str) -> str:
        path = self.string(key)
        if is_within(path, "/usr") and not {"", ".", ".."} & set(path.split("/")[1:]):
            return path
        raise self.error(key, "must be a path under /usr")

    def choice(self, key: str, kind: type[_E]) -> _E:
        try:
            return kind(self.string(key))
        except ValueError:
            raise self.error(key, f"must be one of {', '.join(kind)}") from None

    def array(self, key: str) -> list[_Reader]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self.error(key, "must be an array")
        return [_Reader(item, f"{key}[{index}]") for index, item in enumerate(value)]

    def directories_if_there(self, key: str) -> tuple[str, ...]:
        """Return relative paths that records of an earlier release do not have."""
        value = self._value.get(key, [])
        if isinstance(value, list) and all(map(_is_beneath, value)):
            return tuple(value)
        raise self.error(key, "must be an array of relative paths")

    def object_or_none(self, key: str) -> _Reader | None:
        value = self._get(key)
        return None if value is None else _Reader(value, key)


def _can_be_named(text: str) -> bool:
    """Whether the kernel takes *text*: without NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def _is_beneath(value: object) -> bool:
    """Whether *value* is a path that cannot lead out of where it begins."""
    if not isinstance(value, str) or len(value) > _MAX_PATH or not _can_be_named(value):
        return False
    try:
        return bool(check_writable_dir(value))
    except RefusedError:
        return False


def encode(record: Record) -> bytes:
    """Return the JSON of *record*; every path survives, UTF-8 or not."""
    return _encode(
        {
            "schema": SCHEMA,
            "uuid": record.uuid,
            "name": record.name,
            "phase": record.phase,
            "boot_id": record.boot_id,
            "owner": record.owner,
            "session_id": record.session_id,
            "scope": record.scope,
            "source": record.source,
            "target": record.target,
            "mount_point": record.mount_point,
            "entry": record.entry,
            "created_at": record.created_at,
            "options": {name: getattr(record.options, name) for name in FLAGS}
            | {DIRECTORIES: list(record.options.writable_dirs)},
            "size": record.size,
            "inodes": record.inodes,
            "layers": [
                {
                    "version": layer.version,
                    "source": layer.source,
                    "entries": layer.entries,
                    "size": layer.size,
                    "digest": layer.digest,
                }
                for layer in record.layers
            ],
            "tree": _encode_tree(record.tree),
            "pending": _encode_tree(record.pending),
            "deployment": record.deployment,
        }
    ).encode()


def _encode_tree(tree: Tree | None) -> dict[str, int] | None:
    if tree is None:
        return None
    return {
        "version": tree.version,
        "upper": tree.upper,
        "st_dev": tree.st_dev,
        "fsid": tree.fsid,
    }


def decode(data: bytes) -> Record:
    """Read the JSON of a record.

    :raises RecordError: with the reason, if it is not one of this schema.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}" if data else "empty") from None
    reader = _Reader(raw, "")
    if (schema := reader.number("schema")) != SCHEMA:
        raise RecordError(f"of schema {schema}, and this overlayd knows {SCHEMA}")
    options = reader.object_or_none("options")
    if options is None:
        raise reader.error("options", "must be an object")
    name = reader.string("name")
    try:
        check_name(name)
    except RefusedError as error:
        raise reader.error("name", f"is wrong: {error.message}") from None
    uuid = reader.string("uuid")
    if UUID.fullmatch(uuid) is None:
        raise reader.error("uuid", "is not a uuid")
    entry = reader.string("entry")
    if "/" in entry or entry in {".", ".."}:
        raise reader.error("entry", "must be a file name")
    return Record(
        uuid=uuid,
        name=name,
        phase=reader.choice("phase", Phase),
        boot_id=reader.string("boot_id"),
        owner=reader.number("owner"),
        session_id=reader.number_or_none("session_id"),
        scope=reader.choice("scope", Scope),
        source=reader.string("source"),
        target=reader.below_usr("target"),
        mount_point=reader.below_usr("mount_point"),
        entry=entry,
        created_at=reader.string("created_at"),
        options=Options(
            **{key: options.boolean(key) for key in FLAGS},
            writable_dirs=options.directories_if_there(DIRECTORIES),
        ),
        size=reader.number("size"),
        inodes=reader.number("inodes"),
        layers=tuple(
            Layer(
                version=layer.number("version"),
                source=layer.string("source"),
                entries=layer.number("entries"),
                size=layer.number("size"),
                digest=layer.string_if_there("digest"),
            )
            for layer in reader.array("layers")
        ),
        tree=_decode_tree(reader.object_or_none("tree")),
        pending=_decode_tree(reader.object_or_none("pending")),
        deployment=reader.string_or_none("deployment"),
    )


def _decode_tree(reader: _Reader | None) -> Tree | None:
    if reader is None:
        return None
    return Tree(
        version=reader.number("version"),
        upper=reader.number("upper"),
        st_dev=reader.number("st_dev"),
        fsid=reader.number("fsid"),
    )
