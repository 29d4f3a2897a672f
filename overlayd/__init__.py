# SPDX-License-Identifier: LGPL-2.1-or-later
"""overlayd: named, owned, limited overlays on parts of a read-only /usr."""

__version__ = "0.1.0"
