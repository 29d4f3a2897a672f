# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command on kernels: options, what pytest tells, and what goes wrong; the machine is made up."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import accel, host, kernels, sweep
from harness.channel import Result
from harness.errors import BuildError, MachineError
from harness.kernels import Kernel
from harness.qemu import Accelerator
from harness.results import Outcome, Record, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness.bare import Content, Hardware
    from harness.cache import Cache

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3" time="1.5">
<testcase classname="tests.mounts.test_a" name="test_good[x]" time="1.25" />
<testcase classname="tests.mounts.test_a" name="test_bad" time="0.25">
<failure message="assert 1 == 2&#10;more">the whole story</failure></testcase>
<testcase classname="tests.mounts.test_b" name="test_not_here" time="0.001">
<skipped type="pytest.skip" message="before Linux 6.5">test_b.py:3: before</skipped></testcase>
</testsuite></testsuites>
"""
WHOLE = Record(test="cmd", machine="bare", kernel="6.1", release="6.1.0-t", outcome=Outcome.PASSED)
BUG = "[  12.000000] WARNING: CPU: 0 PID: 1 at fs/overlayfs/super.c:1 ovl+0x1/0x2\n"


class FakeMachine:
    """What a sweep sees of a bare machine."""

    def __init__(self, workdir: Path, *, status: int, junit: str, log: str, breaks: str) -> None:
        self.workdir = workdir
        self.status, self.junit, self.log, self.breaks = status, junit, log, breaks
        self.ran: list[list[str]] = []

    def start(self) -> None:
        if self.breaks:
            raise MachineError(self.breaks)

    def stream(self, argv: Sequence[str], write: Callable[[bytes], object], **_: object) -> int:
        self.ran.append(list(argv))
        write(b"output of it\n")
        return self.status

    def run(self, argv: Sequence[str], *, check: bool = True) -> Result:
        del check
        found = argv[0] == "dmesg" or bool(self.junit)
        return Result(tuple(argv), int(not found), self.log.encode(), b"", 0.0)

    def copy_out(self, source: str, target: Path) -> None:
        del source
        target.write_text(self.junit)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Have machines made up as this says; it is told what they are made of."""
    how: dict[str, object] = {"status": 0, "junit": "", "log": "", "breaks": ""}

    @contextlib.contextmanager
    def fetch(name: str, _cache: Cache, **_: object) -> Iterator[Kernel]:
        if name == "0.1":
            raise BuildError(f"no such kernel: {name}", hint="there are others")
        yield Kernel(
            name=name,
            release=f"{name}.0-t",
            version="1",
            vmlinuz=tmp_path / "vmlinuz",
            vmlinux=None,
            modules=tmp_path,
        )

    @contextlib.contextmanager
    def machine(
        _kernel: Kernel,
        content: Content,
        _cache: Cache,
        *,
        workdir: Path,
        hardware: Hardware,
        say: object,
    ) -> Iterator[FakeMachine]:
        del say
        workdir.mkdir(parents=True)
        found = FakeMachine(
            workdir,
            **{name: how[name] for name in ("status", "junit", "log", "breaks")},  # type: ignore[arg-type]
        )
        how.update(machine=found, content=content, hardware=hardware)
        yield found

    monkeypatch.setattr(kernels, "fetch", fetch)
    monkeypatch.setattr(sweep, "machine", machine)
    monkeypatch.setattr(host, "qemu", lambda: Path("/qemu"))
    monkeypatch.setattr(sweep, "default_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(accel, "choose", lambda *_, **__: Accelerator.TCG)
    monkeypatch.chdir(tmp_path)
    return how


def test_command_that_succeeds_is_one_line_of_the_table_for_each_kernel(
    made: dict[str, object], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert sweep.main(["--kernel", "6.1,6.12", "--", "true", "it"]) == 0
    printed, said = (part.decode() for part in capfdbinary.readouterr())
    assert sorted(printed.splitlines()[:2]) == ["6.1       output of it", "6.12      output of it"]
    assert "6.1 (6.1.0-t)" in printed
    assert "6.12 (6.12.0-t)" in printed
    assert "6.1.0-t: answers" in said
    machine = made["machine"]
    assert isinstance(machine, FakeMachine)
    assert machine.ran == [["true", "it"]]


def test_output_of_one_kernel_is_left_as_it_is(
    made: dict[str, object], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    del made
    assert sweep.main(["--kernel", "6.1", "--", "true"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"output of it\n")


def test_no_more_machines_run_at_a_time_than_said(
    made: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    del made
    running: list[int] = []
    most: list[int] = []

    def stream(_self: FakeMachine, _argv: object, _write: object, **_: object) -> int:
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return 0

    monkeypatch.setattr(FakeMachine, "stream", stream)
    for options, count in (["--jobs=1"], 1), ([], 3):
        most.clear()
        words = [*options, f"--out=jobs{count}", "--kernel=6.1,6.12,unstable", "--", "true"]
        assert sweep.main(words) == 0
        assert max(most) == count


def test_command_that_fails_fails_the_sweep(made: dict[str, object], tmp_path: Path) -> None:
    made["status"] = 3
    assert sweep.main(["--kernel=6.1", "--records=r.jsonl", "--", "false"]) == 1
    (record,) = read(tmp_path / "r.jsonl")
    assert (record.test, record.outcome, record.reason) == (
        "false",
        Outcome.FAILED,
        "exit status 3",
    )
    assert record.artefacts == str(tmp_path / "build/kernels/6.1")


def test_pytest_is_told_to_write_what_the_table_is_made_of(
    made: dict[str, object], tmp_path: Path
) -> None:
    made.update(status=1, junit=JUNIT)
    words = ["--kernel=6.1", "--junit", "--records=r.jsonl", "--", "pytest"]
    assert sweep.main(words) == 1
    machine = made["machine"]
    assert isinstance(machine, FakeMachine)
    assert machine.ran == [["pytest", "--junitxml=/run/junit.xml"]]
    records = read(tmp_path / "r.jsonl")
    assert [record.outcome for record in records] == ["passed", "failed", "skipped"]


def test_tests_are_read_from_what_pytest_writes(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    good, bad, skipped = sweep.tests(tmp_path / "junit.xml", WHOLE)
    assert good == replace(WHOLE, test="tests/mounts/test_a::test_good[x]", phases={"test": 1.25})
    assert (bad.outcome, bad.reason, bad.details) == (
        Outcome.FAILED,
        "assert 1 == 2",
        "the whole story",
    )
    assert (skipped.outcome, skipped.reason) == (Outcome.SKIPPED, "before Linux 6.5")


def test_pytest_that_ended_without_a_failed_test_but_badly_is_a_failure(
    made: dict[str, object], tmp_path: Path
) -> None:
    made.update(status=4, junit=JUNIT.replace("failure", "system-out"))
    assert sweep.main(["--kernel=6.1", "--junit", "--records=r.jsonl", "--", "pytest"]) == 1
    *_, last = read(tmp_path / "r.jsonl")
    assert (last.test, last.reason) == ("pytest", "exit status 4")


def test_warning_of_the_kernel_s_fails_a_command_that_succeeded(
    made: dict[str, object], tmp_path: Path
) -> None:
    made.update(log=BUG)
    assert sweep.main(["--kernel=6.1", "--records=r.jsonl", "--", "true"]) == 1
    (record,) = read(tmp_path / "r.jsonl")
    assert record.reason == "what the kernel logged"
    assert "ovl+0x1" in record.findings[0]
    assert (tmp_path / "build/kernels/6.1/kernel.log").read_text() == BUG


def test_what_is_allowed_in_the_kernel_s_log_is_no_failure(made: dict[str, object]) -> None:
    made.update(log=BUG)
    assert sweep.main(["--kernel=6.1", "--allow=ovl", "--", "true"]) == 0


def test_machine_that_breaks_is_a_failure_and_the_next_kernel_has_its_turn(
    made: dict[str, object], tmp_path: Path
) -> None:
    made.update(breaks="bare 6.1: QEMU died")
    assert sweep.main(["--kernel=6.1,6.12", "--records=r.jsonl", "--", "true"]) == 1
    records = read(tmp_path / "r.jsonl")
    assert [(record.kernel, record.reason) for record in records] == [
        ("6.1", "bare 6.1: QEMU died"),
        ("6.12", "bare 6.1: QEMU died"),
    ]


@pytest.mark.usefixtures("made")
def test_what_cannot_be_begun_is_one_line_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--kernel=0.1", "--", "true"]) == 2
    assert capsys.readouterr().err == (
        "sweep: no such kernel: 0.1\nsweep: hint: there are others\n"
    )


def test_options_say_what_is_on_the_machine(tmp_path: Path) -> None:
    (tmp_path / "src/__pycache__").mkdir(parents=True)
    (tmp_path / "src/__pycache__/a.pyc").write_text("")
    (tmp_path / "src/a.py").write_text("")
    words = [f"--copy={tmp_path}/src", f"--copy={tmp_path}/src/a.py=/etc/b", "--cwd=/project"]
    words += ["--precompile=-m pytest 'a b'", "--library=lib", "--program=ip", "--", "true", "-x"]
    options = sweep.arguments(words)
    content = sweep.content(options)
    assert [name for name in content.files.names() if "." in name[1:]] == ["project/src/a.py"]
    assert "etc/b" in content.files
    assert content.precompile == ("-m", "pytest", "a b")
    assert content.userland.libraries == (Path("lib"),)
    assert content.userland.programs == ("ip",)
    assert content.cwd == "/project"
    assert options.command == ["true", "-x"]
