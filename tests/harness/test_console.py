# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules over console, kernel log and journal, held against logs of real machines."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from harness.console import KNOWN_NOISE, Log, died, scan, scan_journal
from harness.findings import MAX_LINES, Allow, Finding, Kind
from harness.logs import LogEvent, from_journal, from_kmsg

LOGS = Path(__file__).parent / "logs"
KERNELS = ("6.1", "6.12", "7.2")
SYSTEMDS = ("257", "262")
SCENE = "harness: scene "

KERNEL_SCENES: dict[str, tuple[tuple[Kind, str], ...]] = {
    "clean": (),
    "overlayfs": (
        (Kind.OVERLAYFS, "at least 2 lowerdir"),
        (Kind.OVERLAYFS, "upperdir is in-use"),
        (Kind.OVERLAYFS, "maximum fs stacking depth exceeded"),
    ),
    "segfault": ((Kind.CORE_DUMP, "crash (pid "),),
    "trap": ((Kind.CORE_DUMP, "crash (pid "),),
    "warn": ((Kind.WARNING, "crashme.c:15 "),),
    "warnmsg": ((Kind.WARNING, "crashme.c:16 "),),
    "refcount": ((Kind.WARNING, "lib/refcount.c:25 "),),
    "sleep": (
        (Kind.OOPS, "BUG: scheduling while atomic"),
        (Kind.CORE_DUMP, "init (pid "),
        (Kind.OOPS, "BUG: scheduling while atomic"),
    ),
    "oom": ((Kind.OOM, "crash invoked oom-killer"),),
    "hung": ((Kind.HUNG_TASK, "INFO: task init:"),),
    "softlockup": ((Kind.STALL, "watchdog: BUG: soft lockup - CPU#"),),
    "stall": ((Kind.STALL, "rcu: INFO: rcu_preempt self-detected stall on CPU"),),
    "gpf": ((Kind.OOPS, "general protection fault, probably for non-canonical address"),),
    "null": ((Kind.OOPS, "BUG: kernel NULL pointer dereference"),),
    "bug": ((Kind.OOPS, "kernel BUG at "),),
    "listdel": ((Kind.OOPS, "kernel BUG at lib/list_debug.c"),),
    "sysrq": ((Kind.PANIC, "Kernel panic - not syncing: sysrq triggered crash"),),
    "init-exits": ((Kind.PANIC, "Attempted to kill init!"),),
    "panic-on-oops": ((Kind.OOPS, "BUG: kernel NULL"), (Kind.PANIC, "Fatal exception")),
    "end": (),
}
SYSTEMD_SCENES: dict[str, tuple[tuple[Kind, str], ...]] = {
    "fail": ((Kind.UNIT, "fail.service"),),
    "needs-fail": ((Kind.UNIT, "fail.service"), (Kind.UNIT, "needs-fail.service")),
    "crash": ((Kind.CORE_DUMP, "crash (pid "), (Kind.UNIT, "crash.service")),
    "slow": ((Kind.UNIT, "slow.service"),),
    "hog": (
        (Kind.OOM, "crash invoked oom-killer"),
        (Kind.OOM, "hog.service"),
        (Kind.UNIT, "hog.service"),
    ),
    "mount": ((Kind.UNIT, r"dev-nothing\x2dhere.device"), (Kind.UNIT, "mnt-nothing.mount")),
    "cycle": ((Kind.CYCLE, "ordering cycle"),),
    "end": (),
}


def read(name: str) -> str:
    return (LOGS / name).read_bytes().decode("utf-8", "replace")


def kernel_scene(version: str, name: str) -> str:
    text = read(f"kernel-{version}.log")
    after = text[text.index(f"{SCENE}{name}\n") :].split("\n", 1)[1]
    return after.partition(SCENE)[0]


def journal_scene(version: str, name: str) -> list[str]:
    scene, lines = "", []
    for line in read(f"journal-{version}-dirty.json").splitlines():
        entry = json.loads(line)
        if entry.get("SYSLOG_IDENTIFIER") == "harness":
            scene = entry["MESSAGE"].removeprefix("scene ")
        elif scene == name:
            lines.append(line)
    assert lines, f"no scene {name}"
    return lines


def matches(found: tuple[Finding, ...], expected: tuple[tuple[Kind, str], ...]) -> bool:
    return len(found) == len(expected) and all(
        finding.kind is kind and text in finding.subject
        for finding, (kind, text) in zip(found, expected, strict=True)
    )


