"""Starts agent processes on this machine and makes sure none outlives us.

Each agent is `python -m crowdmesh_jax.agent`, never a fork. It holds the read end of a pipe whose
write end only the parent has: when the parent dies in whatever way, the pipe ends and the agent
exits. The token travels in the environment, not in the arguments that every user can list.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..agent.memory import ENVIRONMENT
from ..core import Device
from ..errors import LaunchError
from .emulation import Emulation

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "CROWDMESH_TOKEN"
AGENT_COMMAND = (sys.executable, "-m", "crowdmesh_jax.agent")


@dataclass
class AgentProcess:
    """One child, its log, and the pipe that ties its life to ours."""

    device: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def log_tail(self, lines: int = 8) -> str:
        """The last lines that the agent wrote, for an error message."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])

    def exit_text(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "still running"
        return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"


@dataclass
class Fleet:
    """Agent processes of one crowd on this machine."""

    command: tuple[str, ...] = AGENT_COMMAND
    """What starts an agent; its arguments follow."""
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    agents: dict[str, AgentProcess] = field(default_factory=dict)
    _start: Callable[[Device, str], None] | None = field(default=None, repr=False)

    def spawn(
        self,
        emulation: Emulation,
        coordinator_address: str,
        log_dir: Path,
        cache_dir: Path | None,
    ) -> None:
        """Starts one agent per device of the crowd.

        Raises:
            LaunchError: A process could not be started.
        """
        log_dir.mkdir(parents=True, exist_ok=True)

        def start(device: Device, mode: str) -> None:
            self._launch(device, emulation, coordinator_address, log_dir, cache_dir, mode)

        self._start = start
        try:
            for device in emulation.crowd.devices:
                start(device, "wb")
        except LaunchError:
            self.stop(grace_s=0.5)
            raise

    def relaunch(self, device: Device) -> None:
        """Starts a new process for a device whose process has ended; its log goes on.

        Raises:
            LaunchError: The process could not be started; the others go on.
        """
        assert self._start is not None, "spawned before"
        before = self.agents[device.id].process
        if before.stdin is not None:
            before.stdin.close()
        self._start(device, "ab")

    def _launch(
        self,
        device: Device,
        emulation: Emulation,
        coordinator_address: str,
        log_dir: Path,
        cache_dir: Path | None,
        mode: str,
    ) -> None:
        environment = dict(os.environ)
        environment[TOKEN_VARIABLE] = self.token
        environment["JAX_PLATFORMS"] = "cpu"
        # One core per emulated device: XLA sizes its thread pool by this, before jax loads.
        environment["NPROC"] = "1"
        environment = {**ENVIRONMENT, **environment}  # who sets it otherwise has reasons
        if cache_dir is None:
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        else:
            # A folder per device: two processes never write the same entry at once.
            environment["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir / device.id)
        command = [*self.command, "--device", device.id, "--coordinator", coordinator_address]
        command += ["--speed", repr(device.speed), "--watch-stdin"]
        if device.id in emulation.cores:
            command += ["--core", str(emulation.cores[device.id])]
        log_path = log_dir / f"{device.id}.log"
        try:
            with log_path.open(mode) as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # Ctrl-C in the terminal goes to the parent alone, which stops the agents.
                    start_new_session=True,
                )
        except OSError as exc:
            raise LaunchError(f"agent {device.id!r} could not be started: {exc}") from exc
        self.agents[device.id] = AgentProcess(device.id, process, log_path)
        logger.debug("started agent %s, pid %d", device.id, process.pid)

    def dead(self) -> list[AgentProcess]:
        """Agents whose process has ended."""
        return [agent for agent in self.agents.values() if agent.process.poll() is not None]

    def stop(self, *, grace_s: float = 3.0) -> None:
        """Ends all agents: closes their pipes, then after `grace_s` kills what is left."""
        for agent in self.agents.values():
            if agent.process.stdin is not None and not agent.process.stdin.closed:
                agent.process.stdin.close()
        deadline_s = time.monotonic() + grace_s
        for agent in self.agents.values():
            try:
                agent.process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("agent %s did not stop in %.1f s: killing it", agent.device, grace_s)
                agent.process.kill()
                agent.process.wait(timeout=5.0)
        self.agents.clear()
