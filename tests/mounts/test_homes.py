# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of a login session and the holder that it names: whose, and until when."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import caller, homes
from overlayd.errors import OverlaydError
from tests.mounts.conftest import RUN
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mounts.conftest import World

HOME = Path("/run/home")


@pytest.fixture
def home(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    del world
    monkeypatch.setattr(homes, "_directory", lambda: str(HOME))
    HOME.mkdir(0o700)
    (RUN / "records").mkdir(parents=True)
    return HOME


@contextlib.contextmanager
def sleeping(user: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], user=user) as process:
        try:
            yield process
        finally:
            process.kill()


def name_it(pid: int, **changes: object) -> None:
    (HOME / homes.FILE).write_text(json.dumps(caller.identity(pid) | changes))


def found() -> int | None:
    with homes.opened() as fd:
        return homes.find(fd)


def test_holder_is_the_process_of_the_user_s_that_the_file_names(home: Path) -> None:
    assert found() is None
    with sleeping() as process:
        name_it(process.pid)
        assert found() == process.pid
        name_it(process.pid, started=1)
        assert found() is None, "another process has its number"
        (home / homes.FILE).rename(home / "elsewhere")
        (home / homes.FILE).symlink_to("elsewhere")
        assert found() is None
    with sleeping(user=65534) as process:
        (home / homes.FILE).unlink()
        name_it(process.pid)
        assert found() is None, "it is somebody else's"


def test_holder_ends_with_the_last_overlay_and_not_before(home: Path) -> None:
    del home
    with sleeping() as process:
        name_it(process.pid)
        record = RUN / "records" / "x.json"
        record.write_text('{"name": "x"}')
        homes.let_go()
        assert process.poll() is None
        record.unlink()
        homes.let_go()
        assert process.wait(10) < 0


def test_holder_stays_while_somebody_is_about_to_make_an_overlay(home: Path) -> None:
    del home
    with sleeping() as process:
        name_it(process.pid)
        with homes.opened():
            homes.let_go()
            assert process.poll() is None
        homes.let_go()
        assert process.wait(10) < 0


def test_nobody_begins_while_the_holder_is_being_ended(home: Path) -> None:
    ending = os.open(home, os.O_RDONLY)
    fcntl.flock(ending, fcntl.LOCK_EX)
    begun = threading.Event()

    def begin() -> None:
        with homes.opened():
            begun.set()

    thread = threading.Thread(target=begin)
    thread.start()
    assert not begun.wait(0.3)
    os.close(ending)
    assert begun.wait(10)
    thread.join()


def test_of_those_who_begin_one_starts_the_holder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = os.open(home / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(starting, fcntl.LOCK_EX)
    monkeypatch.setattr(homes, "_started", lambda *_: pytest.fail("there is one"))
    answers: list[int] = []

    def begin() -> None:
        with homes.opened() as fd:
            answers.append(homes.start(fd))

    thread = threading.Thread(target=begin)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    with sleeping() as process:
        name_it(process.pid)
        os.close(starting)
        assert eventually(lambda: not thread.is_alive(), 10)
        assert answers == [process.pid]


def test_directory_that_is_not_the_user_s_alone_is_refused(home: Path) -> None:
    for mode, owner in ((0o700, 1000), (0o750, 0), (0o701, 0), (0o722, 0)):
        home.chmod(mode)
        os.chown(home, owner, 0)
        with pytest.raises(OverlaydError, match="yours alone"), homes.opened():
            pass
    os.chown(home, 0, 0)
    home.chmod(0o700)
    home.rename("/run/elsewhere")
    home.symlink_to("/run/elsewhere")
    with pytest.raises(OverlaydError), homes.opened():
        pass
