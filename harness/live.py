# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages put into a machine that runs: a change is tried in seconds, without another boot.

An image without the packages is booted and frozen once.  A machine restored from that gets the
layer that :mod:`harness.image` would commit, and then is, on its disk and for whoever asks OSTree,
a machine that was booted from the image with them: ``/usr`` is the same, byte for byte, the commit
is the one of that image, and so is the deployment.  Kernel and initramfs are those that it has.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import base
from harness.apt import Apt
from harness.cache import key
from harness.image import layer_entry
from harness.programs import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.cache import Cache
    from harness.image import ImageInputs, Say
    from harness.machine import Machine

_PLACE: Final = "/run/harness-layer"
_TIMEOUT: Final = 180.0  # seconds

# $1: a ref, $2: a commit's subject; then what the layer removes.
# In a mount namespace of its own /usr and /sysroot can be written to, and nobody else sees that.
# Files are replaced, never overwritten: OSTree's repository has them, too.  What is deployed keeps
# its kernel, so the boot loader's entry stays, which leads there by a link.
_APPLY: Final = rf"""
set -eu
ref=$1 subject=$2
shift 2
mount -o remount,bind,rw /usr
mount -o remount,bind,rw /sysroot
for path; do rm -rf "$path"; done
mkdir {_PLACE}
tar --extract --file={_PLACE}.tar --directory={_PLACE} --numeric-owner --xattrs --xattrs-include='*'
cd {_PLACE}
cp -a --remove-destination usr/. /usr
[ ! -d usr/etc ] || cp -a --remove-destination usr/etc/. /etc

link=$(sed -n 's/.* ostree=\([^ ]*\).*/\1/p' /proc/cmdline)
cd "/sysroot${{link%/*}}"
deployed=$(readlink "${{link##*/}}")
old=$(basename "$deployed" .0)
export OSTREE_REPO=/sysroot/ostree/repo
tree=ref=$old
if [ $# -gt 0 ]; then
    checkout=/sysroot/ostree/harness-layer
    ostree checkout --require-hardlinks --fsync=false "$old" $checkout
    for path; do rm -rf "$checkout$path"; done
    tree="dir=$checkout --link-checkout-speedup"
fi
new=$(ostree commit --branch="$ref" --subject="$subject" --bootable --fsync=false --parent=none \
    --timestamp="$(ostree show "$old" | sed -n 's/^Date: *//p')" --tree=$tree --tree=dir={_PLACE})
[ $# = 0 ] || rm -rf $checkout
rm -r {_PLACE} {_PLACE}.tar
[ "$new" != "$old" ] || exit 0
for each in "${{deployed%/*}}/$old.0"* "${{deployed%/*/*}}/backing/$old.0"; do
    [ ! -e "$each" ] || mv "$each" "${{each%/*}}/$new.0${{each##*/$old.0}}"
done
ln -sfn "${{deployed%/*}}/$new.0" "${{link##*/}}"
grep -rlx "$old" $OSTREE_REPO/refs/heads | xargs -r sed -i "s/$old/$new/"
"""
# What a boot would do with what is new.
_START: Final = """
set -e
systemd-tmpfiles --create --prefix=/var --prefix=/run
systemctl daemon-reload
systemctl start multi-user.target
"""


@dataclass(frozen=True, kw_only=True)
class Top:
    """Packages and files as a layer, to be put into machines of an image without them.

    :ivar archive: a tar archive of the layer.
    :ivar removed: absolute paths that go before it is unpacked.
    :ivar ref: what OSTree calls the result, and
    :ivar subject: the first line of its commit's message.
    :ivar fingerprint: equal for layers that are the same.
    """

    archive: Path
    removed: tuple[str, ...]
    ref: str
    subject: str
    fingerprint: str


@contextmanager
def top(inputs: ImageInputs, cache: Cache, *, say: Say = lambda _line: None) -> Iterator[Top]:
    """Give the packages and files of *inputs*, some at least, for as long as the block.

    :raises BuildError: if they cannot be installed.
    """
    apt = Apt(inputs.recipe.suite, cache.root / "apt", say=say)
    base_key = key(*base.inputs(inputs.recipe, apt))
    with layer_entry(inputs, cache, base_key, say) as (layer,):

        def make(stage: Path) -> None:
            archive = ["tar", "--create", f"--file={stage / 'layer.tar'}"]
            options = ("--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*")
            run([*archive, *options, f"--directory={layer.tree}", "."], what="packing the layer")

        name = key(Path(__file__), layer.tree, *layer.removed, inputs.ref, inputs.subject)
        with cache.entry("live-layer", name, make, say, label=inputs.subject) as entry:
            yield Top(
                archive=entry / "layer.tar",
                removed=layer.removed,
                ref=inputs.ref,
                subject=inputs.subject,
                fingerprint=name,
            )


def put_on(machine: Machine, layer: Top) -> None:
    """Put *layer* into a running machine of the same image without it; it stays there.

    :raises CommandError: if that fails.
    """
    machine.copy_in(layer.archive, f"{_PLACE}.tar")
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _APPLY, "sh"]
    machine.run([*command, layer.ref, layer.subject, *layer.removed], timeout=_TIMEOUT)
    machine.run(_START, timeout=_TIMEOUT)
