# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users may do with one another's overlays, and see of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from overlayd import interface, wire
from tests.bus.peer import Peer
from tests.mounts.conftest import RUN, snapshot

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

MANAGE = "org.projectatomic.aptostree.usroverlay.manage-others"
NOBODYS = "00000000-0000-4000-8000-000000000000.json.0"
OUTLINE = {"Name", "Uuid", "Target", "Owner", "Scope", "State"}


def state_of(base: Path) -> tuple[object, ...]:
    """Return all that a denied call might have changed."""
    records = {path.name: path.read_bytes() for path in (RUN / "records").iterdir()}
    table = Path("/proc/self/mountinfo").read_text()
    return snapshot(base), records, table


def made(bus: Bus, user: str, name: str) -> tuple[Path, str]:
    """Have *user* apply; return the base and the object's path."""
    base = bus.base(name, {"motd": "base"})
    with Peer(user) as peer:
        answer = peer.apply(name, base)
        assert not answer.error, answer
        return base, str(answer.body[0])


def test_reset_and_remove_are_the_owner_s_and_the_administrator_s(bus: Bus) -> None:
    bus.serve()
    base, path = made(bus, "alice", "hers")
    (base / "motd").write_text("edited")
    before = state_of(base)
    on_object = (path, wire.OVERLAY)
    with Peer("bob") as bob:
        for interactive in (False, True):
            for answer in (
                bob.reset("hers", interactive=interactive),
                bob.remove("hers", interactive=interactive),
                bob.remove("hers", lazy=True, interactive=interactive),
                bob.call("Reset", "u", (0,), interactive=interactive, at=on_object),
                bob.call("Remove", "b", (True,), interactive=interactive, at=on_object),
            ):
                assert answer.error == "NoPermission", answer
                assert state_of(base) == before
    told = [each for each in bus.told() if each["caller"] != "alice"]
    assert {(each["action"], each["caller"]) for each in told} == {(MANAGE, "bob")}
    assert {each["operation"] for each in told} == {"reset", "remove"}
    assert {(each["name"], each["owner"], each["target"]) for each in told} == {
        ("hers", "7001", str(base))
    }
    with Peer("carol") as carol:
        assert carol.reset("hers").properties()["Version"] == 1
        assert (base / "motd").read_text() == "alice"
        assert not carol.call("Reset", "u", (0,), at=on_object).error
        assert (base / "motd").read_text() == "base"
        assert carol.remove("hers").properties()["State"] == "removed"
    asked = len(bus.told())
    _, path = made(bus, "alice", "mine")
    asked += 2
    with Peer("alice") as alice:
        assert not alice.reset("mine", 0).error
        on_object = (path, wire.OVERLAY)
        assert not alice.call("Remove", "b", (False,), at=on_object).error
        assert alice.call("Remove", "b", (False,), at=on_object).error == "NotFound"
    assert len(bus.told()) == asked  # nobody is asked about one's own
    made(bus, "bob", "his")
    with Peer("root") as root:
        assert not root.remove("his").error
    assert bus.leftovers() == []


def test_cleanup_is_for_administrators(bus: Bus) -> None:
    bus.serve()
    made(bus, "alice", "hers")
    junk = RUN / "quarantine" / NOBODYS
    junk.parent.mkdir(exist_ok=True)
    junk.write_text("junk")
    for user in ("alice", "bob"):
        with Peer(user) as peer:
            for dry in (True, False):
                assert peer.call("Cleanup", "b", (dry,)).error == "NoPermission"
    assert junk.exists()
    assert {each["operation"] for each in bus.told() if each["action"] == MANAGE} == {"cleanup"}
    with Peer("carol") as carol:
        (planned,) = carol.call("Cleanup", "b", (True,)).body
        assert NOBODYS in str(planned)
        assert junk.exists()
        assert carol.call("Cleanup", "b", (False,)).body == (planned,)
    assert not junk.exists()
    assert "hers  active" in bus.overlayd("bob", "list").stdout


