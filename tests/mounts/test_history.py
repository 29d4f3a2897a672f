# SPDX-License-Identifier: LGPL-2.1-or-later
"""History as operators meet it: what commands note, and that noting never stands in their way."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import pytest

from overlayd import caller, history
from tests.mounts.conftest import COMMAND, PLAY, ROOT, SOURCES, STATE, mount
from tests.mounts.processes import as_nobody, child
from tests.mounts.test_cli import run, run_json

if TYPE_CHECKING:
    from tests.mounts.conftest import World

FOLDER: Final = STATE / "overlayd"
DATABASE: Final = FOLDER / "history.db"
SOURCE: Final = SOURCES / "s"
REMOUNT_READ_ONLY: Final = 0x21


def noted() -> list[tuple[str, str, str]]:
    return [(a.verb, a.name, a.outcome) for a in history.read(DATABASE)]


def prepared(world: World, name: str = "app") -> Path:
    world.source("s", {"a": "new a"})
    return world.base(name, {"a": "base a"})


def test_life_of_an_overlay_is_noted(world: World) -> None:
    base = prepared(world)
    before = time.time()
    run("apply", "fix", SOURCE, base)
    uuid = world.manager().status("fix").record.uuid
    run("reset", "fix")
    with child("os.chdir(sys.argv[1])", base):
        run("remove", "fix", code=6)
    run("remove", "fix")
    run("remove", "fix", code=3)
    first, second, busy, removed, missing = history.read(DATABASE)
    assert noted() == [
        ("apply", "fix", "done"),
        ("reset", "fix", "done"),
        ("remove", "fix", "busy"),
        ("remove", "fix", "done"),
        ("remove", "fix", "not-found"),
    ]
    for attempt in (first, second, removed):
        assert (attempt.uuid, attempt.target, attempt.source) == (uuid, str(base), str(SOURCE))
        assert (attempt.allowed, attempt.rule, attempt.message) == (True, "root", "")
    assert "in use" in busy.message
    assert missing.uuid == ""
    assert before <= first.at <= first.at + first.seconds <= second.at <= time.time()
    assert 0 < first.seconds < 60
    assert (first.uid, first.via, first.pid) == (0, "direct", os.getpid())
    assert first.session_id == caller.session_id()
    assert first.login_uid == caller.login_uid()
    assert first.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_environment_of_sudo_is_not_believed(world: World) -> None:
    base = prepared(world)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SUDO_UID": "4242", "SUDO_USER": "eve"}
    done = subprocess.run(
        [*COMMAND, "apply", "fix", SOURCE, base],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    assert b"4242" not in DATABASE.read_bytes()
    assert history.read(DATABASE)[0].uid == 0


def test_login_is_the_one_that_the_kernel_attests(world: World) -> None:
    base = prepared(world)
    code = (
        "import os, sys\n"
        "try: open('/proc/self/loginuid', 'w').write('4242')\n"
        "except OSError: sys.exit(77)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'overlayd', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "apply", "fix", SOURCE, base],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("the login of a process cannot be set here")
    (attempt,) = history.read(DATABASE)
    assert (attempt.login_uid, attempt.uid) == (4242, 0)
    assert attempt.session_id is not None  # the kernel gives out one with each login
    text = run("history", "--json").stdout
    assert json.loads(text)[0]["login_uid"] == 4242


def test_refusals_say_what_denied_them(world: World) -> None:
    base = prepared(world)
    config = world.source("config", {"c.toml": "[limits]\nsource_entries = 1\n"}) / "c.toml"
    run("apply", "fix", SOURCE, "/etc", code=5)
    run("apply", "--", "-x", SOURCE, base, code=5)
    run("apply", "fix", SOURCE, base, "--config", config, code=8)
    run("apply", "fix", "", base, code=5)
    run("apply", "fix", SOURCE, base, "--os", "other", code=None)
    found = history.read(DATABASE)
    assert [a.outcome for a in found[:4]] == ["refused", "refused", "space", "refused"]
    assert [a.rule for a in found[:4]] == ["policy", "policy", "limit", "policy"]
    assert len(found) == 5
    assert not any(a.allowed for a in found[:4])
    assert found[0].target == "/etc"
    assert all(a.message for a in found)


def test_usage_errors_dry_runs_and_looking_are_not_noted(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base, "--dry-run")
    run("apply", "fix", SOURCE, "/etc", "--dry-run", code=5)
    run("apply", "fix", SOURCE, base, "--read-only", "--size", "1M", code=2)
    run("apply", "fix", code=2)
    run("remove", code=2)
    run("reset", "fix", "--to", "x", code=2)
    run("list")
    run("history")
    run("report")
    run("cleanup", "--dry-run")
    run("cleanup")
    run("remove", "--all")
    assert not FOLDER.exists()


def test_batch_and_remove_all_are_noted_one_by_one(world: World) -> None:
    world.source("s", {"a": "new a"})
    names = ("one", "two", "bad")
    tables = [
        f'[[overlay]]\nname = "{name}"\nsource = "{SOURCE}"\n'
        f'target = "{world.base(name, {"a": "x"}) if name != "bad" else "/etc"}"\n'
        for name in names
    ]
    file = SOURCES / "batch.toml"
    file.write_text("".join(tables))
    run("batch", file, "--atomic", code=5)
    found = history.read(DATABASE)
    assert {(a.verb, a.outcome) for a in found} == {("apply", "refused")}
    assert [a.name for a in found] == list(names)
    assert {a.name: a.rule for a in found} == {"one": "batch", "two": "batch", "bad": "policy"}
    run("batch", file, code=5)
    assert [(a.name, a.outcome) for a in history.read(DATABASE)[3:]] == [
        ("one", "done"),
        ("two", "done"),
        ("bad", "refused"),
    ]
    assert all(a.seconds > 0 for a in history.read(DATABASE)[3:])
    with child("os.chdir(sys.argv[1])", PLAY / "two"):
        run("remove", "--all", code=6)
    assert noted()[6:] == [("remove", "one", "done"), ("remove", "two", "busy")]


def test_cleanup_notes_what_it_removed(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    subprocess.run(["umount", base], check=True)
    run("cleanup")
    assert noted() == [("apply", "fix", "done"), ("cleanup", "fix", "done")]
    assert "its mount is gone" in history.read(DATABASE)[1].message
    summary = cast("dict[str, float]", run_json("report"))
    time.sleep(0.1)
    assert run_json("report") == summary  # its time in use has ended
    assert summary["seconds_in_use"] > 0


def make_full() -> None:
    mount("tiny", FOLDER, "tmpfs", "mode=700,size=64k")
    with (FOLDER / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            return


def make_impossible(how: str) -> None:
    """Bring the place of the history into a state in which nothing can be noted."""
    if how == "no directory for it":
        mount("empty", STATE, "tmpfs", "mode=755,nr_inodes=1")
        return
    if how == "a link in the directory's place":
        (STATE / "elsewhere").mkdir(mode=0o700)
        FOLDER.symlink_to("elsewhere")
        return
    FOLDER.mkdir(mode=0o700)
    if how == "full disk":
        make_full()
    elif how == "read-only disk":
        mount("tiny", FOLDER, "tmpfs", "mode=700")
        DATABASE.touch(0o600)
        mount("tiny", FOLDER, "none", flags=REMOUNT_READ_ONLY)
    elif how == "directory":
        DATABASE.mkdir()
    elif how == "link":
        (STATE / "victim").write_text("precious")
        DATABASE.symlink_to(STATE / "victim")
    elif how == "another's":
        os.chown(FOLDER, 65534, 65534)
    elif how == "writable by all":
        FOLDER.chmod(0o777)
    else:
        assert how == "file in the directory's place"
        FOLDER.rmdir()
        FOLDER.write_text("precious")


IMPOSSIBLE: Final = [
    *("full disk", "read-only disk", "directory", "link", "another's", "writable by all"),
    *("no directory for it", "a link in the directory's place", "file in the directory's place"),
]


@pytest.mark.parametrize("how", IMPOSSIBLE)
def test_overlays_come_and_go_where_nothing_can_be_noted(world: World, how: str) -> None:
    base = prepared(world)
    make_impossible(how)
    for arguments in (("apply", "fix", SOURCE, base), ("reset", "fix"), ("remove", "fix")):
        done = run(*arguments)
        assert done.stderr == ""
    assert (base / "a").read_text() == "base a"
    assert world.leftovers() == []
    assert run("remove", "fix", code=3).stderr.startswith("overlayd: there is no overlay 'fix'\n")
    if how == "link":
        assert (STATE / "victim").read_text() == "precious"
    if how == "a link in the directory's place":
        assert os.listdir(STATE / "elsewhere") == []
    done = run("history", code=None)
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr


def test_disk_that_fills_up_keeps_what_was_noted_and_later_goes_on(world: World) -> None:
    del world
    FOLDER.mkdir(mode=0o700)
    mount("tiny", FOLDER, "tmpfs", "mode=700,size=128k")
    attempt = history.Attempt(
        *(1.0, 0, None, 1, "direct", "apply", "fix", "/usr/x" * 300, "/s", "u"),
        *(True, "root", "", "done", "", 0.1),
    )
    results = [history.note(attempt) for _ in range(100)]
    assert results[0]
    assert not results[-1]
    assert len(history.read()) == sum(results)
    mount("tiny", FOLDER, "none", "size=1m", flags=0x20)
    assert history.note(attempt)
    assert len(history.read()) == sum(results) + 1


def test_damaged_history_is_said_and_begins_anew_with_the_next_change(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    DATABASE.write_bytes(b"garbage " * 4096)
    for command in ("history", "report"):
        done = run(command, code=5)
        error, hint = done.stderr.splitlines()
        assert "damaged" in error
        assert "mv " in hint
    run("remove", "fix")
    assert noted() == [("remove", "fix", "done")]


def test_doctor_says_that_history_cannot_be_read_and_works_on(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    assert "history" not in run("doctor").stdout
    DATABASE.write_bytes(b"garbage " * 4096)
    assert "note: history: " in run("doctor").stdout
    DATABASE.unlink()
    DATABASE.symlink_to("elsewhere")
    assert "not a regular file" in run("doctor").stdout


def test_held_history_delays_a_command_and_nothing_more(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    code = (
        "import sqlite3; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN EXCLUSIVE')"
    )
    with child(code, DATABASE):
        start = time.monotonic()
        run("remove", "fix")
        assert time.monotonic() - start < 5
    assert noted() == [("apply", "fix", "done")]
    assert world.leftovers() == []


def test_broken_configuration_does_not_stop_noting_a_removal(world: World) -> None:
    base = prepared(world)
    config = world.source("config", {"c.toml": '[history]\ndays = 1\nsize = "256K"\n'}) / "c.toml"
    run("apply", "fix", SOURCE, base, "--config", config)
    config.write_text("broken [")
    run("remove", "fix", "--config", config)
    assert noted() == [("apply", "fix", "done"), ("remove", "fix", "done")]


def test_journal_gets_every_attempt(world: World) -> None:
    base = prepared(world)
    Path("/run/systemd/journal").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("/run/systemd/journal/socket")
        channel.settimeout(10)
        run("apply", "fix", SOURCE, base)
        entry = channel.recv(1 << 17)
    assert f"MESSAGE_ID={history.MESSAGE_ID}\n".encode() in entry
    assert b"OVERLAYD_VERB=apply\n" in entry
    assert b"OVERLAYD_OUTCOME=done\n" in entry
    run("remove", "fix")  # whose journal has gone


EVIL: Final = "\x1b[31mred\x07\u202e\nx"


def test_escapes_in_names_and_paths_do_not_reach_the_terminal(world: World) -> None:
    base = world.base(f"t{EVIL}", {"a": "x"})
    world.source("s", {"a": "y"})
    run("apply", "fix", SOURCE, base)
    run("apply", EVIL, SOURCE, base, code=5)
    run("remove", os.fsdecode(b"\xff" + EVIL.encode()), code=5)
    for command in (("history",), ("report",), ("history", EVIL)):
        done = run(*command)
        assert all(char == "\n" or char.isprintable() for char in done.stdout), done.stdout
        assert done.stderr == ""
    assert "\\x1b[31mred" in run("history").stdout
    found = cast("list[dict[str, object]]", run_json("history", EVIL))
    assert [(a["name"], a["outcome"]) for a in found] == [(EVIL, "refused")]
    for wrong in (("history", "--since", EVIL), ("history", "--user", EVIL)):
        done = run(*wrong, code=None)
        assert done.returncode in {2, 3}
        assert all(char == "\n" or char.isprintable() for char in done.stderr)


def test_history_is_filtered_and_shown_with_the_latest_last(world: World) -> None:
    base = prepared(world)
    for _ in range(2):
        run("apply", "fix", SOURCE, base)
        run("remove", "fix")
    run("remove", "other", code=3)
    lines = run("history").stdout.splitlines()
    assert re.fullmatch(r"WHEN +USER +WHAT +NAME +OUTCOME +TOOK +TARGET", lines[0])
    assert len(lines) == 6
    assert re.search(r" root +remove +other +not-found +\d+\.\d\d s +-$", lines[-1])
    assert len(run("history", "fix").stdout.splitlines()) == 5
    lines = run("history", "--limit", "2").stdout.splitlines()
    assert lines[0] == "the last 2; there are earlier ones (--limit)"
    assert len(lines) == 4
    assert len(cast("list[object]", run_json("history", "--limit", "3"))) == 3
    assert run("history", "--user", "nobody").stdout == "nothing was noted\n"
    assert run_json("history", "--since", "2100-01-01") == []
    assert len(cast("list[object]", run_json("history", "--user", "root", "--since", "1h"))) == 5
    assert "not a time" in run("history", "--since", "whenever", code=2).stderr
    assert "no user" in run("history", "--user", "no-such-user", code=3).stderr


def test_history_as_json_is_as_documented(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    (entry,) = cast("list[dict[str, object]]", run_json("history"))
    assert list(entry) == list(history.Attempt.__dataclass_fields__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(entry["at"]))
    assert entry["allowed"] is True


def test_report_sums_up(world: World) -> None:
    base = prepared(world)
    assert run("report").stdout == "nothing was noted\n"
    run("apply", "fix", SOURCE, base)
    run("apply", "fix", SOURCE, base, code=4)
    text = run("report").stdout
    assert re.search(r"^root +2 +1 +1 +\d+ s$", text, re.MULTILINE)
    assert re.search(rf"^{base} +2 +1 +1 +\d+ s$", text, re.MULTILINE)
    assert re.search(r"^exists +1$", text, re.MULTILINE)
    assert re.search(r"^\d{4}-\d\d-\d\d  #+ 1$", text, re.MULTILINE)
    answer = cast("dict[str, object]", run_json("report", "--user", "root", "--since", "today"))
    assert answer["by_outcome"] == {"done": 1, "exists": 1}
    assert run("report", "--user", "nobody").stdout == "nothing was noted\n"


@pytest.mark.parametrize(("encoding", "mark"), [("ascii", "#"), ("latin-1", "#"), ("utf-8", "█")])
def test_chart_fits_the_terminal_and_is_of_what_its_encoding_has(
    world: World, encoding: str, mark: str
) -> None:
    run("apply", "fix", SOURCE, prepared(world))
    done = subprocess.run(
        [*COMMAND, "report"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": encoding,
            "COLUMNS": "40",
        },
        check=True,
        capture_output=True,
    )
    bar = done.stdout.decode(encoding).splitlines()[-1]
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d  {mark}{{26}} 1", bar)


def test_others_than_root_are_told_the_way(world: World) -> None:
    base = prepared(world)
    run("apply", "fix", SOURCE, base)
    for command in ("history", "report"):
        done = as_nobody(command)
        assert done.returncode == 10  # without a bus, and so without the service
        assert done.stdout == ""
        assert "only root" in done.stderr
    done = as_nobody("remove", "fix")
    assert done.returncode == 10
    assert len(json.loads(run("history", "--json").stdout)) == 1
