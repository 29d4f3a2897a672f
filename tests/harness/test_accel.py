# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM or TCG: what is believed, what is remembered, and what is said."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

import pytest

from harness import accel
from harness.accel import choose, probe
from harness.errors import HostError
from harness.qemu import Accelerator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., Path]

PANIC = "[    0.7] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
# As a Debian kernel dies on a host whose KVM emulates too little.
INTERNAL = "KVM internal error. Suberror: 1"
ASSERTION = """\
qemu-system-x86_64: error: failed to set MSR 0x10a to 0xc000069
qemu-system-x86_64: target/i386/kvm/kvm.c:3849: kvm_buf_set_msrs: Assertion `ret == n' failed.
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    return path


@pytest.fixture
def make_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return what writes a program that behaves like a QEMU; KVM seems to be there."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "DEVICE", device)

    def make(body: str, version: str = "10.0.2") -> Path:
        program = tmp_path / "qemu"
        program.write_text(
            textwrap.dedent(f"""\
            #!/bin/sh
            if [ "$1" = --version ]; then echo 'QEMU emulator version {version}'; exit; fi
            echo run >> {tmp_path}/runs
            """)
            + textwrap.dedent(body)
        )
        program.chmod(0o755)
        return program

    return make


def runs(directory: Path) -> int:
    try:
        return (directory / "runs").read_text().count("run")
    except FileNotFoundError:
        return 0


def test_a_kernel_that_initialises_is_the_proof(make_qemu: Make, kernel: Path) -> None:
    assert probe(kernel, binary=make_qemu(f"echo '{PANIC}' > console.log; sleep 60")).works


def test_an_internal_error_is_no_proof_though_qemu_goes_on(make_qemu: Make, kernel: Path) -> None:
    body = f"echo 'Probing EDD (edd=off to disable)... ok' > console.log; echo '{INTERNAL}' >&2"
    verdict = probe(kernel, binary=make_qemu(f"{body}; sleep 60"))
    assert not verdict.works
    assert INTERNAL in verdict.why


def test_the_first_error_is_told_when_qemu_ends(make_qemu: Make, kernel: Path) -> None:
    verdict = probe(kernel, binary=make_qemu(f"cat >&2 <<'X'\n{ASSERTION}X\nexit 134"))
    assert verdict.why == "QEMU ends with 'failed to set MSR 0x10a to 0xc000069'"
    assert probe(kernel, binary=make_qemu("exit 3")).why == "QEMU ends with 'status 3'"


def test_silence_is_no_proof(make_qemu: Make, kernel: Path) -> None:
    verdict = probe(kernel, binary=make_qemu("sleep 60"), patience=0.2)
    assert verdict.why == "no kernel starts within 0 s"


def test_the_verdict_is_kept_and_said_each_time(
    make_qemu: Make, kernel: Path, tmp_path: Path
) -> None:
    program, said = make_qemu("echo 'no KVM today' >&2; exit 1"), list[str]()
    for _ in range(3):
        found = choose("auto", kernel, tmp_path / "kept", binary=program, say=said.append)
        assert found is Accelerator.TCG
    assert runs(tmp_path) == 1
    assert len(set(said)) == 1
    assert len(said) == 3
    assert said[0].startswith("accelerator: TCG, ")
    assert "no KVM today" in said[0]
    assert "accelerators.json" in said[0]
    assert "\n" not in said[0]


def test_nothing_is_said_where_kvm_works(make_qemu: Make, kernel: Path, tmp_path: Path) -> None:
    program, said = make_qemu(f"echo '{PANIC}' > console.log; sleep 60"), list[str]()
    for _ in range(2):
        found = choose("auto", kernel, tmp_path / "kept", binary=program, say=said.append)
        assert found is Accelerator.KVM
    assert not said
    assert runs(tmp_path) == 1


def test_another_qemu_or_kernel_is_proved_anew(
    make_qemu: Make, kernel: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    choose("auto", kernel, kept, binary=make_qemu("exit 1"))
    choose("auto", kernel, kept, binary=make_qemu("exit 1", "10.1.0"))
    assert runs(tmp_path) == 2
    kernel.write_bytes(b"another kernel")
    choose("auto", kernel, kept, binary=make_qemu("exit 1", "10.1.0"))
    assert runs(tmp_path) == 3
    assert len(json.loads((kept / accel.FILE).read_text())) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_damaged_file_is_found_out_again(
    make_qemu: Make, kernel: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / accel.FILE).write_text(content)
    program = make_qemu(f"echo '{PANIC}' > console.log; sleep 60")
    assert choose("auto", kernel, tmp_path, binary=program) is Accelerator.KVM


def test_who_names_one_gets_it_unproved(make_qemu: Make, kernel: Path, tmp_path: Path) -> None:
    said: list[str] = []
    program = make_qemu("exit 1")
    assert choose("kvm", kernel, tmp_path, binary=program, say=said.append) is Accelerator.KVM
    assert choose("tcg", kernel, tmp_path, binary=program, say=said.append) is Accelerator.TCG
    assert runs(tmp_path) == 0
    assert not said


def test_without_the_device_nothing_is_tried(
    make_qemu: Make, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "none")
    said: list[str] = []
    program = make_qemu("exit 1")
    assert choose("auto", kernel, tmp_path, binary=program, say=said.append) is Accelerator.TCG
    assert "there is no" in said[0]
    assert runs(tmp_path) == 0


def test_a_directory_that_cannot_be_written_to_costs_only_the_memory(
    make_qemu: Make, kernel: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    program = make_qemu("exit 1")
    assert choose("auto", kernel, tmp_path / "file", binary=program) is Accelerator.TCG
    assert choose("auto", kernel, tmp_path / "file", binary=program) is Accelerator.TCG
    assert runs(tmp_path) == 2


def test_a_qemu_that_cannot_run_is_an_error(make_qemu: Make, kernel: Path, tmp_path: Path) -> None:
    make_qemu("")
    with pytest.raises(HostError, match="cannot run"):
        choose("auto", kernel, tmp_path, binary=tmp_path / "none")
