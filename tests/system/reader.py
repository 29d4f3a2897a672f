# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open and read a file in a tight loop; runs in the machine under test.

    python3 -IS reader.py FILE STOP OUT

Until there is a file STOP.  OUT gets a line when it begins, and in the end one with how many opens
went well, how many failed, and how often something else was read than ``overlay``.
"""

import os
import sys


def main(path: str, stop: str, out: str) -> None:
    """Read, and say what was seen."""
    opens = failed = other = 0
    with open(out, "w", encoding="ascii") as file:
        print("begun", file=file, flush=True)
        while not os.path.exists(stop):
            for _ in range(50):
                try:
                    fd = os.open(path, os.O_RDONLY)
                except OSError:
                    failed += 1
                    continue
                opens += 1
                other += os.read(fd, 100) != b"overlay\n"
                os.close(fd)
        print(opens, failed, other, file=file)


if __name__ == "__main__":
    main(*sys.argv[1:])
