# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python3 -m overlayd``."""

from overlayd.cli import main

main()
