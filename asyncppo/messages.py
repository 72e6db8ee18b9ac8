"""What the processes say to each other, grouped by who receives it, and how it becomes bytes.

A message is a frozen msgspec Struct. On the wire it is a list of frames: a msgpack header, then one raw frame for each
numpy array, in the order of the fields; nothing is pickled, and no long list of numbers enters the header. `decode`
bounds every size before it looks at the content, and raises MessageError for whatever does not make sense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from asyncppo.errors import MessageError

PROTOCOL = 4
"""Raised whenever a message changes; both ends must have the same."""

MAX_HEADER_BYTES = 1 << 20
MAX_FRAMES = 32
_DTYPES = frozenset(map(np.dtype, ("int32", "int64", "uint8", "float32")))

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Frames = list[bytes | memoryview]

MAX_TEXT = 4000
"""Characters of a reason or a description; `brief` keeps to it."""
MOST_REWARD = 1e9
"""A reward beyond it is a mistake; its square would still be a float32."""
_MOST_LOGPROB = 0.1
"""Above 0 there is only the rounding of low precisions."""
Name = Annotated[str, Meta(pattern=r"\A[\w.-]{1,100}\Z")]
"""What goes into logs, events and file names as it is."""
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Version = Annotated[int, Meta(ge=-1, le=1 << 30)]
Published = Annotated[int, Meta(ge=0, le=1 << 30)]
Seconds = Annotated[float, Meta(ge=0, le=1e10)]


def brief(text: str) -> str:
    """A text for people as it may be sent and logged: not endless, without control characters except line ends."""
    clean = "".join(c if c.isprintable() or c == "\n" else " " for c in text[: 2 * MAX_TEXT])
    return clean if len(clean) <= MAX_TEXT else clean[: MAX_TEXT - 2] + " …"


def _no_numbers() -> Float32:
    return np.empty(0, np.float32)


def _no_tokens() -> Int32:
    return np.empty(0, np.int32)


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, eq=False):
    """Base of every message."""


class ArrayRef(msgspec.Struct, frozen=True, array_like=True):
    """Stands in the header for the array in a frame of its own."""

    dtype: str
    shape: tuple[int, ...]
    frame: int


# --- received by the trainer's intake; made by rollout servers -------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First message of a rollout server, repeated until it is answered by Welcome or Refused."""

    protocol: int
    server: Name
    """The server's name; a restarted server may bear the same."""
    incarnation: Name
    """New at every start of the process: what an older incarnation held is leased again."""
    started: Seconds
    """Unix time of that start: of two live processes with one name, the younger one has it, whoever says Hello last."""
    capacity: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Groups that it takes at once."""
    agreement: Text
    """`Config.agreement_hash()`."""
    model: Text
    """`fingerprints.model_fingerprint` of the model directory that the engine was started with."""
    tokenizer: Text
    """`fingerprints.tokenizer_fingerprint` of the same."""
    engine: Text
    """What generates, for people: `sglang 0.5.23 (cpu)`."""
    ranks: Annotated[int, Meta(ge=1, le=1 << 10)] = 1
    """Ranks of it in a broadcast's process group: its tensor parallelism."""


