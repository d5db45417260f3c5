"""Bodies of requests as they arrive, within a length and at a pace.

A client that stands still, or lets a byte through now and then, would hold what its request holds: one of the few places for
frames in memory, or the place of the one key file that is being received. So every body has two limits (`Pace`), in seconds
that the server waited for the client; what the server does in between does not count. The slowest uplink that keeps the default
pace, 64 KiB/s or half a Mbit/s, carries 4.3 GB of keys in 18 hours: there is no limit on the time as a whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from . import wire
from .base import WireError


class SlowError(WireError):
    """A body arrives too slowly. Nothing of it is kept."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How slowly a body may arrive.

    idle_s       longest wait for the next bytes
    bytes_per_s  of all bytes so far over all waits so far, from `idle_s` seconds of waiting on
    """

    idle_s: float = 30.0
    bytes_per_s: float = 64 << 10


async def read(stream: AsyncIterator[bytes], stated: str, most: int, pace: Pace) -> bytes:
    """A body of at most `most` bytes: first what it says of itself, then what it is.

    Args:
        stated: the header content-length, "0" where there is none.

    Raises:
        WireError: it is longer, slower than `pace`, or ends early.
    """
    wire.check_length(int(stated) if stated.isdecimal() and len(stated) < 20 else most + 1, most)
    data = bytearray()
    async for chunk in chunks(stream, pace):
        wire.check_length(len(data) + len(chunk), most)
        data += chunk
    return bytes(data)


async def chunks(stream: AsyncIterator[bytes], pace: Pace) -> AsyncIterator[bytes]:
    """A body as it arrives.

    Raises:
        SlowError: it stands still, or falls behind the pace; the message names the limit.
        WireError: the client went away in the middle.
    """
    waited, size = 0.0, 0
    while True:
        left = pace.idle_s + size / pace.bytes_per_s - waited
        start = time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(stream), min(left, pace.idle_s))
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            waited += time.monotonic() - start
            if left >= pace.idle_s:
                raise SlowError(
                    f"the body stood still for {pace.idle_s:g} s after {size} bytes, no pause may be longer; send it again"
                ) from error
            raise SlowError(
                f"{size} bytes of the body took {waited:.0f} s; after {pace.idle_s:g} s there must be "
                f"{pace.bytes_per_s / 1000:.3g} kB a second: send it again over a faster connection"
            ) from error
        except Exception as error:
            raise WireError(f"the body ended early: {type(error).__name__}") from error
        waited += time.monotonic() - start
        size += len(chunk)
        yield chunk
