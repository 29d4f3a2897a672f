# SPDX-License-Identifier: LGPL-2.1-or-later
"""Children that do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.child import spawn
from harness.errors import HostError

ROOT = Path(__file__).parents[2]


def gone(pid: int, *, seconds: float = 10) -> bool:
    """Return whether *pid* ends within *seconds*; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_runs_in_its_directory_with_its_output(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        process = spawn(["sh", "-c", 'pwd; echo "$1"', "sh", "a 'b' $c"], cwd=tmp_path, stdout=out)
    assert process.wait(10) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path}\na 'b' $c\n"


def test_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(spawn(["sleep", "60"], cwd=tmp_path)))
    thread.start()
    thread.join()
    (process,) = started
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("way", ["kill", "exit", "_exit"])
def test_dies_with_the_process_however_that_ends(tmp_path: Path, way: str) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from harness.child import spawn
print(spawn(["sleep", "60"], cwd=Path(sys.argv[1])).pid, flush=True)
{"os.kill(os.getpid(), signal.SIGKILL)" if way == "kill" else ""}
{"os._exit(0)" if way == "_exit" else ""}
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert gone(int(done.stdout))


def test_a_child_of_a_fork_can_start_children_too(tmp_path: Path) -> None:
    spawn(["true"], cwd=tmp_path).wait(10)
    code = """
import os, sys, threading
from pathlib import Path
from harness.child import spawn
here = Path(sys.argv[1])
spawn(["true"], cwd=here).wait(10)
if (pid := os.fork()) == 0:
    os._exit(spawn(["sh", "-c", "exit 7"], cwd=here).wait(10))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "7"


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot start true"):
        spawn(["true"], cwd=tmp_path / "none")


def test_ctrl_c_does_not_reach_it(tmp_path: Path) -> None:
    process = spawn(["sleep", "60"], cwd=tmp_path)
    try:
        time.sleep(0.1)
        assert os.getsid(process.pid) == process.pid
    finally:
        process.kill()
        process.wait()