class Group(Message, frozen=True, kw_only=True):
    """One prompt's responses, complete and graded. Kept and sent again by the server until it is acknowledged.

    N responses with T tokens in all; S spans of one weight version each. A group without process rewards has [0]
    `step_rewards`, as has every group of an evaluation. `lease` is its sequence number: a second one of the same number
    is a duplicate. `trainer`, `epoch` and `prompt_id` let a trainer that has come back take what was leased before.
    """

    lease: int
    trainer: Text = ""
    """`Welcome.trainer` of the process that leased it."""
    epoch: int = 0
    prompt_id: str = ""
    response_ids: Int32  # [T], the responses one after the other
    lengths: Int32  # [N], sum T, each >= 1
    behaviour_logprobs: Float32  # [T], the engine's own
    span_versions: Int32  # [S], the engine's weight version of each span, rising within a response
    span_lengths: Int32  # [S], tokens of each span, sum T
    span_counts: Int32  # [N], spans of each response, sum S
    rewards: Float32  # [N], the final reward; with reward.overlong_buffer less its penalty
    step_rewards: Float32 = msgspec.field(default_factory=_no_numbers)  # [T], on tokens that complete a step; or [0]
    truncated: UInt8  # [N], 1 where the response reached max_response_tokens
    reward_errors: UInt8  # [N], 1 where grading failed or timed out (which gives a reward of 0)
    generate_s: Seconds
    grade_s: Seconds

    def check(self, group_size: int) -> None:
        """Refuse what does not make sense.

        Raises:
            MessageError: what was expected, and what came.
        """
        tokens, responses = int(self.response_ids.size), int(self.lengths.size)
        if responses != group_size:
            raise MessageError(f"group of lease {self.lease}: expected {group_size} responses, got {responses}")
        for name, expected in (
            ("rewards", responses),
            ("truncated", responses),
            ("reward_errors", responses),
            ("span_counts", responses),
            ("behaviour_logprobs", tokens),
        ):
            if getattr(self, name).shape != (expected,):
                got = getattr(self, name).shape
                raise MessageError(f"group of lease {self.lease}: {name} has shape {got}, expected ({expected},)")
        if self.step_rewards.size not in (0, tokens):
            got = self.step_rewards.shape
            raise MessageError(f"group of lease {self.lease}: step_rewards has shape {got}, expected ({tokens},)")
        if (self.lengths < 1).any() or int(self.lengths.sum()) != tokens:
            raise MessageError(f"group of lease {self.lease}: lengths do not partition its {tokens} tokens")
        spans = int(self.span_versions.size)
        if self.span_lengths.shape != (spans,) or (self.span_lengths < 1).any() or (self.span_counts < 1).any():
            raise MessageError(f"group of lease {self.lease}: malformed version spans")
        if int(self.span_counts.sum()) != spans:
            raise MessageError(f"group of lease {self.lease}: {spans} version spans, but the counts say otherwise")
        starts = np.concatenate(([0], np.cumsum(self.span_counts)))[:-1]
        if not np.array_equal(np.add.reduceat(self.span_lengths, starts), self.lengths):
            raise MessageError(f"group of lease {self.lease}: version spans do not partition the responses")
        rising = np.diff(self.span_versions) >= 0
        rising[starts[1:] - 1] = True
        if not rising.all() or (self.span_versions < 0).any():
            raise MessageError(f"group of lease {self.lease}: version spans fall within a response")
        if (self.response_ids < 0).any() or (self.truncated > 1).any() or (self.reward_errors > 1).any():
            raise MessageError(f"group of lease {self.lease}: token ids, or flags, are out of range")
        if not all(np.isfinite(each).all() for each in (self.behaviour_logprobs, self.rewards, self.step_rewards)):
            raise MessageError(f"group of lease {self.lease}: a log-prob or a reward is not finite")
        if (self.behaviour_logprobs > _MOST_LOGPROB).any():
            raise MessageError(f"group of lease {self.lease}: a log-prob of {self.behaviour_logprobs.max():g}")
        if any((np.abs(each) > MOST_REWARD).any() for each in (self.rewards, self.step_rewards)):
            raise MessageError(f"group of lease {self.lease}: a reward beyond {MOST_REWARD:g}")


class Failed(Message, frozen=True, kw_only=True):
    """A lease that this server could not complete; the trainer leases the prompt again."""

    lease: int
    reason: Text


ServerState = Literal[
    "starting",
    "generating",
    "waiting for leases",
    "swapping",
    "quarantined",
    "engine down",
    "outbox full",
    "stopping",
]
"""What a rollout server does."""


