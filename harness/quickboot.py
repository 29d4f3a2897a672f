# SPDX-License-Identifier: LGPL-2.1-or-later
"""A boot in a third of the time, of an image that knows nothing of it.

Without KVM a plain Debian needs half a minute to multi-user.target.  Three things bring it down:

* an initramfs that does no more than mount the root and hand it to OSTree's own program;
* arguments of the kernel's (:data:`ARGUMENTS`, besides :data:`harness.qemu.TUNING`);
* units and generators that are masked, in ``/run``, into which the initramfs puts the masks before
  systemd starts.

So what is on the disk is the same in a quick boot and in a plain one, ``/etc`` included.  What is
masked makes no difference to programs: polkit, D-Bus, logind, udev, networkd, tmpfiles and sysctl
settings are there.  What is missing shows in :data:`MASKED`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import elf
from harness.apt import unpack
from harness.errors import BuildError
from harness.initramfs import Archive, modules

if TYPE_CHECKING:
    from harness.apt import Apt

ARGUMENTS: Final = (
    # No questions to the terminal about its size, each of which waits for an answer.
    *("TERM=dumb", "systemd.show_status=0"),
    *("systemd.unit=multi-user.target", "fsck.mode=skip"),
)

MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "overlay")

GENERATORS: Final = (
    # Each is a process, and what they find is known: it is not there.
    *("systemd-bless-boot", "systemd-cryptsetup", "systemd-debug", "systemd-factory-reset"),
    *("systemd-fstab", "systemd-getty", "systemd-gpt-auto", "systemd-hibernate-resume"),
    *("systemd-import", "systemd-integritysetup", "systemd-rc-local", "systemd-run", "systemd-ssh"),
    *("systemd-system-update", "systemd-sysv", "systemd-tpm2", "systemd-veritysetup"),
)

MASKED: Final = (
    # Work for the background of a machine that stays: it would come between tests.
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("e2scrub_reap.service", "fstrim.timer", "systemd-tmpfiles-clean.timer"),
    # Databases that the image has already.
    *("ldconfig.service", "systemd-hwdb-update.service", "systemd-journal-catalog-update.service"),
    *("systemd-sysusers.service", "systemd-update-done.service"),
    # What this machine has not: a TPM, EFI variables, a screen, other binaries, hibernation.
    *("systemd-pcrextend.socket", "systemd-pcrlock.socket", "systemd-pcrmachine.service"),
    *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service"),
    *("systemd-tpm2-setup.service", "systemd-tpm2-setup-early.service"),
    *("systemd-bootctl.socket", "systemd-hibernate-clear.service", "systemd-pstore.service"),
    *("modprobe@efi_pstore.service", "modprobe@drm.service"),
    *("proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service"),
    # Pseudo file systems that no test looks at, and their modules.
    *("sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("sys-fs-fuse-connections.mount", "modprobe@configfs.service", "modprobe@fuse.service"),
    *("dev-hugepages.mount", "dev-mqueue.mount"),
    # Nobody logs in at a terminal, nor over a network, and no name is looked up there.
    *("getty.target", "systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    *("ssh.socket", "sshd-keygen.service", "sshd-unix-local.socket", "sshd-vsock.socket"),
    *("systemd-resolved-monitor.socket", "systemd-resolved-varlink.socket"),
    *("systemd-networkd-wait-online.service",),
    # What the initramfs or the command line did, or what is not asked for.
    *(
        "dracut-shutdown.service",
        "systemd-modules-load.service",
        "systemd-network-generator.service",
    ),
    *("systemd-quotacheck.service", "systemd-remount-fs.service", "systemd-initctl.socket"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    *("systemd-random-seed.service",),
    *("systemd-journal-flush.service", "systemd-machine-id-commit.service"),
)

# A unit that is also known by another name, from /etc, cannot be masked in /run.
SKIPPED: Final = ("ssh.service", "systemd-resolved.service")

FILES: Final = {
    **{
        f"systemd/system/{unit}.d/quick.conf": "[Unit]\nConditionPathExists=/nonexistent\n"
        for unit in SKIPPED
    },
    # Devices of the kinds that there are; others come with their events, as always.
    "systemd/system/systemd-udev-trigger.service.d/quick.conf": "[Service]\nExecStart=\n"
    "ExecStart=-udevadm trigger --type=all --action=add --prioritized-subsystem=block,net "
    "--subsystem-match=block --subsystem-match=net --subsystem-match=virtio-ports "
    "--subsystem-match=virtio --subsystem-match=tty --subsystem-match=misc\n",
    "systemd/journald.conf.d/quick.conf": "[Journal]\nStorage=volatile\nAudit=no\n",
}

# cloud-init has nothing to do after the first boot, which takes it five seconds to find out.  /var
# is not mounted yet.
_CLOUD_INIT: Final = "systemd/system-generators/cloud-init-generator"
_CLOUD_INIT_ONCE: Final = f"""\
#!/bin/sh
for done in /sysroot/ostree/deploy/*/var/lib/cloud/instances/*/boot-finished; do
    [ ! -e "$done" ] || exit 0
