# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who runs a process, as the kernel says it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from overlayd import caller
from overlayd.calls import Caller


@pytest.mark.parametrize("which", ["sessionid", "loginuid"])
def test_number_is_the_kernel_s_and_of_that_user_s_process_alone(which: str) -> None:
    file = Path("/proc/self", which)
    number = int(file.read_text()) if file.exists() else 2**32 - 1
    expected = None if number == 2**32 - 1 else number
    uid = os.getuid()
    assert caller.attested(which) == expected
    assert caller.attested(which, os.getpid(), uid) == expected
    assert caller.attested(which, os.getpid(), uid + 1) is None
    assert Caller(":1.1", uid, os.getpid()).number(which) == expected


def test_name_of_a_process_does_not_make_it_anybody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    name = Path("/proc/self/comm").read_text().rstrip("\n")
    monkeypatch.setattr(caller, "_UNSET", -1)  # so that there always is a number
    assert libc.prctl(15, b"x\nUid:\t7", 0, 0, 0) == 0
    try:
        assert caller.attested("sessionid", os.getpid(), 7) is None
    finally:
        libc.prctl(15, name.encode(), 0, 0, 0)


def test_process_that_is_gone_has_no_number() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(OSError, match="No such"):
        caller.attested("sessionid", process.pid)
    assert Caller(":1.1", os.getuid(), process.pid).number("sessionid") is None
