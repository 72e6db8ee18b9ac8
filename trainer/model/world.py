"""World: the ranks of one role, and the few things they do together. A role's world is its own, on its own port."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import HashStore

from asyncppo.waits import waiting

_DEFAULT_TIMEOUT_S = 7200.0


class World:
    """Ranks 0..size-1 of one role, one process per device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without them it is one
    process.

    Args:
        timeout_s: a rank that waits longer than this for another ends with an error.
    """

    def __init__(self, timeout_s: float = _DEFAULT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        if not cuda:
            os.environ["DS_ACCELERATOR"] = "cpu"
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "nccl" if cuda else "gloo"
            store = HashStore() if self.size == 1 else None  # one process needs no port
            timeout = timedelta(seconds=timeout_s)
            with waiting(f"the {self.size} ranks to meet", timeout_s):
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def share(self, arrays: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
        """Rank 0's arrays, on every rank. Nothing is pickled."""
        if self.size == 1:
            assert arrays is not None
            return dict(arrays)
        if self.rank == 0:
            assert arrays is not None
            file = io.BytesIO()
            np.savez(file, **arrays)  # type: ignore[arg-type]
            data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([data.numel() if self.rank == 0 else 0], dtype=torch.int64, device=self.device)
        with waiting("the other ranks" if self.rank == 0 else "what rank 0 has to share", self._timeout_s):
            dist.broadcast(length, 0)
            if self.rank != 0:
                data = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
            dist.broadcast(data, 0)
        if self.rank == 0:
            return dict(arrays or {})
        with np.load(io.BytesIO(data.cpu().numpy().tobytes()), allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}

    def share_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return str(self.share({"text": np.array(text)} if self.rank == 0 else None)["text"])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank, in place."""
        if self.size > 1:
            with waiting("all ranks to add up", self._timeout_s):
                dist.all_reduce(tensor)
        return tensor

    def agree(self, good: bool) -> bool:
        """Whether something is so on all ranks; the same answer on every rank."""
        return not float(self.sum(torch.tensor(float(not good), device=self.device)))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with waiting("all ranks to come to one place", self._timeout_s):
                dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
