# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's end: against real agents, and against what an agent never should say."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.channel import Channel
from harness.errors import (
    ChannelError,
    CommandError,
    CommandTimeoutError,
    MachineError,
)
from tests.harness.agents import (
    Agent,
    Fake,
    FifoAgent,
    PtyAgent,
    alive,
    eventually,
    in_thread,
    pid_in,
    stop,
)

if TYPE_CHECKING:
    import socket

    from harness.logs import LogEvent

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
# Hello.


def test_hello_waits_for_an_agent_that_is_not_there_yet() -> None:
    agent = Agent()
    channel = Channel(agent.connect)
    try:
        threading.Timer(0.5, agent.start).start()
        assert channel.hello(20).kernel == os.uname().release
        assert channel.run(["echo", "hi"]).out == "hi\n"
    finally:
        channel.close()
        agent.remove()


def test_hello_says_what_it_waited_for_in_vain(tmp_path: Path) -> None:
    def connect() -> socket.socket:
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path))

    with pytest.raises(ChannelError, match=r"no agent within 0 s: No such file") as caught:
        Channel(connect).hello(0.2)
    assert caught.value.hint is None


def test_hello_gives_up_on_an_agent_that_is_silent(fake: Fake) -> None:
    start = time.monotonic()
    with pytest.raises(ChannelError, match="does not answer"):
        fake.channel.hello(1.3)
    assert 1 < time.monotonic() - start < 5
    assert fake.expect("hello") == fake.expect("hello")  # asked again, in the same words


def test_hello_works_on_every_kind_of_stream(any_agent: Agent) -> None:
    channel = Channel(any_agent.connect)
    first = channel.hello(20)
    assert channel.run("echo $0", stdin=b"x").out == "sh\n"
    second = channel.hello(20)
    assert second.agent == first.agent
    assert set(second.parts) == {"files", "watch"}
    channel.close()


def test_parts_are_sent_once(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Channel(agent.connect)
    channel.hello(20)
    asked: list[str] = []
    request = channel.request

    def note(op: str, **args: object) -> object:
        asked.append(op)
        return request(op, **args)  # type: ignore[arg-type]

    monkeypatch.setattr(channel, "request", note)
    channel.hello(20)
    assert not asked
    channel.close()


def test_agent_of_another_version_is_refused(fake: Fake) -> None:
    with pytest.raises(ChannelError, match="version 7") as caught:
        fake.greet(version=7)
    assert caught.value.hint == "build the image anew"


def test_what_was_said_to_another_client_is_ignored(fake: Fake) -> None:
    fake.say(b'":"half a line"}\n', b"\xff\xff\n", {"id": 1, "done": True, "rc": 0})
    fake.say({"hello": "another"}, {"started": "x"}, {"garbage": "y"}, {"event": "kmsg"}, b'{"id":')
    fake.greet()
    result = in_thread(lambda: fake.channel.run(["true"], timeout=5))
    ident = fake.expect("run")["id"]
    fake.say({"id": 99, "done": True}, {"id": ident, "done": True, "rc": 0})
    time.sleep(0.1)
    assert not result


def test_no_request_without_hello(agent: Agent) -> None:
    with pytest.raises(ChannelError, match="no conversation"):
        Channel(agent.connect).run(["true"])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_may_come_in_pieces_of_any_size(sizes: list[int]) -> None:
    fake = Fake()
    fake.greet()
    results: list[bytes] = []
    work = threading.Thread(target=lambda: results.append(fake.channel.run(["x"]).stdout))
    work.start()
    ident = fake.expect("run")["id"]
    lines = b"\n\n".join(
        json.dumps(line).encode()
        for line in ({"id": ident, "out": "YWJj"}, {"id": ident, "done": True, "out": "ZGVm"})
    )
    data = lines + b"\n"
    for size in itertools.cycle(sizes):
        fake.say(data[:size])
        data = data[size:]
        if not data:
            break
    work.join(10)
    assert results == [b"abcdef"]
    fake.close()


# The conversation is lost.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"what is this?\n", "no message: 'what is this"),
        (b"[1]\n", "no message"),
        (b"[" * 100_000 + b"\n", "no message"),
        (b'{"started": "b"}\n', "started anew"),
        (b'{"garbage": "zzz"}\n', "got what is no message: 'zzz'"),
    ],
)
def test_nonsense_from_the_agent_ends_the_conversation(
    fake: Fake, line: bytes, message: str
) -> None:
    fake.greet()
    raised = in_thread(lambda: fake.channel.run(["true"]))
    fake.expect("run")
    fake.say(line)
    eventually(lambda: raised)
    assert message in str(raised[0])
    with pytest.raises(ChannelError, match=r"no message|anew"):
        fake.channel.run(["true"])


