"""SGLang behind the `Engine` protocol: a child that this process starts and watches, or a server that runs already.

Everything goes over SGLang's HTTP interface on loopback; every reply's body is read, not only its status. What runs
inside the child is `sglang_process`, the only importer of sglang.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
import msgspec
import numpy as np
import psutil

from asyncppo.config import Config, RolloutConfig, SamplingConfig
from asyncppo.errors import ConfigError, EngineError
from asyncppo.messages import Float32, GroupMember, Int32
from asyncppo.ports import free_port
from asyncppo.waits import waiting
from rollout_server.engine import UNLOADED, Broadcast, Response

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("rollout_server.sglang")

KEY_VARIABLE = "ASYNCPPO_ENGINE_KEY"
"""The API key, to a child or of a server that runs already: in the environment, never on a command line or in a log."""

_OURS = frozenset({"api_key", "host", "model_path", "port", "tensor_parallel_size", "tp", "tp_size", "weight_version"})
_TERM_S = 3.0
_KILL_S = 5.0
_HEALTH_S = 60.0
"""A busy SGLang may be slow to say how it is; one that is gone refuses the connection at once."""
_POLL_S = 0.25
_SOON_S = 0.05
"""Between two looks at something that holds up a swap."""
_CONNECT_S = 5.0
"""A trainer that broadcasts accepts a connection within this time."""
_LEAST_S = 1e-3
"""Where a deadline has passed: aiohttp takes 0 s, and less, as no limit."""
_KNOWS_PRIORITIES = ("fcfs", "lof")
"""SGLang's schedule policies that go with priorities; it does not start with another one and them."""
_LOG_LINES = 15


# --- what comes back -------------------------------------------------------------------------------------------------


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any]
    output_token_logprobs: list[tuple[float, int, Any]] = []
    weight_versions: list[_Span] = []


class _Reply(msgspec.Struct):
    text: str
    output_ids: list[int]
    meta_info: _Meta


class _ScoreMeta(msgspec.Struct):
    input_token_logprobs: list[tuple[float | None, int, Any]]


class _Score(msgspec.Struct):
    meta_info: _ScoreMeta


class _Outcome(msgspec.Struct):
    success: bool | None = None
    status: str | None = None
    message: str = ""


class _ModelInfo(msgspec.Struct):
    weight_version: str


class _ServerInfo(msgspec.Struct):
    tp_size: int


class _Refused(EngineError):
    """SGLang answered, and what it said was no."""


_REPLIES = msgspec.json.Decoder(list[_Reply])


def response_of(reply: _Reply, max_response_tokens: int) -> Response:
    """A checked Response.

    Raises:
        EngineError: ids, log-probs, versions and finish reason do not fit together.
    """
    ids, meta = reply.output_ids, reply.meta_info
    reason = meta.finish_reason.get("type")
    if reason not in ("stop", "length"):
        raise EngineError(f"SGLang ended a response with {meta.finish_reason}, expected stop or length")
    if not 1 <= len(ids) <= max_response_tokens:
        raise EngineError(f"SGLang gave {len(ids)} tokens, expected 1 to {max_response_tokens}")
    if [token for _, token, _ in meta.output_token_logprobs] != ids:
        raise EngineError(
            f"SGLang gave log-probs of {len(meta.output_token_logprobs)} tokens that are not the {len(ids)} it returned"
        )
    spans, end = [], 0
    for span in meta.weight_versions:
        if span.start != end or span.end <= span.start or not span.version.lstrip("-").isdecimal():
            raise EngineError(f"SGLang's weight versions do not partition {len(ids)} tokens: {meta.weight_versions}")
        spans.append((int(span.version), span.end - span.start))
        end = span.end
    if end != len(ids):
        raise EngineError(f"SGLang's weight versions cover {end} of {len(ids)} tokens")
    return Response(
        ids=np.array(ids, np.int32),
        logprobs=np.array([logprob for logprob, _, _ in meta.output_token_logprobs], np.float32),
        spans=spans,
        truncated=reason == "length",
        text=reply.text,
    )


# --- the child -------------------------------------------------------------------------------------------------------


def pick_device(wanted: str) -> str:
    """`auto` is cuda where the driver's device files are and none says otherwise."""
    if wanted != "auto":
        return wanted
    present = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
    return "cuda" if present and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"


