"""Read request heads off a connection, one after the other, within a time limit. D5"""

from __future__ import annotations

import asyncio

from sandbox.egress.request import RequestHead, find_head_end, parse_head
from sandbox.egress.streams import Stream
from sandbox.egress.tunnel import CHUNK_BYTES
from sandbox.policy.hosts import Refusal


async def read_head(
    stream: Stream, pending: bytearray, seconds: float, *, idle_seconds: float | None = None
) -> RequestHead | Refusal | None:
    """Return the next head, a refusal, or None when the client closed between requests.

    ``pending`` holds what was read and not used; what follows the head stays in it. With ``idle_seconds``
    the head's first byte may take that long, and ``seconds`` begin with it.
    """
    try:
        if idle_seconds is not None and not pending:
            async with asyncio.timeout(idle_seconds):
                pending += await stream.receive(CHUNK_BYTES)
            if not pending:
                return None
        async with asyncio.timeout(seconds):
            while (end := find_head_end(pending)) is None:
                data = await stream.receive(CHUNK_BYTES)
                if not data:
                    return Refusal("bad_request", "the request head is cut short") if pending else None
                pending += data
    except TimeoutError:
        return Refusal("timeout", "no complete request head arrived in time")
    if isinstance(end, Refusal):
        return end
    raw = bytes(pending[:end])
    del pending[:end]
    return parse_head(raw)
