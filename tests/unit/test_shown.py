# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is written into units, and which units there can be."""

from __future__ import annotations

import pytest

from overlayd import shown
from overlayd.errors import RefusedError


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/usr/share/app", '"/usr/share/app"'),
        ("/usr/share/a b:c", '"/usr/share/a b\\:c"'),
        ("/usr/share/100%\\x", '"/usr/share/100%%\\\\x"'),
    ],
)
def test_path_is_written_as_systemd_reads_it(path: str, text: str) -> None:
    assert shown._quoted(path) == text


@pytest.mark.parametrize("path", ["/usr/a\nExecStart=/bin/sh", '/usr/a"b', "/usr/a'b", "/usr/\x1b"])
def test_path_that_systemd_cannot_bind_is_refused(path: str) -> None:
    with pytest.raises(RefusedError, match="cannot bind"):
        shown._quoted(path)


@pytest.mark.parametrize(
    "unit", ["", "foo", "foo.socket", "../foo.service", "a/b.service", "-x.service", "a b.service"]
)
def test_what_is_no_name_of_a_service_is_refused(unit: str) -> None:
    with pytest.raises(RefusedError, match="not the name of a service"):
        shown.check_unit(unit)