def child_arguments(config: Config, model: str, device: str, port: int) -> list[str]:
    """Command line of the child, `rollout.engine_args` last so that they win.

    Raises:
        ConfigError: `rollout.engine_args` has an argument that the rollout server sets.
    """
    rollout = config.rollout
    theirs = {key.replace("-", "_"): value for key, value in rollout.engine_args.items()}
    ours = _OURS & theirs.keys()
    if ours:
        raise ConfigError(f"rollout.engine_args.{min(ours)}: the rollout server sets this itself; leave it out")
    settings: dict[str, str | int | float | bool] = {
        "model_path": model,
        "host": "127.0.0.1",
        "port": port,
        "device": device,
        "dtype": rollout.dtype,
        "tp_size": rollout.tensor_parallel,
        "weight_version": UNLOADED,
        # for `score`, which would wait behind all that a swap has retracted
        "enable_priority_scheduling": theirs.get("schedule_policy", "fcfs") in _KNOWS_PRIORITIES,
        "log_level_http": "warning",
    }
    if device == "cpu":
        longest = config.data.max_prompt_tokens + config.sampling.max_response_tokens
        settings |= {
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "mem_fraction_static": 0.05,
            "max_total_tokens": rollout.max_groups * config.sampling.group_size * longest,
            "skip_server_warmup": True,
            "sleep_on_idle": True,  # else its scheduler keeps a core busy with waiting, which others here could use
        }
    settings |= theirs
    arguments = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not False:
            arguments.append(f"{flag}={value}")
    return arguments


