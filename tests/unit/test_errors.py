# SPDX-License-Identifier: LGPL-2.1-or-later
"""The error tree: codes and exit codes that do not change, and what an errno means."""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil

import pytest

import overlayd
from overlayd import errors
from overlayd.errors import OverlaydError, from_oserror

DOCUMENTED = {
    "internal": 1,
    "usage": 2,
    "not-found": 3,
    "exists": 4,
    "refused": 5,
    "busy": 6,
    "no-permission": 7,
    "space": 8,
    "kernel": 9,
    "no-service": 10,
    "interrupted": 130,
}


def _tree() -> list[type[OverlaydError]]:
    for module in pkgutil.iter_modules(overlayd.__path__):
        if module.name != "__main__":
            importlib.import_module(f"overlayd.{module.name}")
    found: list[type[OverlaydError]] = [OverlaydError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def test_exit_codes_are_the_documented_ones_for_good() -> None:
    assert {kind.code: kind.exit_code for kind in _tree()} == DOCUMENTED


def test_no_two_errors_share_a_code_or_an_exit_code() -> None:
    tree = _tree()
    assert len({kind.code for kind in tree}) == len(tree)
    assert len({kind.exit_code for kind in tree}) == len(tree)


def test_no_error_looks_like_success() -> None:
    assert all(0 < kind.exit_code < 256 for kind in _tree())


def test_help_of_the_command_line_lists_every_exit_code() -> None:
    from overlayd.cli import app  # noqa: PLC0415  # click, for this test alone

    assert app.epilog is not None
    for code in DOCUMENTED.values():
        assert f" {code} " in f"{app.epilog} ", code


def test_error_keeps_message_and_hint() -> None:
    error = errors.BusyError("it is busy", hint="wait")
    assert (str(error), error.message, error.hint) == ("it is busy", "it is busy", "wait")
    assert errors.BusyError("it is busy").hint is None


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.SpaceError),
        (errno.EDQUOT, errors.SpaceError),
        (errno.ENOMEM, errors.SpaceError),
        (errno.EMFILE, errors.SpaceError),
        (errno.ENFILE, errors.SpaceError),
        (errno.EACCES, errors.NoPermissionError),
        (errno.EPERM, errors.NoPermissionError),
        (errno.EBUSY, errors.BusyError),
        (errno.ENOENT, errors.NotFoundError),
        (errno.ENOSYS, errors.KernelError),
        (errno.EINVAL, errors.KernelError),
        (errno.EIO, errors.KernelError),
    ],
)
def test_errno_has_its_place_in_the_tree(number: int, kind: type[OverlaydError]) -> None:
    error = from_oserror(OSError(number, os.strerror(number)), "doing it", hint="a hint")
    assert type(error) is kind
    assert error.message == f"doing it: {os.strerror(number)} ({errno.errorcode[number]})"
    assert error.hint == "a hint"


def test_missing_system_call_hints_at_the_kernel_needed() -> None:
    hint = from_oserror(OSError(errno.ENOSYS, "no"), "doing it").hint
    assert hint is not None
    assert "6.1" in hint


def test_oserror_without_a_number_is_translated_too() -> None:
    error = from_oserror(OSError("odd"), "doing it")
    assert isinstance(error, errors.KernelError)
    assert error.message.startswith("doing it: odd")
