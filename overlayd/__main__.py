# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry point of ``overlayd`` and ``python3 -m overlayd``."""

import gc


def main() -> None:
    """Load the command line without looking for garbage, of which loading makes none."""
    gc.disable()
    from overlayd import cli  # noqa: PLC0415  # this is what the line above is for

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
