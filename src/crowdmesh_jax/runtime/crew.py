"""Agents that a coordinator can give stages to: launched here, reused by run after run.

Owns the event loop's thread, the coordinator's transport and the child processes. Synchronous
calls work inside a notebook's running loop, since the loop here is another thread's. Frames go to
the one run that is on; what arrives between runs is dropped, but for who is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..agent.appliance import Appliance
from ..agent.envelope import unseal
from ..core import Crowd
from ..core.folders import cache_folder
from ..errors import AgentLostError, CrowdMeshError, InputError, LaunchError
from ..protocol import messages as msg
from ..transport import GrpcTransport, MemoryNetwork, PeerGone, Received, Transport
from .emulation import Emulation, emulate
from .launcher import AGENT_COMMAND, TOKEN_VARIABLE, Fleet

logger = logging.getLogger(__name__)

T = TypeVar("T")
TransportName = Literal["grpc", "memory"]
COORDINATOR = "coordinator"
LAUNCH_DEADLINE_S = 90.0
"""For all agents to import JAX and say hello; a slow board under load needs some of it."""
WATCH_S = 0.1
MOST_ASKED = 64
"""Requests for rows that are kept of a device while no run is on: more than it reads ahead."""
ENDING_S = 2.0
"""A process that was killed has so long to be gone, with all its threads."""


class Crew:
    """The agents of one crowd. Use `launch`, as a context manager.

    Attributes:
        crowd: With the speeds and rates that the agents really have.
        emulation: What the launcher made of the crowd's speeds.
    """

    def __init__(
        self,
        crowd: Crowd,
        *,
        transport: TransportName = "grpc",
        log_dir: str | Path | None = None,
        cache_dir: str | Path | Literal["default"] | None = "default",
        agent_command: Sequence[str] = AGENT_COMMAND,
        listen: str | None = None,
        token: str | None = None,
    ) -> None:
        if transport not in ("grpc", "memory"):
            raise InputError(f"transport must be 'grpc' or 'memory', got {transport!r}")
        self.transport_name: TransportName = transport
        self.emulation: Emulation = emulate(crowd)
        self._listen, self._token = listen, token
        if self.is_joined:  # devices have the pace that they have
            self.emulation = Emulation(crowd=crowd, factor=1.0, cores={})
        if transport == "memory":
            # One process computes for all: no device has a pace of its own.
            self.emulation = Emulation(crowd=crowd, factor=1.0, cores={})
        self.crowd: Crowd = self.emulation.crowd
        self.hellos: dict[str, msg.Hello] = {}
        self.log_dir = Path(log_dir) if log_dir is not None else None
        """Where the agents' logs go; read when they start."""
        self._cache_dir = cache_folder("compiled") if cache_dir == "default" else cache_dir
        self._fleet = Fleet(command=tuple(agent_command))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crew", daemon=True)
        self._transport: Transport | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: Callable[[Received | PeerGone], None] | None = None
        self._asked: dict[str, list[Received]] = {}
        """Rows that agents asked for since their Hello, while there was no run to answer."""
        self._hello_changed: asyncio.Event | None = None
        self._reported_dead: set[str] = set()
        self._closed = False

    # Life ----------------------------------------------------------------------------------------

    def __enter__(self) -> Crew:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def is_joined(self) -> bool:
        """Whether agents were started elsewhere, and live on when this process ends."""
        return self._listen is not None

    def start(self) -> None:
        """Starts the agents and waits until each has said hello; who joins is waited for by a run.

        Raises:
            LaunchError: One died or said nothing in time; carries the end of its log.
        """
        self.spawn()
        if not self.is_joined:
            self.await_hellos()

    def spawn(self) -> None:
        """Starts the agents and returns, so that there is time for other things meanwhile.

        Raises:
            LaunchError: A process could not be started.
        """
        self._thread.start()
        with self._closing_on_error():
            self.call(self._spawn())

    def await_hellos(self) -> None:
        """Waits until each agent that `spawn` started has said hello.

        Raises:
            LaunchError: One died or said nothing in time; carries the end of its log.
        """
        with self._closing_on_error():
            self.call(self._await_hellos())

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    async def _spawn(self) -> None:
        self._hello_changed = asyncio.Event()
        if self.transport_name == "memory":
            await self._start_in_process()
        else:
            await self._start_processes()

    async def _start_processes(self) -> None:
        transport = GrpcTransport(
            COORDINATOR,
            run="crowd",
            token=self._token or self._fleet.token,
            address=self._listen or "127.0.0.1:0",
        )
        self._transport = transport
        address = await transport.start()
        self._run_task(self._receive(transport), "receive")
        if self.is_joined:
            return
        log_dir = self.log_dir or Path(tempfile.mkdtemp(prefix="crowdmesh-logs-"))
        cache_dir = Path(self._cache_dir) if self._cache_dir is not None else None
        self._fleet.spawn(self.emulation, address, log_dir, cache_dir)
        self._run_task(self._watch(), "watch")

    async def _start_in_process(self) -> None:
        network = MemoryNetwork()
        self._transport = network.transport(COORDINATOR)
        coordinator_address = await self._transport.start()
        self._run_task(self._receive(self._transport), "receive")
        for device in self.crowd.devices:
            inner = network.transport(device.id)
            address = await inner.start()
            await inner.connect(COORDINATOR, coordinator_address, deadline_s=5.0)
            agent = Appliance(inner, coordinator=COORDINATOR, address=address)
            self._run_task(agent.run(), f"agent {device.id}")
            await agent.say_hello()

    async def _await_hellos(self) -> None:
        assert self._hello_changed is not None
        started_s = time.monotonic()
        missing = self.missing
        while missing:
            self._hello_changed.clear()
            for agent in self._fleet.dead():
                raise LaunchError(
                    f"agent {agent.device!r} {agent.exit_text()} before it joined; its log"
                    f" ({agent.log_path}) ends with\n{agent.log_tail()}"
                )
            waited_s = time.monotonic() - started_s
            if waited_s > LAUNCH_DEADLINE_S:
                names = ", ".join(sorted(missing))
                raise LaunchError(
                    f"waited {waited_s:.0f} s for {names} to say hello; is the machine overloaded?"
                    " Use fewer devices, or look into the agents' logs"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._hello_changed.wait()
            missing = self.missing

    @property
    def missing(self) -> set[str]:
        """Devices whose present process has not said hello."""
        named = {str(device.id) for device in self.crowd.devices}
        return named - set(self.hellos) | (self._reported_dead & named)

    def relaunch(self, device: str) -> None:
        """Starts a new process for a device whose process has ended, also during a run, which it
        joins as a newcomer. Returns at once; `await_hellos` waits until it is there.

        Raises:
            InputError: No process was launched here for it, or it still runs.
            LaunchError: The process could not be started.
        """
        if device not in self._fleet.agents:
            raise InputError(f"agent {device!r} was not launched as a process from here")
        self.call(self._relaunch(device))

    async def _relaunch(self, device: str) -> None:
        value = self.crowd.device(device)
        before = self._fleet.agents[device]
        until_s = time.monotonic() + ENDING_S
        while before.process.poll() is None:
            if time.monotonic() < until_s:
                await asyncio.sleep(WATCH_S)
                continue
            raise InputError(
                f"agent {device!r} still runs (pid {before.process.pid}): end it before it is"
                " relaunched"
            )
        self._tell_dead(device, before.exit_text())  # before its successor is heard
        self._fleet.relaunch(value)

    def close(self) -> None:
        """Ends agents, transport and loop. Idempotent; leaves no process behind."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._thread.is_alive():
                with contextlib.suppress(Exception):
                    asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10.0)
        finally:
            self._fleet.stop()
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(5.0)
            if not self._thread.is_alive():
                self._loop.close()  # one that never ran, too

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._transport is not None:
            await self._transport.close()

    # For runs ------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        assert self._transport is not None, "the crew has started"
        return self._transport

    @property
    def pids(self) -> dict[str, int]:
        """Process id of each launched agent; empty in process."""
        return {name: agent.process.pid for name, agent in self._fleet.agents.items()}

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the crew's loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def begin(self, work: Coroutine[Any, Any, T]) -> Any:
        """Starts a coroutine on the crew's loop; returns its `concurrent.futures.Future`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def soon(self, call: Callable[[], Any]) -> None:
        """Runs a callable on the crew's loop."""
        self._loop.call_soon_threadsafe(call)

    @contextlib.contextmanager
    def listen(self, listener: Callable[[Received | PeerGone], None]) -> Any:
        """Gives everything that arrives to one run. Called on the loop."""
        if self._listener is not None:
            raise InputError("these agents are busy with another run; wait for it, or launch more")
        self._listener = listener
        try:
            # Only the loop's thread may tell of the dead from now on.
            for device in self._reported_dead:
                listener(PeerGone(device, self._death(device)))
            yield
        finally:
            self._listener = None

    def take_asked(self) -> list[Received]:
        """Rows that were asked for before a run listened: agents that outlived their coordinator
        ask the next one as soon as they reach it. Called on the loop."""
        asked, self._asked = self._asked, {}
        return [item for items in asked.values() for item in items]

    @property
    def is_started(self) -> bool:
        """Whether its agents were started."""
        return self._transport is not None

    def check_alive(self, devices: Iterable[str] | None = None) -> None:
        """Refuses to start a run on a crew that has lost someone it needs.

        Args:
            devices: Those of the plan; None: all.

        Raises:
            AgentLostError: Names the first one, and how its process ended.
        """
        needed = None if devices is None else {str(device) for device in devices}
        for agent in self._fleet.dead():
            if needed is not None and agent.device not in needed:
                continue
            raise AgentLostError(
                f"agent {agent.device!r} {agent.exit_text()}; launch the crowd again"
            )

    # Inside --------------------------------------------------------------------------------------

    def _run_task(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s failed", task.get_name(), exc_info=task.exception())

    async def _receive(self, transport: Transport) -> None:
        while True:
            item = await transport.receive()
            if isinstance(item, PeerGone):
                await self._lost(item)
                continue
            if item.frame.message.get("message", {}).get("kind") == msg.Hello.__name__:
                self._take_hello(item)
            if item.peer not in self.hellos:
                continue
            if self._listener is not None:
                self._listener(item)
            elif "ask_rows" in item.frame.message.get("extra", {}):
                asked = [*self._asked.get(item.peer, ()), item]
                self._asked[item.peer] = asked[-MOST_ASKED:]

    def _take_hello(self, item: Received) -> None:
        """A device is here, or here again: as another process, or after its channel broke."""
        try:
            message = unseal(item.frame).message
        except CrowdMeshError as exc:
            logger.error("a frame from %s was refused: %s", item.peer, exc)
            return
        assert isinstance(message, msg.Hello)
        assert self._hello_changed is not None
        self.hellos[item.peer] = message
        self._asked.pop(item.peer, None)  # it asks again behind its Hello
        self._reported_dead.discard(item.peer)
        self._hello_changed.set()

    async def _lost(self, gone: PeerGone) -> None:
        if gone.peer in self._reported_dead:
            return  # another process may stand for it by now
        # The socket ends a moment before the process can be waited for, which knows the signal.
        agent = self._fleet.agents.get(gone.peer)
        for _ in range(5):
            if agent is None or agent.process.poll() is not None:
                break
            await asyncio.sleep(WATCH_S)
        self._tell_dead(gone.peer, gone.reason)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for agent in self._fleet.dead():
                self._tell_dead(agent.device, agent.exit_text())

    def _tell_dead(self, device: str, reason: str) -> None:
        if device in self._reported_dead:
            return
        self._reported_dead.add(device)
        if self._listener is not None:
            self._listener(PeerGone(device, self._death(device, reason)))

    def _death(self, device: str, reason: str = "its channel ended") -> str:
        agent = self._fleet.agents.get(device)
        if agent is None or agent.process.poll() is None:
            return reason
        return f"its process was {agent.exit_text()}".replace("was exited", "exited")


def connect(crowd: Crowd, *, listen: str = "127.0.0.1:5151", token: str | None = None) -> Crew:
    """Agents that were started elsewhere and join here; a context manager.

    Each was started as `python -m crowdmesh_jax.agent --device ID --coordinator ADDRESS`, with the
    same CROWDMESH_TOKEN. They live on when this process ends, however it ends: the same script,
    started again with `resume=`, takes up a run with `recovery` where it is.

    Args:
        crowd: Who may join, with what is known of them.
        listen: Where agents reach this process; until TLS exists, on this machine only.
        token: The secret that they share; by default that of the environment.

    Raises:
        InputError: There is no token.
        AddressError: (on entering) the address is taken, or not of this machine.
    """
    token = token or os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise InputError(
            f"connect needs the token that the agents were started with: set {TOKEN_VARIABLE}, or"
            " give token="
        )
    return Crew(crowd, listen=listen, token=token)


def launch(
    crowd: Crowd,
    *,
    transport: TransportName = "grpc",
    log_dir: str | Path | None = None,
    cache_dir: str | Path | Literal["default"] | None = "default",
    agent_command: Sequence[str] = AGENT_COMMAND,
) -> Crew:
    """Agents for a crowd on this machine, one process per device; a context manager.

    Speeds are emulated (`docs/emulation.md`): all are scaled by one factor so that they fit the
    cores. Links slower than the loopback are emulated too. Each agent dies with this process.

    Args:
        transport: "grpc": processes; "memory": threads of this process, without emulation.
        log_dir: Where the agents' logs go; a temporary folder by default.
        cache_dir: Where compiled programs are kept between runs; None: nowhere.
        agent_command: What starts an agent (a wrapper, a container); its arguments follow.

    Raises:
        LaunchError: (on entering) an agent did not come up.
    """
    return Crew(
        crowd,
        transport=transport,
        log_dir=log_dir,
        cache_dir=cache_dir,
        agent_command=agent_command,
    )
