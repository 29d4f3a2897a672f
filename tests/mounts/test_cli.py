# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line as users and scripts meet it: exit codes, text, JSON, signals, terminals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from unittest import mock

import click
import pytest

import overlayd
from overlayd import mountinfo
from overlayd.cli import app, main
from tests.mounts.conftest import COMMAND, PLAY, ROOT, RUN, SOURCES, mount, snapshot
from tests.mounts.processes import as_nobody, child, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.mounts.conftest import World

FILES: Final = {"a": "base a", "sub/b": "base b"}
NEW: Final = {"a": "new a", "sub/c": "new c"}
BASE: Final = PLAY / "app"
SOURCE: Final = SOURCES / "s"
ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: an interpreter's start costs more than the command."""
    command = ["overlayd", *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    done = subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())
    if code is not None:
        assert done.returncode == code, done
    return done


def run_json(*arguments: str | Path) -> object:
    """Run the command line with --json and return what it printed."""
    return json.loads(run(*arguments, "--json").stdout)


def start(
    *arguments: str | Path, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start the command line."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, stdout=stdout, stderr=stderr, text=True
    )


def shell(
    script: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a piece of bash in which ``overlayd`` is the command line; *arguments* are $1 and on."""
    return subprocess.run(
        [
            "bash",
            "-c",
            f'overlayd() {{ "$PYTHON" -m overlayd "$@"; }}\n{script}',
            "bash",
            *arguments,
        ],
        env={**ENVIRONMENT, "PYTHON": sys.executable} | environment,
        capture_output=True,
        check=False,
    )


def applied(world: World, name: str = "fix", **options: bool) -> Path:
    base = world.base(name if name != "fix" else "app", FILES)
    world.apply(name, world.source("s", NEW), base, size=None, manager=None, **options)
    return base


def mounted_at(path: Path) -> mountinfo.Mount:
    (found,) = [m for m in mountinfo.read().within(str(path)) if m.mount_point == str(path)]
    return found


# Exit codes and errors


def assert_error(done: subprocess.CompletedProcess[str], *words: str, hint: bool = True) -> None:
    """Check that there is one line of error, at most one of hint, and nothing else."""
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 + hint, done.stderr
    assert lines[0].startswith("overlayd: ")
    if hint:
        assert re.match(r"  hint: \S", lines[1])
    for word in words:
        assert word in done.stderr


@pytest.mark.usefixtures("world")
def test_exit_code_2_is_for_usage() -> None:
    assert_error(run("apply", "fix", code=2), "Missing argument", "overlayd apply --help")
    assert_error(run("frobnicate", code=2), "frobnicate", "overlayd --help")
    assert_error(run("list", "--frobnicate", code=2), "--frobnicate")
    assert_error(run("reset", "fix", "--to", "yesterday", code=2), "'yesterday'")


def test_exit_code_3_is_for_what_is_not_there(world: World) -> None:
    base = world.base("app", FILES)
    assert_error(run("status", "nothing", code=3), "no overlay 'nothing'", "overlayd list")
    for command in ("remove", "reset"):
        assert_error(run(command, "nothing", code=3), "no overlay 'nothing'")
    assert_error(run("apply", "fix", "/run/nothing", base, code=3), "/run/nothing", hint=False)
    assert_error(run("batch", "/run/nothing", code=3), "/run/nothing", hint=False)
    applied(world)
    assert_error(run("reset", "fix", "--to", "7", code=3), "no version 7", "0 (the base) and 1")


def test_exit_code_4_is_for_what_is_there_already(world: World) -> None:
    applied(world)
    other = world.base("other", FILES)
    assert_error(run("apply", "fix", SOURCE, other, code=4), "overlay 'fix' already")
    assert_error(run("apply", "two", SOURCE, BASE / "sub", code=4), "'fix'", str(BASE))


def test_exit_code_5_is_for_refusals(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    assert_error(run("apply", "--", "-x", source, base, code=5), "not an overlay name")
    assert_error(run("apply", "fix", source, "/etc", code=5), "not under /usr", hint=False)
    assert_error(run("apply", "fix", source, "/usr/bin", code=5), "--allow-critical")
    assert_error(run("apply", "fix", "", base, code=5), "SOURCE is empty", hint=False)
    assert_error(run("apply", "fix", source, "", code=5), "TARGET is empty", hint=False)


def test_exit_code_6_is_for_what_is_busy(world: World) -> None:
    base = applied(world)
    with child("os.chdir(sys.argv[1])", base):
        assert_error(run("remove", "fix", code=6), "in use", "--lazy")


def test_exit_code_7_is_for_what_only_root_may(world: World) -> None:
    base = applied(world)
    apply = "apply two /run /usr/src/two --preserve-owner"
    assert_error(as_nobody(*apply.split()), "takes root, or subordinate uids")
    done = as_nobody(*f"{apply} --allow-other".split())
    assert_error(done, "only root can use --preserve-owner", hint=False)
    assert done.returncode == 7
    assert (base / "a").read_text() == "new a"


@pytest.mark.parametrize("command", ["list", "remove fix", "history", "status --limits"])
def test_exit_code_10_is_for_users_when_there_is_no_bus(world: World, command: str) -> None:
    base = applied(world)
    done = as_nobody(*command.split())
    assert_error(done, "the system bus cannot be reached", "only root can")
    assert done.returncode == 10
    assert (base / "a").read_text() == "new a"


def test_user_other_than_root_gets_help_and_version(world: World) -> None:
    del world
    assert as_nobody("--version").returncode == 0
    assert "Examples" in as_nobody("apply", "--help").stdout


def test_exit_code_8_is_for_space(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    (source / "big").write_bytes(bytes(2 << 20))
    config = world.source("config", {"small.toml": '[limits]\nsource_size = "1M"\n'}) / "small.toml"
    done = run("apply", "fix", source, base, "--config", config, code=8)
    assert_error(done, "2M", "1M", "limits.source_size")


def test_exit_code_9_is_for_what_the_kernel_refuses(world: World) -> None:
    base = world.base("app", FILES)
    for level in (1, 2):
        other = world.base(f"other{level}", {})
        mount("stacked", base, "overlay", f"lowerdir={base}:{other}")
    done = run("apply", "fix", world.source("s", NEW), base, code=None)
    # The mounts on the target itself are named first; one directory further in, it is the depth.
    assert done.returncode == 5
    done = run("apply", "fix", SOURCE, base / "sub", code=9)
    assert_error(done, "two file systems at most")


def test_exit_code_1_is_for_cleanup_that_could_not_finish(world: World) -> None:
    base = applied(world)
    uuid = world.manager().status("fix").record.uuid
    (RUN / f"records/{uuid}.json").write_bytes(b"")
    with child("os.chdir(sys.argv[1])", base):
        done = run("cleanup", code=1)
        assert "some of it could not be removed" in done.stderr
        assert str(base) in done.stdout
    assert str(base) in run("cleanup").stdout
    assert run("cleanup").stdout == "nothing to clean up\n"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ("apply fix --json", 2, "usage"),
        ("status nothing --json", 3, "not-found"),
        ("--json", 2, "usage"),
        ("apply fix /run/sources/s /etc --json", 5, "refused"),
    ],
)
def test_errors_as_json(world: World, arguments: str, code: int, word: str) -> None:
    world.source("s", NEW)
    done = run(*arguments.split(), code=code)
    assert done.stdout == ""
    answer = json.loads(done.stderr)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"code", "message", "hint"}
    assert answer["error"]["code"] == word
    assert answer["error"]["message"]


def test_help_documents_every_exit_code() -> None:
    text = run("--help").stdout
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130):
        assert re.search(rf"\b{code} [a-z]", " ".join(text.split())), code


# JSON

KEYS: Final[Mapping[str, object]] = {
    "name": str,
    "uuid": str,
    "target": str,
    "source": str,
    "owner": int,
    "session_id": (int, type(None)),
    "scope": str,
    "state": str,
    "version": int,
    "created_at": str,
    "mount_point": str,
    "mount_id": (int, type(None)),
    "layers": list,
    "options": {
        "read_only": bool,
        "allow_other": bool,
        "default_permissions": bool,
        "writable_dirs": list,
    },
    "storage": {"size_bytes": int, "used_bytes": int, "inodes": int, "used_inodes": int},
    "deployment": (str, type(None)),
}


def assert_shape(value: object, *, storage: bool = True) -> dict[str, object]:
    """Check that *value* is an overlay as documented, key by key."""
    found = cast("dict[str, object]", value)
    assert set(found) == set(KEYS)
    for key, kind in KEYS.items():
        inner = found[key]
        if isinstance(kind, dict):
            if key == "storage" and not storage:
                assert inner is None
                continue
            assert isinstance(inner, dict)
            assert set(inner) == set(kind)
            assert all(type(inner[name]) is kind[name] for name in kind)
        else:
            assert isinstance(inner, cast("type", kind)), key
            assert kind is bool or not isinstance(inner, bool)
    return found


def test_json_of_every_command_is_the_overlay_as_documented(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    before = datetime.now(UTC).replace(microsecond=0)
    answer = run_json("apply", "fix", source, base, "--size", "64K", "--allow-other")
    made = assert_shape(answer)
    created = datetime.strptime(str(made["created_at"]), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert before <= created <= datetime.now(UTC)
    assert made == {
        **made,
        "name": "fix",
        "target": str(base),
        "source": str(source),
        "owner": 0,
        "scope": "system",
        "state": "active",
        "version": 1,
        "mount_point": str(base),
        "options": {
            "read_only": False,
            "allow_other": True,
            "default_permissions": False,
            "writable_dirs": [],
        },
        "deployment": None,
    }
    (layer,) = cast("list[dict[str, object]]", made["layers"])
    assert layer == {
        "version": 1,
        "source": str(source),
        "entries": 4,
        "size_bytes": 8192,
        "digest": None,
    }
    storage = cast("dict[str, int]", made["storage"])
    assert storage["size_bytes"] == 64 << 10
    assert 0 < storage["used_inodes"] < storage["inodes"]
    assert made["mount_id"] == mounted_at(base).mount_id
    listed = run_json("list")
    assert isinstance(listed, list)
    assert listed == [made]
    assert run_json("status", "fix") == made
    (base / "edit").write_bytes(bytes(20_000))
    used = cast("dict[str, int]", assert_shape(run_json("status", "fix"))["storage"])
    assert used["used_bytes"] >= 20_000
    reset = assert_shape(run_json("reset", "fix"))
    assert (reset["version"], reset["state"], reset["uuid"]) == (0, "active", made["uuid"])
    removed = assert_shape(run_json("remove", "fix"), storage=False)
    assert (removed["state"], removed["mount_id"]) == ("removed", None)
    assert run_json("list") == []


def test_json_of_a_read_only_overlay_has_storage_of_nothing(world: World) -> None:
    applied(world, read_only=True)
    found = assert_shape(run_json("status", "fix"))
    assert found["storage"] == {"size_bytes": 0, "used_bytes": 0, "inodes": 0, "used_inodes": 0}
    assert cast("dict[str, bool]", found["options"])["read_only"]


def test_json_of_what_is_lost_covered_and_draining(world: World) -> None:
    lost, covered, draining = (applied(world, name) for name in ("lost", "covered", "draining"))
    subprocess.run(["umount", lost], check=True)
    mount("foreign", covered, "tmpfs")
    with child("os.chdir(sys.argv[1])", draining) as holder:
        assert_shape(run_json("remove", "draining", "--lazy"), storage=False)
        listed = cast("list[dict[str, object]]", run_json("list", "--all"))
        states = {o["name"]: o["state"] for o in listed}
        assert states == {"lost": "lost", "covered": "covered", "draining": "draining"}
        listed = cast("list[dict[str, object]]", run_json("list"))
        assert {o["name"] for o in listed} == {"lost", "covered"}
        for overlay in listed:
            assert_shape(overlay, storage=overlay["storage"] is not None)
        holder.let_go()


def test_default_permissions_and_allow_other_are_recorded_and_change_nothing(world: World) -> None:
    base = applied(world, default_permissions=True, allow_other=True)
    options = mounted_at(base).options
    assert not {"default_permissions", "allow_other"} & options
    world.manager().reset("fix", 0)
    assert run_json("status", "fix") == {
        **cast("dict[str, object]", run_json("status", "fix")),
        "options": {
            "read_only": False,
            "allow_other": True,
            "default_permissions": True,
            "writable_dirs": [],
        },
    }


# Options


def test_dry_run_says_the_steps_and_changes_nothing_not_even_run(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    before = snapshot(PLAY), Path("/proc/self/mountinfo").read_text(), os.listdir("/run")
    done = run("apply", "fix", source, base, "--dry-run")
    assert (snapshot(PLAY), Path("/proc/self/mountinfo").read_text(), os.listdir("/run")) == before
    assert not RUN.exists()
    assert done.stderr == ""
    steps = done.stdout.splitlines()
    assert steps[0].startswith("reserve the name fix")
    assert f"attach it at {base}" in steps
    assert any(step.startswith("copy 4 entries, 8K") for step in steps)
    assert run_json("apply", "fix", source, base, "--dry-run") == {"steps": steps}
    # It is what an apply does, step by step.
    done = run("apply", "fix", source, base, "-v")
    assert done.stderr.splitlines() == steps


def test_dry_run_fails_as_the_apply_would(world: World) -> None:
    base = applied(world)
    world.base("other", FILES)
    for arguments, code in (
        (("fix", SOURCE, PLAY / "other"), 4),
        (("new", SOURCE, base / "sub"), 4),
        (("new", "/run/nothing", base), 3),
        (("new", SOURCE, "/usr/bin"), 5),
    ):
        dry = run("apply", *arguments, "--dry-run", code=code)
        assert dry.stderr == run("apply", *arguments, code=code).stderr
        assert dry.stdout == ""


def test_dry_run_of_cleanup_only_says(world: World) -> None:
    base = applied(world)
    subprocess.run(["umount", base], check=True)
    done = run("cleanup", "--dry-run")
    assert done.stdout == f"would remove fix: its mount is gone from {base}\n"
    assert [o.state for o in world.manager().list()] == ["lost"]
    answer = run_json("cleanup")
    assert answer == [
        {
            "kind": "lost",
            "subject": "fix",
            "text": f"fix: its mount is gone from {base}",
            "failed": None,
        }
    ]


def test_verbose_says_each_step_and_what_is_undone_on_standard_error(world: World) -> None:
    base = applied(world)
    done = run("reset", "fix", "-v")
    assert done.stdout == f"fix: {base} shows the base\n"
    assert "write the record" in done.stderr.splitlines()
    done = run("remove", "fix", "-v")
    assert done.stdout == "fix: removed\n"
    assert "free the name" in done.stderr.splitlines()
    world.apply("fix", SOURCE, base)
    with child("os.chdir(sys.argv[1])", base):
        done = run("remove", "fix", "-v", code=6)
        assert any(line.startswith("undo: ") for line in done.stderr.splitlines())


def test_config_file_is_read_instead_of_the_machines(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    file = world.source("config", {"own.toml": '[limits]\nupper_size = "5M"\n'}) / "own.toml"
    made = assert_shape(run_json("apply", "fix", source, base, "--config", file))
    assert cast("dict[str, int]", made["storage"])["size_bytes"] == 5 << 20
    file.write_text("[limits]\nupper_sise = 5\n")
    done = run("apply", "two", source, PLAY / "two", "--config", file, code=5)
    assert_error(done, str(file), "limits.upper_sise: no such key", "upper_size")
    assert_error(
        run("apply", "two", source, base, "--config", "/run/no.toml", code=3),
        "/run/no.toml",
        hint=False,
    )


@pytest.mark.parametrize(
    ("size", "size_bytes"), [("4K", 4 << 10), ("3M", 3 << 20), ("1G", 1 << 30)]
)
def test_good_sizes(world: World, size: str, size_bytes: int) -> None:
    base = world.base("app", FILES)
    answer = run_json("apply", "fix", world.source("s", NEW), base, "--size", size)
    assert cast("dict[str, int]", assert_shape(answer)["storage"])["size_bytes"] == size_bytes


def test_bad_sizes_are_usage_errors(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    for size in ("0M", "64", "-1M", "1.5M", "64m", "1T", "", "64MB", "9999999G", "٣M"):
        done = run("apply", "fix", source, base, f"--size={size}", code=2)
        assert "--size" in done.stderr, size
    assert not RUN.exists()


def test_size_of_what_is_read_only_is_a_usage_error(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    done = run("apply", "fix", source, base, "--read-only", "--size", "1M", code=2)
    assert_error(done, "--size", "--read-only")
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("user", "names"),
    [("root", ["fix"]), ("0", ["fix"]), ("nobody", []), ("65534", []), ("4294967295", [])],
)
def test_list_of_one_user(world: World, user: str, names: list[str]) -> None:
    applied(world)
    listed = cast("list[dict[str, object]]", run_json("list", "--user", user))
    assert [overlay["name"] for overlay in listed] == names


@pytest.mark.usefixtures("world")
def test_list_of_an_unknown_user_is_an_error() -> None:
    done = run("list", "--user", "who\x1b[31m", code=3)
    assert_error(done, "there is no user 'who", hint=False)
    assert_tame(done.stderr)


def test_list_for_people_is_a_table_that_can_be_cut_into_fields(world: World) -> None:
    assert run("list").stdout == "no overlays\n"
    applied(world)
    applied(world, "second", read_only=True)
    rows = [line.split() for line in run("list").stdout.splitlines()]
    assert rows[0] == ["NAME", "STATE", "VERSION", "OWNER", "EDITS", "TARGET"]
    assert rows[1][:4] == ["fix", "active", "1", "root"]
    assert rows[1][-1] == str(BASE)
    assert rows[2] == ["second", "active", "1", "root", "read-only", str(PLAY / "second")]


def test_status_for_people_names_everything(world: World) -> None:
    base = applied(world)
    uuid = world.manager().status("fix").record.uuid
    text = run("status", "fix").stdout
    for word in ("fix", "active", str(base), str(SOURCE), "root", "4 entries", uuid, "256M"):
        assert word in text


def test_reset_goes_to_the_base_to_applied_or_to_a_number(world: World) -> None:
    base = applied(world)
    for to, text in (("applied", "new a"), ("base", "base a"), ("1", "new a"), ("0", "base a")):
        run("reset", "fix", "--to", to)
        assert (base / "a").read_text() == text


def test_several_commands_have_options_before_and_after_their_arguments(world: World) -> None:
    base = world.base("app", FILES)
    run("apply", "--json", "fix", world.source("s", NEW), base, "--read-only")
    assert assert_shape(run_json("status", "fix"))["options"] == {
        "read_only": True,
        "allow_other": False,
        "default_permissions": False,
        "writable_dirs": [],
    }


# Help and completion

COMMANDS: Final = (
    *("apply", "list", "status", "reset", "remove"),
    *("batch", "dump", "cleanup", "doctor", "history", "report", "enter", "run"),
    *("attach", "detach"),
)


def test_there_are_exactly_the_documented_commands() -> None:
    with click.Context(app) as context:
        assert sorted(app.list_commands(context)) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_explains_it_and_every_option(command: str) -> None:
    with click.Context(app, info_name="overlayd") as parent:
        found = app.get_command(parent, command)
        assert found is not None
        text = found.get_help(click.Context(found, parent=parent, info_name=command))
    assert text.startswith(f"Usage: overlayd {command} ")
    described = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(described) >= 4
    if len(found.params) > 3:  # more than what all commands have
        assert "Examples:\n    overlayd" in text or command in {"status", "cleanup"}
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in text
            assert parameter.help or command in {"reset", "batch"}, parameter.name
    for option in ("--json", "--verbose", "--config"):
        assert option in text


def test_version_and_help_are_there_for_python_m(world: World) -> None:
    del world
    done = shell("overlayd --version; overlayd -h | head -3; overlayd list -h | head -1")
    lines = done.stdout.decode().splitlines()
    assert lines[0] == f"overlayd, version {overlayd.__version__}"
    assert lines[1] == "Usage: overlayd [OPTIONS] COMMAND [ARGS]..."
    assert lines[-1].startswith("Usage: overlayd list")


@pytest.mark.parametrize("command", ["status", "reset", "remove"])
def test_shell_completion_offers_the_names_of_overlays(world: World, command: str) -> None:
    applied(world, "first")
    applied(world, "first-again")
    applied(world, "other")
    done = shell(
        'COMP_WORDS="overlayd $1 fi" COMP_CWORD=2 _OVERLAYD_COMPLETE=bash_complete overlayd',
        command,
    )
    assert done.stdout.decode().splitlines() == ["plain,first", "plain,first-again"], done.stderr


def test_shell_completion_offers_commands_and_options_and_has_a_script(world: World) -> None:
    del world
    done = shell(
        'COMP_WORDS="overlayd re" COMP_CWORD=1 _OVERLAYD_COMPLETE=bash_complete overlayd\n'
        'COMP_WORDS="overlayd apply --read" COMP_CWORD=2'
        " _OVERLAYD_COMPLETE=bash_complete overlayd\n"
    )
    assert done.stdout.decode().splitlines() == [
        *("plain,remove", "plain,report", "plain,reset", "plain,--read-only")
    ]


def test_shell_completion_without_a_world_or_without_rights_offers_nothing(world: World) -> None:
    del world
    done = shell(
        'COMP_WORDS="overlayd status x" COMP_CWORD=2 _OVERLAYD_COMPLETE=bash_complete overlayd'
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")
    assert not RUN.exists()


# Terminals and pipes


@contextlib.contextmanager
def paused_in_the_copy(*arguments: str, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """Run an apply of 4,000 files, and let it pause so long that it has to say something."""
    SOURCE.mkdir()
    for number in range(4000):
        (SOURCE / f"file{number}").write_bytes(b"x" * 100)
    process = start("apply", "fix", SOURCE, BASE, *arguments, stderr=stderr)
    try:
        assert eventually(lambda: RUN.is_mount() and bool(os.listdir(RUN / "records")))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.55)
        process.send_signal(signal.SIGCONT)
        yield process
    finally:
        process.kill()
        process.communicate()


def read_all(fd: int) -> str:
    text = b""
    with contextlib.suppress(OSError):  # EIO when the other end is closed
        while data := os.read(fd, 65536):
            text += data
    return text.decode()


def test_large_apply_shows_progress_on_a_terminal_and_clears_it(world: World) -> None:
    world.base("app", FILES)
    controller, terminal = pty.openpty()
    with paused_in_the_copy(stderr=terminal) as process:
        os.close(terminal)
        text = read_all(controller)
        out, _ = process.communicate(timeout=20)
    os.close(controller)
    assert process.returncode == 0
    lines = text.split("\r\x1b[K")
    pattern = r"[\d.]+[KMG]? ?(bytes)? of 15.6M, \d+ of 4001 entries, [\d.]+ ?[KMGbytes]+/s"
    assert re.fullmatch(pattern, lines[1]), lines
    assert text.endswith("\r\x1b[K")
    assert "\n" not in text
    assert out.startswith("fix: ")


@pytest.mark.parametrize("where", ["pipe", "terminal with --json"])
def test_large_apply_shows_no_progress_to_a_pipe_or_beside_json(world: World, where: str) -> None:
    world.base("app", FILES)
    if where == "pipe":
        with paused_in_the_copy(stderr=subprocess.PIPE) as process:
            _, text = process.communicate(timeout=20)
    else:
        controller, terminal = pty.openpty()
        with paused_in_the_copy("--json", stderr=terminal) as process:
            os.close(terminal)
            text = read_all(controller)
            process.communicate(timeout=20)
        os.close(controller)
    assert process.returncode == 0
    assert text == ""


def test_standard_streams_may_be_closed(world: World) -> None:
    base = world.base("app", FILES)
    world.source("s", NEW)
    for redirections in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        done = shell(f'overlayd apply fix "$1" "$2" {redirections}', SOURCE, base)
        assert done.returncode == 0, (redirections, done)
        assert (base / "a").read_text() == "new a"
        done = shell(f"overlayd list {redirections}")
        assert done.returncode == 0, (redirections, done)
        done = shell(f"overlayd status nothing {redirections}")
        assert done.returncode == 3, (redirections, done)
        done = shell(f"overlayd remove fix {redirections}")
        assert done.returncode == 0, (redirections, done)
    assert world.leftovers() == []


def test_reader_that_has_seen_enough_is_no_error(world: World) -> None:
    base = world.base("app", FILES)
    world.source("s", NEW)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for arguments in (
            ("apply", "fix", SOURCE, base),
            ("list", "--json"),
            ("status", "fix"),
            ("dump",),
            ("remove", "fix"),
        ):
            process = start(*arguments, stdout=writing)
            _, errors = process.communicate(timeout=20)
            assert (process.returncode, errors) == (0, ""), arguments
            if arguments[0] == "apply":
                assert (base / "a").read_text() == "new a"
    finally:
        os.close(writing)
    assert world.leftovers() == []


def test_output_into_head_works(world: World) -> None:
    applied(world)
    done = shell("overlayd list --json | head -1; echo ${PIPESTATUS[0]}; overlayd doctor | head -1")
    assert done.stdout.decode().splitlines()[:2] == ["[", "0"]
    assert done.stderr == b""


def test_output_that_cannot_be_written_is_an_error_of_one_line(world: World) -> None:
    applied(world)
    done = shell("overlayd list >/dev/full")
    assert done.returncode not in {0, 2}
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("overlayd: ")
    assert "No space left" in line


# Odd names and environments


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LANG": "C"}])
def test_any_locale_takes_names_that_are_not_utf_8(world: World, variables: dict[str, str]) -> None:
    name = os.fsdecode(b"\xff\xfe \xc3\xa4")
    base = world.base(f"t{name}", FILES)
    source = world.source(f"s{name}", {name: "odd", **NEW})
    done = shell('overlayd apply fix "$1" "$2"', source, base, **variables)
    assert done.returncode == 0, done.stderr
    assert b"\\xff\\xfe" in done.stdout
    assert (base / name).read_text() == "odd"
    done = shell("overlayd list; overlayd status fix; overlayd list --json", **variables)
    assert done.returncode == 0, done.stderr
    assert b"\xff" not in done.stdout
    (overlay,) = json.loads(done.stdout[done.stdout.index(b"[\n") :])
    assert os.fsencode(overlay["target"]) == os.fsencode(base)
    done = shell("overlayd remove fix", **variables)
    assert done.returncode == 0, done.stderr
    assert world.leftovers() == []


def test_terminal_of_another_encoding_gets_escapes_and_no_traceback(world: World) -> None:
    base = world.base("中文", FILES)
    world.apply("fix", world.source("s", NEW), base)
    done = shell("overlayd list; overlayd status '中文'", PYTHONIOENCODING="latin-1")
    assert b"Traceback" not in done.stderr
    assert b"\\u4e2d\\u6587" in done.stdout
    assert b"\\u4e2d\\u6587" in done.stderr


@pytest.mark.parametrize(
    "name",
    ["a:b", "a,b", "a\\b", "a b", "a\nb", "a\rb", "a\tb", "a\x0b\x0cb", "#a", "\\012", "ä\u202e"],
)
def test_odd_characters_in_source_target_and_files(world: World, name: str) -> None:
    base = world.base(f"t{name}", {name: "base", f"d{name}/x": "base x"})
    before = snapshot(base)
    world.source(f"s{name}", {name: "new", f"d{name}/y": "new y"})
    world.apply("fix", SOURCES / f"s{name}", base)
    assert (base / name).read_text() == "new"
    assert (base / f"d{name}/x").read_text() == "base x"
    assert (base / f"d{name}/y").read_text() == "new y"
    (overlay,) = world.manager().list()
    assert (overlay.state, overlay.record.target) == ("active", str(base))
    world.manager().reset("fix", 1)
    world.check_invariants()
    mount("foreign", base / f"d{name}", "tmpfs")
    done = run("remove", "fix", code=6)
    assert len(done.stderr.splitlines()) == 2
    subprocess.run(["umount", base / f"d{name}"], check=True)
    world.manager().remove("fix")
    assert snapshot(base) == before
    assert world.leftovers() == []


EVIL: Final = "\x1b[31mred\x1b]0;title\x07\n\r\x7f\u202e.sh"


def assert_tame(*outputs: str) -> None:
    for output in outputs:
        assert all(char == "\n" or char.isprintable() for char in output), output


def test_control_characters_never_reach_the_terminal(world: World) -> None:
    base = world.base(f"t{EVIL}", FILES)
    source = world.source(f"s{EVIL}", {EVIL: "x", f"d{EVIL}/{EVIL}": "y"})
    done = run("apply", "fix", source, base, "-v")
    assert_tame(done.stdout, done.stderr)
    assert "2 flagged files" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    for arguments in (("list",), ("status", "fix"), ("reset", "fix", "-v")):
        done = run(*arguments)
        assert_tame(done.stdout, done.stderr)
    done = world.run("doctor", code=None)
    assert_tame(done.stdout, done.stderr)
    assert done.returncode == 0
    mount(EVIL, base / "sub", "tmpfs")
    done = run("remove", "fix", code=6)
    assert_tame(done.stderr)
    subprocess.run(["umount", base / "sub"], check=True)
    done = run("remove", "fix", "-v")
    assert_tame(done.stdout, done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", EVIL),
        (EVIL,),
        ("list", EVIL),
        ("list", f"--{EVIL}"),
        ("apply", EVIL, "/run", "/usr/src/x"),
        ("apply", "x", f"/run/{EVIL}", "/usr/src/x"),
        ("apply", "x", "/run/sources", f"/usr/src/{EVIL}\n/../../../etc/{EVIL}"),
        ("apply", "x", "/run", "/usr/src/x", f"--size={EVIL}"),
        ("reset", "x", "--to", EVIL),
        ("batch", f"/run/{EVIL}"),
        ("batch", "/run/x", "--jobs", EVIL),
        ("list", "--config", f"/run/{EVIL}"),
        ("apply", "x", "/run/sources", "/usr/src/x", "--config", f"/run/sources/{EVIL}"),
        ("list", "--os", EVIL),
    ],
    ids=lambda arguments: " ".join(arguments).replace(EVIL, "EVIL"),
)
@pytest.mark.usefixtures("world")
def test_control_characters_of_the_command_line_do_not_come_back_raw(
    arguments: tuple[str, ...],
) -> None:
    (SOURCES / EVIL).write_text("[broken\n")
    done = run(*arguments, code=None)
    assert_tame(done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) <= 2


def test_flagged_files_are_listed_in_a_warning_and_can_be_refused(world: World) -> None:
    base = world.base("app", FILES)
    other = world.base("two", FILES)
    names = [f"script{number:02}.sh" for number in range(12)]
    source = world.source("s", {"a": "a", "lib/x.so": "x", **dict.fromkeys(names, "")})
    done = run("apply", "fix", source, base)
    (line,) = done.stderr.splitlines()
    assert line.startswith("overlayd: warning: 13 flagged files: ")
    assert line.endswith(" and 3 more")
    assert line.count(f"{source}/") == 10
    done = run("apply", "two", source, other, "--json", "--dry-run")
    assert "13 flagged files" in json.loads(done.stderr)["warning"]["message"]
    config = world.source("config", {"strict.toml": '[flagged]\nroot = "refuse"\n'})
    done = run("apply", "two", source, other, "--config", config / "strict.toml", code=5)
    assert_error(done, "13 flagged files", "flagged.root")
    (config / "strict.toml").write_text('[flagged]\nroot = "ignore"\n')
    done = run("apply", "two", source, other, "--config", config / "strict.toml")
    assert done.stderr == ""


def test_working_directory_that_is_gone(world: World) -> None:
    base = world.base("app", FILES)
    world.source("s", NEW)
    script = (
        "mkdir /run/gone && cd /run/gone && rmdir /run/gone\n"
        'overlayd apply fix s "$2"; echo $?\n'
        'overlayd apply fix "$1" "$2"; echo $?\n'
        "overlayd list >/dev/null; echo $?\n"
        "overlayd batch file.toml; echo $?\n"
        "overlayd remove fix; echo $?\n"
    )
    done = shell(script, SOURCE, base)
    codes = [line for line in done.stdout.decode().splitlines() if line.isdigit()]
    assert codes == ["5", "0", "0", "3", "0"], done
    assert b"the working directory is gone" in done.stderr
    assert b"Traceback" not in done.stderr
    assert world.leftovers() == []


def test_relative_paths_are_those_of_the_caller(world: World) -> None:
    base = world.base("app", FILES)
    world.source("s", NEW)
    world.run("apply", "fix", "../sources/s", "../../usr/src/app", cwd=SOURCES)
    (overlay,) = world.manager().list()
    assert overlay.record.target == str(base)
    assert os.path.samefile(overlay.record.source, SOURCE)
    assert (base / "a").read_text() == "new a"


def test_umask_and_limits_of_the_caller_do_not_show(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {"dir/file": "x"})
    (source / "dir").chmod(0o755)
    (source / "dir/file").chmod(0o644)
    done = shell('umask 077; ulimit -n 64; overlayd apply fix "$1" "$2"', source, base)
    assert done.returncode == 0, done.stderr
    assert (base / "dir").stat().st_mode & 0o777 == 0o755
    assert (base / "dir/file").stat().st_mode & 0o777 == 0o644
    assert RUN.stat().st_mode & 0o777 == 0o700


# Signals


@pytest.fixture
def large(world: World) -> Path:
    """Make a source that takes a while to copy."""
    world.base("app", FILES)
    source = world.source("s", {})
    block = random.Random(1).randbytes(1 << 16)
    for number in range(2000):
        folder = source / f"dir{number % 50}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{number}").write_bytes(block[:4096])
    (source / "large").write_bytes(block * 500)
    return source


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_at_any_moment_of_a_large_apply_leaves_nothing(
    world: World, large: Path, number: signal.Signals
) -> None:
    before = snapshot(BASE)
    world.manager()
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    codes = []
    for longest in (0.0, 0.03, 0.06, 0.09):
        process = start("apply", "fix", large, BASE)
        # From the first step on: before that it has done nothing, and dies as any program does.
        assert eventually(lambda: RUN.is_mount() and bool(os.listdir(RUN / "records")))
        time.sleep(chance.uniform(0, longest))
        process.send_signal(number)
        out, errors = process.communicate(timeout=20)
        codes.append(process.returncode)
        assert "Traceback" not in errors, (seed, errors)
        if process.returncode == 130:
            assert out == ""
            assert errors == "overlayd: interrupted; nothing is left behind\n"
            assert world.leftovers() == [], seed
        else:
            # It came too late, when all was done.
            assert process.returncode in {0, -number}, (seed, errors)
            assert [o.state for o in world.manager().list()] == ["active"]
            world.manager().remove("fix")
        assert snapshot(BASE) == before
    assert 130 in codes, (seed, codes)
    world.apply("fix", large, BASE)
    world.check_invariants()


def test_signal_before_the_first_step_leaves_nothing(world: World, large: Path) -> None:
    for number, delay in ((signal.SIGINT, 0.0), (signal.SIGTERM, 0.01), (signal.SIGHUP, 0.02)):
        process = start("apply", "fix", large, BASE)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode in {0, 130, -number}
        if process.returncode == 0:  # this machine was so busy that the signal came last
            world.manager().remove("fix")
        assert world.leftovers() == []
    world.apply("fix", large, BASE)


def test_impatient_second_signal_is_cleaned_up_by_the_next_command(
    world: World, large: Path
) -> None:
    before = snapshot(BASE)
    for delay in (0.0, 0.001, 0.01):
        process = start("apply", "fix", large, BASE)
        assert eventually(lambda: RUN.is_mount() and bool(os.listdir(RUN / "records")))
        process.send_signal(signal.SIGINT)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode in {130, -signal.SIGINT}, errors
        assert world.manager().list() == []
        assert world.leftovers() == []
        assert snapshot(BASE) == before


def test_interrupted_as_json(world: World, large: Path) -> None:
    process = start("apply", "fix", large, BASE, "--json")
    assert eventually(lambda: RUN.is_mount() and bool(os.listdir(RUN / "records")))
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert json.loads(errors)["error"]["code"] == "interrupted"
    assert world.leftovers() == []


def test_interrupt_on_a_terminal_clears_the_progress_first(world: World) -> None:
    world.base("app", FILES)
    controller, terminal = pty.openpty()
    with paused_in_the_copy(stderr=terminal) as process:
        os.close(terminal)
        process.send_signal(signal.SIGINT)
        text = read_all(controller)
        process.communicate(timeout=20)
    os.close(controller)
    assert process.returncode in {0, 130}
    if process.returncode == 130:
        assert text.rsplit("\x1b[K", maxsplit=1)[-1] == (
            "overlayd: interrupted; nothing is left behind\r\n"
        )
        assert world.leftovers() == []


def test_console_script_is_the_same_program(world: World) -> None:
    script = shutil.which("overlayd", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("overlayd is not installed beside this interpreter")
    applied(world)
    done = subprocess.run([script, "list"], capture_output=True, text=True, check=True)
    assert done.stdout == run("list").stdout


def test_without_arguments_the_help_is_printed(world: World) -> None:
    assert world.run().stdout == world.run("--help").stdout


def test_remove_all_takes_away_what_it_can_and_names_the_rest(world: World) -> None:
    bases = {name: applied(world, name) for name in ("a", "b", "c")}
    for wrong in (("remove",), ("remove", "a", "--all")):
        assert "either the NAME" in world.run(*wrong, code=2).stderr
    assert len(world.manager().list()) == 3
    with (bases["b"] / "a").open() as _:
        done = world.run("remove", "--all", code=6)
        assert done.stdout == "a: removed\nc: removed\n"
        assert "overlayd: warning: b stays: b is in use by" in done.stderr
        (left,) = cast("list[dict[str, object]]", world.json("remove", "--all", "--lazy"))
        assert (left["name"], left["state"]) == ("b", "draining")
    assert world.json("remove", "--all") == []
    assert world.manager().list() == []
