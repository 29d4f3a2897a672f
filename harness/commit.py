# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the root of a Debian to an OSTree commit.

OSTree's idea of an operating system: everything is in ``/usr`` and the same on every machine,
``/etc`` begins as a copy of ``/usr/etc``, and ``/var`` begins empty and belongs to the machine.  A
Debian is made to fit:

* ``/etc`` becomes ``/usr/etc``; kernel and initramfs lie beside the kernel's modules;
* ``/home``, ``/root``, ``/opt``, ``/srv``, ``/mnt`` and ``/usr/local`` become links into ``/var``;
* dpkg's database says what is in ``/usr``, so it lies there: ``/usr/lib/sysimage/dpkg``;
* what else packages have in ``/var`` is made anew at boot, by systemd-tmpfiles, directories and
  files (from ``/usr/share/factory``).

A tree is changed in place.  :func:`arrange` takes a whole root and :func:`arrange_layer` what was
changed on top of one; :func:`combine` lays one over the other.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError
from harness.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

DPKG: Final = "usr/lib/sysimage/dpkg"
FACTORY: Final = "usr/share/factory"
TMPFILES: Final = "usr/lib/tmpfiles.d"
MODULES: Final = "usr/lib/modules"

_MOVED: Final = {
    "home": "var/home",
    "root": "var/roothome",
    "opt": "var/opt",
    "srv": "var/srv",
    "mnt": "var/mnt",
    "usr/local": "var/usrlocal",
}
_MADE_AT_BOOT: Final = ("dev", "proc", "sys", "run", "media", "boot", "tmp")
_OF_THIS_MACHINE: Final = (
    # What a container builder or a package's script made up while building.
    *("etc/hostname", "etc/machine-id", "etc/resolv.conf", "etc/mtab", "var/lib/dbus/machine-id"),
    *("etc/.pwd.lock", "var/run", "var/lock", "var/tmp"),
)
# Of /var: directories alone come back.
_FORGOTTEN: Final = ("cache", "log", "backups", "lib/apt/lists")
_REMEMBERED: Final = ("cache/debconf",)

_PYC: Final = struct.Struct("<4sII")  # magic number, flags, time; PEP 552
_WHITEOUT: Final = os.makedev(0, 0)
_OVERLAY: Final = "trusted.overlay."


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is laid over a commit: a tree in OSTree's layout, and what is not there any more."""

    tree: Path
    removed: tuple[str, ...] = ()
    """Absolute paths of files and directories.  They may be in *tree* anew."""


def arrange(tree: Path) -> None:
    """Make the root file system of a Debian in *tree* what OSTree deploys."""
    _move_kernel(tree)
    for name in _OF_THIS_MACHINE:
        _remove(tree / name)
    for name in _MADE_AT_BOOT:
        _remove(tree / name)
        (tree / name).mkdir()
    (tree / "tmp").chmod(0o1777)
    tree.chmod(0o755)  # some container builders make it otherwise
    for name in os.listdir(tree):
        if re.match(r"(initrd\.img|vmlinuz)(\.old)?$", name):
            (tree / name).unlink()
    for name, place in _MOVED.items():
        _move_into_var(tree, name, place)
    (tree / "media").rmdir()
    (tree / "media").symlink_to("run/media")
    (tree / "sysroot").mkdir()
    (tree / "ostree").symlink_to("sysroot/ostree")
    (tree / DPKG).parent.mkdir(parents=True, exist_ok=True)
    (tree / "var/lib/dpkg").rename(tree / DPKG)
    (tree / "var/lib/dpkg").symlink_to(os.path.relpath(f"/{DPKG}", "/var/lib"))
    # Empty, it is filled at boot; absent, the boot would count as the first of its machine, and
    # all units would be enabled or disabled by presets.
    (tree / "etc/machine-id").touch(mode=0o444)
    _follow_moves(tree / TMPFILES)
    keep_var(tree / "var", tree, "image")
    (tree / "etc").rename(tree / "usr/etc")
    (tree / "var").mkdir()
    settle(tree)