def last_lines(path: Path, lines: int = _LOG_LINES) -> str:
    """The end of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(its log cannot be read: {error})"
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


async def end_process_tree(child: asyncio.subprocess.Process) -> None:
    """SIGTERM to a child that leads its own process group, then SIGKILL to whatever is left of it and its descendants.

    The event loop alone waits for the child itself: if psutil did, the loop would never learn that it has ended.
    """
    descendants: list[psutil.Process] = []
    try:
        if child.returncode is None:
            descendants = psutil.Process(child.pid).children(recursive=True)
            child.terminate()
            async with asyncio.timeout(_TERM_S):
                await child.wait()
    except psutil.NoSuchProcess:
        log.debug("process %d had just ended", child.pid)
    except TimeoutError:
        log.info("SGLang does not end on SIGTERM within %g s: killed", _TERM_S)
    with contextlib.suppress(ProcessLookupError):  # nothing is left: the rule
        os.killpg(child.pid, signal.SIGKILL)
    _, left = await asyncio.to_thread(psutil.wait_procs, descendants, timeout=_KILL_S)
    try:
        async with asyncio.timeout(_KILL_S):
            await child.wait()
    except TimeoutError:
        left = [*left, child]
    if left:
        log.error("SGLang's processes %s do not end", [process.pid for process in left])


# --- an answer that may come in parts --------------------------------------------------------------------------------


@dataclass
class _Answer:
    """One answer: in one part, or in several where swaps aborted and resubmitted it."""

    parts: list[Response] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """Of all parts."""
    ended: bool = False

    def is_whole(self, max_response_tokens: int) -> bool:
        return self.ended or len(self.ids) >= max_response_tokens

    def take(self, part: Response) -> None:
        """The last part."""
        self._add(part)
        self.ended = True

    def take_aborted(self, reply: _Reply) -> None:
        """A part without its last token, which may be an end-of-sequence that the abort hid: it is drawn again.

        An answer aborted while it waited in SGLang's queue comes without what belongs to it: that part is drawn again.
        """
        meta = reply.meta_info
        ids = reply.output_ids[:-1]
        spans = [_Span(span.version, span.start, min(span.end, len(ids))) for span in meta.weight_versions]
        spans = [span for span in spans if span.start < span.end]
        try:
            whole = _Meta({"type": "length"}, meta.output_token_logprobs[: len(ids)], spans)
            self._add(response_of(_Reply("", ids, whole), len(ids)))
        except EngineError as error:
            log.debug("an aborted part of %d tokens is drawn again: %s", len(ids), error)

    def _add(self, part: Response) -> None:
        self.parts.append(part)
        self.ids += part.ids.tolist()


# --- the engine ------------------------------------------------------------------------------------------------------


class SGLangEngine:
    """`Engine` on SGLang.

    A weight update that did not end well leaves it not `healthy`, and it refuses to `resume`: it may have half of it.

    Args:
        config: the run's config.
        model: directory (or hub name) of the weights to start with.
        log_file: where the child's output goes.
        engine_url: attach to an SGLang server that runs already, with the API key of ASYNCPPO_ENGINE_KEY if it has one.

    Raises:
        ConfigError: `rollout.engine_args` has an argument that the rollout server sets.
    """

    swap_mode: Literal["retract", "resubmit"] = "retract"
    self_tested = False

    def __init__(self, config: Config, model: str, log_file: Path, engine_url: str | None = None) -> None:
        self._config = config
        self._rollout: RolloutConfig = config.rollout
        self._model = model
        self._log_file = log_file
        self._attached = engine_url
        self._device = pick_device(config.rollout.device)
        child_arguments(config, model, self._device, 0)
        self._vocabulary = _vocabulary_size(model)
        self._url = engine_url.rstrip("/") if engine_url else ""
        self._key = os.environ.get(KEY_VARIABLE, "") if engine_url else secrets.token_hex(16)
        self._child: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._version = UNLOADED
        self._paused = False
        self._lost = ""  # why its weights cannot be trusted
        self._group: str | None = None  # the process group that it has joined
        self._sendable = asyncio.Event()  # cleared while `resubmit` swaps
        self._sendable.set()
        self._asking = 0  # requests to /generate that are under way
        self._cache_key = uuid.uuid4().hex  # a new one for every swap that resubmits

    @property
    def description(self) -> str:
        what = f"sglang at {self._url}" if self._attached else f"sglang {_sglang_version()} ({self._device})"
        return what if self.swap_mode == "retract" else f"{what}, swapped by resubmitting"

    @property
    def ranks(self) -> int:
        return self._rollout.tensor_parallel

    @property
    def policy_version(self) -> int:
        return self._version

    async def start(self) -> None:
        started = time.monotonic()
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                connector=aiohttp.TCPConnector(limit=0),
                json_serialize=lambda value: msgspec.json.encode(value).decode(),
            )
        if not self._attached:
            await self._start_child()
        await self._wait_until_ready()
        self._version, self._paused, self._lost, self._group = UNLOADED, False, "", None
        self._sendable.set()
        if self._attached:  # it may be paused, or bear the version of another run
            await self._check_tensor_parallel()
            with contextlib.suppress(_Refused):  # or in the middle of an update
                await self._command("/end_weight_update", {})
            await self.resume()
            body = {"new_version": str(UNLOADED), "abort_all_requests": False}
            await self._command("/update_weight_version", body)
        log.info("%s is ready after %.1f s", self.description, time.monotonic() - started)

    async def generate(self, prompt_ids: Int32, n: int, sampling: SamplingConfig) -> list[Response]:
        prompt = self._checked(prompt_ids)
        answers = [_Answer() for _ in range(n)]
        deadline = time.monotonic() + self._rollout.request_timeout_s
        while unfinished := [answer for answer in answers if not answer.is_whole(sampling.max_response_tokens)]:
            await self._until_sendable(deadline)
            key = self._cache_key
            replies = await self._ask(prompt, unfinished, sampling, deadline)
            for answer, reply in zip(unfinished, replies, strict=True):
                if reply.meta_info.finish_reason.get("type") == "abort" and key != self._cache_key:
                    answer.take_aborted(reply)
                else:
                    answer.take(response_of(reply, sampling.max_response_tokens - len(answer.ids)))
        return [self._response(answer) for answer in answers]

    async def _until_sendable(self, deadline: float) -> None:
        """While it is swapped by resubmitting, no request is sent: it would be aborted again."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._sendable.wait()
        except TimeoutError:
            limit = self._rollout.request_timeout_s
            raise EngineError(f"a request was not answered within {limit:g} s: the engine is swapped") from None

    async def _ask(
        self, prompt: list[int], answers: list[_Answer], sampling: SamplingConfig, deadline: float
    ) -> list[_Reply]:
        """Let SGLang go on with answers to one prompt."""
        name = uuid.uuid4().hex
        requests = [f"{name}.{index}" for index in range(len(answers))]
        # One HTTP request for the group, its prompt repeated. Measured on two cores with 8 groups of 16 responses of 64
        # tokens: 9,200 tok/s; `n` in the sampling parameters gives 8,700, a request for each response 7,600.
        body = {
            "rid": requests,
            "input_ids": [prompt + answer.ids for answer in answers],
            "sampling_params": [
                {
                    "max_new_tokens": sampling.max_response_tokens - len(answer.ids),
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    # said explicitly, as the model's generation_config.json may say something else
                    "min_p": 0.0,
                    "frequency_penalty": 0.0,
                    "presence_penalty": 0.0,
                    "repetition_penalty": 1.0,
                    "ignore_eos": False,
                    "skip_special_tokens": True,
                }
                for answer in answers
            ],
            "return_logprob": True,
        }
        if self.swap_mode == "resubmit":  # no cached prefix of other weights can match
            body["extra_key"] = self._cache_key
        self._asking += 1
        try:
            reply = await self._post("/generate", body, deadline - time.monotonic())
        except asyncio.CancelledError:
            await asyncio.shield(self._abort(requests))
            raise
        finally:
            self._asking -= 1
        try:
            replies = _REPLIES.decode(reply)
        except msgspec.DecodeError as error:
            raise EngineError(f"SGLang's answer to /generate is not what was expected: {error}") from None
        if len(replies) != len(answers):
            raise EngineError(f"SGLang gave {len(replies)} responses, expected {len(answers)}")
        return replies

    def _response(self, answer: _Answer) -> Response:
        if len(answer.parts) == 1:
            return answer.parts[0]
        spans: list[tuple[int, int]] = []
        for version, tokens in (span for part in answer.parts for span in part.spans):
            if spans and spans[-1][0] == version:
                spans[-1] = (version, spans[-1][1] + tokens)
            else:
                spans.append((version, tokens))
        return Response(
            ids=np.concatenate([part.ids for part in answer.parts]),
            logprobs=np.concatenate([part.logprobs for part in answer.parts]),
            spans=spans,
            truncated=answer.parts[-1].truncated,
            text=self.decode(answer.ids),
        )

    def _checked(self, ids: Int32) -> list[int]:
        """SGLang's scheduler dies of a token that it does not know, and everybody's requests with it."""
        tokens: list[int] = ids.tolist()
        least, most = min(tokens, default=-1), max(tokens, default=-1)
        if least < 0 or most >= self._vocabulary:
            raise EngineError(
                f"a prompt of {len(tokens)} tokens with ids {least} to {most}: expected at least one, from 0 to "
                f"{self._vocabulary - 1}; is this the tokenizer of {self._model}?"
            )
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """Loaded at need: only process rewards need it, as SGLang decodes the responses."""
        from tokenizers import Tokenizer

        try:
            if Path(self._model).is_dir():
                return Tokenizer.from_file(str(Path(self._model) / "tokenizer.json"))
            return Tokenizer.from_pretrained(self._model)
        except Exception as error:  # all that tokenizers raises for a file that it cannot read
            raise EngineError(f"{self._model}: its tokenizer.json cannot be loaded: {error}") from None

    async def pause(self) -> None:
        self._paused = True
        if self.swap_mode == "resubmit":
            await self._abort_all()
        # Retracted requests lose their KV cache and recompute it under the new weights.
        await self._command("/pause_generation", {"mode": "retract"})

    async def _abort_all(self) -> None:
        """End all requests; what they have so far comes back, and `generate` sends it again after `resume`."""
        self._cache_key = uuid.uuid4().hex
        self._sendable.clear()
        limit = self._rollout.swap_timeout_s
        try:
            with waiting("aborted requests to come back from SGLang", limit):
                async with asyncio.timeout(limit):
                    while self._asking:
                        await self._post("/abort_request", {"abort_all": True}, limit)
                        await asyncio.sleep(_SOON_S)
        except TimeoutError:
            raise EngineError(f"{self._asking} requests did not end within {limit:g} s of being aborted") from None

    async def load(self, weights: Path | Broadcast, policy_version: int) -> None:
        # said before anything is sent: a load that is cancelled may have written half
        self._lost = f"SGLang may have a part of the weights of version {policy_version}: its load did not end well"
        if isinstance(weights, Broadcast):
            await self._join(weights.member)
            await self._receive(weights, policy_version)
        else:
            await self._read(weights, policy_version)
        reported = await self._reported_version(self._rollout.swap_timeout_s)
        if reported != str(policy_version):
            raise EngineError(f"SGLang reports weight version {reported} after loading {policy_version}")
        self._version, self._lost = policy_version, ""

    async def _read(self, directory: Path, policy_version: int) -> None:
        if not os.path.isdir(directory):  # also where it cannot be looked at
            self._lost = ""
            raise EngineError(f"{directory}, weights of version {policy_version}: there is no such directory")
        # Whatever it refuses after this leaves the engine lost: SGLang rolls back by reading the same files again.
        await self._command(
            "/update_weights_from_disk",
            {
                "model_path": os.path.realpath(directory),
                "weight_version": str(policy_version),
                "abort_all_requests": False,
                "flush_cache": True,
            },
        )

    async def _join(self, member: GroupMember) -> None:
        """Be in this process group, and in no other."""
        if self._group == member.name:
            return
        try:
            await self._leave()
            await _look_for(member)
            await self._command(
                "/init_weights_update_group",
                {
                    "master_address": member.address,
                    "master_port": member.port,
                    "rank_offset": member.rank,
                    "world_size": member.world_size,
                    "group_name": member.name,
                    "backend": member.backend,
                },
            )
        except _Refused:
            self._lost = ""  # no weights were touched
            raise
        self._group = member.name

    async def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await self._command("/destroy_weights_update_group", {"group_name": group})

    async def _receive(self, weights: Broadcast, policy_version: int) -> None:
        """Take each bucket while the trainer broadcasts it."""
        try:
            await self._command("/begin_weight_update", {})
            for index, bucket in enumerate(weights.buckets, 1):
                last = index == len(weights.buckets)
                body = {
                    "names": bucket.names,
                    "dtypes": bucket.dtypes,
                    "shapes": bucket.shapes,
                    "group_name": weights.member.name,
                    "load_format": "flattened_bucket",
                    "flush_cache": last,
                }
                if last:
                    body["weight_version"] = str(policy_version)
                await self._command("/update_weights_from_distributed", body)
            await self._command("/end_weight_update", {})
        except _Refused:
            # one that cannot be started again here (`engine_url`) is left as it was found, but for its weights
            for clean_up in (self._command("/end_weight_update", {}), self._leave()):
                try:
                    await clean_up
                except EngineError as error:
                    log.debug("after a load that failed: %s", error)
            raise

    async def score(self, ids: Int32) -> Float32:
        tokens = self._checked(ids)
        if self._paused:
            raise EngineError("SGLang is paused: it scores nothing before it is resumed")
        body = {
            "input_ids": [tokens],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "priority": 0,  # before all others, which have none, and in the place of one that runs
            "logprob_start_len": 0,
            # nothing cached is used, and nothing that it leaves in the cache can match
            "extra_key": f"score.{uuid.uuid4().hex}",
        }
        reply = await self._post("/generate", body, self._rollout.swap_timeout_s)
        try:
            scores = msgspec.json.decode(reply, type=list[_Score])
        except msgspec.DecodeError as error:
            raise EngineError(f"SGLang's answer to /generate is not what was expected: {error}") from None
        values = [logprob for score in scores for logprob, _, _ in score.meta_info.input_token_logprobs[1:]]
        if len(values) != len(tokens) - 1 or None in values:
            raise EngineError(f"SGLang scored {len(values)} tokens of {len(tokens)}, expected all but the first")
        return np.array(values, np.float32)

    async def resume(self) -> None:
        if self._lost:
            raise EngineError(f"{self._lost}; it has to be started again")
        await self._command("/continue_generation", {})
        self._paused = False
        self._sendable.set()

    async def healthy(self) -> bool:
        # SGLang's own watchdog ends a scheduler that hangs, and the whole child with it.
        if self._paused or self._lost or (self._child is not None and self._child.returncode is not None):
            return False
        try:
            return await self._reported_version(_HEALTH_S) == str(self._version)
        except EngineError:
            return False

    async def restart(self) -> None:
        await self._end_child()
        await self.start()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        await self._end_child()

    # --- the child ---------------------------------------------------------------------------------------------------

    async def _start_child(self) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            KEY_VARIABLE: self._key,
            "ASYNCPPO_ENGINE_PARENT": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        if self._device == "cpu":
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
            if self.ranks > 1:  # it starts no more ranks than the machine has NUMA nodes unless it is told their cores
                cores = sorted(os.sched_getaffinity(0))
                bound = "|".join(str(cores[rank % len(cores)]) for rank in range(self.ranks))
                environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bound)
        if Path(self._model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        environment.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)  # would leave the temperature out of the log-probs
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as output:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rollout_server.sglang_process",
                *child_arguments(self._config, self._model, self._device, port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        log.info("SGLang starts as process %d on port %d, log in %s", self._child.pid, port, self._log_file)

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await end_process_tree(child)

    async def _wait_until_ready(self) -> None:
        limit = self._rollout.start_timeout_s
        deadline = time.monotonic() + limit
        error = "no answer yet"
        while True:
            if self._child is not None and self._child.returncode is not None:
                raise EngineError(
                    f"SGLang ended with exit code {self._child.returncode} while it started; the end of "
                    f"{self._log_file}:\n{last_lines(self._log_file)}"
                )
            try:
                await self._reported_version(min(_HEALTH_S, limit))
                return
            except EngineError as failure:
                error = str(failure)
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"waited {limit:.0f} s for {self.description} to be ready (rollout.start_timeout_s): {error}"
                    + ("" if self._attached else f"; the end of {self._log_file}:\n{last_lines(self._log_file)}")
                )
            await asyncio.sleep(_POLL_S)

    async def _check_tensor_parallel(self) -> None:
        body = await self._request("GET", "/server_info", None, _HEALTH_S)
        try:
            found = msgspec.json.decode(body, type=_ServerInfo).tp_size
        except msgspec.DecodeError as error:
            raise EngineError(f"SGLang's answer to /server_info is not what was expected: {error}") from None
        if found != self.ranks:
            raise EngineError(
                f"SGLang at {self._url} has tensor parallelism {found}, and rollout.tensor_parallel is {self.ranks}: "
                "make them the same"
            )

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _reported_version(self, timeout_s: float) -> str:
        body = await self._request("GET", "/model_info", None, timeout_s)
        try:
            return msgspec.json.decode(body, type=_ModelInfo).weight_version
        except msgspec.DecodeError as error:
            raise EngineError(f"SGLang's answer to /model_info is not what was expected: {error}") from None

    async def _command(self, path: str, body: Mapping[str, Any]) -> None:
        """A phase of a swap: its reply must say that it was done; `_Refused` if it says that it was not."""
        reply = await self._post(path, body, self._rollout.swap_timeout_s)
        try:
            outcome = msgspec.json.decode(reply, type=_Outcome)
        except msgspec.DecodeError as error:
            raise EngineError(f"SGLang's answer to {path} is not what was expected: {error}") from None
        if outcome.success is not True and outcome.status != "ok":
            raise _Refused(f"SGLang answered {path} with: {outcome.message or reply[:500]!r}")

    async def _abort(self, requests: list[str]) -> None:
        """Best effort: what goes on generating is only wasted, and SGLang notices the lost connection by itself."""
        calls = [self._post("/abort_request", {"rid": rid}, _HEALTH_S) for rid in requests]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                log.debug("an abort failed: %s", result)

    async def _post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        return await self._request("POST", path, body, timeout_s)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> bytes:
        if self._session is None:
            raise EngineError("SGLang is not started")
        try:
            timeout = aiohttp.ClientTimeout(total=max(timeout_s, _LEAST_S))
            async with self._session.request(method, self._url + path, json=body, timeout=timeout) as reply:
                content = await reply.read()
        except TimeoutError:
            raise EngineError(f"SGLang did not answer {path} within {timeout_s:.3g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"SGLang cannot be reached for {path}: {type(error).__name__}: {error}") from None
        if reply.status != 200:
            text = content[:1000].decode(errors="replace")
            raise _Refused(f"SGLang answered {path} with HTTP {reply.status}: {text}")
        return content


async def _look_for(member: GroupMember) -> None:
    """Where nobody listens, SGLang would look for half an hour, and answer nothing meanwhile."""
    where = f"{member.address}, port {member.port} (publish.address)"
    refusal = "no answer"
    try:
        with waiting(f"the trainer's broadcast at {where}", _CONNECT_S):
            async with asyncio.timeout(_CONNECT_S):
                while True:
                    try:
                        _, writer = await asyncio.open_connection(member.address, member.port)
                        break
                    except OSError as error:  # it may be about to listen
                        refusal = str(error)
                        await asyncio.sleep(_SOON_S)
    except TimeoutError:
        raise _Refused(f"no trainer broadcasts at {where}: {refusal}, tried for {_CONNECT_S:g} s") from None
    writer.close()
    with contextlib.suppress(OSError):  # all that was asked is whether it is there
        await writer.wait_closed()


def _sglang_version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _vocabulary_size(model: str) -> int:
    """Rows of the embedding, of a model directory; without limit for a hub name."""
    try:
        config = json.loads((Path(model) / "config.json").read_bytes())
    except OSError:
        return 1 << 31
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 1 << 31)
