# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is put on top of a built system, in seconds: packages, files, another kernel.

A command runs in a system that looks as its packages expect it (with ``/etc``, ``/var`` and dpkg's
database where they look for them) and is an overlayfs over the deployment: what the command
changed is what lies in the upper directories afterwards, and that is the layer.  Nothing of the
system below is written to.  The upper directories are in memory, as overlayfs cannot have them on
an overlayfs, which is what a container's root often is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.commit import Layer, arrange_layer
from harness.programs import run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from harness.kernels import Kernel

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# $1: the system below; $2: an empty directory; $3: where the result goes; then pairs of a name and
# what is shown under it, up to "--"; then the command.
_ENTER: Final = r"""
set -eu
below=$1 scratch=$2 result=$3
shift 3
mount -t tmpfs -o mode=755 layer "$scratch"
cd "$scratch"
mkdir below root upper etc var factory work work/root work/etc work/var
mount --bind "$below" below
# Copies shall be whole, and what is renamed too.
whole=redirect_dir=nofollow,metacopy=off,index=off
mount -t overlay -o "lowerdir=below,upperdir=upper,workdir=work/root,$whole" root root
mkdir root/etc
mount -t overlay -o "lowerdir=below/usr/etc,upperdir=etc,workdir=work/etc,$whole" etc root/etc
mount -t proc proc root/proc
mount -t tmpfs -o mode=755 dev root/dev
for node in null zero full random urandom tty; do
    : > root/dev/$node
    mount --bind /dev/$node root/dev/$node
done
ln -s /proc/self/fd root/dev/fd
mount -t tmpfs -o mode=755 run root/run
mount -t tmpfs -o mode=1777 tmp root/tmp
while [ "$1" != -- ]; do
    if [ -d "$2" ]; then
        mkdir -p "root/run/given/$1"
    else
        mkdir -p "$(dirname "root/run/given/$1")"
        : > "root/run/given/$1"
    fi
    mount --bind "$2" "root/run/given/$1"
    mount -o remount,bind,ro "root/run/given/$1"
    shift 2
done
shift
# As a boot does it. What it cannot do here (ACLs, for one) is of no matter to packages.
mount --bind factory root/var
chroot root systemd-tmpfiles --create --prefix=/var > /dev/null 2>&1 || :
umount root/var
mount -t overlay -o "lowerdir=factory,upperdir=var,workdir=work/var,$whole" var root/var
chroot root "$@"
umount -R root
cp -a upper etc var "$result"
"""

# What has a slash in its name is given with "+" for it, as one file in one directory.
_INSTALL: Final = r"""
set -eu
cd /run/given
for file in files/*; do
    [ -e "$file" ] || continue
    target=$(echo "${file#files/}" | tr + /)
    mkdir -p "${target%/*}"
    cp "$file" "$target"
done
set -- packages/*.deb
[ -e "$1" ] || exit 0
exec dpkg --force-unsafe-io --install "$@"
"""

_KERNEL: Final = r"""
set -eu
rm -r /usr/lib/modules/*
cp -R "/run/given/modules" "/usr/lib/modules/$1"
cp /run/given/vmlinuz "/usr/lib/modules/$1/vmlinuz"
depmod "$1"
exec dracut --quiet --force "/usr/lib/modules/$1/initramfs.img" "$1"
"""


def packages(
    below: Path, out: Path, debs: Sequence[Path], *, files: Mapping[str, Path] | None = None
) -> Layer:
    """Install *debs* over the deployment *below*; put the layer into *out*, an empty directory.

    Nothing is fetched: what the packages depend on has to be there.

    :param files: copied first, with their modes: what is at a path here, by its path there.
    :raises BuildError: if a package cannot be installed.
    """
    given = {f"packages/{deb.name}": deb for deb in debs}
    given |= {f"files/{name.replace('/', '+')}": path for name, path in (files or {}).items()}
    script = ["/bin/sh", "-c", _INSTALL]
    return on_top(below, out, script, name="packages", what="installing packages", given=given)


def kernel(below: Path, out: Path, other: Kernel) -> Layer:
    """Put *other* in the place of the kernel of *below*, with an initramfs for any machine."""
    given = {"vmlinuz": other.vmlinuz, "modules": other.modules}
    script = ["/bin/sh", "-c", _KERNEL, "sh", other.release]
    what = f"putting in the kernel {other.release}"
    return on_top(below, out, script, name="kernel", what=what, given=given)


def on_top(  # noqa: PLR0913 - all by keyword but the obvious
    below: Path,
    out: Path,
    argv: Sequence[str],
    *,
    name: str,
    what: str,
    given: Mapping[str, Path] | None = None,
) -> Layer:
    """Run a command as root in the deployment *below*, and return what it changed, in *out*.

    :param name: tells this layer's files from another's.
    :param what: what fails if it fails.
    :param given: files and directories to show beneath ``/run/given``, read-only, by their names
        there.
    """
    environment = {"PATH": _PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    pairs = [str(word) for pair in (given or {}).items() for word in pair]
    with tempfile.TemporaryDirectory(dir=out, prefix="work.") as work:
        scratch, result = Path(work, "scratch"), Path(work, "result")
        scratch.mkdir()
        result.mkdir()
        run(
            ["sh", "-c", _ENTER, "sh", below, scratch, result, *pairs, "--", *argv],
            what=what,
            apart=True,
            env=environment,
        )
        return arrange_layer(result, below, out / "tree", name)
