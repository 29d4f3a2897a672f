# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polkit that answers as a file says, for answers that the real one never gives."""

from __future__ import annotations

import os
import pwd
import sys
import time
from pathlib import Path

from jeepney import HeaderFields, MessageType, new_error, new_method_call, new_method_return
from jeepney.io.blocking import open_dbus_connection

from overlayd.bus import BUS

NAME = "org.freedesktop.PolicyKit1"
YES: tuple[object, ...] = (True, False, {})
ANSWERS: dict[str, tuple[str, tuple[object, ...]]] = {
    "empty": ("", ()),
    "string": ("s", ("yes",)),
    "boolean": ("b", (True,)),
    "numbers": ("(uua{ss})", ((1, 0, {}),)),
    "strings": ("(ssa{ss})", (("true", "false", {}),)),
    "two": ("(bb)", ((True, False),)),
    "twice": ("(bba{ss})(bba{ss})", (YES, YES)),
    "flat": ("bba{ss}", YES),
    "variant": ("v", (("(bba{ss})", YES),)),
    "large": ("(bba{ss})", ((True, False, {"x": "y" * (1 << 20)}),)),
    "dismissed": ("(bba{ss})", ((False, False, {"polkit.dismissed": "true"}),)),
    "yes": ("(bba{ss})", (YES,)),
}


def main(file: str) -> None:
    """Answer questions until the bus is gone."""
    us = pwd.getpwnam("polkitd")  # nobody else may have the name
    os.setgid(us.pw_gid)
    os.setuid(us.pw_uid)
    connection = open_dbus_connection("SYSTEM")
    connection.send_and_get_reply(new_method_call(BUS, "RequestName", "su", (NAME, 0)))
    while True:
        message = connection.receive()
        if message.header.message_type is not MessageType.method_call:
            continue
        how = Path(file).read_text()
        print(message.header.fields[HeaderFields.member], flush=True)  # noqa: T201  # for the test
        if how == "never":
            continue
        if how == "late":
            time.sleep(1)
        if how in ANSWERS or how == "late":
            answer = new_method_return(message, *ANSWERS.get(how, ANSWERS["yes"]))
        elif how == "error":
            answer = new_error(message, f"{NAME}.Error.Failed", "s", ("\x1b[2J",))
        else:
            answer = new_error(message, "a.b", "(bba{ss})", (YES,))
        connection.send(answer)


if __name__ == "__main__":
    main(sys.argv[1])