class Status(Message, frozen=True, kw_only=True):
    """A rollout server's heartbeat: it lives, and this is what it does."""

    policy_version: Version
    groups_in_flight: Count
    unacknowledged: Count
    responses: Count
    """Responses completed since its start."""
    tokens: Count
    """Response tokens generated since its start."""
    idle_s: Seconds
    """Seconds since its start in which it had nothing to generate: it waited for leases."""
    reward_errors: Count
    engine_restarts: Count
    state: ServerState


class Prepared(Message, frozen=True, kw_only=True):
    """The server has all that it needs to load this version, and goes on generating until it is told to `Swap`."""

    policy_version: Published
    manifest: Text
    """`WeightsReady.manifest`."""
    prepare_s: Seconds
    """Disk: every file read and its checksum compared, so that it is in the page cache."""
    group: Text = ""
    """Broadcast: the process group that its engine is in, if any; one that was restarted is in none."""


class Swapped(Message, frozen=True, kw_only=True):
    """The engine serves this version now, and has answered the probe as the trainer does; phase times in seconds."""

    policy_version: Published
    manifest: Text
    """`WeightsReady.manifest` of what was loaded: another trainer's version may have the same number."""
    prepare_s: Seconds
    wait_s: Seconds
    """From Prepared to Swap."""
    pause_s: Seconds
    load_s: Seconds
    resume_s: Seconds
    probe_s: Seconds
    probe_gap: Annotated[float, Meta(ge=0)] | None = None
    """Mean |difference| of the probe's log-probs, engine and trainer, nats; None where there was no probe."""
    attempts: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    """How often it was loaded until the probe was right."""

    @classmethod
    def at_once(cls, policy_version: int, manifest: str) -> Swapped:
        """Of a version that is served already: no phase took any time."""
        return cls(
            policy_version=policy_version,
            manifest=manifest,
            prepare_s=0.0,
            wait_s=0.0,
            pause_s=0.0,
            load_s=0.0,
            resume_s=0.0,
            probe_s=0.0,
        )


class SwapFailed(Message, frozen=True, kw_only=True):
    """The engine keeps its old version, unless it is quarantined or has to be restarted, when it serves none.

    The server tries again with the next version, or when this one is announced again.
    """

    policy_version: Published
    reason: Text
    quarantined: bool = False
    """The engine took the weights and answers the probe wrongly: it generates nothing until a version is right."""


class Goodbye(Message, frozen=True, kw_only=True):
    """The server leaves; what it holds is leased again."""

    reason: Text


# --- received by rollout servers; made by the trainer's intake -------------------------------------------------------


class Welcome(Message, frozen=True, kw_only=True):
    """The server is one of the pool."""

    run: Text
    heartbeat_s: Annotated[float, Meta(gt=0, le=1e6)]
    trainer: Text
    """New at every start of the trainer: leases of another one are void, and their numbers may come again."""


class Refused(Message, frozen=True, kw_only=True):
    """The server does not fit this trainer, and why; it ends."""

    reason: Text


class Lease(Message, frozen=True, kw_only=True):
    """One prompt to answer `group_size` times."""

    lease: int
    epoch: int
    prompt_id: str
    prompt_ids: Int32  # [P]
    answer: str
    group_size: Annotated[int, Meta(ge=0, le=1 << 16)]
    purpose: Literal["train", "eval"]


class Ack(Message, frozen=True, kw_only=True):
    """The trainer holds the group of this lease, or no longer wants it: forget it."""

    lease: int


class Cancel(Message, frozen=True, kw_only=True):
    """These leases are no longer wanted: stop generating for them."""

    leases: list[int]


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """Tensors that are broadcast as one, their bytes one after the other."""

    names: list[str]
    """In the checkpoint's (Hugging Face's) naming."""
    dtypes: list[str]
    """Such as `bfloat16`."""
    shapes: list[list[int]]


