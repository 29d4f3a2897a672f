# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pytest plugin: tests get machines, and fail for what they do to them.

Load it with ``-p harness.plugin``, and say in a ``conftest.py`` where machines come from
(:mod:`harness.provider`).  A test that takes ``machine``, ``machine_module`` or ``host`` runs once
for each kind of machine and each kernel that was asked for.

It is ``host`` of the harness that a test gets, so the plugin of pytest-testinfra is not loaded.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from harness.errors import CapabilityError, HarnessError
from harness.failures import FAILED, VERDICT, keep
from harness.findings import Allow
from harness.guard import Guard, Verdict
from harness.machine import Machine  # noqa: TC001 - pytest may look at fixtures' annotations
from harness.provider import Case, Hooks
from harness.results import Record
from harness.session import STATE, State, case_of, in_order, leaks_of, name_of
from harness.summary import Summary, outcome_of, reason_of
from harness.testinfra_backend import get_host
from harness.timings import LEDGER, Phase, phase
from harness.tracebacks import HARNESS, hide

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from testinfra.host import Host  # type: ignore[import-untyped]
TESTINFRA: Final = (
    "testinfra",
    "pytest11.testinfra",
)  # as -p has it, and as it is installed


# -- options and order -------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("harness", "test machines")
    group.addoption("--machine", metavar="KINDS", help="kinds of machines, or both (default)")
    group.addoption(
        *("--kernel",),
        metavar="VERSIONS",
        help="kernels of machines that have their own, like 6.1,6.12 (default: the image's)",
    )
    group.addoption("--accel", choices=["auto", "kvm", "tcg"], default="auto")
    group.addoption(
        "--everywhere", action="store_true", help="run on each machine what is marked 'once', too"
    )
    group.addoption("--no-cache", action="store_true", help="build everything anew")
    group.addoption(
        "--sit", action="store_true", help="at the first failure keep the machine and wait"
    )
    group.addoption(
        *("--artefacts",),
        metavar="DIR",
        type=Path,
        default=Path("build/artefacts"),
        help="where folders of failed tests go (default: build/artefacts)",
    )
    group.addoption("--records", metavar="FILE", type=Path, help="add results to FILE, for reports")
    group.addoption(
        *("--html-report",), metavar="FILE", type=Path, help="write a page of all results to FILE"
    )
    parser.addini(
        "harness_command", "what runs these tests, for the line that reproduces a failure"
    )


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hooks that a project implements."""
    pluginmanager.add_hookspecs(Hooks)


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Keep testinfra's own plugin out: its ``host`` would win over ours."""
    if plugin is sys.modules[__name__]:
        for name in TESTINFRA:
            if manager.has_plugin(name):
                manager.unregister(name=name)
            manager.set_blocked(name)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Do without xdist when sitting: its processes have no terminal."""
    if config.option.sit and hasattr(config.option, "dist"):
        config.option.dist, config.option.tx, config.option.numprocesses = "no", [], None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Keep the tests that share a machine in one process, unless xdist was told how to spread."""
    if config.option.dist != "load":
        return None
    from harness.scheduling import MachineScheduling  # noqa: PLC0415 - xdist may be absent

    return MachineScheduling(config, log, cases=config.stash[STATE].cases())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what takes long begin early."""
    items[:] = in_order(items)


def pytest_configure(config: pytest.Config) -> None:
    """Begin."""
    config.addinivalue_line(
        "markers", "needs(*capabilities): skip where the machine cannot do these"
    )
    config.addinivalue_line(
        "markers", "once: is the same on all machines; runs on the last that was asked for"
    )
    config.addinivalue_line(
        "markers",
        "allow_findings(pattern, reason, kind=None): let these pass in the machine's logs",
    )
    config.stash[STATE] = State(config)
    if not hasattr(config, "workerinput"):  # of xdist, which sends its reports
        config.pluginmanager.register(Summary(config), "harness-summary")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse options that name no machine, and build what is missing before any process starts."""
    hooks = session.config.hook.pytest_harness_provider
    if hooks.get_hookimpls() and not hasattr(session.config, "workerinput"):
        state = session.config.stash[STATE]
        for case in state.cases():
            if not session.config.option.collectonly:
                state.prepare(case)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give back what the provider shares."""
    if (state := config.stash.get(STATE, None)) is not None:
        state.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a machine on each."""
    if "machine_case" in metafunc.fixturenames:
        cases = metafunc.config.stash[STATE].cases()
        if metafunc.definition.get_closest_marker("once") and not metafunc.config.option.everywhere:
            cases = cases[-1:]
        shared = "machine_module" in metafunc.fixturenames
        ids = [case.shared_id if shared else case.id for case in cases]
        metafunc.parametrize("machine_case", cases, indirect=True, ids=ids, scope="session")


# -- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def machine_case(request: pytest.FixtureRequest) -> Case:
    """Return the kind of machine and the kernel that the test runs on."""
    case = request.param
    assert isinstance(case, Case)  # noqa: S101
    return case


