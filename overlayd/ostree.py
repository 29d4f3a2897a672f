# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which OSTree deployment is booted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from overlayd.errors import RefusedError, shown

_BOOTED: Final = "/run/ostree-booted"
_CMDLINE: Final = "/proc/cmdline"
_PARTS: Final = 5
_SYSROOT: Final = "/sysroot"


@dataclass(frozen=True, slots=True)
class Deployment:
    """The booted deployment: its stateroot ("OS name") and its ``CHECKSUM.SERIAL``, if known."""

    stateroot: str
    name: str | None = None

    def __str__(self) -> str:
        """Return ``STATEROOT/CHECKSUM.SERIAL``, as ``ostree admin status`` names it."""
        return f"{self.stateroot}/{self.name or 'unknown'}"


def booted() -> Deployment | None:
    """Return the booted deployment, None on a machine that is not booted from OSTree.

    The kernel's argument is ``ostree=/ostree/boot.N/STATEROOT/BOOTCHECKSUM/NUMBER``, in the
    physical root a link to the deployment (ostree-prepare-root(1)); ``/run/ostree-booted`` says
    that it was followed.
    """
    if not os.path.lexists(_BOOTED):
        return None
    with open(_CMDLINE, encoding="utf-8", errors="replace") as file:
        words = file.read().split()
    for word in words:
        if word.startswith("ostree="):
            parts = word.removeprefix("ostree=").strip("/").split("/")
            if len(parts) == _PARTS and parts[0] == "ostree" and parts[1].startswith("boot."):
                return Deployment(parts[2], _linked("/".join(parts)))
    return None


def _linked(path: str) -> str | None:
    """Return the deployment's own name; None where the physical root cannot be read."""
    try:
        return os.path.basename(os.readlink(f"{_SYSROOT}/{path}")) or None
    except OSError:
        return None


def check_stateroot(name: str, deployment: Deployment | None) -> None:
    """Accept the booted stateroot's name and no other.

    :raises RefusedError: naming the booted one.
    """
    if deployment is None:
        message = "this machine is not booted from OSTree: it has no stateroot"
        raise RefusedError(message, hint="leave --os and --stateroot out")
    if name != deployment.stateroot:
        message = f"stateroot {shown(name)!r} is not the booted one, {deployment.stateroot!r}"
        raise RefusedError(message, hint="overlays show on the running system only")
