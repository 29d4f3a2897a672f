# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inputs to begin with, and how they are changed: what deep faults are found from.

The seeds are valid examples of each form.  A change is three numbers, so that hypothesis can draw
and shrink a list of them, and a loop without it can as well.
"""

from __future__ import annotations

import array
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jeepney import DBusAddress, HeaderFields, new_method_call
from jeepney.low_level import Endianness, parse_signature

from overlayd import config, interface, records, stream, wire
from overlayd.model import Layer, Options, Phase, Scope, SourceKind, Tree
from overlayd.stream import Entry, Header, Type
from tests.unit.conftest import UUID, make_overlay, make_record
from tests.unit.histories import attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    Change = tuple[int, int, int]

LARGEST: Final = 1 << 16
"""Bytes of an input; each fits into a socket."""
_MANY: Final = 4000
_NUMBERS: Final = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
_DIGITS: Final = re.compile(rb"[0-9]+")
_TEXTS: Final = (b"-1", b"0", b"1" * 20, b"9" * 400, b"9" * 5000, b"1e999", b"NaN", b"null")


# -- changes ---------------------------------------------------------------------------------------


def _flip(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << what % 8)]) + data[at + 1 :] if data else data


def _truncate(data: bytes, at: int, _what: int, _other: bytes) -> bytes:
    return data[:at]


def _remove(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    return data[:at] + data[at + what % 64 + 1 :]


def _insert(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    return data[:at] + what.to_bytes(2, "little") + data[at:]


def _splice(data: bytes, at: int, what: int, other: bytes) -> bytes:
    return data[:at] + other[what % (len(other) + 1) :]


def _duplicate(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    piece = data[at : at + what % 128 + 1]
    return data[:at] + piece + data[at:]


def _repeat(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    """Say a few bytes thousands of times: what is nested or added up."""
    piece = data[at : at + what % 4 + 1]
    return data[:at] + piece * (what % _MANY) + data[at:]


def _number(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    """Write one of the numbers at the ends of ranges over what is there."""
    size = (1, 2, 4, 8)[what % 4]
    value = _NUMBERS[what // 4 % len(_NUMBERS)] & ((1 << 8 * size) - 1)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _digits(data: bytes, at: int, what: int, _other: bytes) -> bytes:
    """Write another number in digits."""
    found = _DIGITS.search(data, at)
    if found is None:
        return data
    return data[: found.start()] + _TEXTS[what % len(_TEXTS)] + data[found.end() :]


_CHANGES: Final[tuple[Callable[[bytes, int, int, bytes], bytes], ...]] = (
    *(_flip, _truncate, _remove, _insert, _splice, _duplicate, _repeat, _number, _digits),
)
KINDS: Final = len(_CHANGES) + 1


def changed(
    data: bytes, changes: Sequence[Change], others: Sequence[bytes], words: Sequence[bytes]
) -> bytes:
    """Return *data* with *changes* made, which take pieces of *others* and of *words*."""
    for kind, where, what in changes:
        at = where % (len(data) + 1)
        if kind == len(_CHANGES):
            data = data[:at] + words[what % len(words)] + data[at:]
        elif kind < len(_CHANGES) and (at < len(data) or kind):
            data = _CHANGES[kind](data, at, what, others[what % len(others)])
        data = data[:LARGEST]
    return data


# -- text ------------------------------------------------------------------------------------------

CONFIG: Final = (
    Path(config.__file__).with_name("overlayd.toml").read_bytes(),
    b'[limits]\noverlays = 3\nupper_size = "1G"\nsource_depth = 200\nmemory_share = 5\n',
    b"[users]\noverlays = 1\nbytes = '2G'\n[history]\ndays = 36500\nsize = \"256K\"\n",
    b'[critical]\ntrees = ["/usr/bin", "/usr/lib/*/x"]\nusers = true\n',
    b'[flagged]\npatterns = ["*.so", "[ab]?"]\nroot = "refuse"\nusers = "ignore"\n',
    b"limits.overlays = 0x10\nlimits = { copies = 1_0 }\n",
)
TOML_WORDS: Final = (
    *(b"[", b"]", b"[[", b"{", b"}", b"=", b".", b".a", b"root.a", b'"', b'"""', b"'", b"'''"),
    *(b"\\u0000", b"\\uD800", b"\\U0001F600", b"\xff", b"\r", b"\n", b"\0", b"#", b"inf", b"true"),
    *(b"1979-05-27T07:32:00Z", b"0x1", b"\xe2\x80\xae", b"[overlay.a]\n", b"[[overlay]]\n"),
)
BATCH: Final = (
    b'[[overlay]]\nname = "fix"\nsource = "/root/fix"\ntarget = "/usr/share/app"\n',
    (
        b'[[overlay]]\nname = "a"\nsource = "s"\ntarget = "/usr/a"\nread_only = true\n'
        b'private = true\nwritable_dirs = ["x/y", "z"]\n\n'
        b'[[overlay]]\nname = "b"\nsource = "../t"\ntarget = "/usr/b"\nsize = "64M"\n'
        b"allow_other = true\ndefault_permissions = false\npreserve_owner = true\n"
    ),
    b'overlay = [{name = "c", source = "s", target = "/usr/c"}]\n',
)

_RECORD: Final = make_record(
    pending=Tree(2, 3, 4, 5),
    session_id=4,
    layers=(Layer(1, "/root/a\udcff", 3, 8192, "ab" * 32), Layer(2, "/b", 1, 0)),
    deployment="debian/0.1",
)
RECORDS: Final = (
    records.encode(make_record()),
    records.encode(_RECORD),
    records.encode(make_record(phase=Phase.DRAINING, tree=None, scope=Scope.PRIVATE)),
    records.encode(make_record(options=Options(read_only=True, writable_dirs=("a/b", "c")))),
)
JSON_WORDS: Final = (
    *(b"null", b"true", b"[", b"]", b"{", b"}", b'""', b":", b",", b"[[", b'{"":', b"1e999"),
    *(b"NaN", b"-Infinity", b'"\\ud800"', b'"\\udcff"', b'"\\u0000"', b'".."', b'"/usr/.."', b"\n"),
    *(b'"id":3', b'"done":true', b'"/"', b"18446744073709551616", b"\xff\xfe", b"\xef\xbb\xbf"),
)

MOUNTS: Final = (
    (
        b"23 1 0:21 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"
        b"24 23 0:22 / /run rw,nosuid shared:2 master:1 - tmpfs run rw,size=1024k,mode=755\n"
        b"25 23 0:23 / /usr/share/app rw - overlay overlayd:3f0c8a52-1111-4222-8333-abcdef rw\n"
        b"26 25 0:24 /a\\040b /usr/share/app/\\134x ro - tmpfs no\\043ne ro\n"
    ),
    b"1 1 0:2 / / rw - rootfs rootfs rw\n30 1 8:1 / / ro shared:1 propagate_from:3 - xfs /dev/a ro",
    b"40 1 0:50 / /usr/x rw - overlay overlayd:x rw,lowerdir=a:b\n",
)
MOUNT_WORDS: Final = (
    *(b" - ", b" - overlay overlayd:", b"\\040", b"\\777", b"\\012", b"4294967296:0", b"-1:0"),
    *(b" / / ", b"23 23 ", b"23 24 ", b"\n", b" ", b"shared:", b"\xff", b"/usr"),
)

_ANSWERED: Final = b'{"id":3,"done":true,"rc":0,"seconds":0.1,"expired":false}\n'
ANSWERS: Final = (
    b"r" + b'{"id":3,"out":"aGkK"}\n{"id":3,"err":"eA=="}\n' + _ANSWERED,
    b"r" + b'\n{"id":3,"done":true,"error":"no user","errno":2}\n',
    b"r" + b'{"started":"x"}\n{"garbage":"y"}\n{"event":"kmsg","entry":"x"}\n' + _ANSWERED,
    b"g" + b'{"id":3,"entry":{"name":"","kind":"dir","mode":493,"mtime":5,"link":""}}\n'
    b'{"id":3,"entry":{"name":"f","kind":"file","mode":420,"mtime":7,"link":""}}\n'
    b'{"id":3,"data":"aGkK"}\n'
    b'{"id":3,"entry":{"name":"l","kind":"link","mode":511,"mtime":7,"link":"/etc"}}\n'
    b'{"id":3,"entry":{"name":"d","kind":"dir","mode":448,"mtime":9,"link":""}}\n'
    b'{"id":3,"entry":{"name":"d/f","kind":"file","mode":511,"mtime":9,"link":""}}\n'
    b'{"id":3,"done":true,"skipped":["/dev/null"]}\n',
    b"g" + b'{"id":3,"entry":{"name":"","kind":"file","mode":420,"mtime":1700000000000000000}}\n'
    b'{"id":3,"data":"AAEC"}\n{"id":3,"done":true}\n',
    b"f" + b'{"id":3,"done":true}\n'
    b'{"event":"kmsg","entry":"3,10,123456,-;tmpfs: a\\\\x0a fault\\n SUBSYSTEM=x"}\n'
    b'{"event":"journal","entry":{"MESSAGE":"hi","PRIORITY":"3","_COMM":"sh",'
    b'"__MONOTONIC_TIMESTAMP":"5","X":[104,105],"Y":["a",["b"]]}}\n',
)

_HELLO: Final = b'\n{"op":"hello","nonce":"n"}\n'
REQUESTS: Final = (
    _HELLO + b'{"op":"run","id":1,"argv":["true"],"timeout":1,"env":{"A":"b"},"cwd":"/"}\n',
    _HELLO + b'{"op":"run","id":1,"argv":["cat"],"input":true,"live":true,"user":"root"}\n'
    b'{"op":"data","id":1,"data":"aGkK"}\n{"op":"end","id":1}\n{"op":"abort","id":1}\n',
    _HELLO + b'{"op":"put","id":2,"path":"/a/b"}\n'
    b'{"op":"entry","id":2,"name":"","kind":"dir","mode":448,"mtime":5}\n'
    b'{"op":"entry","id":2,"name":"f","kind":"file","mode":420,"mtime":5}\n'
    b'{"op":"data","id":2,"data":"aGkK"}\n'
    b'{"op":"entry","id":2,"name":"l","kind":"link","link":"f","mtime":5}\n{"op":"end","id":2}\n',
    _HELLO + b'{"op":"get","id":3,"path":"/"}\n{"op":"get","id":4,"path":"/none","user":"x"}\n',
    _HELLO + b'{"op":"none","id":5}\n' + _HELLO.replace(b'"n"', b'"m"') + b"[]\n{\n",
)


def any_value(random: Random, depth: int = 3) -> object:
    """Return any JSON value."""
    kind = random.randrange(9 if depth else 7)
    if kind == 7:
        return [any_value(random, depth - 1) for _ in range(random.randrange(3))]
    if kind == 8:
        return {
            random.choice(["", "version", "a"]): any_value(random, depth - 1)
            for _ in range(random.randrange(3))
        }
    texts = ["", "..", "a/b", "/usr/a", "/usr/../etc", "\0", "\ud800", "\udcff", "x" * 5000, "\n"]
    numbers = [-1, 0, 1, 1 << 63, 1 << 64, 10**400, 1.5, float("nan"), float("inf")]
    return (None, True, False, random.choice(numbers), random.choice(texts), [], {})[kind]


def any_record(random: Random) -> bytes:
    """Return a record of which some places hold something else."""
    record = json.loads(random.choice(RECORDS))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        place: object = record
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))  # type: ignore[arg-type]
            key = random.choice(keys)
            inner = place[key]  # type: ignore[index]
            if not inner or not isinstance(inner, (dict, list)) or random.random() < 0.3:
                place[key] = any_value(random)  # type: ignore[index]
                break
            place = inner
    return json.dumps(record).encode()


# -- streams ---------------------------------------------------------------------------------------


def _file(name: bytes, data: bytes = b"", size: int = 0, mode: int = 0o644) -> bytes:
    attributes = [(b"user.a", b"value"), (b"user.b", b"")] if name == b"f" else []
    head = stream.pack_file(Entry(name, mode, 7, attributes, size or len(data)))
    return head + (stream.pack_data(0, len(data)) + data if data else b"")


def _stream(entries: int, size: int, *frames: bytes, kind: SourceKind) -> bytes:
    head = stream.pack_header(Header(kind, entries, size))
    return b"".join([head, *frames, stream.pack_end(entries, size)])


_ROOT: Final = stream.pack_enter(Entry(b"root", 0o755, 5))
_LEAVE: Final = stream.pack(Type.LEAVE)
STREAMS: Final = (
    _stream(
        *(8, 3 * 4096, _ROOT, _file(b"f", b"data"), stream.pack_link(b"g", [b"f"])),
        *(_file(b"holes", size=1 << 40), stream.pack_symlink(b"l", 9, b"../x")),
        stream.pack_symlink(b"long", 9, b"y" * 4000),
        stream.pack_enter(Entry(b"d", 0o1700, -5, [(b"user.x", b"1")])),
        *(_file(b"in", b"z" * 50, mode=0o777), _LEAVE, _LEAVE),
        kind=SourceKind.DIRECTORY,
    ),
    _stream(1, 4096, _file(b"f", b"data"), kind=SourceKind.FILE),
    _stream(1, 0, _ROOT, _LEAVE, kind=SourceKind.DIRECTORY),
    _stream(
        42,
        0,
        *(_ROOT, *[stream.pack_enter(Entry(b"d", 0o755, 5))] * 41, *[_LEAVE] * 42),
        kind=SourceKind.DIRECTORY,
    ),
)
STREAM_WORDS: Final = (
    *(stream.MAGIC, _ROOT, _LEAVE, _file(b"f", b"x"), _file(b"x"), stream.pack_link(b"k", [b"f"])),
    *(stream.pack_link(b"k", [b"d", b"in"]), stream.pack_symlink(b"d", 0, b"/etc"), b"..", b"."),
    *(b"user.", b"user.overlay.opaque", b"trusted.overlay.opaque", b"/", b"\0"),
    stream.pack_enter(Entry(b"d", 0o755, 0)),
)


def any_stream(random: Random) -> bytes:
    """Return a stream of any frames, with what it announces right most of the time."""
    names = [b"a", b"b", b"d", b"e", b"f", b"in", b"\xff", b"..", b"n" * 255]
    frames, entries, depth, size = [_ROOT], 1, 1, 0
    for _ in range(random.randrange(12)):
        name, mode = random.choice(names), random.choice([0, 0o644, 0o777, 0o1777, 0o4755])
        kind = random.randrange(6)
        if kind == 0:
            frames.append(_LEAVE)
            depth -= 1
            continue
        entries += 1
        if kind == 1:
            frames.append(stream.pack_enter(Entry(name, mode, random.choice([0, -1, 1 << 62]))))
            depth += 1
        elif kind == 2:
            frames.append(stream.pack_symlink(name, 0, random.choice([b"x", b"/", b"t" * 4095])))
            size += 4096 * (len(frames[-1]) > 4000)
        elif kind == 3:
            frames.append(stream.pack_link(name, random.sample(names, random.randrange(1, 4))))
        else:
            data = bytes(random.choice([0, 1, 4096, 4097]))
            length = random.choice([0, len(data), 1 << 50, (1 << 63) - 1])
            frames.append(_file(name, data, length, mode))
            size += -(-len(data) // 4096) * 4096
    frames += [_LEAVE] * max(0, depth)
    if random.random() < 0.2:
        entries, size = random.choice([(0, 0), (entries + 1, size), (1 << 40, 1 << 50)])
    return _stream(entries, size, *frames, kind=SourceKind.DIRECTORY)


# -- messages --------------------------------------------------------------------------------------

SENDER: Final = ":1.7"
_ATTEMPT: Final = attempt(via="bus", uuid=UUID, login_uid=None)
_OVERLAY: Final = f"{interface.OVERLAYS}/{UUID.replace('-', '_')}"
_PATHS: Final = ("/", wire.PATH, interface.OVERLAYS, _OVERLAY, "/org", "/x")
_SIGNATURES: Final = (
    *("s", "b", "u", "t", "d", "x", "v", "h", "g", "o", "ay", "as", "av", "a{sv}", "a{uv}", "(ss)"),
    *("a(ss)", "a()", "()", "a(()())", "aaaaay", "a", "(", "a{vs}", "z", "vv", "(" * 40 + ")" * 40),
)
_OPTIONS: Final = (
    *("draining", "name", "uid", "since", "limit", "size", "read-only", "allow-other", "\n"),
    *("default-permissions", "allow-critical", ""),
)


def call(path: str, face: str, member: str, signature: str, body: tuple[object, ...]) -> bytes:
    """Return a call as the bus passes it on."""
    place = DBusAddress(path, bus_name=wire.NAME, interface=face or None)
    message = new_method_call(place, member, signature or None, body)
    message.header.fields[HeaderFields.sender] = SENDER
    data: bytes = message.serialise(5, fds=array.array("i"))
    return data


def _plain(kind: str) -> object:
    """Return a plain value of a type that a method takes."""
    return {"s": "fix", "t": 7, "u": 1, "b": False, "a{sv}": {"allow-other": ("b", True)}}[kind]


CALLS: Final = (
    *(
        call(
            _OVERLAY if method.place is interface.Place.OVERLAY else wire.PATH,
            *(method.interface, method.name, method.takes),
            tuple(_plain(kind) for _, kind in method.arguments),
        )
        for method in interface.METHODS
    ),
    call(wire.PATH, wire.MANAGER, "List", "a{sv}", ({"draining": ("b", True)},)),
    call(
        *(wire.PATH, wire.MANAGER, "History", "a{sv}"),
        ({"name": ("s", "x"), "uid": ("u", 0), "since": ("d", 1.5), "limit": ("u", 3)},),
    ),
)
CALL_WORDS: Final = (
    *(b"()", b"a()", b"\4a(v)\0", b"\1v\0", b"\1s\0", b"\5a{sv}\0", b"\0", b"a{sv}", b"\1d\0"),
    *(b"\xff" * 4, b"\0" * 8, *(word.encode() for word in _OPTIONS)),
    *(struct.pack("<d", value) for value in (float("nan"), float("inf"), -1e308)),
)


def _raw(random: Random, signature: str, size: int = 24) -> bytes:
    """Return a variant of *signature*, which holds anything."""
    text = signature.encode()
    numbers = [
        struct.pack("<I", random.choice([0, 1, 4, 8, 16, 1 << 20])) for _ in range(size // 4)
    ]
    return bytes([len(text)]) + text + b"\0" + b"".join(numbers)


def any_call(random: Random) -> bytes:
    """Return a call of any method, its options variants of any signature."""
    method = random.choice([each for each in interface.METHODS if "a{sv}" in each.takes])
    place = wire.PATH if random.random() < 0.9 else random.choice(_PATHS)
    options = {random.choice(_OPTIONS): ("s", "here") for _ in range(random.randrange(1, 3))}
    body = tuple(options if kind == "a{sv}" else _plain(kind) for _, kind in method.arguments)
    data = call(place, method.interface, method.name, method.takes, body)
    at = data.rfind(b"\1s\0")
    data = data[:at] + _raw(random, random.choice(_SIGNATURES))
    # The lengths of the body and of the options are made right again.
    fields = int.from_bytes(data[12:16], "little")
    start = 16 + fields + -fields % 8
    whole = len(data) - start
    data = data[:4] + whole.to_bytes(4, "little") + data[8:]
    if method.takes == "a{sv}":
        data = data[:start] + (whole - 8).to_bytes(4, "little") + data[start + 4 :]
    return data


def _properties(found: dict[str, tuple[str, object]]) -> bytes:
    data: bytes = parse_signature(list("a{sv}")).serialise(found, 0, Endianness.little)
    return data


PROPERTIES: Final = (
    _properties(wire.to_wire(make_overlay(), full=True)),
    _properties(wire.to_wire(make_overlay(), full=False)),
    _properties(wire.attempt_to_wire(_ATTEMPT)),
)
