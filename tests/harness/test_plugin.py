# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pytest plugin, in pytest runs of its own on machines that are this host."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness.results import Outcome, Record, read
from tests.harness.agents import alive

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[2]
Run = Callable[..., pytest.RunResult]
CONFTEST = """
import pytest
from pathlib import Path
from tests.harness.fakes import FakeProvider

def pytest_harness_provider(config):
    return FakeProvider(Path("machines").absolute())

def pytest_harness_leaks(machine):
    return machine.run(["sh", "-c", f"ls {machine.workdir}/leaks 2>/dev/null; true"]).out.split()

def pytest_harness_collect(machine):
    return {"state.txt": "echo the state", "sub/broken.txt": ["false"]}
"""
WARN = 'machine.run(["write", "WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2"])'


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs pytest on a test module, on the container unless told."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(CONFTEST)

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        if not any(option.startswith("--machine") for option in options):
            options = ("--machine=container", *options)
        # Hypothesis takes a second to load, and in-process runs load it each time.
        plugins = ("-p", "harness.plugin", "-p", "no:hypothesispytest")
        return pytester.runpytest_inprocess(*plugins, *options)

    return run


def made(pytester: pytest.Pytester) -> list[str]:
    """Return the names of the machines that were made."""
    root = pytester.path / "machines"
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def records(pytester: pytest.Pytester, name: str = "records") -> list[Record]:
    return read(pytester.path / name)


def folder(pytester: pytest.Pytester) -> Path:
    (place,) = (pytester.path / "build" / "artefacts").iterdir()
    return place


# -- which machines ----------------------------------------------------------------------------


def test_test_runs_on_each_machine_with_each_kernel(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        "def test_it(machine):\n    assert machine.run(['echo', 'hi']).out == 'hi\\n'",
        *("--machine=both", "--kernel=6.1,6.12", "-v"),
    )
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["*::test_it[[]vm-6.1] PASSED*", "*vm-6.12*PASSED*", "*::test_it[[]container-host]*"]
    )
    release = os.uname().release
    result.stdout.re_match_lines(
        [
            r"KERNEL +MACHINE +PASSED +FAILED +SKIPPED +TIME",
            rf"6\.1 \({release}\) +vm +1 +0 +0 ",
            rf"6\.12 \({release}\) +vm +1 +0 +0 ",
            rf"host \({release}\) +container +1 +0 +0 ",
        ]
    )
    assert len(made(pytester)) == 3
    assert (pytester.path / "machines" / f"closed-{os.getpid()}").exists()


def test_image_kernel_is_used_unless_one_is_named(run: Run) -> None:
    result = run("def test_it(machine): pass", "--machine=vm", "-v")
    result.stdout.fnmatch_lines(["*test_it[[]vm-image] PASSED*"])


def test_unknown_machine_is_refused_with_the_known_ones(run: Run) -> None:
    result = run("def test_it(machine): pass", "--machine=vm,toaster")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--machine: no toaster here, but both, vm, container, odd*"])


def test_unknown_kernel_is_refused_at_once(run: Run) -> None:
    result = run("def test_it(machine): pass", "--machine=both", "--kernel=6.1,5.10")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--kernel: no 5.10 here, but image, 6.1, 6.12*"])


def test_what_is_the_same_everywhere_runs_once(run: Run) -> None:
    source = """
import pytest
@pytest.mark.once
def test_words(machine): pass
"""
    for options, count in ((), 1), (("--everywhere",), 3):
        result = run(source, "--machine=both", "--kernel=6.1,6.12", "-v", *options)
        result.assert_outcomes(passed=count)
        result.stdout.fnmatch_lines(["*test_words[[]container-host] PASSED*"])
    run(source, "--machine=vm", "-v").stdout.fnmatch_lines(["*test_words[[]vm-image] PASSED*"])


def test_what_takes_long_begins_early(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_first="def test_plain(): pass\ndef test_one(machine_module): pass",
        test_second="def test_two(machine_module): pass\ndef test_three(machine_module): pass",
    )
    result = run("def test_own(machine): pass", "--machine=both", "-v")
    shown = re.findall(r"::test_(\w+(?:\[\w+)?)", result.stdout.str())
    assert shown == [
        *("own[vm", "two[vm", "three[vm", "one[vm"),
        *("own[container", "two[container", "three[container", "one[container", "plain"),
    ]


