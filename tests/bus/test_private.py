# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private overlays: each user sees his own, and nobody else does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bus.conftest import COMMAND, PYTHON, USERS
from tests.mounts.conftest import COMMAND as ROOTS
from tests.mounts.conftest import RUN, SOURCES
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from tests.bus.conftest import Bus

ALICE = Path(f"/run/user/{USERS['alice']}/overlayd")


def inside(bus: Bus, user: str, name: str, script: str, code: int = 0) -> str:
    """Run a shell script where *user*'s private overlays are seen; return what it printed."""
    done: subprocess.CompletedProcess[str] = bus.overlayd(
        user, "enter", name, "--", "sh", "-c", script, code=code
    )
    return done.stdout


def test_private_overlay_is_seen_inside_alone_and_takes_no_root(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base", "sub/deep": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice", "sub/more": "more"})
    said = bus.overlayd("alice", "apply", "hers", source, base).stdout
    assert said
    assert (base / "motd").read_text() == "base"
    assert inside(bus, "alice", "hers", f"cat {base}/motd {base}/sub/deep") == "alicebase"
    bus.overlayd("alice", "enter", "hers", "--", "sh", "-c", f"echo edit > {base}/motd")
    assert inside(bus, "alice", "hers", f"cat {base}/motd") == "edit\n"
    for words, code in ((("hers", "--", "/none"), 3), (("none", "--", "true"), 3)):
        said = bus.overlayd("alice", "enter", *words, code=code).stderr
        assert said.startswith("overlayd: "), said
        assert "none" in said
    bus.overlayd("alice", "reset", "hers", "--to", "applied")
    assert inside(bus, "alice", "hers", f"cat {base}/motd") == "alice"
    bus.overlayd("alice", "reset", "hers")
    assert inside(bus, "alice", "hers", f"cat {base}/motd; ls {base}/sub") == "basedeep\n"
    bus.overlayd("alice", "remove", "hers")
    assert sorted(os.listdir(ALICE)) == ["holder.json", "start.lock"]


def holders(bus: Bus, user: str) -> list[int]:
    """Return the pids of *user*'s holders."""
    return bus.holders(USERS[user])


def test_two_users_see_their_own_on_the_same_target_and_root_s_beneath(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base", "more": "base"})
    roots = bus.source("roots", {"root": "root", "motd": "root"})
    for user in ("alice", "bob"):
        source = bus.source_of(user, "s", {"motd": user})
        bus.overlayd(user, "apply", "own", source, base)
    # What everybody sees comes and goes beneath.
    bus.run("apply", "roots", roots, base)
    assert (base / "motd").read_text() == "root"
    for user in ("alice", "bob"):
        assert inside(bus, user, "own", f"cat {base}/motd") == user
        bus.overlayd(user, "reset", "own")
        assert inside(bus, user, "own", f"cat {base}/motd {base}/root") == "rootroot"
        bus.overlayd(user, "remove", "own")
        assert holders(bus, user) == []
    # And lies there already.
    bus.overlayd("alice", "apply", "own", bus.source_of("alice", "t", {"motd": "on it"}), base)
    assert inside(bus, "alice", "own", f"cat {base}/motd {base}/root") == "on itroot"
    bus.run("remove", "roots", "--lazy")
    assert (base / "motd").read_text() == "base"
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "on it"
    bus.overlayd("alice", "remove", "own")
    assert bus.leftovers() == []


def test_list_shows_both_scopes_and_names_are_of_one(bus: Bus) -> None:
    bases = [bus.base(name, {"motd": "base"}) for name in ("one", "two")]
    bus.serve()
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "same", source, bases[0], "--allow-other")
    bus.overlayd("alice", "apply", "same", source, bases[1])
    listed = bus.json_as("alice", "list")
    assert isinstance(listed, list)
    assert [(each["name"], each["scope"], each["owner"]) for each in listed] == [
        ("same", "private", USERS["alice"]),
        ("same", "system", USERS["alice"]),
    ]
    table = bus.overlayd("alice", "list").stdout.splitlines()
    assert table[0].split()[:2] == ["NAME", "SCOPE"]
    others = bus.json_as("bob", "list")
    assert isinstance(others, list)
    assert [each["scope"] for each in others] == ["system"]
    assert "private" in bus.overlayd("alice", "status", "same").stdout
    bus.overlayd("alice", "apply", "same", source, bases[0], code=4)
    bus.overlayd("alice", "remove", "same")
    assert "private" not in bus.overlayd("alice", "status", "same").stdout
    assert (bases[0] / "motd").read_text() == "alice"
    bus.overlayd("alice", "remove", "same")
    assert bus.leftovers() == []


