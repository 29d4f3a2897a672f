# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk with an OSTree deployment on it, and looking into such a disk.

The disk is one ext4 file system without a boot loader: kernel, initramfs and command line are
handed over by whoever boots it.  It is filled as it is made, from a directory on this machine, so
neither a loop device nor a mount is needed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError
from harness.host import need
from harness.programs import run

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE: Final = 4 << 30
"""Bytes; what is not written takes no room here."""
ROOT: Final = "root=/dev/vda rw"
TOOLS: Final = {
    "ostree": "ostree",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
}

_MANIFEST: Final = Path(__file__).with_name("manifest.py")
_OPTION: Final = re.compile(r"^(\w+)\s+(.*)$", re.MULTILINE)

# $1: an image of a file system; $2: an empty directory; then a command, which is run in there.
# Mounting it does what the journal says is still to be done.
_LOOK: Final = r"""
set -eu
mount -o loop "$1" "$2"
cd "$2"
shift 2
"$@"
"""

# In the root of a disk: every byte of what is deployed in /usr, against the commit.
_CHANGES: Final = r"""
set -- ostree/deploy/*/deploy/*.0
commit=${1##*/}
ostree --repo=ostree/repo diff "${commit%.0}" "./$1" | grep -E '^.  *(\./|/)*usr(/|$)' || true
"""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What was deployed in a sysroot; paths are relative to it."""

    root: Path
    checksum: str
    kernel: Path
    initrd: Path
    arguments: str
    """The kernel's, as the boot loader's entry has them."""


def make_sysroot(sysroot: Path, stateroot: str, repo: Path) -> Path:
    """Make the root of a disk in *sysroot*, an empty directory; return its repository.

    That has what is in *repo*, as hard links: both must be on the same file system.
    """
    need(TOOLS)
    run(["ostree", "admin", "init-fs", "--modern", sysroot], what="making a sysroot")
    command = ("ostree", "admin", "os-init", stateroot, f"--sysroot={sysroot}")
    run(command, what="making a stateroot")
    own = sysroot / "ostree/repo"
    for part in ("objects", "refs"):
        run(["cp", "-al", f"{repo / part}/.", own / part], what="linking the repository")
    for setting in (("sysroot.bootloader", "none"), ("core.fsync", "false")):
        run(["ostree", f"--repo={own}", "config", "set", *setting], what="configuring")
    return own


def deploy(sysroot: Path, stateroot: str, ref: str, *, drop: Sequence[str] = ()) -> Deployment:
    """Deploy *ref* of the sysroot's repository; the refs in *drop*, and what only they need, go."""
    repo = f"--repo={sysroot / 'ostree/repo'}"
    arguments = [f"--karg={argument}" for argument in ROOT.split()]
    run(
        ["ostree", "admin", "deploy", f"--sysroot={sysroot}", f"--os={stateroot}", *arguments, ref],
        what=f"deploying {ref}",
    )
    if drop:
        run(["ostree", repo, "refs", "--delete", *drop], what="removing refs")
        run(["ostree", repo, "prune", "--refs-only", "--depth=0"], what="pruning the repository")
    run(["ostree", repo, "config", "unset", "core.fsync"], what="configuring")
    entries = list((sysroot / "boot/loader/entries").glob("*.conf"))
    if len(entries) != 1:
        raise BuildError(f"deploying {ref} made {len(entries)} entries for a boot loader")
    entry = dict(_OPTION.findall(entries[0].read_text(encoding="utf-8")))
    checksum = run(["ostree", repo, "rev-parse", ref], what=f"looking for {ref}").strip()
    return Deployment(
        root=Path("ostree/deploy", stateroot, "deploy", f"{checksum}.0"),
        checksum=checksum,
        kernel=Path("boot", entry["linux"].lstrip("/")),
        initrd=Path("boot", entry["initrd"].lstrip("/")),
        arguments=entry["options"],
    )


def write(sysroot: Path, image: Path, *, size: int = SIZE) -> None:
    """Write *sysroot* to *image*, a raw disk image of *size* bytes that takes what it holds."""
    with image.open("xb") as file:
        file.truncate(size)
    # One inode for 32 KiB: Debian's files are as large on average, and half of it stays free.
    # The tables are written now: a guest would do it in the background, while it is measured.
    options = ("-i", "32768", "-E", "lazy_itable_init=0,lazy_journal_init=1")
    run(["mkfs.ext4", "-q", "-L", "root", *options, "-d", sysroot, image], what="making a disk")


def look(disk: Path, argv: Sequence[str | Path], *, disk_format: str = "qcow2") -> str:
    """Run a command in the root of the file system on *disk*; return what it prints.

    It sees what a boot would see, with the journal's pending writes done.  The disk itself is only
    read, so it may be that of a machine whose power was cut; not that of a running one.  Needs
    root and a loop device.
    """
    need(TOOLS)
    with tempfile.TemporaryDirectory(prefix="harness-disk-", dir="/var/tmp") as scratch:
        raw, point = Path(scratch, "raw"), Path(scratch, "root")
        point.mkdir()
        convert = ("qemu-img", "convert", "-f", disk_format, "-O", "raw")
        run([*convert, disk, raw], what=f"copying {disk.name}")
        command = ["sh", "-c", _LOOK, "sh", raw, point, *argv]
        return run(command, what=f"looking into {disk.name}", apart=True)


def changes(disk: Path, *, disk_format: str = "qcow2") -> str:
    """Return what differs between the one commit deployed on *disk* and its ``/usr``.

    One line for each path; no text if all is as it was committed.  *disk* is not in use.
    """
    return look(disk, ["sh", "-euc", _CHANGES], disk_format=disk_format)


def digest(disk: Path, directory: Path, *, disk_format: str = "qcow2") -> str:
    """Return the digest (:mod:`harness.manifest`) of a *directory* on *disk*, which is not in use.

    *directory* is relative to the file system: ``deployment.root / "usr"``.
    """
    command = (sys.executable, "-IS", _MANIFEST, directory)
    return look(disk, command, disk_format=disk_format).strip()
