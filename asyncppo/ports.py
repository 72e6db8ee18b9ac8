"""Loopback: which addresses are, and choosing a port for a process that is about to start."""

from __future__ import annotations

import ipaddress
import random
import socket
from urllib.parse import urlsplit

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


def is_loopback(address: str) -> bool:
    """Whether only this host can reach an address such as `tcp://127.0.0.1:5757`."""
    host = ""
    try:
        host = urlsplit(address).hostname or ""
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
