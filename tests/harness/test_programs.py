# SPDX-License-Identifier: LGPL-2.1-or-later
"""How programs that build are run, and what is said of them when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import BuildError, HostError
from harness.programs import Timer, run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def test_output_is_returned_and_the_environment_is_small() -> None:
    said = run(["env"], what="looking", env={"MORE": "1"})
    assert {line.partition("=")[0] for line in said.splitlines()} >= {"HOME", "LC_ALL", "MORE"}
    assert "PYTEST_CURRENT_TEST" not in said


def test_failure_is_one_line_with_the_rest_in_notes() -> None:
    script = "echo out; echo first >&2; echo the reason >&2; exit 3"
    with pytest.raises(BuildError) as caught:
        run(["sh", "-c", script], what="making it")
    assert caught.value.message == "making it: the reason"
    assert "stdout: out" in notes(caught.value)
    assert "first\nthe reason" in notes(caught.value)


def test_silent_failure_says_its_status() -> None:
    with pytest.raises(BuildError, match="making it: exit status 3"):
        run(["sh", "-c", "exit 3"], what="making it")


def test_missing_program_is_the_hosts_fault() -> None:
    with pytest.raises(HostError, match="making it: nosuchprogram is missing"):
        run(["nosuchprogram"], what="making it")


@needs_root
def test_missing_program_is_named_apart_too() -> None:
    with pytest.raises(BuildError, match="nosuchprogram"):
        run(["nosuchprogram"], what="making it", apart=True)


def test_program_that_hangs_is_ended() -> None:
    with pytest.raises(BuildError, match="not done after 0 s"):
        run(["sleep", "60"], what="making it", timeout=0.1)


@needs_root
def test_mounts_apart_are_not_seen_here(tmp_path: Path) -> None:
    script = f"mount -t tmpfs none {tmp_path} && touch {tmp_path}/there && ls {tmp_path}"
    assert run(["sh", "-c", script], what="mounting", apart=True).strip() == "there"
    assert not list(tmp_path.iterdir())


@needs_root
def test_children_apart_end_with_their_parent(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "from harness.programs import run\n"
        f"run(['sh', '-c', 'readlink /proc/self/ns/pid > {pid}; sleep 60 & sleep 60'], "
        "what='x', apart=True)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root) as process:
        until = time.monotonic() + 20
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.kill()
    namespace = pid.read_text().strip()
    while left := processes_in(namespace):
        assert time.monotonic() < until, left
        time.sleep(0.02)


def processes_in(namespace: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            if os.readlink(place) == namespace:
                found.append(str(place))
        except OSError:
            continue
    return found


def test_timer_says_what_is_done() -> None:
    said: list[str] = []
    Timer(said.append, "image")("the disk")
    assert said == ["image: the disk: 0.0 s"]
