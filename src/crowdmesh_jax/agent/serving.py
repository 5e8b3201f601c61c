"""A process that is one device: joins a coordinator over gRPC and serves its runs."""

from __future__ import annotations

import logging

from ..errors import CrowdMeshError
from ..transport import GrpcTransport
from .appliance import CONNECT_DEADLINE_S, Appliance
from .copies import CopyLimits

logger = logging.getLogger(__name__)


async def serve(
    *,
    device: str,
    coordinator_address: str,
    listen: str,
    speed: float,
    token: str,
    stays: bool,
    limits: CopyLimits,
) -> int:
    """Serves until the coordinator is gone. Returns the process's exit status."""
    transport = GrpcTransport(device, run="crowd", token=token, address=listen)
    coordinator = "coordinator"
    try:
        address = await transport.start()
        await transport.connect(coordinator, coordinator_address, deadline_s=CONNECT_DEADLINE_S)
        agent = Appliance(
            transport,
            coordinator=coordinator,
            address=address,
            coordinator_address=coordinator_address,
            speed=speed,
            stays=stays,
            limits=limits,
        )
        await agent.say_hello()
        await agent.run()
    except CrowdMeshError as exc:
        logger.error("%s", exc)
        return 1
    finally:
        await transport.close()
    return 0
