# SPDX-License-Identifier: LGPL-2.1-or-later
"""Roots of Debians as far as the harness looks at them, in no time."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RELEASE = "6.12.1-test"
MODULES = f"usr/lib/modules/{RELEASE}"
PYC = struct.Struct("<4sIII")


def write(path: Path, content: str | bytes = "", *, mode: int = 0o644) -> Path:
    """Write a file with its parents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def debian(top: Path) -> Path:
    """Make a root, as a container builder leaves it."""
    files = {
        f"boot/vmlinuz-{RELEASE}": "kernel",
        f"boot/initrd.img-{RELEASE}": "initramfs",
        f"boot/config-{RELEASE}": "config",
        f"{MODULES}/modules.dep": "",
        "etc/hostname": "builder",
        "etc/machine-id": "0123456789abcdef0123456789abcdef",
        "etc/passwd": "root:x:0:0::/root:/bin/sh",
        "etc/resolv.conf": "nameserver 10.0.0.1",
        "root/.profile": "profile",
        "run/left": "",
        "tmp/left": "",
        "usr/bin/tool": "tool",
        "usr/lib/tmpfiles.d/home.conf": "# home\nQ /home 0755 - - -\nq /srv 0755 - - -\n",
        "usr/lib/tmpfiles.d/var.conf": "d /var/log 0755 - - -\nd /var/lib 0755 - - -\n",
        "usr/local/bin/own": "own",
        "var/cache/apt/pkgcache.bin": "cache",
        "var/cache/debconf/config.dat": "config",
        "var/lib/apt/lists/mirror_Packages": "packages",
        "var/lib/dpkg/status": "status",
        "var/lib/pam/seen": "pam",
        "var/log/dpkg.log": "log",
    }
    for name, content in files.items():
        write(top / name, content)
    for name in ("dev", "proc", "sys", "home", "opt", "srv", "mnt", "media", "var/opt", "var/run"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "vmlinuz").symlink_to(f"boot/vmlinuz-{RELEASE}")
    (top / "initrd.img.old").symlink_to(f"boot/initrd.img-{RELEASE}")
    (top / "var/spool").mkdir()
    (top / "var/spool/mail").symlink_to("../mail")
    (top / "var/lib/secret").mkdir(mode=0o700)
    write(top / "usr/lib/python3/__pycache__/timed.pyc", PYC.pack(b"\xcb\r\r\n", 0, 1234, 5))
    write(top / "usr/lib/python3/__pycache__/hashed.pyc", PYC.pack(b"\xcb\r\r\n", 1, 1234, 5))
    write(top / "usr/lib/python3/__pycache__/short.pyc", b"\xcb\r")
    return top
