# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent as a process, spoken to by hand: what a client may find it in, and do to it."""

from __future__ import annotations

import base64
import grp
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.agents import (
    PYTHON,
    Agent,
    Client,
    FifoAgent,
    PtyAgent,
    alive,
    eventually,
    pid_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.channel import Channel

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which root may")


def connected(agent: Agent) -> Client:
    """Return a client once the agent takes one."""
    clients: list[Client] = []

    def try_once() -> bool:
        try:
            clients.append(Client(agent.connect()))
        except OSError:
            return False
        return True

    eventually(try_once)
    return clients[0]


def run(ident: int, script: str, **more: object) -> dict[str, object]:
    return {"op": "run", "id": ident, "argv": ["sh", "-c", script], **more}


def output(message: dict[str, object], name: str = "out") -> str:
    return base64.b64decode(str(message.get(name, ""))).decode()


def test_agent_answers_hello_with_boot_id_and_clock(client: Client) -> None:
    answer = client.hello("again")
    assert answer["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert answer["kernel"] == os.uname().release
    assert abs(float(str(answer["clock"])) - time.time()) < 60


def test_agent_loads_little_before_it_listens() -> None:
    path = Path(__file__).parents[2] / "harness" / "agent.py"
    command = [PYTHON, "-IS", "-X", "importtime", str(path), "nothing:"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "json" in loaded
    assert not loaded & {"subprocess", "socket", "selectors", "typing", "dataclasses", "tempfile"}


def test_agent_refuses_a_place_it_does_not_know() -> None:
    path = Path(__file__).parents[2] / "harness" / "agent.py"
    done = subprocess.run([PYTHON, "-IS", path, "tcp:1"], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"tcp:1" in done.stderr


def test_agent_on_stdio_ends_with_its_input(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "harness" / "agent.py"
    lines = b'{"op":"hello","nonce":"x"}\n{"op":"nothing","id":7}\n'
    done = subprocess.run(
        [PYTHON, "-IS", path, "stdio:"], input=lines, capture_output=True, timeout=20, check=True
    )
    assert b'"hello":"x"' in done.stdout
    assert b'{"id":7,"done":true,"error":"unknown operation \'nothing\'"}' in done.stdout
    assert not done.stderr
    del tmp_path


# Conversations.


def test_what_comes_before_a_hello_is_ignored(agent: Agent, channel: Channel) -> None:
    del channel
    client = Client(agent.connect())
    client.send(b"rubbish\n", run(1, "echo no"), {"op": "hello", "nonce": "yes"})
    assert client.receive()["hello"] == "yes"
    client.send(run(2, "echo yes"))
    assert client.receive()["id"] == 2
    client.close()


def test_half_a_line_of_another_client_does_no_harm(any_agent: Agent) -> None:
    first = connected(any_agent)
    first.hello("first")
    first.send(b'{"op":"run","id":1,"argv":["sh","-c","echo ')
    time.sleep(0.1)
    second = connected(any_agent)
    assert second.hello("second")["hello"] == "second"
    second.send(run(1, "echo mine"))
    assert output(second.last(1)) == "mine\n"
    first.close()
    second.close()


def test_repeated_hello_is_the_same_conversation(client: Client) -> None:
    client.send(run(1, "sleep 0.3; echo done"))
    client.hello("n")
    assert output(client.last(1)) == "done\n"


def test_new_hello_ends_what_ran_before(any_agent: Agent, tmp_path: Path) -> None:
    client = connected(any_agent)
    client.hello("before")
    client.send(run(1, f"echo $$ > {tmp_path}/pid; head -c 200000 /dev/zero; exec sleep 100"))
    pid = pid_in(tmp_path / "pid")
    client.hello("after")
    eventually(lambda: not alive(pid))
    client.send(run(1, "echo clean"))
    answer = client.receive()
    assert (answer["id"], output(answer)) == (1, "clean\n")
    client.close()


def test_commands_of_a_client_that_left_are_killed(
    agent: Agent, client: Client, tmp_path: Path
) -> None:
    other = Client(agent.connect())
    other.hello()
    other.send(run(1, f"echo $$ > {tmp_path}/pid; exec sleep 100"))
    pid = pid_in(tmp_path / "pid")
    other.close()
    eventually(lambda: not alive(pid))
    client.send(run(2, "echo well"))
    assert output(client.last(2)) == "well\n"


def test_two_clients_of_a_socket_do_not_disturb_each_other(agent: Agent, client: Client) -> None:
    other = Client(agent.connect())
    other.hello("other")
    client.send(run(1, "sleep 0.2; echo one"))
    other.send(run(1, "echo two"))
    assert output(other.last(1)) == "two\n"
    assert output(client.last(1)) == "one\n"
    other.close()


# Lines that are wrong.


def test_garbage_is_named_and_the_next_line_understood(client: Client) -> None:
    client.send(b"\xff\xfe{{{\n[1, 2]\n\n   \n", run(1, "echo ok"))
    assert "{{{" in str(client.receive()["garbage"])
    assert client.receive()["garbage"] == "[1, 2]"
    assert output(client.last(1)) == "ok\n"


def test_deeply_nested_garbage_does_not_end_the_agent(client: Client) -> None:
    client.send(b"[" * 200_000 + b"\n", run(1, "echo ok"))
    assert "garbage" in client.receive()
    assert output(client.last(1)) == "ok\n"


def test_endless_line_is_dropped_without_filling_memory(agent: Agent, client: Client) -> None:
    before = agent.status("VmHWM")
    for _ in range(60):
        client.send(b"x" * MIB)
    client.send(b"\n", run(1, "echo ok"))
    assert output(client.last(1)) == "ok\n"
    assert agent.status("VmHWM") - before < 64 * 1024


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "fly"}, "unknown operation 'fly'"),
        ({"op": "run"}, "'argv' must be"),
        ({"op": "run", "argv": []}, "'argv' must be"),
        ({"op": "run", "argv": [1]}, "expected str, bytes or os.PathLike object, not int"),
        ({"op": "run", "argv": ["true"], "env": [1]}, "'env' must be"),
        ({"op": "run", "argv": ["true"], "cwd": 7}, "'cwd' must be"),
        ({"op": "run", "argv": ["a\0b"]}, "null byte"),
        ({"op": "run", "argv": ["true"], "user": "no-such-user"}, "no user 'no-such-user'"),
        ({"op": "put"}, "'path' must be"),
        ({"op": "put", "path": "here"}, "must be absolute"),
        ({"op": "get", "path": "/no/such/file"}, "/no/such/file: No such file"),
        ({"op": "get", "path": "/dev/null"}, "neither a file nor a directory"),
        ({"op": "load", "part": "bad", "source": "x = "}, "invalid syntax"),
    ],
)
def test_request_that_makes_no_sense_is_answered_with_an_error(
    client: Client, request_: dict[str, object], error: str
) -> None:
    client.send({**request_, "id": 5})
    assert error in str(client.last(5)["error"])
    client.send(run(6, "echo still here"))
    assert output(client.last(6)) == "still here\n"


def test_data_for_no_request_is_ignored(client: Client) -> None:
    client.send({"op": "data", "id": 9, "data": "AAAA"}, {"op": "end", "id": 9}, run(1, "echo ok"))
    assert client.receive()["id"] == 1


# Commands.


def test_large_output_needs_little_memory(agent: Agent, client: Client) -> None:
    before = agent.status("VmHWM")
    client.send(run(1, "head -c 50000000 /dev/zero"))
    size = 0
    while not (message := client.receive()).get("done"):
        size += len(base64.b64decode(str(message["out"])))
    assert size + len(output(message)) == 50_000_000
    assert agent.status("VmHWM") - before < 8 * 1024


def test_output_that_nobody_takes_stops_the_command_not_the_agent(
    agent: Agent, client: Client
) -> None:
    before = agent.status("VmHWM")
    client.send(run(1, "head -c 50000000 /dev/zero"))
    time.sleep(0.5)
    assert agent.status("VmHWM") - before < 8 * 1024
    other = Client(agent.connect())
    other.hello()
    other.send(run(1, "echo well"))
    assert output(other.last(1)) == "well\n"
    other.close()


def test_commands_run_side_by_side_and_answer_when_they_end(client: Client) -> None:
    for ident, pause in ((1, 0.6), (2, 0.3), (3, 0.0)):
        client.send(run(ident, f"sleep {pause}; echo {ident}"))
    answers = [client.receive() for _ in range(3)]
    assert [answer["id"] for answer in answers] == [3, 2, 1]
    assert [output(answer) for answer in answers] == ["3\n", "2\n", "1\n"]


def test_forty_commands_at_once(client: Client) -> None:
    for ident in range(40):
        client.send(run(ident, f"head -c 100000 /dev/urandom | wc -c; echo {ident}"))
    ends: dict[object, list[str]] = {}
    while len(ends) < 40:
        message = client.receive()
        ends[message["id"]] = output(message).split()
    assert ends == {ident: ["100000", str(ident)] for ident in range(40)}


def test_timeout_kills_the_whole_process_group(client: Client) -> None:
    client.send(run(1, "sleep 300 & echo $!; echo $$; wait", timeout=0.4))
    answer = client.last(1)
    assert answer["expired"] is True
    assert answer["rc"] == -9
    pids = [int(line) for line in output(answer).split()]
    assert len(pids) == 2
    eventually(lambda: not any(map(alive, pids)))


def test_abort_kills_a_command(client: Client) -> None:
    client.send(run(1, "sleep 300"), {"op": "abort", "id": 1})
    answer = client.last(1)
    assert answer.get("rc") == -9 or "killed" in str(answer.get("error"))


def test_command_ends_with_its_first_process(client: Client) -> None:
    start = time.monotonic()
    client.send(run(1, "sleep 20 & echo $!; echo err >&2"))
    answer = client.last(1)
    assert time.monotonic() - start < 5
    assert (answer["rc"], output(answer, "err")) == (0, "err\n")
    pid = int(output(answer))
    assert alive(pid)  # a daemon may stay
    os.kill(pid, 9)


def test_command_that_closes_its_output_is_waited_for(client: Client) -> None:
    client.send(run(1, "exec >&- 2>&-; sleep 0.3; exit 3"))
    assert client.last(1)["rc"] == 3


def test_command_has_a_clean_world(client: Client) -> None:
    client.send(run(1, "env | sort; pwd; umask; cat; ls /proc/self/fd | wc -w; ps -o pgid= $$"))
    lines = output(client.last(1)).splitlines()
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    assert set(env) == {"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "USER"}
    assert lines[-4:-1] == ["/", "0022", "4"]


def test_environment_and_directory_are_passed_on(client: Client) -> None:
    client.send(run(1, "echo $A $PATH; pwd", env={"A": "ä b", "PATH": "/bin"}, cwd="/usr"))
    assert output(client.last(1)) == "ä b /bin\n/usr\n"


@pytest.mark.parametrize(
    ("argv", "more", "rc", "err"),
    [
        (["no-such-program"], {}, 127, "no-such-program: No such file or directory\n"),
        (["/etc/passwd"], {}, 126, "/etc/passwd: Permission denied\n"),
        (["true"], {"cwd": "/no/where"}, 127, "/no/where: No such file or directory\n"),
        (["echo", "x" * 140_000], {}, 126, "echo: Argument list too long\n"),
    ],
)
def test_what_cannot_be_started_ends_as_in_a_shell(
    client: Client, argv: list[str], more: dict[str, object], rc: int, err: str
) -> None:
    client.send({"op": "run", "id": 1, "argv": argv, **more})
    answer = client.last(1)
    assert (answer["rc"], output(answer, "err")) == (rc, err)


def test_huge_argv_arrives(client: Client) -> None:
    words = [f"{number:05}" * 200 for number in range(1000)]
    client.send(
        {"op": "run", "id": 1, "argv": ["sh", "-c", 'echo $# "${1000}" | wc -c', "-", *words]}
    )
    assert int(output(client.last(1))) == len("1000 ") + 1001


@needs_root
def test_another_user_has_none_of_roots_rights(client: Client) -> None:
    script = "id -u; id -G; env; grep -E 'Groups|CapEff' /proc/self/status; cat /etc/shadow"
    client.send(run(1, script, user="nobody"))
    answer = client.last(1)
    lines = output(answer).splitlines()
    assert lines[:2] == ["65534", str(grp.getgrnam("nogroup").gr_gid)]
    assert re.search(r"Groups:\s+65534 *$", "\n".join(lines), re.MULTILINE)
    assert "CapEff:\t0000000000000000" in lines
    assert {"USER=nobody", "LOGNAME=nobody", "HOME=/nonexistent"} <= set(lines)
    assert "PATH=/usr/local/bin:/usr/bin:/bin" in lines
    assert "Permission denied" in output(answer, "err")


# Devices.


def test_port_without_a_host_costs_no_cpu() -> None:
    agent = FifoAgent().start()
    try:
        client = connected(agent)
        client.hello()
        client.close()
        agent.port.disconnect()
        before = agent.cpu()
        time.sleep(2)
        assert agent.cpu() - before < 0.2
        client = connected(agent)
        assert client.hello("again")
        client.close()
    finally:
        agent.remove()


def test_answer_that_nobody_took_does_not_block_the_port_for_the_next_host() -> None:
    agent = FifoAgent().start()
    try:
        client = connected(agent)
        client.hello()
        client.send(run(1, "head -c 5000000 /dev/zero"))
        client.receive()
        agent.port.disconnect()  # in the middle of an answer
        time.sleep(0.2)
        client.close()
        client = connected(agent)
        client.hello("next")
        client.send(run(1, "echo fine"))
        assert output(client.last(1)) == "fine\n"
        client.close()
    finally:
        agent.remove()


@pytest.fixture
def pty_agent() -> Iterator[PtyAgent]:
    agent = PtyAgent()
    yield agent
    agent.remove()


def test_device_may_come_late_and_vanish_and_come_again(
    pty_agent: PtyAgent, tmp_path: Path
) -> None:
    pty_agent.start()
    time.sleep(0.3)
    for nonce in ("late", "again"):
        pty_agent.plug_in()
        client = connected(pty_agent)
        assert "started" in client.receive()
        client.hello(nonce)
        client.send(run(1, f"echo $$ > {tmp_path}/{nonce}; exec sleep 100"))
        pid = pid_in(tmp_path / nonce)
        pty_agent.unplug()
        eventually(lambda pid=pid: not alive(pid))  # type: ignore[misc]
        client.close()
    assert pty_agent.cpu() < 2


def test_large_answers_of_many_go_whole_through_a_narrow_device(pty_agent: PtyAgent) -> None:
    pty_agent.plug_in()
    pty_agent.start()
    client = connected(pty_agent)
    client.hello()
    sizes = dict.fromkeys(range(4), 0)
    for ident in sizes:
        client.send(run(ident, "head -c 700000 /dev/urandom | tee /dev/stderr"))
    streams = {(ident, name): b"" for ident in sizes for name in ("out", "err")}
    left = set(sizes)
    while left:
        message = client.receive()
        ident = int(str(message["id"]))
        for name in ("out", "err"):
            streams[ident, name] += base64.b64decode(str(message.get(name, "")))
        if message.get("done"):
            left.remove(ident)
    for ident in sizes:
        assert len(streams[ident, "out"]) == 700_000
        assert streams[ident, "out"] == streams[ident, "err"]
    client.close()


def test_socket_of_a_killed_agent_is_taken_over(agent: Agent, channel: Channel) -> None:
    del channel
    agent.kill()
    assert agent.path.exists()
    agent.start()
    client = connected(agent)
    assert client.hello()
    assert oct(agent.path.stat().st_mode & 0o777) == "0o600"
    client.close()
