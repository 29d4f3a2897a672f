# SPDX-License-Identifier: LGPL-2.1-or-later
"""What overlayd costs, as ratios to the same work done without it: ``python -m benchmarks``."""
