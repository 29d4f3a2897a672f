# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files into the machine and out of it: what a copy keeps, and what no machine can make of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.errors import RemoteError
from tests.harness.agents import Agent, Fake, eventually, in_thread

if TYPE_CHECKING:
    from harness.channel import Channel

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def make_tree(root: Path) -> None:
    root.mkdir()
    (root / "empty").mkdir(mode=0o700)
    (root / "closed").mkdir()
    (root / "closed" / "inside").write_text("in a directory that cannot be written to")
    (root / "closed").chmod(0o555)
    (root / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "tool").chmod(0o751)
    (root / "big").write_bytes(os.urandom(300_007))
    (root / "none").touch(0o600)
    (root / "link").symlink_to("../not there")
    (root / "to dir").symlink_to("empty")
    (root / 'odd "name"\n\\').write_text("1")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe")).write_text("no UTF-8")
    os.utime(root / "tool", ns=(10**18, 10**18 + 7))
    os.utime(root / "empty", ns=(10**18, 10**18 + 9))


def look(root: Path) -> dict[str, object]:
    """Return all that a copy is to keep."""
    found: dict[str, object] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        info = path.lstat()
        content = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        name = "" if path == root else str(path.relative_to(root))
        found[name] = (stat.filemode(info.st_mode), info.st_mtime_ns, content)
    return found


