# SPDX-License-Identifier: LGPL-2.1-or-later
"""testinfra's modules on a machine; here they must say of this machine what is true."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.testinfra_backend import get_host

if TYPE_CHECKING:
    from tests.harness.agents import LocalMachine


def test_host_is_made_once_for_a_machine_and_user(local: LocalMachine) -> None:
    assert get_host(local) is get_host(local)
    assert get_host(local, user="nobody") is not get_host(local)
    assert "harness://nobody@local" in repr(get_host(local, user="nobody"))


def test_commands_quote_and_report(local: LocalMachine) -> None:
    host = get_host(local)
    assert host.check_output("echo %s", "a b; $HOME") == "a b; $HOME"
    result = host.run("printf '\\303\\244' ; echo err >&2; exit 4")
    assert (result.rc, result.stdout, result.stderr) == (4, "ä", "err\n")
    assert host.run("printf '\\377'").stdout_bytes == b"\xff"
    with pytest.raises(AssertionError, match="Unexpected exit code 1"):
        host.check_output("false")
    assert host.exists("sh")
    assert not host.exists("no-such-program")


def test_file(local: LocalMachine) -> None:
    host = get_host(local)
    passwd = host.file("/etc/passwd")
    assert passwd.is_file
    assert passwd.user == "root"
    assert passwd.mode == 0o644
    assert passwd.contains("^root:")
    assert passwd.content == Path("/etc/passwd").read_bytes()
    assert not host.file("/no/such").exists
    assert host.file("/proc/self/exe").is_symlink


def test_user_group_and_process(local: LocalMachine) -> None:
    host = get_host(local)
    assert host.user("nobody").uid == 65534
    assert host.group("root").gid == 0
    assert host.user().name == "root"
    assert host.process.filter(pid=1)


def test_mount_point(local: LocalMachine) -> None:
    host = get_host(local)
    assert host.mount_point("/proc").filesystem == "proc"
    assert not host.mount_point("/etc/passwd").exists


@pytest.mark.skipif(not shutil.which("dpkg"), reason="no Debian")
def test_package_and_system(local: LocalMachine) -> None:
    host = get_host(local)
    assert host.package("dpkg").is_installed
    assert not host.package("no-such-package").is_installed
    assert host.system_info.type == "linux"


def test_service_asks_systemd(local: LocalMachine) -> None:
    local.program("systemctl", 'test "$*" = "is-active x" && exit 0; exit 3')
    local.program("readlink", "echo /lib/systemd/systemd")
    service = get_host(local).service("x")
    if type(service).__name__ != "SystemdService":
        pytest.skip("testinfra sees another service manager here")
    assert service.is_running
    assert not get_host(local).service("y").is_running


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root may")
def test_users_and_sudo_go_by_the_agent(local: LocalMachine) -> None:
    nobody = get_host(local, user="nobody")
    assert nobody.check_output("id -un") == "nobody"
    host = get_host(local)
    with host.sudo("nobody"):
        assert host.check_output("id -un") == "nobody"
    assert host.check_output("id -un") == "root"
    with nobody.sudo():
        assert nobody.check_output("id -un %s", "root") == "root"
        with nobody.sudo("nobody"):
            assert nobody.check_output("id -un") == "nobody"
