# SPDX-License-Identifier: LGPL-2.1-or-later
"""What changes between a look and a deed: targets that are exchanged, names that are taken over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from overlayd import mountinfo, stream
from overlayd.model import SourceKind
from overlayd.stream import Entry, Header
from tests.bus.conftest import PYTHON
from tests.bus.peer import ALLOW_OTHER, Peer, directory
from tests.mounts.conftest import PLAY, tree
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bus.conftest import Bus

_EXCHANGE = """
import ctypes, sys
renameat2 = ctypes.CDLL(None).renameat2
one, other = (path.encode() for path in sys.argv[1:])
print("ready", flush=True)
while True:
    for _ in range(100):
        renameat2(-100, one, -100, other, 2)
"""


def outside() -> list[str]:
    """Return where overlays lie that is not below the playground."""
    found = [mount.mount_point for each in mountinfo.read().tagged.values() for mount in each]
    return [point for point in found if not point.startswith(f"{PLAY}/")]


def test_target_exchanged_for_a_link_never_leads_an_overlay_outside(bus: Bus) -> None:
    rounds = 20_000 if "OVERLAYD_LONG" in os.environ else 120
    bus.config.write_text("[users]\ncalls = 1000000\n")
    etc = tree(bus.source("outside", {}) / "secret", {"motd": "outside"})
    folder = bus.base("turn", {"inner/motd": "base"}) / "inner"
    link = PLAY / "turn" / "other"
    link.symlink_to(etc)
    bus.serve()
    process = subprocess.Popen(
        [*PYTHON, "-ISc", _EXCHANGE, str(folder), str(link)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONHOME": "/run/python/prefix"},
    )
    seen: dict[str, int] = {}
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Peer("alice") as alice:
            for number in range(rounds):
                target = folder if number % 2 else folder / "deeper"
                answer = alice.apply("hers", target)
                seen[answer.error] = seen.get(answer.error, 0) + 1
                assert outside() == []
                assert sorted(os.listdir(etc)) == ["motd"]
                assert (etc / "motd").read_text() == "outside"
                if answer.error:
                    assert bus.leftovers() == [], answer
                else:
                    assert not alice.remove("hers", lazy=True).error
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert seen.keys() <= {"", "Refused", "Busy", "NotFound", "Kernel"}, seen
    assert len(seen) > 1, seen
    assert bus.leftovers() == []


def test_name_that_is_taken_over_while_polkit_decides_is_not_what_was_meant(bus: Bus) -> None:
    bases: list[Path] = [bus.base(name, {"motd": "base"}) for name in ("a", "b")]
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob, Peer("carol") as carol:
        for call in ("remove", "reset"):
            assert not alice.apply("one", bases[0]).error
            polkit = bus.processes["polkit"]
            polkit.send_signal(signal.SIGSTOP)
            try:
                if call == "remove":
                    serial = carol.send("Remove", "sb", ("one", True))
                else:
                    serial = carol.send("Reset", "su", ("one", 0))
                time.sleep(0.5)
                assert not alice.remove("one").error  # her own: polkit is not asked
                with Peer("root") as root:
                    assert not root.apply("one", bases[1], {"motd": "bob"}).error
            finally:
                polkit.send_signal(signal.SIGCONT)
            assert carol.receive(serial).error == "NotFound"
            assert (bases[1] / "motd").read_text() == "bob"
            assert bob.remove("one").error == "NoPermission"
            with Peer("root") as root:
                assert not root.remove("one").error
    assert eventually(lambda: bus.leftovers() == [], 5)


def test_target_that_becomes_critical_while_polkit_decides_is_asked_about_anew(bus: Bus) -> None:
    tool = bus.base("bin", {"tool": "base"}) / "tool"
    bus.config.write_text("[critical]\nusers = true\n")
    bus.serve()
    with Peer("alice") as alice:
        number, writing = alice.open_stream()
        parts = [
            stream.pack_header(Header(SourceKind.FILE, 1, 4096)),
            stream.pack_file(Entry(b"file", 0o755, 0, size=5)),
            *(stream.pack_data(0, 5), b"alice", stream.pack_end(1, 4096)),
        ]
        os.write(writing, b"".join(parts))
        os.close(writing)
        bus.processes["polkit"].send_signal(signal.SIGSTOP)
        try:
            options = {**ALLOW_OTHER, "allow-critical": ("b", True)}
            serial = alice.begin_apply("hers", tool, number, options)
            time.sleep(0.5)
            tool.chmod(0o4755)
        finally:
            bus.processes["polkit"].send_signal(signal.SIGCONT)
        assert alice.receive(serial).error == "Busy"
        assert tool.read_text() == "base"
        assert bus.leftovers() == []


def test_name_and_place_asked_for_by_two_go_to_one_of_them(bus: Bus) -> None:
    bus.config.write_text("[users]\ncalls = 1000000\n")
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice, Peer("bob") as bob:
        for number in range(10):
            serials = []
            for peer in (alice, bob):
                reading, writing = peer.open_stream()
                os.write(writing, directory({"motd": peer.user}))
                serials.append(peer.begin_apply(f"race-{number % 2}", base, reading))
                os.close(writing)
            answers = [alice.receive(serials[0]), bob.receive(serials[1])]
            assert sorted(answer.error for answer in answers) == ["", "Exists"], answers
            winner = alice if not answers[0].error else bob
            assert (base / "motd").read_text() == winner.user
            assert not winner.remove(f"race-{number % 2}").error
    assert bus.leftovers() == []
