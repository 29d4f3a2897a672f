# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bare kernel: any of Debian's, with Python, a few programs and the project on top of it.

There is no service manager and no disk: everything lies in an initramfs, in three archives.
Debian's part (``userland``) and the kernel's modules are built once and kept; what is under test
is put together for each start, which costs nothing.  Such a machine answers four or five seconds
after the start of QEMU, without KVM.

``harness.sweep`` runs a command on several kernels.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import host
from harness import userland as userlands
from harness.apt import Apt
from harness.cache import key
from harness.initramfs import Archive, modules
from harness.machine import Capability
from harness.precompile import precompile
from harness.qemu import TUNING, Accelerator, Spec
from harness.userland import Userland
from harness.vm import QemuMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.cache import Cache
    from harness.kernels import Kernel

ARGUMENTS: Final = f"{TUNING} console=ttyS0 panic=-1 rdinit=/init"

_MODULES: Final = ("virtio_pci", "virtio_console", "virtio_rng")
_NO_MANAGER: Final = "there is no service manager on a bare kernel"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What it runs on.

    :ivar memory_mib: half of it is what the root, a tmpfs, may grow to.
    :ivar binary: QEMU; None: what ``host.qemu`` finds or installs.
    """

    memory_mib: int = 1024
    cpus: int = 2
    accelerator: Accelerator = Accelerator.TCG
    binary: Path | None = None


class BareMachine(QemuMachine):
    """A machine without a system; made by :func:`machine`."""

    lacks = {  # noqa: RUF012 - a ClassVar of the interface
        Capability.SYSTEMD: _NO_MANAGER,
        Capability.SOFT_REBOOT: _NO_MANAGER,
        Capability.OSTREE: "everything is in an initramfs",
    }

    def stream(
        self,
        argv: Sequence[str],
        write: Callable[[bytes], object],
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
    ) -> int:
        """Run a command as root and give what it writes, on both streams, to *write* as it comes.

        *write* is called on another thread.  Return the status.

        :raises CommandTimeoutError: after *timeout* seconds.
        """
        with self._working():
            return self.channel.run(
                argv, timeout=timeout, env=env, cwd=cwd, live=lambda _name, data: write(data)
            ).returncode


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is on top of a kernel.

    :ivar files: what is under test.
    :ivar userland: what else must be there.
    :ivar load: the modules that are loaded at the start.
    :ivar precompile: arguments of Python's; what they import comes compiled.
    :ivar cwd: the directory for that command, among *files*.
    """

    files: Archive = field(default_factory=Archive)
    userland: Userland = field(default_factory=Userland)
    load: tuple[str, ...] = ("overlay",)
    precompile: tuple[str, ...] = ()
    cwd: str = "/"


@contextlib.contextmanager
def machine(  # noqa: PLR0913  # what such a machine is made of
    kernel: Kernel,
    content: Content,
    cache: Cache,
    *,
    workdir: Path,
    hardware: Hardware | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[BareMachine]:
    """Give a machine that runs *kernel*, off at first; it is ended with the block."""
    hardware = hardware or Hardware()
    workdir.mkdir(parents=True, exist_ok=True)
    initrd = workdir / "initramfs"
    with contextlib.ExitStack() as stack:
        userland = stack.enter_context(_userland(content.userland, cache, say))
        parts = [userland / "archive", stack.enter_context(_modules(kernel, content, cache, say))]
        if content.precompile:
            parts.append(stack.enter_context(_compiled(userland, content, cache, say)))
        with initrd.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
            content.files.write(out)
        stack.callback(initrd.unlink, missing_ok=True)
        spec = Spec(
            name=f"bare {kernel.name}",
            kernel=(kernel.vmlinux or kernel.vmlinuz).absolute(),
            initrd=initrd.absolute(),
            append=ARGUMENTS,
            memory_mib=hardware.memory_mib,
            cpus=hardware.cpus,
            accelerator=hardware.accelerator,
        )
        binary = hardware.binary or host.qemu()
        yield stack.enter_context(BareMachine(spec, workdir=workdir, binary=binary))


@contextlib.contextmanager
def _userland(userland: Userland, cache: Cache, say: Callable[[str], None]) -> Iterator[Path]:
    apt = Apt(userland.suite, cache.root / "apt", say=say)
    inputs = key(*userlands.inputs(userland, apt))

    def build(stage: Path) -> None:
        userlands.write(userland, apt, stage)

    label = f"Python of {userland.suite}"
    with cache.entry("userland", inputs, build, say, label=label) as entry:
        yield entry


@contextlib.contextmanager
def _modules(
    kernel: Kernel, content: Content, cache: Cache, say: Callable[[str], None]
) -> Iterator[Path]:
    wanted = (*_MODULES, *content.load)

    def build(stage: Path) -> None:
        archive, names = Archive(), []
        for module in modules(kernel.modules, wanted):
            name = f"/usr/lib/modules/{kernel.release}/{module.name}.ko"
            archive.file(name, module.content)
            names.append(f"{name}\n")
        archive.file(userlands.MODULES, "".join(names).encode())
        (stage / "archive").write_bytes(archive.to_bytes())

    inputs = key(*userlands.BUILDERS, Path(__file__), kernel.release, kernel.version, *wanted)
    label = f"modules of {kernel.release}"
    with cache.entry("modules", inputs, build, say, label=label) as entry:
        yield entry / "archive"


@contextlib.contextmanager
def _compiled(
    userland: Path, content: Content, cache: Cache, say: Callable[[str], None]
) -> Iterator[Path]:
    def build(stage: Path) -> None:
        found = precompile(
            userland / "root", content.files, content.precompile, cwd=content.cwd, say=say
        )
        (stage / "archive").write_bytes(found.to_bytes())

    # The key of the userland is the name of the directory that its entry is in.
    inputs = key(
        Path(__file__).with_name("precompile.py"),
        userland.parent.name,
        content.files.to_bytes(),
        content.cwd,
        *content.precompile,
    )
    with cache.entry("compiled", inputs, build, say, label="compiled modules") as entry:
        yield entry / "archive"
