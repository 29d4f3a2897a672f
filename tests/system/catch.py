# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop an overlayd command in the middle of its work; runs in the machine under test.

    python3 -IS catch.py DOING NAME DELAY COMMAND…

DOING is what the record of the overlay NAME must say: ``applying``, ``resetting`` or ``removing``.
DELAY milliseconds after it says so the command is stopped, by SIGSTOP, and stays so.  Prints the
record as it is then and the command's pid.  Exit status 3: the command was done before.
"""

import ctypes
import glob
import json
import os
import select
import signal
import subprocess
import sys
import time

RUN = "/run/overlayd"
IN_MOVED_TO = 0x80


def doing(record: dict[str, object]) -> str:
    """Return what the record says is being done, or nothing."""
    if record["phase"] == "preparing":
        # The layer is being filled: there is more of it than its empty top.
        layer = f"{RUN}/storage/{record['uuid']}/layer/tree"
        return "applying" if os.path.isdir(layer) and os.listdir(layer) else ""
    if record["phase"] == "removing":
        return "removing"
    return "resetting" if record["pending"] is not None else ""


def record_of(name: str) -> dict[str, object]:
    """Return the overlay's record, or one of nothing."""
    for path in glob.glob(f"{RUN}/records/*.json"):
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
        except FileNotFoundError:
            continue
        if record["name"] == name:
            return dict(record)
    return {"phase": "", "pending": None}


def main(what: str, name: str, delay: float, command: list[str]) -> int:
    """Run the command, and stop it."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init()
    libc.inotify_add_watch(watch, f"{RUN}/records".encode(), IN_MOVED_TO)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while child.poll() is None:
        # What is not written into the record, such as that the copying began, has no event.
        if select.select([watch], [], [], 0.002)[0]:
            os.read(watch, 4096)
        if doing(record_of(name)) != what:
            continue
        time.sleep(delay / 1000)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        record = record_of(name)
        if doing(record) == what:
            sys.stdout.write(json.dumps({"pid": child.pid, **record}))
            return 0
        os.kill(child.pid, signal.SIGCONT)
        child.wait()
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:]))