@pytest.fixture
def machine(machine_case: Case, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Return a fresh machine, for this test alone."""
    state = request.config.stash[STATE]
    guard = state.acquire(machine_case, shared=False)
    yield guard.machine
    state.release(guard)


@pytest.fixture(scope="module")
def machine_module(machine_case: Case, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Return a machine that the tests of this module share; one that broke stays broken."""
    state = request.config.stash[STATE]
    guard = state.acquire(machine_case, shared=True)
    yield guard.machine
    state.release(guard)


@pytest.fixture
def host(machine_case: Case, request: pytest.FixtureRequest) -> Host:
    """Return testinfra's host: the module's machine if the test has that, else a fresh one."""
    del machine_case  # the test runs once for each
    return get_host(request.getfixturevalue(_machine_fixture(request)))


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check what is left in the machine once the fixtures that the test has beside it are gone."""
    if not {"machine", "machine_module", "host"} & set(request.fixturenames):
        yield
        return
    item = request.node
    request.getfixturevalue(_machine_fixture(request))  # ends after this one
    guards = request.config.stash[STATE].guards_of(item)
    check = leaks_of(item)
    for guard in guards:
        guard.note_leaks(check)
    yield
    with phase(Phase.TEARDOWN):
        verdict = sum((guard.left(check) for guard in guards), Verdict())
    if verdict and not item.stash.get(FAILED, False):
        keep(item, "teardown", str(verdict), verdict)
        raise pytest.fail.Exception(str(verdict), pytrace=False)


def _machine_fixture(request: pytest.FixtureRequest) -> str:
    return "machine_module" if "machine_module" in request.fixturenames else "machine"


# -- running -----------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what the machine cannot do, before it is made if that is known."""
    state = item.config.stash[STATE]
    case = case_of(item)
    wanted = [capability for mark in item.iter_markers("needs") for capability in mark.args]
    if case is not None and (reason := state.missing(case, wanted)):
        raise _skipped(reason)
    try:
        result = yield
    except CapabilityError as error:
        raise _skipped(_plain(error, state, item)) from None
    if case is not None and (reason := state.missing(case, wanted)):
        raise _skipped(reason)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the test, then look at what its machines logged, which can fail it."""
    state = item.config.stash[STATE]
    guards = state.guards_of(item)
    allowed = [Allow(*mark.args, **mark.kwargs) for mark in item.iter_markers("allow_findings")]
    for guard in guards:
        guard.begin(allowed)
    try:
        result = yield
    except CapabilityError as error:
        raise _skipped(_plain(error, state, item)) from None
    except (Exception, pytest.fail.Exception):
        if verdict := _findings(item, guards):
            item.add_report_section("call", "machine", str(verdict))
        raise
    if verdict := _findings(item, guards):
        raise pytest.fail.Exception(str(verdict), pytrace=False)
    return result


def _findings(item: pytest.Item, guards: Iterable[Guard]) -> Verdict:
    with phase(Phase.TEARDOWN):
        verdict = sum((guard.findings() for guard in guards), Verdict())
    item.stash[VERDICT] = verdict
    return verdict


def _skipped(reason: str) -> BaseException:
    return pytest.skip.Exception(reason, _use_item_location=True)


def _plain(error: CapabilityError, state: State, item: pytest.Item) -> str:
    """Return what it says, with the kind in place of a name that is different each time."""
    text = str(error)
    for guard in state.guards_of(item):
        text = text.replace(guard.machine.name, guard.case.machine)
    return text


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hide the harness in tracebacks, note where time went, keep what a failure left."""
    state = item.config.stash[STATE]
    error = call.excinfo.value if call.excinfo is not None else None
    # Of other errors the harness itself is to blame.
    if isinstance(error, HarnessError | AssertionError) and not item.config.option.fulltrace:
        hide(error, _hidden())
        call.excinfo = pytest.ExceptionInfo.from_exception(error)
    report = yield
    spent = LEDGER.take()
    rest = Phase.TEARDOWN if call.when == "teardown" else Phase.TEST
    spent[rest] = spent.get(rest, 0.0) + max(0.0, call.duration - sum(spent.values()))
    case = case_of(item)
    record = Record(
        test=name_of(item),
        machine=case.machine if case else "",
        kernel=case.kernel if case else "",
        outcome=outcome_of(report),
        release=_release(state, item),
        reason=reason_of(report),
        phases={phase.value: seconds for phase, seconds in spent.items()},
    )
    if report.failed:
        item.stash[FAILED] = True
        kept = keep(item, report.when, report.longreprtext, item.stash.get(VERDICT, Verdict()))
        report.sections.append(("harness", kept.text))
        record = replace(
            record,
            details=report.longreprtext,
            findings=tuple(map(str, kept.verdict.findings)),
            artefacts=kept.place,
            reproduce=kept.reproduce,
        )
    report.harness = record.to_json()  # type: ignore[attr-defined]  # xdist sends it along
    return report


def _hidden() -> list[Path]:
    directories = [HARNESS]
    if (module := sys.modules.get("testinfra")) is not None and module.__file__:
        directories.append(Path(module.__file__).parent)
    return directories


def _release(state: State, item: pytest.Item) -> str:
    for guard in state.guards_of(item):
        with suppress(HarnessError):
            return guard.machine.kernel
    return ""