@pytest.mark.parametrize("data", ["abc", "a", "\u00e9"])
def test_output_that_makes_no_sense_ends_the_request(fake: Fake, data: str) -> None:
    fake.greet()
    raised = in_thread(lambda: fake.channel.run(["true"]))
    ident = fake.expect("run")["id"]
    fake.say({"id": ident, "out": data}, {"id": ident, "done": True, "rc": float("nan")})
    eventually(lambda: raised)
    assert "makes no sense" in str(raised[0])


def test_status_that_is_no_number_is_none(fake: Fake) -> None:
    fake.greet()
    for value in (float("nan"), float("inf"), "x", None):
        threading.Thread(
            target=lambda value=value: fake.say(
                {"id": fake.expect("run")["id"], "done": True, "rc": value}
            )
        ).start()
        assert fake.channel.run(["true"]).returncode == 0


def test_line_without_an_end_ends_the_conversation(fake: Fake) -> None:
    fake.greet()
    raised = in_thread(lambda: fake.channel.run(["true"]))
    fake.expect("run")
    with pytest.raises(OSError, match="Broken pipe"):
        fake.say(*[b"x" * (1 << 20)] * 200)
    eventually(lambda: raised)
    assert "no end" in str(raised[0])


def test_end_of_file_ends_what_waits(agent: Agent, channel: Channel) -> None:
    raised = [in_thread(lambda: channel.run("sleep 30")) for _ in range(3)]
    time.sleep(0.2)
    agent.kill()
    eventually(lambda: all(raised))
    for errors in raised:
        assert isinstance(errors[0], ChannelError)
    with pytest.raises(ChannelError, match="gone"):
        channel.run("true")


@pytest.mark.parametrize("kind", [PtyAgent, FifoAgent])
def test_agent_that_was_started_anew_is_noticed_without_end_of_file(kind: type[Agent]) -> None:
    agent = kind()
    if isinstance(agent, PtyAgent):
        agent.plug_in()
    agent.start()
    channel = Channel(agent.connect)
    try:
        first = channel.hello(20)
        raised = in_thread(lambda: channel.run("sleep 30"))
        time.sleep(0.2)
        agent.kill()
        agent.start()
        if isinstance(agent, PtyAgent):  # which says on a device that it is new
            eventually(lambda: raised)
            assert "anew" in str(raised[0])
        second = channel.hello(20)
        assert second.agent != first.agent
        assert second.boot_id == first.boot_id
        assert channel.run(["echo", "new"]).out == "new\n"
        eventually(lambda: raised)
    finally:
        channel.close()
        agent.remove()


def test_client_of_a_restored_machine_finds_the_agent_in_mid_sentence(tmp_path: Path) -> None:
    """The agent notices nothing: it is stopped, talks to somebody else, and goes on."""
    agent = FifoAgent(hang_up=False).start()
    frozen, restored = Channel(agent.connect), Channel(agent.connect)
    try:
        frozen.hello(20)
        script = f"echo $$ > {tmp_path}/pid; cat /dev/zero"
        raised = in_thread(lambda: frozen.run(script))
        pid = pid_in(tmp_path / "pid")
        assert agent.process is not None
        stop(agent.process)
        agent.port.disconnect()
        threading.Timer(0.3, agent.process.send_signal, (18,)).start()
        restored.hello(20)
        assert restored.run(["echo", "clean"]).out == "clean\n"
        eventually(lambda: not alive(pid))
        eventually(lambda: raised)
    finally:
        frozen.close()
        restored.close()
        agent.remove()


