"""Choosing a loopback port for a process that is about to start."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to outgoing connections (32768 and up): one of those may be taken by anybody between
# our choice and the bind, which is half a minute later where SGLang imports in between (seen: address already in use).
_RANGE = range(20_000, 32_000)


def free_port() -> int:
    """A loopback TCP port that nobody listens on now."""
    while True:
        port = random.choice(_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