def test_project_without_machines_is_told_what_to_implement(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(machine): pass")
    plugins = ("-p", "harness.plugin", "-p", "no:hypothesispytest")
    result = pytester.runpytest_inprocess(*plugins)
    result.stdout.fnmatch_lines(["*no machines: implement pytest_harness_provider*"])


def test_test_without_a_machine_runs_once_and_prints_no_table(run: Run) -> None:
    result = run("def test_it(): pass")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*KERNEL*MACHINE*")


def test_machine_is_fresh_and_machine_module_shared(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
        import pytest
        seen = set()
        @pytest.mark.parametrize("n", [1, 2])
        def test_fresh(machine, n):
            assert machine.name not in seen
            seen.add(machine.name)
        shared = set()
        @pytest.mark.parametrize("n", [1, 2])
        def test_shared(machine_module, host, n):
            assert host.check_output("echo $$")
            shared.add(machine_module.name)
            assert len(shared) == 1 and not shared & seen
        """
    )
    result.assert_outcomes(passed=4)
    assert len(made(pytester)) == 3


def test_host_is_testinfra_on_the_machine(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
        def test_alone(host):
            assert host.file("/etc/passwd").is_file
            assert host.backend.NAME == "harness"
        def test_same(machine, host):
            machine.copy_in(b"text", f"{machine.workdir}/f")
            assert host.file(f"{machine.workdir}/f").content_string == "text"
        """
    )
    result.assert_outcomes(passed=2)
    assert len(made(pytester)) == 2


def test_machines_are_closed_when_the_test_is_over(run: Run) -> None:
    result = run(
        """
        machines = []
        def test_one(machine):
            machines.append(machine)
            assert 0
        def test_two():
            assert not machines[0].agent.directory.exists()
        """
    )
    result.assert_outcomes(failed=1, passed=1)


# -- findings ----------------------------------------------------------------------------------


def test_finding_fails_the_test_that_caused_it_and_no_other(run: Run) -> None:
    result = run(
        f"""
        def test_before(machine_module): pass
        def test_guilty(machine_module):
            machine = machine_module
            {WARN}
        def test_after(machine_module): pass
        """,
        "-v",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*test_guilty*FAILED*"])
    result.stdout.fnmatch_lines(
        ["warning (console): WARNING: CPU: 0*", "[[]*1.000000] WARNING: CPU: 0 PID: 1 at x.c:1*"]
    )


def test_finding_in_a_test_that_fails_anyway_is_shown_beside(run: Run) -> None:
    for failure in ("assert 1 == 2", "import pytest; pytest.fail('because')"):
        result = run(f"def test_it(machine):\n    {WARN}\n    {failure}")
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*- Captured machine call -*", "warning (console): *"])


def test_panic_ends_the_test_within_seconds(run: Run) -> None:
    start = time.monotonic()
    result = run(
        """
        def test_it(machine):
            machine.run("(sleep 0.5; write 'Kernel panic - not syncing: test') & sleep 60")
        """
    )
    assert time.monotonic() - start < 15
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *MachineError: container-host-*: Kernel panic - not syncing*"])
    result.stdout.fnmatch_lines(["panic (console): Kernel panic - not syncing: test"])


def test_finding_may_be_allowed_for_a_test_or_for_all(run: Run, pytester: pytest.Pytester) -> None:
    source = f"""
        import pytest
        @pytest.mark.allow_findings("x.c:1", "it is what is tested", kind="warning")
        def test_allowed(machine):
            {WARN}
        @pytest.mark.allow_findings("x.c:1", "another kind", kind="oops")
        def test_not(machine):
            {WARN}
        """
    run(source).assert_outcomes(passed=1, failed=1)
    pytester.makeconftest(
        CONFTEST
        + """
from harness.findings import Allow
def pytest_harness_allow(config):
    return [Allow("x.c", "everywhere")]
"""
    )
    run(source).assert_outcomes(passed=2)


def test_machine_that_dies_unseen_fails_the_test(run: Run) -> None:
    result = run("def test_it(machine):\n    machine.agent.kill()")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["died (machine): *"])


def test_shared_machine_that_broke_fails_all_with_the_first_cause(run: Run) -> None:
    result = run(
        """
        def test_one(machine_module):
            machine_module.run("write 'Kernel panic - not syncing: first'; sleep 20")
        def test_two(machine_module): pass
        """
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*test_two*", "E *MachineError: *not syncing: first"])


# -- leaks -------------------------------------------------------------------------------------

LEAK = "machine.run(f'mkdir -p {machine.workdir}/leaks; touch {machine.workdir}/leaks/mount-x')"


def test_what_is_left_behind_is_an_error_of_that_test(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        f"""
        def test_guilty(machine_module):
            machine = machine_module
            {LEAK}
        def test_after(machine_module): pass
        """,
        "--records=records",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_guilty*", "left behind:", "  mount-x"])
    guilty, after = records(pytester)
    assert (guilty.outcome, after.outcome) == (Outcome.FAILED, Outcome.PASSED)
    assert guilty.reason == "in teardown: left behind:"
    place = folder(pytester)
    assert place.name.endswith("teardown")
    assert (place / "mountinfo.after").exists()  # the machine was still there


def test_what_the_tests_own_fixtures_take_away_is_no_leak(run: Run) -> None:
    result = run(
        f"""
        import pytest
        @pytest.fixture
        def thing(machine):
            {LEAK}
            yield
            machine.run(f"rm -r {{machine.workdir}}/leaks")
        def test_it(thing): pass
        @pytest.fixture(scope="module")
        def things(machine_module):
            machine = machine_module
            {LEAK}
        def test_shared(things, machine_module): pass
        """
    )
    result.assert_outcomes(passed=2)


def test_failed_test_is_not_blamed_for_what_it_could_not_take_away(run: Run) -> None:
    result = run(f"def test_it(machine):\n    {LEAK}\n    assert 0")
    result.assert_outcomes(failed=1)


def test_machine_that_is_off_has_no_leaks(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        CONFTEST.replace("return machine.run", "machine.raise_if_broken(); return machine.run")
    )
    run("def test_it(machine):\n    machine._off = True").assert_outcomes(passed=1)


# -- capabilities ------------------------------------------------------------------------------


def test_what_a_machine_cannot_do_is_skipped_with_its_reason(
    run: Run, pytester: pytest.Pytester
) -> None:
    result = run(
        """
        import pytest
        from harness.machine import Capability
        @pytest.mark.needs(Capability.REBOOT)
        def test_can(machine): machine.reboot()
        @pytest.mark.needs(Capability.POWER_CUT)
        def test_marked(machine): assert 0
        def test_unmarked(machine): machine.power_cut()
        @pytest.mark.needs(Capability.POWER_CUT)
        def test_shared(machine_module): assert 0
        """,
        "-rs",
    )
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["    3 on container, host: container cannot do power-cut: nobody may cut the power*"]
    )
    result.stdout.no_fnmatch_line("*SKIPPED*plugin.py*")
    assert len(made(pytester)) == 2  # what is known by then is not made for a skip


def test_machine_that_this_host_cannot_have_is_a_skip(run: Run) -> None:
    result = run("def test_it(machine): pass", "--machine=odd")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*odd machines cannot be had on this host: no reason at all*"])


def test_machine_that_cannot_be_made_fails_without_the_harness(run: Run) -> None:
    result = run("def test_it(machine): pass", "--machine=broken")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["no machine (broken-host): no program for this machine", "hint: apt install it"]
    )
    result.stdout.no_fnmatch_line("*fakes.py*")


# -- failures ----------------------------------------------------------------------------------


def test_failure_shows_the_tests_own_frames_only(run: Run) -> None:
    result = run(
        """
        def helper(machine):
            machine.run("echo complaint >&2; exit 7")
        def test_it(machine, host):
            helper(machine)
        def test_infra(host):
            host.check_output("exit 3")
        """
    )
    result.assert_outcomes(failed=2)
    output = result.stdout.str()
    assert "test_failure_shows_the_tests_own_frames_only.py:2: CommandError" in output
    assert "CommandError: exit status 7: echo complaint >&2; exit 7" in output
    assert "stderr: complaint" in output
    for name in ("machine.py", "channel.py", "errors.py", "plugin.py", "testinfra"):
        assert f"{name}:" not in output


def test_error_of_the_harness_itself_shows_all_frames(run: Run) -> None:
    result = run("def test_it(machine):\n    machine.user(1).run(['true'], env=5)")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*machine.py:*"])


def test_failed_test_leaves_a_folder_and_the_command(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nharness_command = ./nox -s system --")
    result = run(
        f"""
        import pytest
        @pytest.mark.parametrize("what", ["apple", "pear"])
        def test_it(machine, what):
            {WARN}
            assert what == "apple" and machine.workdir == 0
        """,
        *("--machine=vm", "--kernel=6.1", "--accel=tcg", "-k", "pear", "--records=records"),
    )
    result.assert_outcomes(failed=1, deselected=1)
    place = folder(pytester)
    name = "test_failed_test_leaves_a_folder_and_the_command.py-test_it-pear-vm-6.1"
    assert place.name == name
    again = (
        "./nox -s system -- --accel=tcg --machine=vm --kernel=6.1 "
        "'test_failed_test_leaves_a_folder_and_the_command.py::test_it[vm-6.1-pear]'"
    )
    result.stdout.fnmatch_lines(["*- harness -*", f"again by: {again.replace('[', '[[]')}"])
    result.stdout.fnmatch_lines([f"kept in: build/artefacts/{name}"])
    texts = {path.name: path.read_text() for path in place.rglob("*") if path.is_file()}
    assert texts["reproduce.txt"] == f"{again}\n"
    assert "WARNING: CPU: 0" in texts["console.txt"]
    assert "WARNING: CPU: 0" in texts["findings.txt"]
    assert "assert" in texts["error.txt"]
    assert " / " in texts["mountinfo.before"]
    assert texts["mountinfo.before"] == texts["mountinfo.after"]
    assert texts["state.txt"] == "the state\n"
    assert texts["broken.txt"].strip() == "(exit status 1)"
    assert texts["dmesg.txt"] == "nothing\n"
    assert "console.log" in texts  # from the machine's own directory
    (record,) = records(pytester)
    assert record.outcome is Outcome.FAILED
    assert record.reproduce == again
    assert record.artefacts == f"build/artefacts/{name}"
    assert record.test.endswith("::test_it[pear]")
    assert "WARNING" in record.findings[0]


def test_command_reproduces_the_failure(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nharness_command = {sys.executable} -m pytest -p harness.plugin -q")
    run("def test_it(machine_module):\n    assert 0", "--machine=both", "--kernel=6.1,6.12")
    for place in (pytester.path / "build" / "artefacts").iterdir():
        command = (place / "reproduce.txt").read_text()
        again = subprocess.run(
            command, shell=True, cwd=pytester.path, capture_output=True, text=True, check=False
        )
        assert "1 failed" in again.stdout
        assert "assert 0" in again.stdout


def test_folder_of_a_dead_machine_says_what_it_died_of(run: Run, pytester: pytest.Pytester) -> None:
    run("def test_it(machine):\n    machine.agent.kill()\n    machine.run(['true'])")
    place = folder(pytester)
    assert (place / "broken.txt").read_text().strip()
    assert (place / "console.txt").exists()
    assert not (place / "mountinfo.after").exists()


def test_failure_before_the_test_is_kept_too(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
        import pytest
        @pytest.fixture
        def thing(machine): assert 0
        def test_it(thing): pass
        """,
        "--records=records",
    )
    result.assert_outcomes(errors=1)
    assert (folder(pytester) / "console.txt").exists()
    (record,) = records(pytester)
    assert record.reason == "in setup: assert 0"


# What runs in the background of a shell ignores Ctrl-C, and so do its children.
INTERRUPTIBLE = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_sit_keeps_the_failed_machine_and_says_how_to_enter(
    run: Run, pytester: pytest.Pytester
) -> None:
    del run  # its conftest is what is needed
    pytester.makepyfile(
        """
        def test_one(machine): assert 0
        def test_two(machine): pass
        """
    )
    process = pytester.popen(
        [
            *(sys.executable, "-c", INTERRUPTIBLE, "-p", "harness.plugin"),
            *("--sit", "-n2", "--machine=container"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "Ctrl-C ends it" in line:
            break
    assert "test_one[container-host] failed; its machine waits." in said
    assert "enter it: look-into container-host-" in said
    (name,) = made(pytester)
    pid = int((pytester.path / "machines" / name / "agent.pid").read_text())
    assert alive(pid)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "1 failed" in out
    assert "passed" not in out  # the second test was not begun
    assert not alive(pid)


# -- several processes -------------------------------------------------------------------------


def test_xdist_keeps_a_shared_machine_in_one_process(run: Run, pytester: pytest.Pytester) -> None:
    tests = """
        import pytest
        @pytest.mark.parametrize("n", range(4))
        def test_shared(machine_module, n): assert n != 3
        @pytest.mark.parametrize("n", range(4))
        def test_fresh(machine, n): pass
        """
    pytester.makepyfile(test_other=tests)
    result = run(tests, "-n2", "--machine=both", "--records=records", "-v", "--junitxml=junit.xml")
    result.assert_outcomes(passed=28, failed=4)
    names = made(pytester)
    assert len(names) == 16 + 4  # one for each fresh test; one for each module, machine
    workers = {name.split("-")[2] for name in names}
    assert len(workers) == 2
    found = records(pytester)
    assert len(found) == 32
    assert all("@" not in record.test for record in found)
    assert {record.test.rpartition("[")[2] for record in found} == {"0]", "1]", "2]", "3]"}
    for record in found:
        if record.outcome is Outcome.FAILED:
            assert "@" not in record.reproduce
            assert (pytester.path / record.artefacts / "error.txt").exists()
    result.stdout.re_match_lines([r"image \(.*\) +vm +14 +2 +0 ", r"host \(.*container +14 +2 +0 "])
    suite = ET.parse(pytester.path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("32", "4")


def test_xdist_skips_and_errors_are_listed(run: Run) -> None:
    result = run("def test_it(machine): pass", "-n2", "--machine=odd,broken")
    result.assert_outcomes(skipped=1, errors=1)
    result.stdout.fnmatch_lines(["*1 on odd, host: odd machines cannot be had*"])


# -- results -----------------------------------------------------------------------------------


def test_records_of_several_runs_make_one_report(run: Run, pytester: pytest.Pytester) -> None:
    source = "def test_it(machine): assert machine.workdir.name.startswith('vm-6.12')"
    options = ("--records=records", "--html-report=out/report.html")
    run(source, "--machine=vm", "--kernel=6.1", *options)
    result = run(source, "--machine=vm", "--kernel=6.12", *options)
    result.stdout.fnmatch_lines(["report: out/report.html"])
    old, new = records(pytester)
    assert (old.kernel, old.outcome) == ("6.1", Outcome.FAILED)
    assert (new.kernel, new.outcome) == ("6.12", Outcome.PASSED)
    page = (pytester.path / "out" / "report.html").read_text()
    assert "<br>6.1<br>" in page
    assert "<br>6.12<br>" in page
    joined = subprocess.run(
        [sys.executable, "-m", "harness.report", pytester.path / "records"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert joined.returncode == 1
    assert joined.stdout.count("vm") >= 2


def test_time_is_told_apart(run: Run, pytester: pytest.Pytester) -> None:
    run(
        """
        import time
        def test_it(machine): time.sleep(0.3)
        """,
        "--records=records",
    )
    (record,) = records(pytester)
    assert set(record.phases) == {"build", "boot", "restore", "test", "teardown"}
    assert record.phases["boot"] > 0.05  # what the provider says
    assert record.phases["test"] > 0.3
    assert record.phases["teardown"] < 5


def test_records_are_lines_of_json(run: Run, pytester: pytest.Pytester) -> None:
    run("def test_it(machine): pass", "--records=records")
    (line,) = (pytester.path / "records").read_text().splitlines()
    assert json.loads(line)["outcome"] == "passed"


def test_expected_failure_counts_as_passed(run: Run, pytester: pytest.Pytester) -> None:
    result = run(
        """
        import pytest
        @pytest.mark.xfail(strict=True)
        def test_it(machine): assert 0
        """,
        "--records=records",
    )
    result.assert_outcomes(xfailed=1)
    (record,) = records(pytester)
    assert record.outcome is Outcome.PASSED
    assert not record.artefacts
