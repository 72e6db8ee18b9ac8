"""What runs as the SGLang child: `python -m rollout_server.sglang_process <arguments of sglang.launch_server>`.

The only importer of sglang. SGLang starts its scheduler and detokenizer with `spawn`, which imports this module again
in each of them, so what has to happen before `import sglang` stands at module level. `sglang_engine` sets for it:

    ASYNCPPO_ENGINE_KEY        the API key; it stays off the command line, and out of the children's environment
    ASYNCPPO_ENGINE_PARENT     the process to die with
    SGLANG_USE_CPU_ENGINE=1    on a CPU: then the two shims below are put in place
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import types
from typing import Any

from asyncppo.lifetime import die_with_parent


def _missing(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not available on a CPU")

    return call


class _NoKernels(types.ModuleType):
    """`sgl_kernel` has no CPU build; only speculative decoding and KV defragmentation call it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(name)


def install_cpu_shims() -> object:
    """Make sglang importable without a GPU; the result must be kept alive.

    torchvision's wheel is a CUDA build whose operators do not load: with these two schemas it imports all the same.
    """
    torch: Any = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["sgl_kernel"] = _NoKernels("sgl_kernel")
    return library


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    _SHIMS = install_cpu_shims()


def keep_out_of_logs(secret: str) -> None:
    """SGLang logs all its arguments, the API key among them."""
    make = logging.getLogRecordFactory()

    def make_without_secret(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if secret in str(record.msg):
            record.msg = str(record.msg).replace(secret, "(hidden)")
        return record

    logging.setLogRecordFactory(make_without_secret)


def main() -> None:
    """Serve until killed."""
    parent = os.environ.pop("ASYNCPPO_ENGINE_PARENT", None)
    if parent is not None:  # SGLang asks the same of the kernel for its own children
        die_with_parent(int(parent), signal.SIGKILL)
    key = os.environ.pop("ASYNCPPO_ENGINE_KEY", None)
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    arguments = sys.argv[1:]
    if key:
        keep_out_of_logs(key)
        arguments += ["--api-key", key]
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
