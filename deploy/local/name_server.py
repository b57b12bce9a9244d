"""A name server that knows one name: what a headless Service is in a cluster.

``python -m deploy.local.name_server PORT NAME FILE SECONDS`` answers on 127.0.0.1, over UDP, that
NAME has the IPv4 addresses that are in FILE, one a line. As those of clusters do, it keeps what it
knows for some seconds.
"""

from __future__ import annotations

import math
import socket
import struct
import sys
import time
from pathlib import Path

_SECONDS = 1  # that an answer may be kept
_A, _IN = 1, 1


def answer(query: bytes, name: str, addresses: list[str]) -> bytes:
    """The answer to a DNS query: the addresses, none to what is not asked for A, or NXDOMAIN."""
    end = 12
    labels = []
    while query[end]:
        labels.append(query[end + 1 : end + 1 + query[end]].decode("ascii", "replace").lower())
        end += 1 + query[end]
    end += 1
    kind, _ = struct.unpack("!HH", query[end : end + 4])
    known = ".".join(labels) == name
    found = addresses if known and kind == _A else []
    head = query[:2] + struct.pack("!HHHHH", 0x8400 if known else 0x8403, 1, len(found), 0, 0)
    # 0xC00C points to the name in the question.
    records = b"".join(
        struct.pack("!HHHIH", 0xC00C, _A, _IN, _SECONDS, 4) + socket.inet_aton(address)
        for address in found
    )
    return head + query[12 : end + 4] + records


def main() -> None:
    """Answer until the process is ended."""
    port, name, file, seconds = sys.argv[1:]
    known: list[str] = []
    read = -math.inf
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", int(port)))
        while True:
            query, client = server.recvfrom(512)
            try:
                if time.monotonic() > read + float(seconds):
                    known, read = Path(file).read_text().split(), time.monotonic()
                server.sendto(answer(query, name, known), client)
            except (IndexError, struct.error):  # no query
                continue


if __name__ == "__main__":
    main()
