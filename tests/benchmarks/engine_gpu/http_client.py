"""A client of the HTTP server that costs little, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time


def main() -> None:
    """Stream what is asked for on a line of the input, all at once, and say how long it took. Little but sockets."""
    port = int(sys.argv[1])

    async def stream(body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        parts = []
        while part := await reader.read(1 << 16):
            parts.append(part)
        writer.close()
        return b"".join(parts)

    async def all_of(bodies: list[bytes]) -> tuple[list[bytes], float]:
        start = time.perf_counter()
        answers = await asyncio.gather(*map(stream, bodies))
        return list(answers), time.perf_counter() - start

    for line in sys.stdin:
        answers, seconds = asyncio.run(all_of([json.dumps(body).encode() for body in json.loads(line)]))
        ends = [answer.decode().rsplit("data: {", 1)[-1] for answer in answers]  # the event that tells the usage
        tokens = [json.loads("{" + end.split("\n", 1)[0])["usage"]["completion_tokens"] for end in ends]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
