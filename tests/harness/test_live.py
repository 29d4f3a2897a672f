# SPDX-License-Identifier: LGPL-2.1-or-later
"""A layer put into a machine that runs: on its disk and for OSTree it is as if it was booted so."""

from __future__ import annotations

import os
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness import disk, live
from harness.cache import Cache, default_root
from harness.fleet import Fleet
from harness.provider import IMAGE_KERNEL, Case
from harness.vm import QemuMachine
from tests.harness.trees_of_debian import write
from tests.system import project

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images need root")


@pytest.fixture
def machine() -> Iterator[QemuMachine]:
    """Give a VM of the project's image without its package."""
    cache = Cache(default_root())
    with project.inputs(cache, print) as inputs:
        bare = replace(inputs, packages=())
        fleet = Fleet(lambda: nullcontext(bare), cache)
        try:
            with fleet.acquire(Case("vm", IMAGE_KERNEL)) as machine:
                assert isinstance(machine, QemuMachine)
                yield machine
        finally:
            fleet.close()


def test_it_is_a_deployment_of_a_commit_with_the_layer(
    machine: QemuMachine, tmp_path: Path
) -> None:
    before = deployed(machine)
    tree = tmp_path / "tree"
    write(tree / "usr/bin/added", "#!/bin/sh\necho added\n", mode=0o755)
    write(tree / "usr/share/base-files/motd", "replaced\n")
    write(tree / "usr/etc/added.conf", "of the layer\n")
    archive = tmp_path / "layer.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tree, ".")
    gone = ("/usr/share/doc/bash", "/usr/bin/less")
    top = live.Top(archive=archive, removed=gone, ref="test/ref", subject="a layer", fingerprint="")
    live.put_on(machine, top)
    commit = deployed(machine)
    assert commit != before
    assert machine.run("ostree show test/ref").out.split()[1] == commit
    check(machine)
    machine.run("sync")
    machine.power_cut()
    root = machine.spec.disks[0].path
    disk.look(root, ["ostree", "--repo=ostree/repo", "fsck", "--quiet"])
    assert disk.changes(root) == ""
    machine.start()
    assert deployed(machine) == commit
    check(machine)


def deployed(machine: QemuMachine) -> str:
    """Return the commit that is booted, as OSTree tells."""
    star, _, name = machine.run("ostree admin status").out.split()[:3]
    assert star == "*"
    return name.removesuffix(".0")


def check(machine: QemuMachine) -> None:
    """Insist that the layer is there, and that /usr is as closed as before."""
    said = machine.run("added; cat /usr/share/base-files/motd /etc/added.conf").out
    assert said == "added\nreplaced\nof the layer\n"
    for path in ("/usr/bin/less", "/usr/share/doc/bash"):
        assert machine.run(["test", "-e", path], check=False).returncode == 1
    assert machine.run("touch /usr/x /sysroot/x", check=False).returncode == 1