def arrange_layer(result: Path, below: Path, tree: Path, name: str) -> Layer:
    """Make a layer of what overlayfs collected on top of the deployment *below*.

    :param result: a directory with the upper directories ``upper`` (of ``/``), ``etc``, ``var``.
    :param tree: where the layer's tree goes; must not exist.
    :param name: tells this layer's rules for systemd-tmpfiles from another's.
    """
    upper, etc, var = result / "upper", result / "etc", result / "var"
    for place in (*_MADE_AT_BOOT, "etc"):
        _remove(upper / place)
    hidden = [*_hidden(upper, ""), *_hidden(etc, "usr/etc")]
    list(_hidden(var, "var"))
    for each in _OF_THIS_MACHINE:
        parent, _, inner = each.partition("/")
        _remove({"etc": etc, "var": var}[parent] / inner)
    upper.rename(tree)
    (tree / "usr").mkdir(exist_ok=True)
    if any(etc.iterdir()):
        etc.rename(tree / "usr/etc")
    keep_var(var, tree, name, below=below)
    settle(tree)
    # A new directory hides what was there, too: nothing.
    return Layer(
        tree=tree, removed=tuple(f"/{path}" for path in hidden if os.path.lexists(below / path))
    )


def keep_var(var: Path, tree: Path, name: str, *, below: Path | None = None) -> None:
    """Have everything in *var* made at boot, as far as there are no rules for it already.

    *var* is removed.  The files go to *tree*'s factory directory, the rules to a file of
    systemd-tmpfiles.

    :param below: the deployment over which *tree* is laid, and whose rules hold, too.
    """
    known, factories = set(_paths_of(tree / TMPFILES)), [tree / FACTORY]
    if below is not None:
        known.update(_paths_of(below / TMPFILES))
        factories.append(below / FACTORY)
    rules = []
    for entry in sorted(_walk(var)):
        inner, status = os.path.relpath(entry, var), os.lstat(entry)
        place, regular = f"/var/{inner}", stat.S_ISREG(status.st_mode)
        forgotten = _is_below(inner, _FORGOTTEN) and not _is_below(inner, _REMEMBERED)
        if inner == "." or (forgotten and not stat.S_ISDIR(status.st_mode)):
            continue
        in_factory = any((factory / place.lstrip("/")).exists() for factory in factories)
        if place in known and not (regular and in_factory):
            continue
        if re.search(r"\s", place):
            raise BuildError(f"a name with a blank in it, which tmpfiles.d cannot have: {place!r}")
        escaped = place.replace("%", "%%")
        rule = f"{escaped} {stat.S_IMODE(status.st_mode):04o} {status.st_uid} {status.st_gid} -"
        if stat.S_ISDIR(status.st_mode):
            rules.append(f"d {rule}")
        elif stat.S_ISLNK(status.st_mode):
            rules.append(f"L {escaped} - - - - {os.readlink(entry)}")
        elif regular:
            kept = tree / FACTORY / place.lstrip("/")
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(entry, kept)
            if place not in known:
                rules.append(f"C {rule}")
    shutil.rmtree(var)
    if rules:
        conf = tree / TMPFILES / f"ostree-{name}.conf"
        conf.parent.mkdir(parents=True, exist_ok=True)
        conf.write_text("".join(f"{rule}\n" for rule in rules), encoding="utf-8")
        conf.chmod(0o644)


def settle(tree: Path) -> None:
    """Give everything in *tree* the time that OSTree gives it, 1970, and let Python know.

    Python compares the time of a module with the one in its compiled file: if they differ it
    compiles the module whenever it is used, and without KVM that takes seconds.
    """
    for entry in _walk(tree):
        status = os.lstat(entry)
        if stat.S_ISREG(status.st_mode) and entry.endswith(".pyc"):
            with open(entry, "r+b") as file:
                if len(head := file.read(_PYC.size)) == _PYC.size:
                    magic, flags, _ = _PYC.unpack(head)
                    if flags == 0:
                        file.seek(0)
                        file.write(_PYC.pack(magic, flags, 0))
        os.utime(entry, (0, 0), follow_symlinks=False)


def commit(repo: Path, ref: str, tree: Path, *, subject: str, consume: bool = False) -> str:
    """Commit *tree* to *ref*; return the commit's checksum.

    Files that are hard links to the repository's are known and not read again.

    :param consume: whether to move the files into the repository, which must be on the same file
        system.
    """
    command = ["ostree", f"--repo={repo}", "commit", f"--branch={ref}", f"--subject={subject}"]
    command += ["--bootable", "--fsync=false", f"--tree=dir={tree}"]
    command.append("--consume" if consume else "--link-checkout-speedup")
    return run(command, what=f"committing {ref}").strip()