done
exec /usr/lib/{_CLOUD_INIT} "$@"
"""

_PREPARE_ROOT: Final = "usr/lib/ostree/ostree-prepare-root"
_CONFIGURATION: Final = "usr/lib/ostree/prepare-root.conf"
_LIBRARIES: Final = ("usr/lib64", "usr/lib/x86_64-linux-gnu")  # the loader is in the first
_BUSYBOX: Final = "busybox-static"
_RUN: Final = "run.quick"

_INIT: Final = f"""\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
$b cp -a /{_RUN}/. /run/
while read -r module; do $b insmod "$module"; done < /modules
root=/dev/vda
read -r line < /proc/cmdline
for word in $line; do
    case $word in root=/dev/*) root=${{word#root=}} ;; esac
done
tries=0
while [ ! -b "$root" ] && [ $tries -lt 500 ]; do
    $b usleep 20000
    tries=$((tries + 1))
done
$b mount -t ext4 -o rw "$root" /sysroot
/{_PREPARE_ROOT} /sysroot
for each in dev proc sys run; do $b mount --move /$each /sysroot/$each; done
exec $b switch_root /sysroot /sbin/init
echo "the root on $root cannot be started"
exec $b sh
"""


def write(tree: Path, kernel: Path, apt: Apt, file: Path) -> None:
    """Write the initramfs for quick boots of the deployment in *tree* to *file*.

    :param kernel: the kernel's modules: ``/usr/lib/modules/RELEASE``, in this tree or another.
    :param apt: where busybox is taken from.
    :raises BuildError: if the tree lacks something for it.
    """
    archive = Archive()
    for name in ("dev", "proc", "run", "sys", "sysroot"):
        archive.directory(name)
    archive.file("init", _INIT.encode(), mode=0o755)
    for name in (_PREPARE_ROOT, *libraries(tree, _PREPARE_ROOT)):
        archive.file(name, tree / name, mode=0o755)
    # Where the program asks for them.
    archive.symlink("lib64", "usr/lib64")
    archive.symlink("lib", "usr/lib")
    archive.file(_CONFIGURATION, tree / _CONFIGURATION)
    loaded = modules(kernel, MODULES)
    for module in loaded:
        archive.file(f"{module.name}.ko", module.content)
    archive.file("modules", "".join(f"/{module.name}.ko\n" for module in loaded).encode())
    for unit in MASKED:
        archive.symlink(f"{_RUN}/systemd/system/{unit}", "/dev/null")
    for generator in GENERATORS:
        name = f"{_RUN}/systemd/system-generators/{generator}-generator"
        archive.symlink(name, "/dev/null")
    for name, text in FILES.items():
        archive.file(f"{_RUN}/{name}", text.encode())
    archive.file(f"{_RUN}/{_CLOUD_INIT}", _CLOUD_INIT_ONCE.encode(), mode=0o755)
    with tempfile.TemporaryDirectory() as scratch, file.open("xb") as out:
        busybox = "busybox-static"
        unpack(
            apt.download([busybox], Path(scratch), only=lambda p: p.name == busybox), Path(scratch)
        )
        program = next(Path(scratch).glob("**/bin/busybox"))
        archive.file("bin/busybox", program, mode=0o755)
        archive.write(out)


def libraries(tree: Path, program: str) -> list[str]:
    """Return the shared libraries that a program needs, relative to the *tree* they are in."""
    found: dict[str, None] = {}
    pending = [program]
    while pending:
        for name in elf.needed((tree / pending.pop()).read_bytes()):
            places = (f"{directory}/{name}" for directory in _LIBRARIES)
            place = next((place for place in places if (tree / place).exists()), None)
            if place is None:
                raise BuildError(f"{program} needs {name}, which is not in the image")
            if place not in found:
                found[place] = None
                pending.append(place)
    return list(found)
