# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the package brings, and an overlay as an administrator's own tools see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testinfra.host import Host  # type: ignore[import-untyped]

    from tests.system.guest import Guest

BASE = "/usr/share/base-files"


@pytest.mark.once
def test_package_brings_command_configuration_manual_and_completions(
    guest: Guest, host: Host
) -> None:
    assert host.package("overlayd").is_installed
    said = guest.overlayd("--version").out
    assert host.package("overlayd").version.startswith(said.split()[-1])
    command = host.file("/usr/bin/overlayd")
    assert (command.user, command.mode) == ("root", 0o755)
    defaults = host.file("/usr/lib/overlayd/overlayd.toml")
    assert defaults.contains("upper_size")
    assert defaults.mode == 0o644
    assert host.file("/etc/overlayd/overlayd.toml.d").is_directory
    pages = host.check_output("dpkg -L overlayd | grep '/man[58]/'").split()
    assert {"overlayd.8.gz", "overlayd-apply.8.gz", "overlayd.toml.5.gz"} <= {
        page.rpartition("/")[2] for page in pages
    }
    guest.sh('gzip --test "$@"', *pages)
    for shell in "bash-completion", "zsh", "fish":
        assert host.check_output("dpkg -L overlayd | grep -c /%s/", shell) != "0"
    assert host.run("dpkg --verify overlayd").stdout == ""


@pytest.mark.once
def test_configuration_of_the_administrator_counts(guest: Guest, host: Host) -> None:
    source = guest.source("config", {"motd": "Try me.\n"})
    drop_in = "/etc/overlayd/overlayd.toml.d/tried.toml"
    guest.machine.copy_in(b'[limits]\noverlays = 1\nupper_size = "3M"\n', drop_in)
    try:
        with guest.overlay("config", source, BASE):
            assert host.check_output("df --output=size -BM %s | tail -n 1", BASE).strip() == "3M"
            said = guest.overlayd("apply", "second", source, "/usr/share/dpkg", code=8)
            assert "as many as there may be" in said.err
            assert drop_in in str(guest.doctor()["config_files"])
            # A broken file stops what reads it, and nobody from taking the overlay away.
            guest.machine.copy_in(b"[limits]\nnonsense = 1\n", drop_in)
            said = guest.overlayd("apply", "second", source, "/usr/share/dpkg", code=5)
            assert "nonsense" in said.err
    finally:
        guest.sh(f"rm {drop_in}")


def test_overlay_is_a_mount_that_other_tools_understand(guest: Guest, host: Host) -> None:
    source = guest.source("tools", {"motd": "Try me.\n"})
    before = host.file(BASE)
    owner, mode = before.user, before.mode
    with guest.overlay("tools", source, BASE, "--read-only") as overlay:
        mount = host.mount_point(BASE)
        assert mount.exists
        assert (mount.filesystem, mount.device) == ("overlay", f"overlayd:{overlay.uuid}")
        assert "ro" in mount.options
        folder, motd = host.file(BASE), host.file(f"{BASE}/motd")
        assert (folder.user, folder.mode) == (owner, mode)
        assert (motd.user, motd.content_string) == ("root", "Try me.\n")
        assert host.check_output("findmnt -no SOURCE -T %s/motd", BASE) == mount.device
    assert not host.mount_point(BASE).exists
