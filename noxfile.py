# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be run here: ``./nox -l`` lists it, ``./nox`` runs the default sessions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "unit", "mounts"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
PYTHON_SOURCES = ("overlayd", "noxfile.py", "tests", "benchmarks", "demo", "tools")
# Bounded where a newer release is allowed to find more: an old commit must stay green.
LINTERS = ("ruff~=0.17.6", "mypy>=2.4,<3", "import-linter>=2.3", "nox")
TESTS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
COVERAGE = "coverage>=7.10.3"  # its subprocess patch


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, the rule of imports and the shape of the tree."""
    install_project(session, *LINTERS, *TESTS)
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
    apt_need(session, {"unshare": "util-linux", "mount": "mount", "setcap": "libcap2-bin"})
    run_tests(session, "tests/mounts")


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
    """Measure, and write the figures to bench.json."""
    install_project(session)
    session.run("python", "-m", "benchmarks", "--json", "bench.json", *session.posargs)


@nox.session(name="fresh-machine", venv_backend="none")
def fresh_machine(session: nox.Session) -> None:
    """Prove the demo and ./nox on Debian 12 and 13, made afresh (-- SUITE...); needs root."""
    if os.geteuid() != 0:
        session.error("making a machine needs root")
    apt_need(session, {"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "mount": "mount"})
    session.run(
        sys.executable,
        "tools/fresh_machine.py",
        *session.posargs,
        external=True,
        interrupt_timeout=None,  # it removes the machine
    )


def install_project(session: nox.Session, *requirements: str) -> None:
    """Install the checkout in place, without a build environment that is made anew each time."""
    session.install(*nox.project.load_toml("pyproject.toml")["build-system"]["requires"])
    session.install("--no-build-isolation", "--editable", ".", *requirements)


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


def apt_need(session: nox.Session, packages: dict[str, str]) -> None:
    """Have these commands: what is missing is installed from its package, by APT and as root."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = sorted({pkg for cmd, pkg in packages.items() if not shutil.which(cmd, path=path)})
    if not missing:
        return
    if os.geteuid() != 0:
        session.error(f"missing commands; as root: apt install {' '.join(missing)}")
    apt = ("apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300")
    install = (*apt, "install", "--no-install-recommends", *missing)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Package lists may be missing or outdated: they are fetched if it does not work as is.
    first = subprocess.run(
        install, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if first.returncode != 0:
        session.run(*apt, "update", external=True)
        session.run(*install, env=env, external=True)