def test_tree_goes_in_and_comes_out_as_it_was(channel: Channel, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    channel.put(tmp_path / "tree", f"{tmp_path}/new/place/in")
    assert look(tmp_path / "new/place/in") == look(tmp_path / "tree")
    assert channel.get(f"{tmp_path}/new/place/in", tmp_path / "out") == ()
    assert look(tmp_path / "out") == look(tmp_path / "tree")


def test_directory_is_merged_into_one_that_is_there(channel: Channel, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    there = tmp_path / "there"
    there.mkdir()
    (there / "own").write_text("stays")
    (there / "tool").symlink_to("own")
    channel.put(tmp_path / "tree", str(there), mode=0o711)
    assert (there / "own").read_text() == "stays"
    assert (there / "tool").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE(there.stat().st_mode) == 0o711
    assert not list(there.glob(".*"))


def test_file_takes_its_place_by_a_rename(channel: Channel, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with target.open() as reader:
        channel.put(b"new", str(target))
        assert reader.read() == "old"
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    channel.put(b"", str(target), mode=0o4750)
    assert stat.S_IMODE(target.stat().st_mode) == 0o4750
    assert target.read_bytes() == b""


@needs_root
def test_set_id_bits_do_not_come_out(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "su").touch()
    (tmp_path / "su").chmod(0o6755)
    channel.get(f"{tmp_path}/su", tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_put_that_fails_says_why_and_leaves_nothing(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "directory" / "full").mkdir(parents=True)
    with pytest.raises(RemoteError) as caught:
        channel.put(b"x", f"{tmp_path}/directory")
    assert caught.value.errno == 21
    (tmp_path / "file").touch()
    with pytest.raises(RemoteError, match=r"Not a directory|File exists"):
        channel.put(bytes(5_000_000), f"{tmp_path}/file/below")
    make_tree(tmp_path / "tree")
    with pytest.raises(RemoteError, match=r"File exists|Not a directory"):
        channel.put(tmp_path / "tree", f"{tmp_path}/file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "tree"]
    assert channel.run(["true"]).returncode == 0


def test_source_that_cannot_be_read_fails_on_the_host(channel: Channel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        channel.put(tmp_path / "nothing", f"{tmp_path}/target")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").touch()
    os.mkfifo(tmp_path / "tree" / "pipe")
    with pytest.raises(OSError, match="pipe: neither"):
        channel.put(tmp_path / "tree", f"{tmp_path}/target")
    assert channel.run(["true"]).returncode == 0


def test_get_leaves_out_what_is_no_file(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a")
    os.mkfifo(tmp_path / "tree" / "pipe")
    assert channel.get(f"{tmp_path}/tree", tmp_path / "out") == (f"{tmp_path}/tree/pipe",)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_get_reads_files_that_have_no_size(channel: Channel, tmp_path: Path) -> None:
    channel.get("/proc/self/mountinfo", tmp_path / "deep" / "mountinfo")
    assert b" / / " in (tmp_path / "deep" / "mountinfo").read_bytes()


def test_get_of_what_is_not_there(channel: Channel, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="No such file") as caught:
        channel.get("/no/such/thing", tmp_path / "out")
    assert caught.value.errno == 2
    assert not (tmp_path / "out").exists()


def test_target_that_cannot_be_written_fails_on_the_host(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file"):
        channel.get("/etc/passwd", tmp_path / "file" / "below")
    assert channel.run(["true"]).returncode == 0


@pytest.mark.parametrize("name", ["../out", "/etc/evil", "a/../../b", "link/b", "dir/", "dir/.."])
def test_machine_cannot_write_outside_of_the_target(fake: Fake, tmp_path: Path, name: str) -> None:
    fake.greet()
    target = tmp_path / "target"
    raised = in_thread(lambda: fake.channel.get("/x", target))
    ident = fake.expect("get")["id"]
    base = {"mode": 0o755, "mtime": 0}
    fake.say({"id": ident, "entry": {"name": "", "kind": "dir", **base}})
    fake.say({"id": ident, "entry": {"name": "dir", "kind": "dir", **base}})
    fake.say(
        {"id": ident, "entry": {"name": "link", "kind": "link", "link": str(tmp_path), **base}}
    )
    fake.say({"id": ident, "entry": {"name": name, "kind": "file", **base}})
    eventually(lambda: raised)
    assert "strange name" in str(raised[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "a\0b", "kind": "file"},
        {"name": "\ud800", "kind": "dir"},
        {"name": "l", "kind": "link", "link": "\0"},
    ],
)
def test_name_that_no_file_can_have_ends_the_copy(
    fake: Fake, tmp_path: Path, entry: dict[str, object]
) -> None:
    fake.greet()
    raised = in_thread(lambda: fake.channel.get("/x", tmp_path / "target"))
    ident = fake.expect("get")["id"]
    for each in ({"name": "", "kind": "dir"}, entry):
        fake.say({"id": ident, "entry": each})
    eventually(lambda: raised)
    assert "makes no sense" in str(raised[0])


def test_time_that_no_file_can_have_is_none(fake: Fake, tmp_path: Path) -> None:
    fake.greet()
    raised = in_thread(lambda: fake.channel.get("/x", tmp_path / "target"))
    ident = fake.expect("get")["id"]
    fake.say({"id": ident, "entry": {"name": "", "kind": "file", "mtime": 1 << 80}})
    fake.say({"id": ident, "done": True})
    eventually(lambda: (tmp_path / "target").exists() and not fake.channel._requests)
    assert not raised
    assert (tmp_path / "target").stat().st_mtime == 0


@needs_root
def test_files_of_another_user_are_that_users(
    agent: Agent, channel: Channel, tmp_path: Path
) -> None:
    place = agent.directory  # which all can reach
    home = place / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    make_tree(tmp_path / "tree")
    channel.put(tmp_path / "tree", f"{home}/in", user="nobody")
    assert look(home / "in") == look(tmp_path / "tree")
    assert {path.lstat().st_uid for path in home.rglob("*")} == {65534}
    with pytest.raises(RemoteError) as caught:
        channel.put(b"x", f"{place}/not-here", user="nobody")
    assert caught.value.errno == 13
    (place / "secret").write_text("for root")
    (place / "secret").chmod(0o600)
    with pytest.raises(RemoteError, match="Permission denied"):
        channel.get(f"{place}/secret", tmp_path / "out", user="nobody")
    channel.get(f"{home}/in", tmp_path / "out", user="nobody")
    assert look(tmp_path / "out") == look(tmp_path / "tree")
    with pytest.raises(RemoteError, match="no user 'nosuch'"):
        channel.put(b"x" * 1_000_000, f"{home}/x", user="nosuch")
