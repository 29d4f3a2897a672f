# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where everything lies."""

from __future__ import annotations

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from typing import Final

USR: Final = "/usr"
RUN: Final = "/run/overlayd"
ROOTS: Final = "/run/overlayd.private"
"""Where root has what users have in the directory of their login session: private overlays'."""
