"""`python -m crowdmesh_jax.agent`: an agent process. Sets the machine up before JAX is imported."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from pathlib import Path


def _die_with_parent() -> None:
    """Exits when the launcher's end of our standard input closes, however it died."""

    def watch() -> None:
        try:
            while sys.stdin.buffer.read(4096):
                pass
        finally:
            os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """Runs an agent until its coordinator releases it or its launcher is gone."""
    parser = argparse.ArgumentParser(
        prog="python -m crowdmesh_jax.agent",
        description="Joins a coordinator and runs the stage it is given. Any model: programs and"
        " parameters arrive over the wire. Until TLS exists it uses the loopback only. The token"
        " is read from CROWDMESH_TOKEN.",
    )
    parser.add_argument("--device", required=True, help="this device's id in the crowd")
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--speed", type=float, default=1.0, help="emulated speed, 1: real")
    parser.add_argument("--core", type=int, help="pin the process to this core")
    parser.add_argument(
        "--copies-mb", type=float, default=1024.0, help="memory for copies kept for others"
    )
    parser.add_argument("--copies-dir", type=Path, help="a folder for those that do not fit there")
    parser.add_argument("--copies-dir-mb", type=float, default=4096.0, help="and its limit")
    parser.add_argument("--watch-stdin", action="store_true", help="exit when stdin closes")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(),
        format=f"%(asctime)s {arguments.device} %(levelname)s %(name)s: %(message)s",
    )
    if arguments.watch_stdin:
        _die_with_parent()
    if not 0 < arguments.speed <= 1:
        parser.error(f"--speed must lie in (0, 1], got {arguments.speed}")
    if arguments.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.core})

    import jax

    # Ops must run on the thread that calls them: that is the thread whose CPU time is taken.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    import asyncio

    from .copies import CopyLimits
    from .memory import return_freed_memory
    from .serving import serve

    return_freed_memory()

    return asyncio.run(
        serve(
            device=arguments.device,
            coordinator_address=arguments.coordinator,
            listen=arguments.listen,
            speed=arguments.speed,
            token=os.environ.get("CROWDMESH_TOKEN", ""),
            stays=not arguments.watch_stdin,
            limits=CopyLimits(
                memory_bytes=int(arguments.copies_mb * 2**20),
                disk_bytes=int(arguments.copies_dir_mb * 2**20),
                folder=arguments.copies_dir,
            ),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
