# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be run here: ``./nox -l`` lists it, ``./nox`` runs the default sessions."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from harness import host, userland  # noqa: E402  # the standard library is all it needs
from harness.errors import HarnessError  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "unit", "mounts", "bus", "crash", "kernels", "system", "harness"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

PYTHON_SOURCES = ("overlayd", "harness", "noxfile.py", "tests", "benchmarks", "demo", "tools")
# Bounded where a newer release is allowed to find more: an old commit must stay green.
LINTERS = ("ruff~=0.17.6", "mypy>=2.4,<3", "import-linter>=2.3", "nox")
TESTS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
FAULTS = ("python-ptrace>=0.9.9",)
COVERAGE = "coverage>=7.10.3"  # its subprocess patch
MACHINES = ("pytest>=8", "pytest-xdist>=3.6", "pytest-testinfra>=10")
RESULTS = ROOT / "build"
HARNESS_PROGRAMS = {
    "dpkg-buildpackage": "dpkg-dev",
    "lintian": "lintian",
    "git": "git",
    "cpio": "cpio",
    "busybox": "busybox-static",
    "ostree": "ostree",
    "mkfs.ext4": "e2fsprogs",
    "systemd-nspawn": "systemd-container",
    "podman": "podman",
    "crun": "crun",
}
BUS_PROGRAMS = {
    "dbus-daemon": "dbus-daemon",
    "busctl": "systemd",
    "/usr/lib/polkit-1/polkitd": "polkitd",
    "newuidmap": "uidmap",
    "gcc": "gcc",
    "nm": "binutils",
    "su": "util-linux",
}
CRASH_PROGRAMS = BUS_PROGRAMS | {
    "prlimit": "util-linux",
    "qemu-storage-daemon": "qemu-utils",
    "mkfs.ext4": "e2fsprogs",
}
# What may differ from kernel to kernel; `nox -s kernels -- tests/mounts` runs everything.
KERNEL_TESTS = (
    *(f"tests/mounts/test_{name}.py" for name in ("exchange", "crash", "busy", "namespaces")),
    *(f"tests/mounts/test_{name}.py" for name in ("space", "targets", "usr", "life")),
    "-knot (at_random_moments or whatever_command or thousand_lives or at_any_step and private)",
)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, the rule of imports and the shape of the tree."""
    install_project(session, *LINTERS, *TESTS, *MACHINES, *FAULTS)
    sources = [name for name in PYTHON_SOURCES if (ROOT / name).exists()]
    session.run("ruff", "check", *sources)
    session.run("ruff", "format", "--check", *sources)
    session.run("mypy", *sources)
    session.run("lint-imports", "--no-logo")
    session.run("pytest", "-q", "tests/lint")


@nox.session
def unit(session: nox.Session) -> None:
    """Test what needs no mounts; any user may run it."""
    run_tests(session, "tests/unit")


@nox.session
def mounts(session: nox.Session) -> None:
    """Test real overlays, each worker in a mount namespace of its own; needs root."""
    if os.geteuid() != 0:
        session.skip("needs root, to mount overlays in a mount namespace of its own")
    have(session, {"unshare": "util-linux", "mount": "mount", "setcap": "libcap2-bin"})
    run_tests(session, "tests/mounts")


@nox.session
def bus(session: nox.Session) -> None:
    """Test the service with a real bus and polkit, as users; needs root."""
    if os.geteuid() != 0:
        session.skip("needs root, to be several users in a mount namespace of its own")
    have(session, BUS_PROGRAMS)
    run_tests(session, "tests/bus")


@nox.session
def crash(session: nox.Session) -> None:
    """Throw faults of every kind at real overlays, in a quick form (-- --whole --seed=N)."""
    if os.geteuid() != 0:
        session.skip("needs root, to kill what mounts overlays in namespaces of its own")
    have(session, CRASH_PROGRAMS)
    install_project(session, *TESTS, *FAULTS)
    # No coverage: it slows down what is killed some thousand times.
    session.run("pytest", "-n", "auto", *tests_or(["tests/crash"], session.posargs))


@nox.session
def proof(session: nox.Session) -> None:
    """Try every fault there is and write docs/proof.md (-- --minutes=N, -k SOME); takes hours."""
    if os.geteuid() != 0:
        session.error("needs root, as the tests do")
    have(session, CRASH_PROGRAMS)
    install_project(session, *TESTS, *MACHINES, *FAULTS)
    install_fuzzer(session)
    RESULTS.mkdir(exist_ok=True)
    tried = RESULTS / "tried.jsonl"
    add = f"--tried={tried}"
    crash = ("pytest", "-n", "auto", "tests/crash", "--whole", add)
    system = ("pytest", "-p", "harness.plugin", "-n", "auto", "tests/system", "--rounds=2", add)
    minutes = [*session.posargs] or ["--minutes=10"]  # of fuzzing, and of the soak
    every: list[tuple[str, ...]] = [
        (*crash, *minutes),
        ("python", "-m", "tests.crash.fuzz", add, *minutes),
        (*system, "-k", "power or moves or killed"),
    ]
    if "-k" in session.posargs:  # once more; of the rest stays what the last time has found
        every = [(*crash, *session.posargs)]
    else:
        tried.unlink(missing_ok=True)
    for what in every:
        # What does not hold is on the page as well.
        session.run(*what, success_codes=[0, 1])
    session.run("python", "-m", "tests.crash.page", str(tried), "docs/proof.md")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz all that reads what others wrote, led by coverage (-- --minutes=N TARGET...)."""
    if os.geteuid() != 0:
        session.error("needs root, for a mount namespace and a jail of its own")
    install_project(session, *TESTS)
    install_fuzzer(session)
    session.run("python", "-m", "tests.crash.fuzz", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Use overlays for long and see that nothing grows (-- --minutes=N); draws build/soak.svg."""
    if os.geteuid() != 0:
        session.error("needs root, to mount overlays in a mount namespace of its own")
    have(session, BUS_PROGRAMS)
    install_project(session, *TESTS)
    RESULTS.mkdir(exist_ok=True)
    out = f"--out={RESULTS}/soak.svg"
    session.run("python", "-m", "tests.crash.soak", out, *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """Test real overlays on bare kernels (-- --kernel=6.1,6.12,unstable --accel=… TESTS)."""
    options = [word for word in session.posargs if word.startswith(("--kernel=", "--accel="))]
    if not any(word.startswith("--kernel=") for word in options):
        options.append("--kernel=6.1,unstable")  # Debian 13's, between them, is that of 'system'
    tests = [word for word in session.posargs if word not in options] or [*KERNEL_TESTS]
    project = nox.project.load_toml("pyproject.toml")["project"]
    libraries = Path(session.create_tmp(), "libraries")
    shutil.rmtree(libraries, ignore_errors=True)  # pip would keep what is there
    session.run(
        *("python", "-m", "pip", "install", "--quiet", "--no-compile", f"--target={libraries}"),
        # For the machines' Python, not for this one.
        *("--only-binary=:all:", f"--python-version={userland.PYTHON}"),
        *(*project["dependencies"], *TESTS),
        silent=True,
    )
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    session.run(
        *("python", "-m", "harness.sweep", "--junit", f"--library={libraries}"),
        *(f"--copy={name}=/src/{name}" for name in ("overlayd", "tests/mounts", "pyproject.toml")),
        *("--cwd=/src", "--memory=2048", "--jobs=1", f"--out={RESULTS / 'kernels'}"),
        "--allow=overlayfs: maximum fs stacking depth exceeded",  # it is tried
        f"--precompile={shlex.join([*pytest, '--collect-only', *tests])}",
        *options,
        *("--", "python3", *pytest, "-n", "2", *tests),
        env={"PYTHONPATH": str(ROOT)},
    )


@nox.session(name="harness")
def harness_tests(session: nox.Session) -> None:
    """Test the harness itself, on real machines where it needs them."""
    if os.geteuid() != 0:
        session.skip("needs root, for machines")
    have(session, HARNESS_PROGRAMS, qemu=True)
    session.install(*MACHINES, *TESTS)
    # Most of them wait for a machine most of the time.
    workers = 2 * len(os.sched_getaffinity(0))
    session.run("pytest", "-n", str(workers), *(session.posargs or ["tests/harness"]))


@nox.session
def system(session: nox.Session) -> None:
    """Test the package on booted images (-- --machine=vm|container --kernel=6.1,… -k NAME)."""
    run_system_tests(session, *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Test the package on all kernels, with ten reboots of each kind and ten power cuts."""
    kernels = "--kernel=image,6.1,unstable"  # the image's is Debian 13's: 6.12
    run_system_tests(session, kernels, "--rounds=10", "--everywhere", *session.posargs)


@nox.session
def image(session: nox.Session) -> None:
    """Build the image, and say where it is (-- --kernel=VERSION)."""
    run_machines(session, "image")


@nox.session
def shell(session: nox.Session) -> None:
    """Enter a fresh machine with the tree as it is (-- --machine=vm|container)."""
    run_machines(session, "shell")


@nox.session
def cache(session: nox.Session) -> None:
    """Look at what is kept between runs (-- --list), or drop it (-- --prune)."""
    session.run("python", "-m", "harness.cache", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Report what the tests since the last report have covered; runs after them by itself."""
    session.install(COVERAGE)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def demo(session: nox.Session) -> None:
    """Show the program at work on this machine's /usr and leave nothing behind; needs root."""
    if os.geteuid() != 0:
        session.error("the demo needs root: it mounts overlays under /usr")
    install_project(session)
    session.run("python", "demo/tour.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, and write the figures to bench.json (-- harness: the machines of the tests)."""
    arguments = list(session.posargs)
    if arguments[:1] == ["harness"]:
        session.install(*MACHINES)
        module, arguments = "benchmarks.machines", arguments[1:]
    else:
        install_project(session)
        module = "benchmarks"
    session.run("python", "-m", module, "--json", "bench.json", *arguments)


@nox.session(name="fresh-machine", venv_backend="none")
def fresh_machine(session: nox.Session) -> None:
    """Prove the demo and ./nox on Debian 12 and 13, made afresh (-- SUITE...); needs root."""
    if os.geteuid() != 0:
        session.error("making a machine needs root")
    have(session, {"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "mount": "mount"})
    session.run(
        sys.executable,
        "tools/fresh_machine.py",
        *session.posargs,
        external=True,
        interrupt_timeout=None,  # it removes the machine
    )


def run_system_tests(session: nox.Session, *arguments: str) -> None:
    """Run the tests on booted images and leave their results in build/."""
    session.install(*MACHINES, *FAULTS)
    RESULTS.mkdir(exist_ok=True)
    records = RESULTS / "system.jsonl"
    records.unlink(missing_ok=True)
    session.run(
        *("pytest", "-p", "harness.plugin", "-n", "auto"),
        *(f"--junitxml={RESULTS}/system.xml", f"--html-report={RESULTS}/system.html"),
        f"--records={records}",
        *("-o", "harness_command=./nox -R -s system --"),
        *tests_or(["tests/system"], arguments),
    )


def tests_or(default: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return *arguments* of pytest, after the *default* tests if they name none."""
    named = any((ROOT / argument.split("::")[0]).exists() for argument in arguments)
    return [*([] if named else default), *arguments]


def run_machines(session: nox.Session, what: str) -> None:
    """Do something with the machines of the system tests, without tests."""
    session.install("pytest>=8")  # whose hooks the harness names
    session.run("python", "-m", "tests.system", what, *session.posargs)


def install_project(session: nox.Session, *requirements: str) -> None:
    """Install the checkout in place, without a build environment that is made anew each time."""
    session.install(*nox.project.load_toml("pyproject.toml")["build-system"]["requires"])
    session.install("--no-build-isolation", "--editable", ".", *requirements)


def install_fuzzer(session: nox.Session) -> None:
    """Install atheris where there is a wheel of it; tests/crash/fuzz.py can do without."""
    pip = ("python", "-m", "pip", "install", "--quiet", "--only-binary=:all:")
    session.run(*pip, "atheris>=3", success_codes=[0, 1])


def run_tests(session: nox.Session, directory: str) -> None:
    """Run the tests below ``directory``, their own processes' coverage of overlayd measured."""
    install_project(session, *TESTS, COVERAGE)
    data = f".coverage.{session.name}"
    for old in ROOT.glob(f"{data}.*"):
        old.unlink()
    session.notify("coverage")
    session.run(
        *("coverage", "run", "-m", "pytest", "-n", "auto"),
        *(session.posargs or [directory]),
        env={"COVERAGE_FILE": str(ROOT / data)},
    )


def have(session: nox.Session, packages: dict[str, str], *, qemu: bool = False) -> None:
    """Have these commands: what is missing is installed from its package, by APT and as root."""
    try:
        host.need(packages)
        if qemu:
            host.qemu()
    except HarnessError as error:
        session.error(f"{error.message}; {error.hint}" if error.hint else error.message)