def stamped(*messages: str) -> str:
    return "".join(f"[{n:5}.000000] {message}\n" for n, message in enumerate(messages))


# -- real logs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("scene", KERNEL_SCENES)
def test_each_kernel_scene_gives_its_findings_and_no_other(version: str, scene: str) -> None:
    found = scan(kernel_scene(version, scene))
    expected = KERNEL_SCENES[scene]
    if (version, scene) == ("6.12", "softlockup"):  # there it was seen twice, 5 and 11 s long
        expected *= 2
    assert matches(found, expected), "\n".join(map(str, found))
    assert all(finding.source == "console" for finding in found)


@pytest.mark.parametrize("version", KERNELS)
def test_boot_of_a_bare_kernel_is_clean(version: str) -> None:
    boot, _, rest = read(f"kernel-{version}.log").partition(SCENE)
    assert boot.count("\n") > 300
    assert scan(boot) == ()
    assert scan(boot + SCENE + rest) != ()


@pytest.mark.parametrize("version", SYSTEMDS)
def test_clean_boot_of_debian_gives_no_finding(version: str) -> None:
    console = read(f"console-{version}-clean.log")
    journal = read(f"journal-{version}-clean.json").splitlines()
    assert "login:" in console
    assert len(journal) > 300
    assert scan(console) == ()
    assert scan_journal(journal) == ()


@pytest.mark.parametrize("version", SYSTEMDS)
@pytest.mark.parametrize("scene", SYSTEMD_SCENES)
def test_each_systemd_scene_gives_its_findings_and_no_other(version: str, scene: str) -> None:
    found = scan_journal(journal_scene(version, scene))
    assert matches(found, SYSTEMD_SCENES[scene]), "\n".join(map(str, found))


@pytest.mark.parametrize("version", SYSTEMDS)
def test_console_alone_shows_what_the_kernel_said(version: str) -> None:
    found = scan(read(f"console-{version}-dirty.log"))
    assert [finding.kind for finding in found] == [Kind.CORE_DUMP, Kind.OOM]


def test_failed_unit_comes_with_what_it_said() -> None:
    (finding,) = scan_journal(journal_scene("257", "fail"))
    assert any("I shall fail" in line for line in finding.lines)
    assert any("Failed with result 'exit-code'" in line for line in finding.lines)


def test_trace_stays_together_and_is_cut() -> None:
    (finding,) = scan(kernel_scene("6.12", "warnmsg"))
    assert "cut here" in finding.lines[0]
    assert "the harness wants a warning: 42" in finding.lines[1]
    assert any("Call Trace:" in line for line in finding.lines)
    assert len(finding.lines) == MAX_LINES


def test_oom_keeps_who_was_killed_however_long_the_state_of_memory_is() -> None:
    (finding,) = scan(kernel_scene("6.12", "oom"))
    assert "Out of memory: Killed process" in finding.lines[-1]


def test_lines_of_others_do_not_cut_a_trace() -> None:
    lines = kernel_scene("7.2", "warn").splitlines(keepends=True)
    mixed = "".join(
        line
        + ("[    4.0] systemd-journald[1]: busy\nsome program's output\n" if n % 5 == 0 else "")
        for n, line in enumerate(lines)
    )
    (finding,) = scan(mixed)
    (alone,) = scan("".join(lines))
    assert finding == alone


def test_same_thing_on_console_and_in_the_journal_is_one_finding() -> None:
    log = Log()
    text = kernel_scene("6.12", "warn")
    log.console(text)
    for line in text.splitlines():
        number, _, message = line[1:].partition("] ")
        event = LogEvent("kmsg", message, identifier="kernel", monotonic=float(number or 0))
        log.event(event)
    assert [finding.kind for finding in log.findings()] == [Kind.WARNING]


def test_crash_reported_by_kernel_and_coredump_is_one_finding() -> None:
    found = scan_journal(journal_scene("257", "crash"))
    assert [finding.kind for finding in found].count(Kind.CORE_DUMP) == 1
    lines = [line for line in journal_scene("257", "crash") if "segfault at" not in line]
    (dump,) = (each for each in scan_journal(lines) if each.kind is Kind.CORE_DUMP)
    assert "dumped core" in dump.lines[0]