class WeightsReady(Message, frozen=True, kw_only=True):
    """A version is published: prepare for it, and say so (`Prepared`); `Swap` follows. Two phases, two transports."""

    policy_version: Published
    manifest: str
    """The checksum of the version's manifest: what identifies its content."""
    directory: str = ""
    """Transport `disk`: where the version lies whole, with its manifest. Empty: transport `broadcast`."""
    buckets: list[Bucket] = []
    """Transport `broadcast`: what will be sent, in this order."""
    probe_ids: Int32 = msgspec.field(default_factory=_no_tokens)  # [P], or [0]: no probe
    probe_logprobs: Float32 = msgspec.field(default_factory=_no_numbers)  # [P-1], of probe_ids[1:], temperature 1
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    """The probe's mean |difference| may be so much, nats."""


class GroupMember(msgspec.Struct, frozen=True, kw_only=True):
    """A server's place in the process group that a version is broadcast in; the trainer is rank 0."""

    name: str
    """Of the group; one that has joined a group of this name keeps using it."""
    address: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    rank: Annotated[int, Meta(ge=1, le=1 << 16)]
    """Of its first engine rank."""
    world_size: Annotated[int, Meta(ge=2, le=1 << 16)]
    backend: Literal["gloo", "nccl"]


class Swap(Message, frozen=True, kw_only=True):
    """Load what you are prepared for: pause, load, resume, probe.

    One for anything else is out of date. It is ignored, unless it is of a broadcast: then it is declined with
    SwapFailed, as the round's other members would wait.
    """

    policy_version: Published
    manifest: str
    member: GroupMember | None = None
    """Transport `broadcast`: where it comes from."""


class Pulse(Message, frozen=True, kw_only=True):
    """The trainer lives."""

    policy_version: Version


class Unknown(Message, frozen=True, kw_only=True):
    """The trainer does not know the sender (it may have restarted): say Hello again."""


class Stop(Message, frozen=True, kw_only=True):
    """The run has ended, or is being ended: leave."""

    reason: Text


# --- received by a critic; made by the learner -----------------------------------------------------------------------


class ForCritic(Message, frozen=True, kw_only=True):
    """Base of what a critic receives: another process of it, that died or was not born yet, must not act on it."""

    session: str = ""
    """`CriticReady.session` of the process that is meant."""


class Learn(ForCritic, frozen=True, kw_only=True):
    """A packed batch: learn from the shard, then give the values of all responses (AsyPPO, Algorithm 1).

    N responses, L tokens with their prompts, T response tokens.
    """

    step: int
    """Below 0 in the warm start, which then ends with −1."""
    input_ids: Int32  # [L], prompt and response of each sequence, one after the other
    sequence_lengths: Int32  # [N], sum L
    response_lengths: Int32  # [N], sum T
    rewards: Float32  # [T]
    shard: UInt8  # [N], 1 where this critic learns from the response
    group_index: Int32  # [N], which group of the batch the response belongs to


class SaveCritic(ForCritic, frozen=True, kw_only=True):
    """Write everything that a resume needs into this directory."""

    directory: str


class ExportCritic(ForCritic, frozen=True, kw_only=True):
    """Write the weights into this directory, a Hugging Face model with a scalar head that other runs start from."""

    directory: str


class StartCritic(ForCritic, frozen=True, kw_only=True):
    """Begin anew from weights that `ExportCritic` wrote: another optimiser, and the schedule from its start."""

    directory: str
    """Empty: begin as the config says, with its warm start, whatever another run has left there meanwhile."""


class LoadCritic(ForCritic, frozen=True, kw_only=True):
    """Go on from this directory."""

    directory: str


# --- received by the learner; made by a critic -----------------------------------------------------------------------


class FromCritic(Message, frozen=True, kw_only=True):
    """Base of what a critic says: the word of a process that has died meanwhile is no answer."""

    session: str = ""
    """New at every start of the process."""


class CriticReady(FromCritic, frozen=True, kw_only=True):
    """The critic is up. It says so while the learner is silent: either may have been started again."""

    index: int
    parameters: int
    used: bool = False
    """It has learned, loaded or begun anew for a learner: one that has just come up lets it begin again."""


