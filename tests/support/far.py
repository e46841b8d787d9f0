"""A long line on one host: what goes through it comes later."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def far(port: int, one_way_s: float) -> Iterator[int]:
    """A port of this host that is `one_way_s` seconds away from another one.

    The connection to it stands at once, and what is said on it takes its time: to whoever connects, the round trip is
    that of the first answer.
    """
    loop = asyncio.new_event_loop()
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def deliver(data: bytes) -> None:
            if data:
                writer.write(data)
            else:
                writer.close()

        data = b"?"
        while data:
            with contextlib.suppress(OSError):
                data = await reader.read(1 << 16)
                loop.call_later(one_way_s, deliver, data)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, there_writer))
        await asyncio.gather(carry(reader, there_writer), carry(there_reader, writer))

    server = loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, name="far", daemon=True)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        for writer in writers:
            writer.transport.abort()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
