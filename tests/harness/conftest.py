# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the harness's tests share: an agent and a channel to it, and a machine that was booted."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis
import pytest

from harness import bare, host, kernels, qemu
from harness.cache import Cache, default_root
from harness.channel import Channel
from harness.template import Templates
from tests.harness.agents import Agent, Client, Fake, FifoAgent, LocalMachine, PtyAgent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.template import Template

# Emulated machines run beside these tests: how long an example takes says nothing.
hypothesis.settings.register_profile(
    "harness", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("harness")


@pytest.fixture
def agent() -> Iterator[Agent]:
    """Return an agent that listens on a socket."""
    agent = Agent().start()
    yield agent
    agent.remove()


@pytest.fixture(params=[Agent, PtyAgent, FifoAgent])
def any_agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    """Return an agent on each kind of stream in turn."""
    agent: Agent = request.param()
    if isinstance(agent, PtyAgent):
        agent.plug_in()
    agent.start()
    yield agent
    agent.remove()


@pytest.fixture
def channel(agent: Agent) -> Iterator[Channel]:
    """Return a channel that has said hello to the agent."""
    channel = Channel(agent.connect)
    channel.hello(20)
    yield channel
    channel.close()


@pytest.fixture
def client(agent: Agent, channel: Channel) -> Iterator[Client]:
    """Return a client by hand, which has said hello."""
    del channel  # the agent listens by then
    client = Client(agent.connect())
    client.hello()
    yield client
    client.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalMachine]:
    """Return this machine as a machine without any capability, greeted."""
    machine = LocalMachine(tmp_path)
    machine.greet(20)
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def bare_template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    """Return the template of a bare kernel that has an empty disk of 64 MiB."""
    binary = host.which("qemu-system-x86_64")
    if binary is None or host.qemu_version(qemu.version(binary)) < (10,):
        pytest.skip("needs QEMU 10 or newer")
    directory = tmp_path_factory.mktemp("bare")
    disk = directory / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    cache = Cache(default_root())
    with (
        kernels.fetch("6.12", cache) as kernel,
        bare.machine(
            kernel,
            bare.Content(load=("virtio_blk",)),
            cache,
            workdir=directory,
            hardware=bare.Hardware(binary=binary),
        ) as machine,
        Templates(cache, binary=binary).booted(
            replace(machine.spec, disks=(qemu.Disk(path=disk, format="raw", serial="scratch"),)),
            identity=("64 MiB of nothing",),
            label="bare kernel for the harness's own tests",
        ) as template,
    ):
        yield template


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Return the other end of a channel, an agent that says what a test wants."""
    fake = Fake()
    yield fake
    fake.close()