class Learned(FromCritic, frozen=True, kw_only=True):
    """The answer to Learn: the values after learning, and what learning did."""

    step: int
    values: Float32  # [T]
    fresh_values: Float32  # [T], those before learning; [0] where nobody wants them
    metrics: dict[str, float]
    seconds: float


class Done(FromCritic, frozen=True, kw_only=True):
    """What was asked for is done, or could not be written."""

    failure: str = ""
    """Why a directory could not be written: the critic is as it was, and lives. Empty when all is done."""


class CriticFailed(FromCritic, frozen=True, kw_only=True):
    """What was asked for failed; the critic ends."""

    reason: str


ToTrainer = Hello | Group | Failed | Status | Prepared | Swapped | SwapFailed | Goodbye
ToRollout = Welcome | Refused | Lease | Ack | Cancel | WeightsReady | Swap | Pulse | Unknown | Stop
ToCritic = Learn | SaveCritic | LoadCritic | ExportCritic | StartCritic | Stop
ToLearner = CriticReady | Learned | Done | CriticFailed


class Codec:
    """Encodes any message; decodes those of one union. Not thread-safe: one for each thread.

    Args:
        receives: the union of messages that may come, such as `ToTrainer`.
        max_bytes: a larger message is refused before it is decoded.
    """

    def __init__(self, receives: Any, max_bytes: int = 512 << 20) -> None:
        self._max_bytes = max_bytes
        self._frames: Sequence[Any] = ()
        self._used: set[int] = set()
        self._arrays: list[Any] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._take_array)
        self._decoder = msgspec.msgpack.Decoder(receives, dec_hook=self._give_array)

    def encode(self, message: Message) -> Frames:
        """Header and array frames of a message; the arrays are not copied."""
        self._arrays = []
        header = self._encoder.encode(message)
        return [header, *self._arrays]

    def decode(self, frames: Sequence[bytes | memoryview]) -> Any:
        """The message in these frames; its arrays are read-only views of them.

        Raises:
            MessageError: too many or too large frames, a header that is no known message, an array that is not what
                its header says, a frame that is not exactly one array's.
        """
        if not 1 <= len(frames) <= MAX_FRAMES:
            raise MessageError(f"expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
        total = sum(len(frame) for frame in frames)
        if len(frames[0]) > MAX_HEADER_BYTES or total > self._max_bytes:
            raise MessageError(
                f"header of {len(frames[0])} bytes, {total} bytes in all; "
                f"at most {MAX_HEADER_BYTES} and {self._max_bytes}"
            )
        self._frames = frames
        self._used.clear()
        try:
            message = self._decoder.decode(frames[0])
            if len(self._used) != len(frames) - 1:
                raise ValueError(f"{len(frames)} frames, {len(self._used)} arrays")
            return message
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            raise MessageError(f"does not decode: {error}") from None
        finally:
            self._frames = ()

    def _take_array(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"cannot encode {type(value).__name__}")
        if value.dtype not in _DTYPES:
            raise NotImplementedError(f"cannot encode an array of {value.dtype}")
        self._arrays.append(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
        return ArrayRef(value.dtype.name, value.shape, len(self._arrays))

    def _give_array(self, kind: Any, value: Any) -> Any:
        wanted = np.dtype(kind.__args__[1].__args__[0]).name
        ref = msgspec.convert(value, ArrayRef)
        if ref.dtype != wanted:
            raise ValueError(f"array of {ref.dtype}, expected {wanted}")
        if not 1 <= ref.frame < len(self._frames) or len(ref.shape) != 1 or ref.shape[0] < 0:
            raise ValueError("array without its frame, or with a shape that is not one number")
        if ref.frame in self._used:
            raise ValueError(f"frame {ref.frame} is two arrays")
        self._used.add(ref.frame)
        data = memoryview(self._frames[ref.frame]).toreadonly()
        if data.nbytes != math.prod(ref.shape) * np.dtype(wanted).itemsize:
            raise ValueError(f"array of shape {ref.shape} in a frame of {data.nbytes} bytes")
        return np.frombuffer(data, dtype=wanted)
