# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may apply what, and what polkit is told of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.bus.conftest import USERS
from tests.bus.peer import ALLOW_OTHER, Peer, directory

if TYPE_CHECKING:
    from pathlib import Path

    from tests.bus.conftest import Bus

APPLY = "org.projectatomic.aptostree.usroverlay"
CRITICAL = f"{APPLY}.critical"
ALSO_CRITICAL = {**ALLOW_OTHER, "allow-critical": ("b", True)}


def unchanged(bus: Bus, base: Path) -> None:
    assert (base / "motd").read_text() == "base"
    assert bus.leftovers() == []


def test_apply_by_a_user_takes_allow_other_and_polkit_s_yes(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice:
        for options in ({}, {"allow-other": ("b", False)}):
            answer = alice.apply("hers", base, options=options)
            assert answer.error == "Refused", answer
            assert "--allow-other" in answer.text
        unchanged(bus, base)
        assert bus.told() == []  # nobody is asked about what is refused anyway
        made = alice.apply("hers", base)
        found = made.properties(1)
        assert found["Owner"] == 7001
        assert found["Source"] == "/claimed"
        assert (base / "motd").read_text() == "alice"
    bus.check_invariants()


def test_apply_that_polkit_denies_receives_no_byte_and_leaves_nothing(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("bob") as bob:
        answer = bob.apply("no-way", base)
        assert answer.error == "NoPermission", answer
        assert [told["digest"] for told in bus.told()] == [""]
        unchanged(bus, base)


def test_apply_denied_once_the_digest_is_known_leaves_nothing(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("bob") as bob:
        answer = bob.apply("later-no", base)
        assert answer.error == "NoPermission", answer
        first, second = bus.told()
        assert (first["digest"], len(second["digest"])) == ("", 64)
        unchanged(bus, base)


def test_apply_that_nobody_can_be_asked_about_is_denied(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    with Peer("alice") as alice:
        for interactive in (False, True):
            answer = alice.apply("ask-me", base, interactive=interactive)
            assert answer.error == "NoPermission", answer
            unchanged(bus, base)
        # A caller who is not to be asked is refused before anything is received.
        assert [bool(told["digest"]) for told in bus.told()] == [False, False, True]


def test_polkit_is_told_what_will_be_shown(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    files = {"motd": "x" * 5000, "run.sh": "true", "quiet": ""}
    with Peer("alice") as alice:
        answer = alice.apply("hers", base, files, source="/home/alice/there")
        layers = answer.properties(1)["Layers"]
        assert len(answer.body[2]) == 1  # type: ignore[arg-type]
        assert "run.sh" in str(answer.body[2])
    before, after = bus.told()
    digest = hashlib.sha256(directory(files)).hexdigest()
    assert {key: before[key] for key in ("action", "caller", "name", "target", "source")} == {
        "action": APPLY,
        "caller": "alice",
        "name": "hers",
        "target": str(base),
        "source": "/home/alice/there",
    }
    told = ("user", "files", "entries", "size", "digest", "flagged", "critical")
    assert {key: after[key] for key in told} == {
        "user": "7001",
        "files": "3",
        "entries": "4",
        "size": "12K",
        "digest": digest,
        "flagged": "1 flagged files: run.sh",
        "critical": "",
    }
    assert layers == [(1, "/home/alice/there", 4, 12288, digest)]


def test_flagged_files_are_refused_where_the_configuration_says_so(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.config.write_text('[flagged]\nusers = "refuse"\n')
    bus.serve()
    with Peer("alice") as alice:
        answer = alice.apply("hers", base, {"run.sh": "true"})
        assert answer.error == "Refused", answer
        assert "run.sh" in answer.text
        assert "flagged.users" in answer.text
        unchanged(bus, base)
        assert not alice.apply("hers", base, {"motd": "alice"}).error


def test_critical_target_is_root_s_alone_unless_configured(bus: Bus) -> None:
    base = bus.base("vital", {"motd": "base"})
    bus.config.write_text('[critical]\ntrees = ["/usr/src/vital"]\n')
    bus.serve()
    for user in ("alice", "carol"):
        with Peer(user) as peer:
            for options in (ALLOW_OTHER, ALSO_CRITICAL):
                answer = peer.apply("theirs", base, options=options)
                assert answer.error == "Refused", answer
                assert "critical" in answer.text
            assert "critical.users" in answer.text
    source = bus.source_of("alice", "s", {"motd": "alice"})
    said = bus.overlayd("alice", "apply", "hers", source, base, "--allow-other", code=5).stderr
    assert "only root covers it" in said
    assert "--allow-critical" not in said
    unchanged(bus, base)
    assert bus.told() == []
    with Peer("root") as root:
        assert root.apply("roots", base, options={}).error == "Refused"
        assert not root.apply("roots", base, options={"allow-critical": ("b", True)}).error
    assert bus.told() == []  # root is not asked about


def test_critical_target_is_asked_about_by_an_action_of_its_own(bus: Bus) -> None:
    base = bus.base("vital", {"motd": "base"})
    inner = bus.base("vital/inner", {"motd": "base"})
    bus.config.write_text('[critical]\ntrees = ["/usr/src/vital"]\nusers = true\n')
    bus.serve()
    with Peer("alice") as alice:
        assert alice.apply("hers", inner).error == "Refused"
        assert alice.apply("hers", inner, options=ALSO_CRITICAL).error == "NoPermission"
        unchanged(bus, base)
    with Peer("carol") as carol:
        assert not carol.apply("hers", inner, options=ALSO_CRITICAL).error
    told = bus.told()
    assert {each["action"] for each in told} == {CRITICAL}
    assert {each["critical"] for each in told} == {"/usr/src/vital/inner lies in /usr/src/vital"}
    # What the question says is what the rules of the bus see as well.
    assert [each["caller"] for each in told] == ["alice", "carol", "carol"]


def test_options_that_are_unknown_or_of_another_type_are_refused(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.serve()
    wrong: list[dict[str, tuple[str, object]]] = [
        {"preserve-owner": ("b", True)},
        {"scope": ("s", "system")},
        {"owner": ("u", 0)},
        {"owner": ("u", 2**32 - 1)},
        {"owner": ("u", USERS["bob"])},
        {"uid": ("u", 0)},
        {"allow-other": ("s", "yes")},
        {"size": ("t", 0)},
        {"size": ("u", 4096)},
        {"size": ("t", 1 << 60)},
        {"size": ("t", 4096), "read-only": ("b", True)},
        {"\x1b[2J": ("b", True)},
    ]
    with Peer("alice") as alice:
        for options in wrong:
            answer = alice.apply("hers", base, options=ALLOW_OTHER | options)
            assert answer.error == "Refused", (options, answer)
            assert "\x1b" not in answer.text
        for name in ("", "..", "a/b", "\x1b[2J", "x" * 10_000, "nul\u202e"):
            answer = alice.apply(name, base)
            assert answer.error == "Refused", (name, answer)
            assert "\x1b" not in answer.text
        for target in ("", "relative", "/etc", "/usr/../etc", "/usr//src", "/usr/src/lib/", "/"):
            answer = alice.apply("hers", target)
            assert answer.error == "Refused", (target, answer)
        unchanged(bus, base)
        assert bus.told() == []


@pytest.mark.parametrize("user", ["large", "last"])
def test_user_with_a_uid_above_2_31_is_himself_and_nobody_else(bus: Bus, user: str) -> None:
    base = bus.base("lib", {"motd": "base"})
    other = bus.base("other", {"motd": "base"})
    bus.serve()
    with Peer(user) as large, Peer("alice") as alice:
        assert not alice.apply("hers", other).error
        assert large.apply("no-way", base).error == "NoPermission"
        for call in (large.reset, large.remove):
            assert call("hers").error == "NoPermission"
        answer = large.apply("its", base)
        assert answer.properties(1)["Owner"] == USERS[user]
        assert alice.remove("its").error == "NoPermission"
        assert not large.reset("its").error
        assert "Source" in large.list().listed()["its"]
        assert not large.remove("its").error
    rows = bus.json_as("root", "history", "its")
    assert isinstance(rows, list)
    assert rows[-1]["uid"] == USERS[user]