def test_what_is_there_is_what_the_documentation_says(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base", "other": "base", "sub/deep": "x", "own/deep": "x"})
    bus.overlayd("alice", "apply", "own", bus.source_of("alice", "s", {"sub/new": "new"}), base)
    said = inside(
        bus,
        "alice",
        "own",
        f"""
        cd {base}
        stat -c %U . sub | sort -u
        rm motd && ls
        rm sub/deep && mkdir sub/dir && ls sub
        (echo edit > other) 2>&1 | grep -o 'Permission denied'
        (echo edit > own/new) 2>&1 | grep -o 'Permission denied'
        rm other && echo mine > other && cat other
        """,
    )
    assert said.split() == (
        [*["alice", "other", "own", "sub", "dir", "new"], *["Permission", "denied"] * 2, "mine"]
    )
    assert (base / "motd").read_text() == "base"
    bus.overlayd("alice", "remove", "own")


def test_program_that_is_entered_is_as_it_would_be_outside(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base)
    env = {"SOME": "thing", "XDG_RUNTIME_DIR": str(ALICE.parent)}

    def run(*command: str, code: int = 0) -> str:
        whole = [*COMMAND, "enter", "own", "--", *command]
        return bus.as_user("alice", *whole, code=code, env=env).stdout

    assert run(
        "sh", "-c", "echo $SOME; pwd; id -u; id -g"
    ) == f"thing\n/\n{USERS['alice']}\n" * 1 + (f"{USERS['alice']}\n")
    run("sh", "-c", "exit 42", code=42)
    run("sh", "-c", "kill -TERM $$", code=-15)
    assert bus.as_user("alice", *COMMAND, "enter", "own", "--", "nothing-there", code=3).stderr
    # A directory that the caller is in.
    shell = f"cd {source} && exec {' '.join(COMMAND)} enter own -- pwd"
    assert bus.as_user("alice", "sh", "-c", shell).stdout == f"{source}\n"
    # A shell if nothing is said, and several names.
    said = bus.as_user("alice", *COMMAND, "enter", "own", env={"SHELL": "/bin/pwd"}).stdout
    assert said == "/\n"
    assert "no overlay 'none'" in bus.overlayd("alice", "enter", "own", "none", code=3).stderr
    # From inside one can look, and no more.
    script = f"{' '.join(COMMAND)} {{}}"
    look = bus.overlayd("alice", "enter", "own", "--", "sh", "-c", script.format("status own"))
    assert "private" in look.stdout
    for what in ("enter own", "remove own", "reset own", f"apply more {source} {base}/more"):
        again = ("enter", "own", "--", "sh", "-c", script.format(what))
        assert "inside" in bus.overlayd("alice", *again, code=5).stderr
    bus.overlayd("alice", "remove", "own")


def test_run_is_gone_with_its_program(bus: Bus) -> None:
    bases = [bus.base(name, {"motd": "base\n"}) for name in ("one", "two")]
    source = bus.source_of("alice", "s", {"motd": "alice\n"})
    pairs = [f"{source}:{base}" for base in bases]
    said = bus.overlayd("alice", "run", *pairs, "--", "cat", *(base / "motd" for base in bases))
    assert said.stdout == "alice\nalice\n"
    bus.overlayd("alice", "run", pairs[0], "--", "sh", "-c", "exit 7", code=7)
    assert "not exist" in bus.overlayd("alice", "run", f"/none:{bases[0]}", code=3).stderr
    assert "SOURCE:TARGET" in bus.overlayd("alice", "run", "nothing", code=2).stderr
    assert holders(bus, "alice") == []
    assert not ALICE.exists()
    assert {(base / "motd").read_text() for base in bases} == {"base\n"}


def test_nothing_inside_gains_rights(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    shutil.copy("/bin/cat", base / "cat")
    (base / "cat").chmod(0o4755)
    secret = bus.base("secret", {"motd": "secret"})
    (secret / "motd").chmod(0o600)
    assert bus.as_user("alice", base / "cat", secret / "motd").stdout == "secret"
    source = bus.source_of("alice", "s", {"motd": "alice", "libc.so.6": "evil"})
    bus.overlayd("alice", "apply", "own", source, base)
    said = inside(
        bus,
        "alice",
        "own",
        f"""
        {base}/cat {secret}/motd 2>&1 | grep -o 'Permission denied'
        grep -E '^(NoNewPrivs|CapEff|CapPrm)' /proc/self/status | tr -d '\\t'
        cat /proc/self/uid_map | tr -s ' '
        umount {base} 2>&1 | wc -l
        """,
    )
    uid = USERS["alice"]
    assert said.splitlines() == [
        "Permission denied",
        "CapPrm:0000000000000000",
        "CapEff:0000000000000000",
        "NoNewPrivs:1",
        f" {uid} {uid} 1",
        "1",
    ]
    bus.overlayd("alice", "remove", "own")


def test_others_cannot_go_in_nor_touch_what_is_there(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base)
    [pid] = holders(bus, "alice")
    for command in (
        ["nsenter", f"--target={pid}", "--user", "--mount", "cat", str(base / "motd")],
        ["cat", f"/proc/{pid}/root{base}/motd"],
        ["ls", str(ALICE)],
        ["kill", str(pid)],
        ["kill", "-STOP", str(pid)],
    ):
        assert bus.as_user("bob", *command, code=None).returncode != 0, command
    for arguments in (["remove", "own"], ["reset", "own"], ["enter", "own"], ["status", "own"]):
        assert bus.overlayd("bob", *arguments, code=None).returncode in {3, 10}
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    bus.overlayd("alice", "remove", "own")


def test_directory_of_somebody_else_is_refused(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    ALICE.mkdir(mode=0o700)  # root's
    assert bus.overlayd("alice", "apply", "own", source, base, code=None).returncode in {5, 7}
    os.chown(ALICE, USERS["alice"], USERS["alice"])
    ALICE.chmod(0o770)
    assert "yours alone" in bus.overlayd("alice", "apply", "own", source, base, code=5).stderr
    assert holders(bus, "alice") == []


def test_holder_that_is_killed_or_stopped_harms_nobody(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    for user in ("alice", "bob"):
        bus.overlayd(user, "apply", "own", bus.source_of(user, "s", {"motd": user}), base)
    [pid] = holders(bus, "alice")
    os.kill(pid, signal.SIGSTOP)
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: holders(bus, "alice") == [], 10)
    assert bus.overlayd("alice", "enter", "own", code=None).returncode in {3, 10}
    bus.overlayd("alice", "apply", "own", SOURCES / "alice/s", base)
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    assert inside(bus, "bob", "own", f"cat {base}/motd") == "bob"
    for user in ("alice", "bob"):
        bus.overlayd(user, "remove", "own")
    assert bus.leftovers() == []


def test_holder_goes_when_root_removes_the_directory_of_all_overlays(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base)
    os.rmdir(RUN)  # nobody needs it here; what lies on it elsewhere goes as well
    RUN.mkdir(mode=0o755)
    assert eventually(lambda: holders(bus, "alice") == [], 10)
    bus.overlayd("alice", "apply", "own", source, base)
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    bus.overlayd("alice", "remove", "own")


def test_end_of_the_session_can_unmount_its_directory(bus: Bus) -> None:
    uid = USERS["alice"]
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=700,uid={uid},gid={uid}", "own", ALICE.parent],
        check=True,
    )
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base)
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    subprocess.run(["umount", ALICE.parent], check=True)  # at once: it is not in use
    assert eventually(lambda: holders(bus, "alice") == [], 10)
    assert bus.leftovers() == []


def test_files_that_the_user_forges_do_no_harm(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base)
    [pid] = holders(bus, "alice")
    good = (ALICE / "holder.json").read_text()
    for text in ("", "{}", "[]", '{"pid": 1, "started": 0}', good.replace(str(pid), "-1")):
        (ALICE / "holder.json").write_text(text)
        assert bus.overlayd("alice", "enter", "own", code=None).returncode in {3, 10}
    (ALICE / "holder.json").write_text(good)
    inside(bus, "alice", "own", "echo { > /run/overlayd/records/junk.json")
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    cleaned = bus.overlayd("alice", "cleanup")
    assert "junk" in cleaned.stdout
    assert "only your own was cleaned up" in cleaned.stderr
    bus.overlayd("alice", "remove", "own")


def test_full_storage_is_an_error_of_the_one_who_fills_it(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd("alice", "apply", "own", source, base, "--size", "1M")
    fill = f"head -c 4M /dev/zero > {base}/large 2>&1; ls -l {base}/large | cut -d' ' -f5"
    assert 0 < int(inside(bus, "alice", "own", fill).split()[-1]) <= 1 << 20
    bus.overlayd("alice", "reset", "own", "--to", "applied")
    assert inside(bus, "alice", "own", f"ls {base}") == "motd\n"
    bus.config.write_text("[users]\noverlays = 1\n")
    more = bus.overlayd("alice", "apply", "more", source, bus.base("other", {}), code=8).stderr
    assert "users.overlays" in more
    bus.overlayd("alice", "remove", "own")


def test_where_users_may_have_no_namespaces_the_switch_is_named(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    # Of a namespace around, so that nobody else is kept from anything.
    around = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c"]
    script = f"""
        echo 0 > /proc/sys/user/max_user_namespaces || exit 99
        {" ".join(COMMAND)} apply own {source} {base}
        {" ".join(COMMAND)} run {source}:{base} -- true
    """
    said = bus.as_user("alice", *around, script, code=9).stderr
    assert said.count("user.max_user_namespaces=0") == 2, said
    assert said.count("hint: sysctl user.max_user_namespaces=") == 2
    assert holders(bus, "alice") == []


def test_applies_at_the_same_time_share_one_holder(bus: Bus) -> None:
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bases = [bus.base(f"lib{number}", {"motd": "base"}) for number in range(6)]
    script = "".join(
        f"{' '.join(COMMAND)} apply own-{number} {source} {base} & "
        for number, base in enumerate(bases)
    )
    bus.as_user("alice", "sh", "-c", f"{script} wait")
    assert len(holders(bus, "alice")) == 1
    seen = inside(bus, "alice", "own-0", f"cat {' '.join(f'{base}/motd' for base in bases)}")
    assert seen == "alice" * 6
    assert bus.overlayd("alice", "remove", "--all", code=None).returncode in {0, 10}
    assert holders(bus, "alice") == []


def test_writable_directory_of_the_base_takes_entries_and_edits_by_replacing(bus: Bus) -> None:
    files = {"motd": "base", "conf/one": "one", "conf/deep/two": "two", "file": "x", "link": "-> /"}
    base = bus.base("lib", files)
    source = bus.source_of("alice", "s", {"motd": "alice"})
    bus.overlayd(
        *("alice", "apply", "own", source, base, "--writable-dir", "conf/deep"),
        *("--writable-dir", "new/here"),
    )
    said = inside(
        bus,
        "alice",
        "own",
        f"cd {base}; echo 3 > conf/deep/three; rm conf/deep/two; echo 1 > conf/more; ls conf/*;"
        " echo x > new/here/y; stat -c '%U %a' conf new/here",
    )
    assert said.split() == [
        *("conf/more", "conf/one", "conf/deep:", "three", "alice", "755", "alice", "755"),
    ]
    dumped = bus.overlayd("alice", "dump", code=None).stdout
    bus.overlayd("alice", "remove", "own")
    if dumped:
        file = source.parent / "dumped.toml"
        file.write_text(dumped)
        bus.overlayd("alice", "batch", file)
        assert inside(bus, "alice", "own", f"echo > {base}/conf/deep/again; echo ok") == "ok\n"
        bus.overlayd("alice", "remove", "own")
    for wrong in ("/conf", "../x", "", "a//b"):
        bus.overlayd("alice", "apply", "own", source, base, "--writable-dir", wrong, code=5)
    for nothing in ("file", "file/x", "link"):
        said = bus.overlayd(
            "alice", "apply", "own", source, base, "--writable-dir", nothing, code=5
        ).stderr
        assert "no directory" in said
    again = ("apply", "own", source, base, "--writable-dir", "conf")
    bus.overlayd("alice", *again, "--allow-other", code=2)
    bus.run(*again, code=2)
    assert holders(bus, "alice") == []


def test_root_s_private_overlay_keeps_owners_and_rights_and_is_seen_inside_alone(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base", "sub/deep": "base"})
    (base / "sub").chmod(0o750)
    os.chown(base / "sub", 0, 42)
    source = bus.source("s", {"motd": "root", "sub/more": "more"})
    bus.run("apply", "own", source, base, "--private", "--size", "1M")
    assert (base / "motd").read_text() == "base"
    show = ("enter", "own", "--", "sh", "-c")
    script = f"cat {base}/motd; stat -c '%u %g %a' {base}/sub; echo edit > {base}/sub/deep"
    assert bus.run(*show, script).stdout == "root0 42 750\n"
    [listed] = json.loads(bus.run("list", "--json").stdout)
    assert (listed["name"], listed["scope"], listed["owner"]) == ("own", "private", 0)
    # The other scope is there as before.
    other = bus.base("other", {"motd": "base"})
    bus.run("apply", "own", source, other)
    assert (other / "motd").read_text() == "root"
    assert bus.run(*show, f"cat {other}/motd").stdout == "root"
    bus.run("reset", "own")
    assert bus.run(*show, f"cat {base}/motd {base}/sub/deep").stdout == "basebase"
    assert "inside" in bus.run(*show, f"{' '.join(ROOTS)} remove own", code=5).stderr
    bus.run("apply", "both", source, base, "--private", "--allow-other", code=2)
    dumped = source.parent / "dumped.toml"
    dumped.write_text(bus.run("dump").stdout)
    said = bus.run("remove", "--all").stdout
    assert said.count("own: removed") == 2
    # What was private is so again, though both have one name: that is for two files.
    one, two = dumped.read_text().split("\n[[overlay]]\n")[1:]
    assert ("private" in one, "private" in two) == (True, False)
    dumped.write_text(f"[[overlay]]\n{one}")
    assert "--atomic" in bus.run("batch", dumped, "--atomic", code=5).stderr
    bus.run("batch", dumped)
    assert (base / "motd").read_text() == "base"
    assert bus.run(*show, f"cat {base}/motd").stdout == "root"
    bus.run("remove", "own")
    assert bus.holders(0) == []
    assert bus.leftovers() == []
    assert bus.run("run", f"{source}:{base}", "--", "cat", base / "motd").stdout == "root"


def test_terminals_the_bus_and_the_network_go_on_working_inside(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    bus.overlayd("alice", "apply", "own", bus.source_of("alice", "s", {"motd": "alice"}), base)
    program = """
import os, pty, socket, subprocess
master, slave = pty.openpty()
os.write(master, b"typed\\n")
print(os.read(slave, 100).decode().strip())
server = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(server.getsockname()):
    print("connected")
call = ["busctl", "--system", "call", "org.freedesktop.DBus", "/", "org.freedesktop.DBus"]
name = ["GetConnectionUnixUser", "s", "org.freedesktop.DBus"]
print(subprocess.run([*call, *name], capture_output=True, text=True).returncode)
"""
    done = bus.overlayd("alice", "enter", "own", "--", *PYTHON, "-c", program)
    assert done.stdout.split() == ["typed", "connected", "0"]
    bus.overlayd("alice", "remove", "own")


def test_apply_that_is_told_to_stop_leaves_nothing(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {f"d{n}/f{m}": "" for n in range(100) for m in range(150)})
    for number in (signal.SIGTERM, signal.SIGINT):
        process = bus.start_overlayd("alice", "apply", "own", source, base)
        # Told to the command alone, once its child is at it: the holder is there first.
        assert eventually(lambda: bool(holders(bus, "alice")), 20)
        time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, "interrupted" in said) == (130, True), said
        assert eventually(lambda: holders(bus, "alice") == [], 10)
        assert (base / "motd").read_text() == "base"
    bus.overlayd("alice", "apply", "own", source, base)
    bus.overlayd("alice", "remove", "own")


@pytest.fixture
def subordinate(bus: Bus) -> Bus:
    """Give a bus whose alice has subordinate uids, around her own: 0 is 200000, 7002 is 207001."""
    for name in ("newuidmap", "newgidmap"):
        if shutil.which(name) is None:
            pytest.skip("not installed here: uidmap")
    for name in ("subuid", "subgid"):
        Path(f"/etc/{name}").write_text("bob:400000:65536\nalice:200000:100\nalice:200100:65436\n")
    return bus


def test_subordinate_uids_give_owners_to_what_is_the_user_s(subordinate: Bus) -> None:
    bus, alice = subordinate, USERS["alice"]
    base = bus.base("lib", {"motd": "base", "sub/deep": "base"})
    source = bus.source_of("alice", "s", {"mine": "alice", "theirs": "x", "strange": "x"})
    os.chown(source / "theirs", 200033, 200033)
    os.chown(source / "strange", 0, 0)
    bus.overlayd("alice", "apply", "own", source, base, "--preserve-owner")
    [pid] = holders(bus, "alice")
    lines = Path(f"/proc/{pid}/uid_map").read_text().splitlines()
    assert sorted([int(number) for number in line.split()] for line in lines) == [
        [0, 200000, 100],
        [100, 200100, alice - 100],
        [alice, alice, 1],
        [alice + 1, 200000 + alice, 65536 - alice],
    ]
    seen = f"stat -c '%n %u' {base} {base}/*"
    listed = {
        "": alice,
        "/mine": alice,
        "/motd": 65534,
        "/strange": alice,
        "/sub": 65534,
        "/theirs": 33,
    }
    expected = [f"{base}{name} {uid}" for name, uid in listed.items()]
    assert inside(bus, "alice", "own", seen).splitlines() == expected
    # As root of that, owners can be changed, and daemons can become somebody else.
    said = bus.overlayd(
        *("alice", "enter", "--as-root", "own", "--", "sh", "-c"),
        f"""
        id -u; chown 0:42 {base}/mine && stat -c '%u %g' {base}/mine
        setpriv --reuid=33 --regid=33 --clear-groups cat {base}/theirs && echo
        grep -E '^(NoNewPrivs|CapEff)' /proc/self/status | tr -d '\\t'
        # But no right to what is not the user's, nor to mounts.
        echo x 2>/dev/null >> {base}/motd || echo denied
        cat /etc/shadow 2>&1 | grep -o 'Permission denied'
        chown 0 {base}/sub/deep 2>/dev/null || echo denied
        umount {base} 2>/dev/null || echo denied
        """,
    ).stdout.splitlines()
    caps = said.pop(3)
    assert said == [
        *("0", "0 42", "x", "NoNewPrivs:1", "denied", "Permission denied", "denied", "denied")
    ]
    assert not int(caps.partition(":")[2], 16) >> 21 & 1  # CAP_SYS_ADMIN
    assert inside(bus, "alice", "own", f"stat -c '%u %g' {base}/mine") == "0 42\n"
    # A reset is as ever, and what is outside is as it was.
    bus.overlayd("alice", "reset", "own", "--to", "applied")
    assert inside(bus, "alice", "own", seen).splitlines() == expected
    from_within = " ".join([*COMMAND, "remove", "own"])
    bus.overlayd("alice", "enter", "--as-root", "own", "--", "sh", "-c", from_within, code=5)
    assert bus.overlayd(
        "alice", "run", "--as-root", f"{source}:{base}", "--", "sh", "-c", "id -u"
    ).stdout == ("0\n")
    bus.overlayd("alice", "remove", "own")
    assert os.stat(source / "theirs").st_uid == 200033
    assert holders(bus, "alice") == []


def test_without_subordinate_uids_it_is_said_and_one_s_own_is_enough(bus: Bus) -> None:
    base = bus.base("lib", {"motd": "base"})
    source = bus.source_of("alice", "s", {"motd": "alice"})
    for name, text in (("subuid", "bob:400000:65536\nalice:x:y\nalice\n"), ("subgid", "")):
        Path(f"/etc/{name}").write_text(text)
    said = bus.overlayd("alice", "apply", "own", source, base, "--preserve-owner", code=7).stderr
    assert "subordinate" in said
    assert holders(bus, "alice") == []
    bus.overlayd("alice", "apply", "own", source, base)
    said = bus.overlayd("alice", "enter", "--as-root", "own", code=5).stderr
    assert "/etc/subgid gives you none" in said
    said = bus.overlayd("alice", "run", "--as-root", f"{source}:{base}", code=5).stderr
    assert "/etc/subgid gives you none" in said
    bus.overlayd("alice", "remove", "own")
    # What is configured but cannot be had changes nothing.
    Path("/etc/subuid").write_text("alice:7002:65536\n")
    Path("/etc/subgid").write_text("alice:100:4294967295\n")
    bus.overlayd("alice", "apply", "own", source, base)
    assert inside(bus, "alice", "own", f"cat {base}/motd") == "alice"
    bus.overlayd("alice", "remove", "own")


_FAKE = """
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void evil(void) {
    printf("loaded by %d, shadow %d\\n", geteuid(), open("/etc/shadow", O_RDONLY) >= 0);
    fflush(stdout);
    _exit(0);
}
"""


def fake_library(real: Path, place: Path) -> None:
    """Build a library with the symbols of a real one, that says as whom it is loaded."""
    told = subprocess.run(
        ["nm", "-D", "--defined-only", real], capture_output=True, text=True, check=True
    ).stdout
    versions: dict[str, list[str]] = {}
    for name in {line.split()[-1] for line in told.splitlines() if line.split()[-2] == "T"}:
        symbol, _, version = name.partition("@")
        versions.setdefault(version.lstrip("@"), []).append(symbol)
    text = _FAKE + "".join(f"int {n}(void) {{ return 1; }}\n" for v in versions.values() for n in v)
    (place / "fake.c").write_text(text)
    script = "".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items())
    (place / "fake.map").write_text(script)
    subprocess.run(
        [
            *("gcc", "-shared", "-fPIC", f"-Wl,-soname,{real.name}", "-o", place / real.name),
            *(f"-Wl,--version-script={place / 'fake.map'}", place / "fake.c"),
        ],
        check=True,
    )


def test_fake_library_under_a_set_id_program_gains_nothing(bus: Bus) -> None:
    for program, package in (("gcc", "gcc"), ("nm", "binutils"), ("su", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"not installed here: {package}")
    real = next(Path("/usr/lib").glob("*/libpam.so.0"))
    build = bus.source_of("alice", "build", {})
    fake_library(real, build)
    source = bus.source_of("alice", "s", {})
    shutil.copy(build / real.name, source)
    # That it would be root if it could: so the system's own library is exchanged.
    subprocess.run(["mount", "--bind", build / real.name, real.resolve()], check=True)
    assert bus.as_user("alice", "su", "bob").stdout == "loaded by 0, shadow 1\n"
    subprocess.run(["umount", real.resolve()], check=True)
    bus.overlayd("alice", "apply", "own", source, real.parent)
    expected = f"loaded by {USERS['alice']}, shadow 0\n"
    assert bus.overlayd("alice", "enter", "own", "--", "su", "bob").stdout == expected
    once = ("run", f"{source}:{real.parent}", "--", "su", "bob")
    assert bus.overlayd("alice", *once).stdout == expected
    if shutil.which("newuidmap"):
        for name in ("subuid", "subgid"):
            Path(f"/etc/{name}").write_text("alice:200000:65536\n")
        assert bus.overlayd("alice", "run", "--as-root", *once[1:]).stdout == (
            "loaded by 0, shadow 0\n"
        )
    # Nobody else's su is any other.
    assert "loaded" not in bus.as_user("bob", "su", "alice", code=None).stdout
    bus.overlayd("alice", "remove", "own")


_TRACE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
ATTACH, SEIZE = 16, 0x4206
pid = int(sys.argv[1])
for request in (ATTACH, SEIZE):
    print(libc.ptrace(request, pid, None, None), os.strerror(ctypes.get_errno()))
for name in ("mem", "environ", "fd", "ns/mnt"):
    try:
        path = f"/proc/{pid}/{name}"
        {"fd": os.listdir, "ns/mnt": os.readlink}.get(name, open)(path)
        print("got", name)
    except PermissionError:
        pass
"""


def shows(file: Path, data: bytes) -> bool:
    """Whether that is what a file has."""
    return file.read_bytes() == data


def test_nobody_else_traces_what_is_inside(subordinate: Bus) -> None:
    bus = subordinate
    base = bus.base("lib", {"motd": "base"})
    bus.overlayd("alice", "apply", "own", bus.source_of("alice", "s", {"motd": "alice"}), base)
    entered = [
        bus.start_overlayd("alice", "enter", *option, "own", "--", "sleep", "100")
        for option in ([], ["--as-root"])
    ]
    sleeps = b"sleep\x00100\x00"
    pids = [*holders(bus, "alice"), *(process.pid for process in entered)]
    for process in entered:
        assert eventually(partial(shows, Path(f"/proc/{process.pid}/cmdline"), sleeps))
    for pid in pids:
        said = bus.as_user("bob", *PYTHON, "-c", _TRACE, str(pid)).stdout
        assert said == "-1 Operation not permitted\n" * 2
        assert bus.as_user("bob", "kill", "-0", str(pid), code=None).returncode != 0
    # Nor does root of bob's own namespace, nor of alice's subordinate uids what is bob's.
    as_root = ["unshare", "--user", "--map-root-user", *PYTHON, "-c", _TRACE, str(pids[0])]
    assert bus.as_user("bob", *as_root).stdout == "-1 Operation not permitted\n" * 2
    bus.overlayd("bob", "apply", "own", bus.source_of("bob", "s", {"motd": "bob"}), base)
    [other] = holders(bus, "bob")
    bus.overlayd(
        *("alice", "enter", "--as-root", "own", "--", "sh", "-c"),
        f"kill {other} || nsenter -t {other} -U -m true || cat /proc/{other}/root{base}/motd",
        code=1,
    )
    for process in entered:
        process.kill()
        process.communicate()
    for user in ("alice", "bob"):
        bus.overlayd(user, "remove", "own", "--lazy")
    assert bus.leftovers() == []