@pytest.mark.parametrize("name", ["kernel-6.12.log", "console-257-clean.log"])
def test_five_megabytes_take_well_under_a_second(name: str) -> None:
    text = read(name)
    text = (text * (5_000_000 // len(text) + 1))[:5_000_000]
    start = time.process_time()
    scan(text)
    assert time.process_time() - start < 0.8


# -- rules for what could not be provoked; the texts are the kernel's and systemd's own ----------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kind.STALL, "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!"),
        (Kind.STALL, "watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 1"),
        (Kind.STALL, "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
        (Kind.STALL, "rcu: INFO: rcu_sched detected expedited stalls on CPUs/tasks: { 0-...D }"),
        (Kind.OOPS, "divide error: 0000 [#1] PREEMPT SMP NOPTI"),
        (Kind.OOPS, "BUG: unable to handle page fault for address: ffffffffffffffd8"),
        (Kind.OOPS, "BUG: KASAN: slab-use-after-free in ovl_copy_up+0x12/0x30"),
        (Kind.OOPS, "BUG: Bad page state in process python3  pfn:1234"),
        (Kind.WARNING, "UBSAN: array-index-out-of-bounds in fs/overlayfs/copy_up.c:12:3"),
        (Kind.OOM, "Memory cgroup out of memory: Killed process 12 (sh) total-vm:4kB"),
        (Kind.OOM, "kworker/0:1: page allocation failure: order:4, mode:0x40cc0(GFP_KERNEL)"),
        (Kind.DISK, "EXT4-fs error (device vda): ext4_lookup:1855: inode #2: comm ls: bad"),
        (Kind.DISK, "I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1"),
        (Kind.DISK, "Buffer I/O error on dev vda, logical block 0, lost async page write"),
        (Kind.INIT, "systemd[1]: Freezing execution."),
        (Kind.INIT, "systemd[1]: Caught <SEGV>, dumped core as pid 123."),
        (Kind.UNIT, "systemd[1]: foo.service: Failed with result 'exit-code'."),
        (Kind.CYCLE, "systemd[1]: a.service: Found ordering cycle on b.service/start"),
        (Kind.OVERLAYFS, "overlayfs: failed to resolve '/nowhere': -2"),
    ],
)
def test_message_is_found(kind: Kind, message: str) -> None:
    (finding,) = scan(stamped("innocent", message, "innocent, too"))
    assert finding.kind is kind


@pytest.mark.parametrize(
    "message",
    [
        "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible",
        "RETBleed: WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks",
        'overlayfs: "xino" feature enabled using 2 upper inode bits.',
        "overlayfs: fs on '/run/x' does not support file handles, falling back to xino=off.",
        "overlayfs: upper fs does not support tmpfile.",
        "EXT4-fs (vda): recovery complete",
        "EXT4-fs (vda): mounted filesystem 12 r/w with ordered data mode. Quota mode: none.",
        "hrtimer: interrupt took 5000000 ns",
        "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable",
        "Command line: console=ttyS0 panic=-1 oops=panic",
        "printk: log_buf_len: 1048576 bytes",
        "python3[123]: BUG: this program says so",
        "systemd[1]: Started foo.service - tells of a WARNING: nothing.",
        "systemd[1]: Failed to put bus name to hashmap: File exists",
        "rcu: RCU restricting CPUs from NR_CPUS=8192 to nr_cpu_ids=2.",
        "NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.",
    ],
)
def test_innocent_message_is_not_found(message: str) -> None:
    assert scan(stamped(message)) == ()


def test_program_that_quotes_a_warning_on_the_console_is_not_found() -> None:
    assert scan("WARNING: from a program\nBUG: in a program\nOops: no\n") == ()


@pytest.mark.parametrize(
    ("line", "kind", "subject"),
    [
        (
            "[\x1b[0;1;31mFAILED\x1b[0m] Failed to start \x1b[0;1;39mfoo.service\x1b[0m - Foo.\r",
            *(Kind.UNIT, "foo.service"),
        ),
        ("[DEPEND] Dependency failed for bar.mount - /bar.", *(Kind.UNIT, "bar.mount")),
        ("[FAILED] Failed unmounting var.mount - /var.", *(Kind.UNIT, "var.mount")),
        (
            "You are in emergency mode. After logging in, type ...",
            *(Kind.INIT, "You are in emergency mode. After logging in, type"),
        ),
        (
            "Kernel panic - not syncing: no stamps here",
            *(Kind.PANIC, "Kernel panic - not syncing: no stamps here"),
        ),
    ],
)
def test_status_of_systemd_on_the_console(line: str, kind: Kind, subject: str) -> None:
    (finding,) = scan(line + "\n")
    assert (finding.kind, finding.subject.rstrip()) == (kind, subject)


def test_kernel_message_behind_a_prompt_is_found() -> None:
    (finding,) = scan("root@guest:~# [   12.000000] Kernel panic - not syncing: late\n")
    assert finding.kind is Kind.PANIC


def test_stamp_with_the_caller_is_understood() -> None:
    (finding,) = scan("[   12.000000][    T1] WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2\n")
    assert finding.subject.startswith("WARNING: CPU: 0")


def test_emergency_unit_means_that_init_gave_up() -> None:
    fields = {"MESSAGE": "Starting", "MESSAGE_ID": "7d4958e842da4a758f6c1cdc7b36dcc5"}
    log = Log()
    for unit in ("innocent.service", "emergency.service"):
        log.event(from_journal({**fields, "UNIT": unit, "SYSLOG_IDENTIFIER": "systemd"}))
    (finding,) = log.findings()
    assert (finding.kind, finding.subject) == (Kind.INIT, "emergency.service")


def test_cancelled_job_is_no_failure() -> None:
    log = Log()
    fields = {"MESSAGE_ID": "be02cf6855d2428ba40df7e9d022f03d", "UNIT": "a.service"}
    log.event(from_journal({**fields, "JOB_RESULT": "canceled"}))
    assert log.findings() == ()
    log.event(from_journal({**fields, "JOB_RESULT": "failed"}))
    assert len(log.findings()) == 1


def test_record_of_kmsg_is_understood() -> None:
    log = Log()
    log.event(from_kmsg("4,812,3456000,-;WARNING: CPU: 0 PID: 1 at x.c:1\n SUBSYSTEM=x\n"))
    (finding,) = log.findings()
    assert finding.source == "kernel"
    assert finding.lines == ("[    3.456000] WARNING: CPU: 0 PID: 1 at x.c:1",)


# -- the log as a whole ------------------------------------------------------------------------


def test_finding_is_known_before_its_trace_ends_and_grows() -> None:
    log = Log()
    lines = kernel_scene("6.1", "null").splitlines(keepends=True)
    log.console("".join(lines[:3]))
    (early,) = log.findings()
    assert early.kind is Kind.OOPS
    log.console("".join(lines[3:]))
    (late,) = log.findings()
    assert late.subject == early.subject
    assert len(late.lines) > len(early.lines)


def test_text_may_come_in_any_pieces() -> None:
    text = kernel_scene("6.12", "null")
    whole = scan(text)
    for size in (1, 7, 100):
        log = Log()
        for start in range(0, len(text), size):
            log.console(text[start : start + size])
        assert log.findings() == whole


def test_line_without_an_end_counts_when_nothing_more_comes() -> None:
    log = Log()
    log.console("[    1.000000] Kernel panic - not syncing: cut o")
    assert log.findings() == ()
    log.end_of_console()
    assert [finding.kind for finding in log.findings()] == [Kind.PANIC]


def test_rest_of_a_trace_that_was_reported_is_not_reported_again() -> None:
    log = Log()
    lines = kernel_scene("6.12", "gpf").splitlines(keepends=True)
    log.console("".join(lines[:5]))
    assert len(log.findings()) == 1
    log.forget()
    log.console("".join(lines[5:]))
    assert log.findings() == ()
    log.console(kernel_scene("6.12", "warn"))
    assert [finding.kind for finding in log.findings()] == [Kind.WARNING]


def test_allowed_findings_are_left_out() -> None:
    text = kernel_scene("6.12", "overlayfs")
    depth = Allow("maximum fs stacking depth", "the test goes too deep", Kind.OVERLAYFS)
    assert len(scan(text, [depth])) == 2
    assert scan(text, [Allow("overlayfs: ", "all of them")]) == ()
    assert len(scan(text, [Allow("overlayfs: ", "another kind", Kind.OOPS)])) == 3


def test_allowance_looks_at_the_lines_too() -> None:
    assert scan(kernel_scene("6.12", "warnmsg"), [Allow("wants a warning: 42", "it does")]) == ()


def test_known_noise_has_reasons() -> None:
    assert all(allow.reason for allow in KNOWN_NOISE)


def test_dead_machine_is_reported_with_its_last_words() -> None:
    finding = died("QEMU ended with signal 9", "line\n\nKVM internal error. Suberror: 1\n")
    assert finding.kind is Kind.DIED
    assert str(finding).splitlines() == [
        "died (machine): QEMU ended with signal 9",
        "line",
        "KVM internal error. Suberror: 1",
    ]