def test_others_see_name_target_owner_and_state_only(bus: Bus) -> None:
    bus.serve()
    _, path = made(bus, "alice", "hers")
    everything = {name for name, _ in interface.OVERLAY_PROPERTIES}
    properties = (path, interface.PROPERTIES)
    for user, expected in (
        ("alice", everything),
        ("carol", everything),
        ("root", everything),
        ("bob", OUTLINE),
    ):
        with Peer(user) as peer:
            objects = peer.call("GetManagedObjects", at=(wire.PATH, interface.OBJECTS)).body[0]
            assert isinstance(objects, dict)
            views = {
                "list": peer.list().listed()["hers"],
                "status": peer.call("Status", "s", ("hers",)).properties(),
                "all": peer.call("GetAll", "s", (wire.OVERLAY,), at=properties).properties(),
                "objects": objects[path][wire.OVERLAY],
            }
            for what, view in views.items():
                assert set(view) == expected, (user, what)
            for name in everything:
                got = peer.call("Get", "ss", (wire.OVERLAY, name), at=properties)
                assert (got.error == "") == (name in expected), (user, name, got)
                if got.error:
                    assert got.error == "NotFound"
                    assert "claimed" not in got.text
    # Looking asks polkit without anybody being asked, and only about what is not one's own.
    looks = [told for told in bus.told() if told["operation"] == "look"]
    assert {told["caller"] for told in looks} == {"bob", "carol"}
    seen = bus.overlayd("bob", "status", "hers").stdout
    assert "claimed" not in seen
    assert "claimed" in bus.overlayd("alice", "status", "hers").stdout
    assert "claimed" in bus.overlayd("carol", "status", "hers").stdout


def test_history_of_others_is_an_outline(bus: Bus) -> None:
    bus.serve()
    made(bus, "alice", "hers")
    with Peer("bob") as bob:
        assert bob.remove("hers").error == "NoPermission"
        assert bob.apply("no-way", bus.base("other", {"a": "b"})).error == "NoPermission"

    def seen(user: str, **options: tuple[str, object]) -> list[dict[str, object]]:
        with Peer(user) as peer:
            answer = peer.call("History", "a{sv}", (options,))
            assert not answer.error, answer
            found = answer.body[0]
            assert isinstance(found, list)
            return [{key: value for key, (_, value) in each.items()} for each in found]

    def told(user: str) -> list[tuple[object, ...]]:
        return [
            (each["verb"], each["name"], each["uid"], each["outcome"], each["source"] != "")
            for each in seen(user)
        ]

    hers = ("apply", "hers", 7001, "done")
    removal = ("remove", "hers", 7002, "no-permission")
    denied = ("apply", "no-way", 7002, "no-permission")
    assert told("root") == [(*hers, True), (*removal, False), (*denied, True)]
    assert told("alice") == [(*hers, True), (*removal, False), (*denied, False)]
    # Of his own attempt he sees only what he may see of the overlay.
    assert told("bob") == [(*hers, False), (*removal, False), (*denied, True)]
    for each in seen("bob"):
        if each["uid"] != 7002:
            assert (each["digest"], each["message"], each["uuid"], each["pid"]) == ("", "", "", 0)
    own = {str(each["name"]): each for each in seen("bob", uid=("u", 7002))}
    assert set(own) == {"hers", "no-way"}
    assert own["no-way"]["pid"] == os.getpid()
    assert own["no-way"]["allowed"] is False
    assert [each["name"] for each in seen("bob", limit=("u", 1))] == ["no-way"]
    assert seen("bob", name=("s", "' OR 1 --")) == []
    with Peer("bob") as bob:
        for wrong in ({"name": ("u", 1)}, {"x": ("s", "")}, {"limit": ("d", 1.0)}):
            assert bob.call("History", "a{sv}", (wrong,)).error == "Refused", wrong
        for odd in (("d", float("nan")), ("d", float("inf")), ("d", -1e300)):
            assert bob.call("History", "a{sv}", ({"since": odd},)).error in {"", "Refused"}, odd