def commit_over(repo: Path, ref: str, below: str, layers: Iterable[Layer], *, subject: str) -> str:
    """Commit to *ref* what *below*, a ref of *repo*, is with *layers* over it.

    Only the layers are read; none may remove anything.  Return the commit's checksum, which is the
    same whenever *below* and the layers are: the commit has the time of *below* and no parent.
    """
    shown = run(["ostree", f"--repo={repo}", "show", below], what=f"looking at {below}")
    made = next(line for line in shown.splitlines() if line.startswith("Date:"))
    command = ["ostree", f"--repo={repo}", "commit", f"--branch={ref}", f"--subject={subject}"]
    command += ["--bootable", "--fsync=false", "--parent=none", f"--tree=ref={below}"]
    command += [f"--tree=dir={layer.tree}" for layer in layers]
    command.append(f"--timestamp={made.removeprefix('Date:').strip()}")
    return run(command, what=f"committing {ref}").strip()


def combine(tree: Path, layers: Iterable[Layer], out: Path) -> None:
    """Make *out* what *tree* is with *layers* over it, each over those before it.

    It has hard links to the files of *tree*, which must be on the same file system.
    """
    run(["cp", "-al", tree, out], what="linking the base")
    for layer in layers:
        for path in layer.removed:
            _remove(out / path.lstrip("/"))
        # Replaced, never written through a link.
        copy = ("cp", "-a", "--remove-destination", "--reflink=auto")
        run([*copy, f"{layer.tree}/.", out], what="laying a layer over the base")


def init(repo: Path) -> None:
    """Make an empty repository, in which files lie as they are."""
    run(["ostree", f"--repo={repo}", "init", "--mode=bare"], what="making a repository")


def release(tree: Path) -> str:
    """Return the release of the one kernel in *tree*, a root in either layout."""
    found = sorted(entry.name for entry in (tree / MODULES).iterdir() if entry.is_dir())
    if len(found) != 1:
        raise BuildError(f"one kernel is wanted in /{MODULES}: there are {len(found)}: {found}")
    return found[0]


def _move_kernel(tree: Path) -> None:
    kernel = release(tree)
    for name, wanted in (("vmlinuz", "vmlinuz"), ("initrd.img", "initramfs.img")):
        source = tree / "boot" / f"{name}-{kernel}"
        if not source.is_file():
            raise BuildError(f"the kernel {kernel} has no /boot/{source.name}")
        source.rename(tree / MODULES / kernel / wanted)
    for name in ("config", "System.map"):
        source = tree / "boot" / f"{name}-{kernel}"
        if source.is_file():
            source.rename(tree / MODULES / kernel / name)


def _move_into_var(tree: Path, name: str, place: str) -> None:
    source, target = tree / name, tree / place
    if target.is_dir():
        target.rmdir()
    if source.is_dir():
        source.rename(target)
    else:
        target.mkdir()
    source.symlink_to(os.path.relpath(target, source.parent))


def _follow_moves(directory: Path) -> None:
    """Have systemd-tmpfiles make what was moved where it is now: it follows no links."""
    for conf in sorted(directory.glob("*.conf")):
        text = conf.read_text(encoding="utf-8")
        moved = text
        for name, place in _MOVED.items():
            moved = re.sub(
                rf"^(\S+[ \t]+)/{name}(?=[/\s])", rf"\g<1>/{place}", moved, flags=re.MULTILINE
            )
        if moved != text:
            conf.write_text(moved, encoding="utf-8")


def _paths_of(directory: Path) -> Iterator[str]:
    """Yield the paths that rules of systemd-tmpfiles are about."""
    for conf in sorted(directory.glob("*.conf")):
        for line in conf.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.split()[1].replace("%%", "%")


def _hidden(upper: Path, place: str) -> Iterator[str]:
    """Yield what is hidden of the layers below; take overlayfs's marks out of *upper*."""
    for entry in list(_walk(upper)):
        path = os.path.normpath(os.path.join(place, os.path.relpath(entry, upper)))
        status = os.lstat(entry)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == _WHITEOUT:
            os.unlink(entry)
            yield path
            continue
        for name in os.listxattr(entry, follow_symlinks=False):
            if name.startswith(_OVERLAY):
                if name.endswith(".opaque") and os.getxattr(entry, name) == b"y":
                    yield path
                os.removexattr(entry, name, follow_symlinks=False)


def _walk(top: Path) -> Iterator[str]:
    """Yield every path below *top*, and *top*, directories after what they hold."""
    for directory, names, files in os.walk(top, topdown=False):
        for name in (*files, *(name for name in names if os.path.islink(f"{directory}/{name}"))):
            yield f"{directory}/{name}"
        yield directory


def _is_below(name: str, tops: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}/") for top in tops)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
