# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real package, unpacked by dpkg into a writable overlay on all of /usr."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.apt import Apt
from harness.cache import Cache, default_root
from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.system.guest import Guest

SUITE = "trixie"
PACKAGE = "hello"
"""A program with documents and translations: it makes new directories in many places."""
DEB = "/var/tmp/package.deb"
# The image's own packages came without their documents and translations; this one is to be whole.
UNPACK = f"dpkg --path-include='/usr/*' --unpack {DEB}"


@pytest.fixture(scope="session")
def package() -> Iterator[Path]:
    """Give the package's file."""
    cache = Cache(default_root())

    def fetch(stage: Path) -> None:
        apt = Apt(SUITE, cache.root / "apt")
        apt.update()
        apt.download([PACKAGE], stage, only=lambda found: found.name == PACKAGE)

    with cache.entry("package", cache.key(SUITE, PACKAGE), fetch) as entry:
        yield next(entry.glob("*.deb"))


@pytest.mark.needs(Capability.OSTREE)
def test_dpkg_unpacks_a_package_into_an_overlay_on_usr(fresh: Guest, package: Path) -> None:
    fresh.machine.copy_in(package, DEB)
    usr = fresh.usr_of_the_commit()
    # OSTree keeps dpkg's database in the image, so that it is of the deployment.
    assert fresh.sh("readlink -f /var/lib/dpkg").startswith("/usr/")
    refused = fresh.sh(f"{UNPACK} 2>&1", check=False)
    assert "Read-only file system" in refused
    source = fresh.source("empty", {})
    assert "critical target" in fresh.overlayd("apply", "all", source, "/usr", code=5).err
    # The agent loads a library when it first becomes somebody else: not from the overlay.
    fresh.sh("true", user="alice")
    fresh.apply("all", source, "/usr", "--allow-critical")
    said = fresh.sh(
        f"""
        {UNPACK} >/dev/null
        dpkg-query -W -f '${{Status}}\n' {PACKAGE}
        dpkg --configure {PACKAGE} >/dev/null
        dpkg-query -W -f '${{Status}}\n' {PACKAGE}
        {UNPACK} | grep -o 'over (.*'      # over itself: renames and backups
        dpkg --configure {PACKAGE} >/dev/null
        dpkg --verify {PACKAGE}; dpkg --audit
        cd /; dpkg -L {PACKAGE} | xargs -d '\n' ls -d >/dev/null && echo all there
        """,
        timeout=180,
    )
    version = fresh.sh(f"dpkg-deb -f {DEB} Version")
    assert said.split("\n") == [
        "install ok unpacked",
        "install ok installed",
        f"over ({version}) ...",
        "all there",
    ]
    assert fresh.sh("hello", user="alice") == "Hello, world!"
    assert fresh.status("all").used_bytes
    # What dpkg knows goes with what it did.
    if fresh.can("exchange by MOVE_MOUNT_BENEATH"):
        fresh.overlayd("reset", "all")
    else:
        # OSTree's /usr is a mount: docs/surprises.md.
        said = fresh.overlayd("reset", "all", code=9).err
        assert "cannot be reached beneath it" in said
        assert fresh.sh("hello", user="alice") == "Hello, world!"
        fresh.overlayd("remove", "all", "--lazy")
        fresh.apply("all", source, "/usr", "--allow-critical")
    said = fresh.sh(f"dpkg -s {PACKAGE} 2>&1; which hello; dpkg --audit", check=False)
    assert "is not installed" in said
    assert "/hello" not in said
    fresh.sh(f"{UNPACK} >/dev/null; dpkg --purge {PACKAGE} >/dev/null", timeout=180)
    assert fresh.sh("which hello || echo gone", check=False) == "gone"
    # Whatever was started meanwhile runs from the overlay.
    fresh.overlayd("remove", "all", "--lazy")
    assert fresh.usr() == usr
    assert fresh.overlays("--all") == []  # it has ended by now
