"""What a copy of some bytes takes at least: the bound that a swap is held to."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from pathlib import Path

_CHUNK = 4 << 20
_LOOPBACK_BYTES = 256 << 20
_TIMES = 5
_TIMEOUT_S = 60.0


def copy_bandwidth(directory: Path) -> float:
    """Bytes a second of reading published files from the page cache into memory; the median of some times."""
    files = [path for path in directory.iterdir() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in files)
    buffer = bytearray(max(path.stat().st_size for path in files))
    rates = []
    for _ in range(_TIMES + 1):  # the first one brings them into the cache
        started = time.perf_counter()
        for path in files:
            with path.open("rb", buffering=0) as file:
                view = memoryview(buffer)
                while (read := file.readinto(view)) and len(view) > read:
                    view = view[read:]
        rates.append(size / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def loopback_bandwidth() -> float:
    """Bytes a second over one TCP connection of this host, one thread at each end."""
    chunk = bytes(_CHUNK)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname(), _TIMEOUT_S) as sender:
                for _ in range(_LOOPBACK_BYTES // _CHUNK):
                    sender.sendall(chunk)

        thread = threading.Thread(target=send, name="loopback", daemon=True)
        thread.start()
        server.settimeout(_TIMEOUT_S)
        receiver, _ = server.accept()
        with receiver:
            receiver.settimeout(_TIMEOUT_S)
            buffer = bytearray(_CHUNK)
            started, received = time.perf_counter(), 0
            while received < _LOOPBACK_BYTES and (read := receiver.recv_into(buffer)):
                received += read
            took = time.perf_counter() - started
        thread.join(_TIMEOUT_S)
    return received / took
