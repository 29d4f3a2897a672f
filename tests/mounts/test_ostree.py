# SPDX-License-Identifier: LGPL-2.1-or-later
"""The OSTree stateroot: the booted one is accepted, any other refused, none is no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import ostree
from overlayd.errors import RefusedError
from tests.mounts.conftest import bind

if TYPE_CHECKING:
    from tests.mounts.conftest import World

CHECKSUM = "0123456789abcdef" * 4
BOOTED = Path("/run/ostree-booted")
COMMAND_LINE = Path("/run/cmdline")
FILES = {"a": "base a"}
NEW = {"a": "new a"}
OPTION = pytest.mark.parametrize("option", ["--os", "--stateroot"])


def boot(argument: str = f"ostree=/ostree/boot.1/debian/{CHECKSUM}/0") -> None:
    """Make it look as if this machine had been booted from OSTree."""
    COMMAND_LINE.write_text(f"BOOT_IMAGE=/vmlinuz root=/dev/vda rw {argument} quiet\n")
    bind(COMMAND_LINE, Path("/proc/cmdline"))
    BOOTED.touch()


@OPTION
def test_booted_stateroot_is_accepted_and_any_other_names_the_booted_one(
    world: World, option: str
) -> None:
    boot()
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    done = world.run("apply", "fix", source, base, option, "fedora", "--json", code=5)
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "refused"
    assert "'fedora'" in error["message"]
    assert "'debian'" in error["message"]
    assert world.leftovers() == []
    world.run("apply", "fix", source, base, option, "debian")
    listed = world.json("list", option, "debian")
    assert isinstance(listed, list)
    assert [overlay["name"] for overlay in listed] == ["fix"]
    done = world.run("list", option, "other\x1b[31m", code=5)
    assert "'debian'" in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stdout == ""


def test_overlay_says_which_deployment_it_was_made_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot()
    source = world.source("s", NEW)
    overlay = world.apply("unknown", source, world.base("other", FILES))
    assert overlay.record.deployment is None
    monkeypatch.setattr(ostree, "_SYSROOT", "/run/sysroot")
    entry = Path(f"/run/sysroot/ostree/boot.1/debian/{CHECKSUM}/0")
    entry.parent.mkdir(parents=True)
    entry.symlink_to("../../../deploy/debian/deploy/4567.3")
    overlay = world.apply("fix", source, world.base("app", FILES))
    assert overlay.record.deployment == "debian/4567.3"
    shown = world.json("status", "fix")
    assert isinstance(shown, dict)
    assert shown["deployment"] == "debian/4567.3"
    assert "deployment:  debian/4567.3" in world.run("status", "fix").stdout
    world.manager().reset("fix", 0)
    assert world.manager().status("fix").record.deployment == "debian/4567.3"


@OPTION
def test_machine_not_booted_from_ostree_refuses_the_option_and_does_everything_else(
    world: World, option: str
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    for command in (("apply", "fix", source, base), ("list",)):
        done = world.run(*command, option, "debian", code=5)
        assert "not booted from OSTree" in done.stderr
        assert "leave --os and --stateroot out" in done.stderr
    assert world.leftovers() == []
    assert world.apply("fix", source, base).record.deployment is None
    world.manager().remove("fix")


@pytest.mark.parametrize(
    ("argument", "stateroot"),
    [
        (f"ostree=/ostree/boot.0/debian/{CHECKSUM}/1", "debian"),
        (f"ostree=/ostree/boot.1.1/my-os/{CHECKSUM}/0", "my-os"),
        (f"ostree=ostree/boot.1/debian/{CHECKSUM}/0", "debian"),
        ("", None),
        ("ostree=", None),
        ("ostree=/ostree/boot.1/debian", None),
        (f"ostree=/elsewhere/boot.1/debian/{CHECKSUM}/0", None),
        (f"xostree=/ostree/boot.1/debian/{CHECKSUM}/0", None),
    ],
)
@pytest.mark.usefixtures("world")
def test_stateroot_is_read_from_the_argument_that_the_kernel_was_given(
    argument: str, stateroot: str | None
) -> None:
    boot(argument)
    found = ostree.booted()
    assert (None if found is None else found.stateroot) == stateroot
    if stateroot is None:
        with pytest.raises(RefusedError, match="not booted from OSTree"):
            ostree.check_stateroot("debian", found)


def test_argument_alone_does_not_make_it_an_ostree_machine(world: World) -> None:
    boot()
    BOOTED.unlink()
    overlay = world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    assert overlay.record.deployment is None
