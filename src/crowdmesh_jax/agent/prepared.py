"""Stages that this device may have to take over: programs and rows that came ahead, compiled.

What an Install would bring beside the state. A stage that was installed once is prepared from then
on. It knows nothing of who takes over what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..execution import warm_up
from ..programs import ProgramCache, bundle_from_arrays, load_stage
from .envelope import Envelope, Key

logger = logging.getLogger(__name__)

LOW_PRIORITY = 10
"""Of the thread that compiles ahead: training goes on meanwhile."""
SHIPPED = ("program", "data", "eval_data")
"""Roles of the arrays that stay the same at each version."""
SHIPPED_EXTRAS = ("manifest", "data", "eval_data")


def is_preparation(extra: Mapping[str, Any]) -> bool:
    """Whether a frame brings a stage ahead."""
    return isinstance(extra.get("prepare"), str)


class PreparedStages:
    """Arrays and extras of stages, by the coordinator's name for them."""

    def __init__(self, programs: ProgramCache) -> None:
        self._programs = programs
        self._stages: dict[str, tuple[Mapping[Key, Any], Mapping[str, Any]]] = {}
        # A thread of its own: it stays at its low priority, which only root could raise again.
        self._thread = ThreadPoolExecutor(1, "compile ahead", initializer=_lower_priority)

    async def prepare(self, envelope: Envelope) -> dict[str, Any]:
        """Takes a stage ahead and compiles it. What there is to tell: `prepared` (its name) or
        `unprepared` with an error; no run ends for it, not even where the compiler has no memory.
        """
        name = envelope.extra["prepare"]
        arrays = dict(envelope.groups[0]) if envelope.groups else {}
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._compile, arrays, envelope.extra)
        except Exception as exc:
            logger.warning("a stage was not made ready ahead", exc_info=exc)
            return {"unprepared": name, "error": f"{type(exc).__name__}: {exc}"}
        self._stages[name] = arrays, dict(envelope.extra)
        return {"prepared": name}

    def _compile(self, arrays: Mapping[Key, Any], extra: Mapping[str, Any]) -> None:
        packed = {key[1]: value for key, value in arrays.items() if key[0] == "program"}
        bundle = bundle_from_arrays(str(extra.get("manifest")), packed)
        loaded = load_stage(bundle, cache=self._programs)
        loaded.compile(leave_out=() if extra.get("evaluates") else ("eval_forward",))
        warm_up(bundle.manifest)

    def find(self, extra: Mapping[str, Any]) -> tuple[Mapping[Key, Any], Mapping[str, Any]]:
        """What is here of the stage that an Install's extra names; nothing if it never came."""
        return self._stages.get(str(extra.get("kit")), ({}, {}))

    def remember(self, arrays: Mapping[Key, Any], extra: Mapping[str, Any]) -> None:
        """An installed stage need not come again."""
        kept = {key: value for key, value in arrays.items() if key[0] in SHIPPED}
        extras = {name: extra[name] for name in SHIPPED_EXTRAS if name in extra}
        self._stages[str(extra.get("kit"))] = kept, extras

    def clear(self) -> None:
        self._stages.clear()

    def close(self) -> None:
        """Ends the thread; what it compiles is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _lower_priority() -> None:
    with contextlib.suppress(AttributeError, OSError):  # not everywhere is it a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