def test_silent_agent_is_given_up(
    agent: Agent, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.channel.SLACK", 0.3)
    assert agent.process is not None
    stop(agent.process)
    with pytest.raises(ChannelError, match="not answered within"):
        channel.run("true", timeout=0.2)


def test_close_gives_its_cause_to_who_waits_and_who_comes(channel: Channel) -> None:
    cause = MachineError("the kernel panicked")
    raised = in_thread(lambda: channel.run("sleep 30"))
    time.sleep(0.2)
    channel.close(cause)
    eventually(lambda: raised)
    assert raised[0] is cause
    with pytest.raises(MachineError, match="panicked"):
        channel.run(["true"])
    with pytest.raises(MachineError, match="panicked"):
        channel.hello()
    channel.close()


def test_close_ends_a_hello_that_waits(fake: Fake) -> None:
    raised = in_thread(lambda: fake.channel.hello(30))
    fake.expect("hello")
    fake.channel.close(MachineError("QEMU died"))
    eventually(lambda: raised)
    assert str(raised[0]) == "QEMU died"


# Commands.


def test_result_has_all_of_a_command(channel: Channel) -> None:
    result = channel.run("printf '\\377a'; echo err >&2; sleep 0.2; exit 3")
    assert (result.returncode, result.stdout, result.stderr) == (3, b"\xffa", b"err\n")
    assert result.out == "�a"
    assert 0.2 <= result.seconds < 5
    assert result.argv[:2] == ("sh", "-c")
    with pytest.raises(CommandError) as caught:
        result.check()
    assert "exit status 3: printf" in caught.value.message
    assert (caught.value.rc, caught.value.err) == (3, b"err\n")
    assert "stderr: err" in caught.value.__notes__


def test_command_ended_by_a_signal_says_so(channel: Channel) -> None:
    with pytest.raises(CommandError, match="signal 15: kill"):
        channel.run("kill $$").check()


def test_timeout_has_the_output_so_far(channel: Channel) -> None:
    with pytest.raises(CommandTimeoutError, match=r"still running after 0\.3 s") as caught:
        channel.run("echo begun; sleep 60", timeout=0.3)
    assert caught.value.out == b"begun\n"


def test_live_output_comes_before_the_command_ends(channel: Channel) -> None:
    pieces: list[tuple[float, str, bytes]] = []
    start = time.monotonic()
    result = channel.run(
        "echo one; sleep 0.5; echo two >&2; sleep 0.5; printf three",
        live=lambda name, piece: pieces.append((time.monotonic() - start, name, piece)),
    )
    assert [piece[1:] for piece in pieces] == [
        ("out", b"one\n"),
        ("err", b"two\n"),
        ("out", b"three"),
    ]
    assert pieces[0][0] < 0.5 < pieces[1][0] < 1
    assert result.stdout == b"one\nthree"


def test_fifty_megabytes_arrive(agent: Agent, channel: Channel) -> None:
    result = channel.run("yes 0123456789abcde | head -c 52428800 | tee /dev/stderr | sha256sum")
    assert len(result.stderr) == 52_428_800
    assert agent.status("VmHWM") < 40 * 1024


def test_binary_input_arrives_unchanged(channel: Channel) -> None:
    data = os.urandom(3_000_001)
    assert channel.run(["cat"], stdin=data).stdout == data


def test_command_that_does_not_read_its_input_is_no_trouble(channel: Channel) -> None:
    assert channel.run(["true"], stdin=bytes(1 << 20)).returncode == 0


def test_many_threads_share_a_channel(channel: Channel) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = channel.run(["echo", str(number)], stdin=bytes(70_000)).out

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: f"{number}\n" for number in range(24)}


def test_interrupted_wait_kills_the_command(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        pid_in(tmp_path / "pid")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(channel, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel.run(f"echo $$ > {tmp_path}/pid; exec sleep 100")
    eventually(lambda: not alive(pid_in(tmp_path / "pid")))
    assert channel.run("echo on").out == "on\n"


def test_round_trip_is_short(channel: Channel) -> None:
    channel.run(["true"])
    start = time.monotonic()
    for _ in range(20):
        channel.run(["true"])
    assert (time.monotonic() - start) / 20 < 0.1


# Clock and log.


@needs_root
def test_clock_and_randomness_are_put_right(channel: Channel) -> None:
    channel.set_clock()
    assert abs(channel.hello(20).clock - time.time()) < 1


def write_kmsg(text: str) -> None:
    try:
        Path("/dev/kmsg").write_text(f"<3>{text}\n")  # one without an end is not shown yet
    except OSError:
        pytest.skip("the kernel's log cannot be written to")


def test_log_is_followed_from_now_on_and_anew_after_each_hello(channel: Channel) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("there is a journal here, and it would be read")
    events: list[LogEvent] = []
    write_kmsg("harness: before")
    channel.follow(events.append)
    write_kmsg("harness: first")
    eventually(lambda: any("first" in event.message for event in events))
    channel.hello(20)
    write_kmsg("harness: between")
    channel.follow(events.append)
    write_kmsg("harness: second")
    eventually(lambda: any("second" in event.message for event in events))
    own = [event for event in events if event.message.startswith("harness: ")]
    assert [event.message.split()[1] for event in own] == ["first", "second"]
    assert all(event.kernel and event.priority == 3 for event in own)


def test_callback_of_an_event_may_ask_the_machine(channel: Channel) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("there is a journal here, and it would be read")
    answers: list[str] = []
    channel.follow(lambda _: answers.append(channel.run("echo asked").out))
    write_kmsg("harness: ask")
    eventually(lambda: "asked\n" in answers)
