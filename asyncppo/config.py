"""The configuration: one frozen Struct per component, read from YAML, refused when it is wrong.

A file says only what differs from the defaults; `base: other.yaml` takes another file first; `--set a.b=c` comes last.
Unknown keys are refused with the nearest known one, ranges stand in the types, and what can be derived is a property
here and not a key. docs/configuration.md is generated from this file (`asyncppo config docs`).
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import itertools
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from asyncppo.errors import ConfigError
from asyncppo.ports import is_loopback

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
UnitInterval = Annotated[float, Meta(ge=0, le=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Scheduled = Fraction | list[tuple[NonNegative, Fraction]]
"""A constant, or points (version, value) between which it runs in a straight line: `[[0, 0.0], [100, 0.2]]`."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: frozen, keyword only, unknown keys refused."""


class RunConfig(Section, frozen=True, kw_only=True):
    """The run as a whole."""

    name: Annotated[str, Meta(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its directory is `directory`/`name`."""
    directory: str = "runs"
    """Where run directories are made."""
    seed: int = 42
    """Seed of the order of prompts, the shards, the critics' heads and the minibatches."""
    steps: Positive = 500
    """Trainer steps; each consumes `stream.prompts_per_batch` groups and publishes one policy version."""
    save_every: NonNegative = 50
    """Steps between checkpoints; 0 saves only at the end and on a stop."""
    keep_checkpoints: Positive = 2
    """How many checkpoints are kept."""
    keep_every: NonNegative = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps only the newest `keep_checkpoints`."""
    inspect_every: NonNegative = 10
    """Steps between samples for `asyncppo inspect`: one group, token by token, of every such step; 0 keeps none."""


class DataConfig(Section, frozen=True, kw_only=True):
    """The prompts."""

    train: str
    """A `.jsonl` or `.parquet` file, or the name of a dataset on the hub (needs the `data` extra)."""
    split: str = "train"
    """Split of a hub dataset."""
    prompt_column: str = "prompt"
    """Column with the problem: a text, or a list of chat messages."""
    answer_column: str = "answer"
    """Column with the gold answer."""
    id_column: str | None = None
    """Column with the prompt's id; without it the id is the row number."""
    template: str = "{prompt}"
    """The user message, with `{prompt}` where the problem goes; the tokenizer's chat template is put around it."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out, and counted."""
    shuffle: bool = True
    """Draw a new order, from the seed, for every epoch."""


class EvalConfig(Section, frozen=True, kw_only=True):
    """Held-out problems, answered by the rollout servers, never entering the buffer or its counts."""

    sets: dict[str, str] = {}
    """Name to dataset, as in `data.train`; columns and template are those of `data`."""
    samples: Positive = 4
    """Responses drawn for each problem, at the sampling of training; pass@1 is their mean reward."""
    limit: Positive | None = None
    """At most this many problems of each set."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""


class SamplingConfig(Section, frozen=True, kw_only=True):
    """How responses are drawn. Both ends must agree on this section."""

    group_size: Positive = 32
    """Responses of each prompt."""
    max_response_tokens: Positive = 8000
    """Generation stops there; the response is then truncated (`algorithm.truncated`)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, at the engine and in the trainer's log-probs alike."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Nucleus sampling. Below 1 the engine's log-probs are those before the truncation (docs/how-it-works.md)."""
    top_k: Annotated[int, Meta(ge=-1)] = -1
    """Only the k likeliest tokens are drawn from; -1 is all."""


class RewardConfig(Section, frozen=True, kw_only=True):
    """How responses are graded. Both ends must agree on this section."""

    function: str = "math_verify"
    """`math_verify`, or `package.module:function` with (response text, gold answer) -> reward in [0, 1], or such a
    reward with process rewards (docs/extending.md). Not used where `functions` is given."""
    functions: dict[str, float] = {}
    """Several such functions with their weights; the reward is the weighted sum, so are the process rewards."""
    overlong_buffer: NonNegative = 0
    """DAPO's soft overlong punishment: over the last so many tokens before `sampling.max_response_tokens` the reward
    falls linearly by `overlong_penalty`, in training alone; 0 has none."""
    overlong_penalty: PositiveFloat = 1.0
    """What a response of `sampling.max_response_tokens` loses."""
    workers: Positive = 1
    """Grading processes of each rollout server."""
    timeout_s: PositiveFloat = 10.0
    """A grading that takes longer is killed, and is a reward error."""
    memory_mb: Positive = 4096
    """A grading process that wants more address space is killed, which is a reward error."""
    on_error: Literal["mask", "zero", "drop"] = "mask"
    """What becomes of a response whose grading failed: it leaves every loss, every baseline and the critics' shards, it
    counts as a reward of 0, or its whole group is dropped and the prompt leased again."""


class StreamConfig(Section, frozen=True, kw_only=True):
    """From the rollout servers into the trainer."""

    address: Annotated[str, Meta(pattern=r"^tcp://.+:\d+$")] = "tcp://127.0.0.1:5757"
    """Where the trainer listens for rollout servers."""
    prompts_per_batch: Positive = 64
    """Groups of one trainer step, B."""
    max_staleness: Annotated[int, Meta(ge=0, le=64)] = 4
    """No batch ever holds a group staler than this many versions."""
    drop_equal_rewards: bool = False
    """DAPO's dynamic sampling: a group whose responses all have the same reward is not trained on, and counted."""
    slow: Literal["wait", "drop"] = "wait"
    """What becomes of a prompt whose answer takes longer than the bound allows: `wait` makes the trainer wait for it,
    `drop` cancels it and leases it again; drops are counted by length and reward, for they favour short answers."""
    ready_batches: Positive = 1
    """No prompt is leased while this many whole batches wait to be trained: more would only grow old."""
    keys: str | None = None
    """Directory of CURVE keys (`asyncppo keys`): everything on TCP is encrypted, and only known keys are let in."""
    insecure: bool = False
    """Listen on, or connect to, an address that is not loopback without keys."""
    heartbeat_s: PositiveFloat = 2.0
    """Both ends say that they live this often; ten missed heartbeats are a death."""
    lease_timeout_s: PositiveFloat = 600.0
    """A prompt that a server has held for longer is given to another."""
    failures_in_a_row: Positive = 3
    """Leases that a server fails one after the other before it is set aside for `set_aside_s`, and then tried with
    one."""
    set_aside_s: PositiveFloat = 30.0
    """How long a server that fails is set aside; twice as long each time, up to ten times."""
    batch_timeout_s: PositiveFloat = 1800.0
    """The trainer ends with an error after waiting this long for one batch."""
    max_message_mb: Positive = 512
    """Larger messages are refused before they are decoded."""


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """AsyPPO (arXiv 2510.01656) with decoupled PPO (arXiv 2505.24298)."""

    critics: NonNegative = 2
    """M. 0 is GRPO (group-normalised advantages), 1 is PPO, 2 is AsyPPO."""
    shards: Literal["disjoint", "shared", "half"] = "disjoint"
    """Which responses of each group a critic learns from: its own part, or all; `half` is a control in which all learn
    from the first critic's part."""
    aggregation: Literal["mean", "min", "confidence"] = "mean"
    """How the critics' values become one; `confidence` weights each by the inverse of its running squared error."""
    gamma: UnitInterval = 1.0
    """Discount of rewards."""
    lam: UnitInterval = 1.0
    """GAE's lambda for the actor (`critic.lam` is that of the critics' target)."""
    lam_length_alpha: PositiveFloat | None = None
    """VAPO's length-adaptive lambda for the actor, 1 - 1/(alpha * length), in place of `lam`."""
    group_std: bool = True
    """Without critics: divide by the standard deviation of the group's rewards (GRPO), or do not (Dr. GRPO)."""
    whiten_advantages: bool = False
    """Shift and scale the batch's advantages to zero mean and unit standard deviation."""
    mask_signal: Literal["value_std", "entropy", "random"] = "value_std"
    """What orders the tokens for both masks; `entropy` is the paper's comparison, `random` a control."""
    mask_fraction: Scheduled = 0.2
    """k: tokens of lowest signal that leave the policy term."""
    entropy_coef: NonNegativeFloat = 0.01
    """beta: weight of the entropy bonus."""
    entropy_filter: Scheduled = 0.2
    """h: tokens of highest signal that leave the entropy bonus."""
    mask_scope: Literal["batch", "sequence"] = "batch"
    """Whether the masks' fractions are of the whole batch or of each response."""
    utd: Annotated[int, Meta(ge=1, le=4)] = 1
    """How often each group is trained on (update-to-data ratio)."""
    reuse: Literal["epochs", "replay"] = "epochs"
    """`epochs`: `utd` passes within one step, with one proximal and one set of targets. `replay`: the group returns to
    the buffer and is drawn again at later versions while its staleness allows, with everything computed anew."""
    ratio: Literal["token", "sequence", "prefix-min"] = "token"
    """Ratio of current to proximal: PPO's of each token, GSPO's of the sequence, MinPRO's least of any prefix."""
    trust: Literal["clip", "divergence"] = "clip"
    """What keeps the update small: PPO's clip, or DPPO's limit on the binary total variation."""
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """PPO's clip below 1."""
    clip_high: PositiveFloat = 0.2
    """PPO's clip above 1."""
    dual_clip: Annotated[float, Meta(gt=1)] | None = None
    """Dual-clip PPO: with a negative advantage the ratio counts at most so much."""
    divergence_limit: PositiveFloat = 0.15
    """Limit of `trust: divergence`, a difference of probabilities."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of KL(current‖reference); 0 loads no reference."""
    reference: str | None = None
    """The reference policy, a Hugging Face directory or hub name; without it the actor as it was at the start."""
    proximal: Literal["recompute", "interpolate", "behaviour"] = "recompute"
    """Anchor of the ratio: the actor when the batch's update began (decoupled PPO), A-3PO's interpolation without that
    forward pass, or the policy that drew the tokens (PPO without correction for staleness)."""
    behaviour_mode: Literal["mask", "clamp", "none"] = "mask"
    """What happens where the behaviour weight exceeds its cap; `none` leaves the weight out."""
    behaviour_level: Literal["token", "sequence"] = "token"
    """The behaviour weight of each token, or the product over the response."""
    behaviour_cap: Annotated[float, Meta(ge=1)] = 5.0
    """Cap of the behaviour weight, proximal over behaviour."""
    loss_aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "constant"] = (
        "seq-mean-token-mean"
    )
    """How token losses become one, always with denominators of the global batch; `constant` divides by responses times
    `sampling.max_response_tokens` (Dr. GRPO)."""
    truncated: Literal["zero", "mask", "bootstrap"] = "zero"
    """A truncated response keeps its reward and a terminal value of 0, leaves the losses, or bootstraps from its last
    value."""


class GuardConfig(Section, frozen=True, kw_only=True):
    """What watches over an update: the brake, the skipped step, the alarm."""

    min_ess: UnitInterval = 0.3
    """The brake: an effective sample size below this fraction lowers `algorithm.utd`, then the staleness bound, one a
    step; 0 does not look."""
    max_logprob_gap: PositiveFloat | None = None
    """The brake, likewise, when trainer and engine differ by more on average (nats, tokens of the current version)."""
    recover_after: Positive = 10
    """Good steps after which the brake is eased by one."""
    max_skipped: Positive = 3
    """Steps in a row whose loss or gradient is not finite, and which are therefore skipped, before the run ends."""
    min_separation: NonNegativeFloat = 0.01
    """The alarm: critics whose std is less than this share of their value's spread over tokens have become one."""
    stall_s: PositiveFloat = 1800.0
    """The watchdog: a process whose work (the update, a save, …) takes so long, or whose wait does not end a minute
    after its own limit, writes all stacks and ends with exit code 1."""


class ModelConfig(Section, frozen=True, kw_only=True):
    """What the actor and the critics have in common: a model and how it is trained."""

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """DeepSpeed, or the plain PyTorch twin that the tests compare it with."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and activations; the optimiser keeps float32 masters."""
    zero_stage: Annotated[int, Meta(ge=1, le=3)] = 1
    """DeepSpeed's ZeRO stage."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in CPU memory."""
    processes: Positive = 1
    """Data-parallel ranks; one process per device."""
    devices: list[NonNegative] = []
    """GPU indices, one for each process; empty takes as many as there are processes, from 0 upward, role by role."""
    attention: Literal["segments", "flash_attention_2"] = "segments"
    """Attention over packed sequences: PyTorch's per sequence (any device), or the flash-attn package."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    micro_batch_tokens: Positive = 16384
    """Tokens (prompts included) of one forward pass; a longer sequence goes alone."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: NonNegative = 0
    """Optimiser steps in which the learning rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    minibatches: Positive = 1
    """Optimiser steps of one pass over a batch, on disjoint sets of responses."""


class ActorConfig(ModelConfig, frozen=True, kw_only=True):
    """The actor: a causal language model."""

    path: str
    """A Hugging Face directory or hub name."""


class CriticOverride(Section, frozen=True, kw_only=True):
    """What one critic has otherwise than the others."""

    path: str | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    warmup_steps: NonNegative | None = None
    minibatches: Positive | None = None
    epochs: Positive | None = None
    micro_batch_tokens: Positive | None = None


class CriticConfig(ModelConfig, frozen=True, kw_only=True):
    """The critics: any checkpoint, with a scalar head."""

    path: str | None = None
    """A Hugging Face directory or hub name; without it the actor's (a symmetric critic)."""
    each: list[CriticOverride] = []
    """What differs from critic to critic, in their order (`[{path: a}, {path: b, learning_rate: 2.0e-5}]`); empty, or
    one entry for each."""
    epochs: Positive | None = None
    """Passes of a critic over its shard in each step; without it `algorithm.utd` (with `reuse: epochs`) or 1."""
    lam: UnitInterval = 1.0
    """Lambda of the critics' target: 1 is the Monte-Carlo return, less is TD(lambda) on the critic's own values."""
    value_clip: PositiveFloat | None = None
    """PPO's value clip, in units of return, around the values before the step; without it there is none."""
    fresh_values: bool = False
    """Value every batch before learning from it, too: an honest explained variance, for one more forward pass. A
    `value_clip` and `lam` below 1 do so anyway."""
    warmup_batches: NonNegative = 0
    """The warm start: so many batches of the first policy version train the critics alone, before the actor's first
    step."""
    warmup_learning_rate: PositiveFloat | None = None
    """Learning rate at the start of the warm start, from where it falls linearly to 0; without it `learning_rate`
    throughout."""
    warmup_directory: str | None = None
    """Critics that were warm-started by the same settings (whatever the seed) are taken from here and not trained
    again; otherwise they are written here. Without it: in the run directory."""
    addresses: list[str] = []
    """Where critics that were started by hand listen, `tcp://host:port` each; empty starts them beside the learner."""
    timeout_s: PositiveFloat = 1800.0
    """The learner ends with an error after waiting this long for a critic."""
    restarts: NonNegative = 3
    """How often a critic that has died is started again, and brought to where it was, before the run ends; one that has
    lived for an hour counts anew."""
    recovery_mb: Positive = 2048
    """The batches since a critic's last checkpoint are kept up to this size, so that one that is started again learns
    them again; older ones it then misses."""


class RolloutConfig(Section, frozen=True, kw_only=True):
    """The rollout servers."""

    max_groups: Positive = 16
    """Groups that one server has in flight at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is a GPU."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the engine's weights."""
    tensor_parallel: Positive = 1
    """GPUs of one SGLang server."""
    engine_args: dict[str, str | int | float | bool] = {}
    """Further arguments of `sglang.launch_server`, without the dashes: `mem_fraction_static: 0.8`."""
    start_timeout_s: PositiveFloat = 600.0
    """SGLang must be ready within this time."""
    request_timeout_s: PositiveFloat = 1800.0
    """A generation request that takes longer fails, and its prompt is leased again."""
    swap_timeout_s: PositiveFloat = 300.0
    """Each phase of a weight swap must end within this time."""
    self_test: bool = True
    """At the start, swap weights in the middle of an answer and prove from the log-probs that no stale cache is left.
    An engine that does not pass is swapped by aborting its requests and resubmitting what they have so far."""
    connect_timeout_s: PositiveFloat = 600.0
    """A rollout server looks this long for the trainer."""
    spill_mb: Positive = 1024
    """Finished groups that wait for the trainer to come back are kept on disk up to this size; then generation
    pauses."""


class PublishConfig(Section, frozen=True, kw_only=True):
    """New weights, from the trainer to the rollout servers."""

    transport: Literal["auto", "disk", "broadcast"] = "auto"
    """How the bytes travel: as files in `publish.directory`, or from the trainer's process group into the engines.
    `auto` is disk, unless other hosts may connect (`stream.address`) and the directory is this host's memory."""
    directory: str = "/dev/shm"
    """Where versions are written: memory on one host, a shared directory on several."""
    every: Positive = 1
    """Steps from one published version to the next, at most `stream.max_staleness` + 1: staleness counts steps."""
    swap: Literal["together", "rolling"] = "together"
    """`rolling` lets a quarter of the servers swap at a time, so that the others generate meanwhile (disk only)."""
    address: str | None = None
    """Broadcast: the trainer's host name or address as the servers reach it. Default: the host of `stream.address`."""
    bucket_mb: Positive = 512
    """Broadcast: tensors are sent in buckets of this size; an engine holds one more in memory while it swaps."""
    ready_timeout_s: PositiveFloat = 30.0
    """Broadcast: it begins without the servers that are not prepared within this time of the first that is."""
    probe: bool = True
    """After every swap the engine answers a fixed prompt, and its log-probs are compared with the trainer's own."""
    tolerance: PositiveFloat | None = None
    """How far they may differ, on average, in nats. Default: 0.001 where both ends compute in float32, else 0.05."""


_DECIDE_WARM_START = (
    "path",
    "dtype",
    "betas",
    "weight_decay",
    "max_grad_norm",
    "minibatches",
    "warmup_batches",
    "lam",
    "value_clip",
)


class Config(Section, frozen=True, kw_only=True):
    """Everything; what the file has to say is `data.train` and `actor.path`."""

    run: RunConfig = RunConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    stream: StreamConfig = StreamConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    actor: ActorConfig
    critic: CriticConfig = CriticConfig()
    guard: GuardConfig = GuardConfig()
    rollout: RolloutConfig = RolloutConfig()
    publish: PublishConfig = PublishConfig()

    @property
    def run_directory(self) -> Path:
        """Where this run's metrics, checkpoints and reports are."""
        return Path(self.run.directory) / self.run.name

    @property
    def weights_directory(self) -> Path:
        """Where this run's versions are published."""
        tag = hashlib.sha256(str(self.run_directory.resolve()).encode()).hexdigest()[:8]
        return Path(self.publish.directory) / f"asyncppo-{self.run.name}-{tag}"

    def critic_of(self, index: int) -> CriticConfig:
        """The section `critic` as it is for one critic: its `each` entry applied, its path and epochs filled in."""
        mine = self.critic.each[index] if self.critic.each else CriticOverride()
        own = {key: value for key, value in msgspec.structs.asdict(mine).items() if value is not None}
        merged = msgspec.structs.replace(self.critic, **own, each=[])
        passes = 1 if self.algorithm.reuse == "replay" else self.algorithm.utd
        return msgspec.structs.replace(merged, path=merged.path or self.actor.path, epochs=merged.epochs or passes)

    @property
    def critic_paths(self) -> list[str]:
        """The checkpoint of each critic."""
        return [str(self.critic_of(index).path) for index in range(self.algorithm.critics)]

    @property
    def warmup_directory(self) -> Path:
        """Where this config's warm-started critics are kept: a directory named by what decides how they come out."""
        algorithm, critic = self.algorithm, self.critic
        decides = {
            "actor": self.actor.path,
            "data": self.data,
            "sampling": self.sampling,
            "reward": self.reward,
            "stream": (self.stream.prompts_per_batch, self.stream.drop_equal_rewards),
            "algorithm": (algorithm.critics, algorithm.shards, algorithm.gamma, algorithm.truncated),
            "critics": [
                {key: getattr(self.critic_of(index), key) for key in _DECIDE_WARM_START}
                | {"rate": critic.warmup_learning_rate or self.critic_of(index).learning_rate}
                | {"falls": critic.warmup_learning_rate is not None}
                for index in range(algorithm.critics)
            ],
        }
        tag = hashlib.sha256(msgspec.json.encode(decides, order="deterministic")).hexdigest()[:12]
        return Path(critic.warmup_directory or self.run_directory / "warm_start") / tag

    @property
    def passes(self) -> int:
        """Optimiser passes of the actor over one batch."""
        return self.algorithm.utd if self.algorithm.reuse == "epochs" else 1

    @property
    def responses_per_batch(self) -> int:
        """Responses of one trainer step."""
        return self.stream.prompts_per_batch * self.sampling.group_size

    @property
    def max_admitted(self) -> int:
        """Groups that are in flight or buffered at most: (max_staleness + 1) batches."""
        return (self.stream.max_staleness + 1) * self.stream.prompts_per_batch

    @property
    def actor_steps(self) -> int:
        """Optimiser steps of the actor in the whole run."""
        return self.run.steps * self.passes * self.actor.minibatches

    def critic_steps(self, index: int) -> int:
        """Optimiser steps of one critic in the whole run, its warm start apart."""
        critic = self.critic_of(index)
        return self.run.steps * (critic.epochs or 1) * critic.minibatches

    @property
    def warmup_groups(self) -> int:
        """Groups of the critics' warm start."""
        return self.critic.warmup_batches * self.stream.prompts_per_batch if self.algorithm.critics else 0

    def derived(self) -> dict[str, str | int]:
        """What follows from the keys, for `asyncppo config show`."""
        return {
            "run_directory": str(self.run_directory),
            "weights_directory": str(self.weights_directory),
            "responses_per_batch": self.responses_per_batch,
            "max_admitted_groups": self.max_admitted,
            "prompts_of_the_run": self.warmup_groups + self.run.steps * self.stream.prompts_per_batch,
            "actor_optimizer_steps": self.actor_steps,
            "critic_optimizer_steps": self.critic_steps(0) if self.algorithm.critics else 0,
            "trainer_processes": self.actor.processes + self.algorithm.critics * self.critic.processes,
            "agreement_hash": self.agreement_hash(),
        }

    def agreement_hash(self) -> str:
        """Hash of what the two ends have to agree on: how responses are drawn and graded."""
        shared = msgspec.json.encode({"sampling": self.sampling, "reward": self.reward}, order="deterministic")
        return hashlib.sha256(shared).hexdigest()[:16]

    @property
    def publish_transport(self) -> tuple[Literal["disk", "broadcast"], str]:
        """The transport of the weights, and why it is that one."""
        publish = self.publish
        if publish.transport != "auto":
            return publish.transport, "publish.transport says so"
        if is_loopback(self.stream.address):
            return "disk", f"every server is on this host, as stream.address is {self.stream.address}"
        if not Path(publish.directory).resolve().is_relative_to("/dev/shm"):
            return "disk", f"publish.directory, {publish.directory}, is no host's memory: all hosts have to see it"
        return "broadcast", f"servers of other hosts may connect to {self.stream.address}"

    def check(self) -> None:
        """Refuse combinations that no single type can refuse.

        Raises:
            ConfigError: one line: which keys, what they say, what would do.
        """
        if self.algorithm.shards != "shared" and self.algorithm.critics > self.sampling.group_size:
            raise ConfigError(
                f"algorithm.critics is {self.algorithm.critics} but sampling.group_size is only "
                f"{self.sampling.group_size}: disjoint shards need a response for each critic"
            )
        if self.sampling.top_k in (0, 1):
            raise ConfigError(
                f"sampling.top_k is {self.sampling.top_k}: expected -1 (all tokens) or at least 2; SGLang takes 1 for "
                "greedy and then reports log-probs without the temperature"
            )
        if not all(math.isfinite(weight) for weight in self.reward.functions.values()):
            raise ConfigError(f"reward.functions is {self.reward.functions}: expected finite weights")
        if self.reward.overlong_buffer > self.sampling.max_response_tokens:
            raise ConfigError(
                f"reward.overlong_buffer is {self.reward.overlong_buffer}, more than the "
                f"{self.sampling.max_response_tokens} tokens of a response (sampling.max_response_tokens)"
            )
        if self.algorithm.critics == 0 and self.sampling.group_size == 1:
            raise ConfigError("algorithm.critics is 0 (GRPO) but sampling.group_size is 1: a group needs 2 or more")
        if self.stream.drop_equal_rewards and self.sampling.group_size == 1:
            raise ConfigError(
                "stream.drop_equal_rewards is true and sampling.group_size is 1: the rewards of a group of one are "
                "always equal, so no group would ever be trained on"
            )
        if self.critic.each and len(self.critic.each) != self.algorithm.critics:
            raise ConfigError(
                f"critic.each has {len(self.critic.each)} entries for {self.algorithm.critics} critics: leave it "
                "empty, or give one for each"
            )
        if self.algorithm.mask_signal == "entropy" and self.algorithm.proximal != "recompute":
            raise ConfigError(
                f"algorithm.mask_signal is entropy, which the proximal pass computes, and algorithm.proximal is "
                f"{self.algorithm.proximal}: set algorithm.proximal to recompute"
            )
        if self.publish.every > self.stream.max_staleness + 1:
            raise ConfigError(
                f"publish.every is {self.publish.every} and stream.max_staleness {self.stream.max_staleness}: between "
                "two published versions nothing would be fresh enough; at most stream.max_staleness + 1"
            )
        if self.publish.swap == "rolling" and self.publish_transport[0] == "broadcast":
            raise ConfigError(
                f"publish.swap is rolling and the transport is broadcast ({self.publish_transport[1]}): a broadcast "
                "reaches all servers at once; set publish.swap to together, or publish.transport to disk"
            )
        for key in ("mask_fraction", "entropy_filter"):
            points = getattr(self.algorithm, key)
            versions = [version for version, _ in points] if isinstance(points, list) else [0]
            if not versions or versions != sorted(set(versions)):
                raise ConfigError(
                    f"algorithm.{key}: expected points [version, value] with rising versions, got {points}"
                )
        if int(self.stream.address.rpartition(":")[2]) > 65535:
            raise ConfigError(f"stream.address is {self.stream.address}: ports end at 65535")
        if self.critic.addresses and len(self.critic.addresses) != self.algorithm.critics:
            raise ConfigError(
                f"critic.addresses has {len(self.critic.addresses)} entries for {self.algorithm.critics} critics"
            )
        if self.actor.devices and len(self.actor.devices) != self.actor.processes:
            raise ConfigError(f"actor.devices has {len(self.actor.devices)} GPUs for {self.actor.processes} processes")
        wanted = self.algorithm.critics * self.critic.processes
        if self.critic.devices and len(self.critic.devices) != wanted:
            raise ConfigError(f"critic.devices has {len(self.critic.devices)} GPUs for {wanted} critic processes")
        critics = [("critic", self.critic_of(index)) for index in range(self.algorithm.critics)]
        for section, model in (("actor", self.actor), *critics):
            if model.minibatches > self.stream.prompts_per_batch:
                raise ConfigError(
                    f"{section}.minibatches is {model.minibatches}, more than the {self.stream.prompts_per_batch} "
                    "groups of a batch (stream.prompts_per_batch)"
                )
            if model.engine == "plain" and model.processes > 1:
                raise ConfigError(f"{section}.engine is plain, which trains in one process; use deepspeed for more")


def at(scheduled: float | list[tuple[int, float]], version: int) -> float:
    """The value of a `Scheduled` key at a version: straight lines between its points, constant outside them."""
    if not isinstance(scheduled, list):
        return scheduled
    for (start, low), (end, high) in itertools.pairwise(scheduled):
        if start <= version < end:
            return low + (high - low) * (version - start) / (end - start)
    return scheduled[0][1] if version < scheduled[0][0] else scheduled[-1][1]


def load(path: Path | str, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a config file and what it is based on, then apply `a.b=c` overrides.

    Args:
        path: a YAML file; its key `base` names a file, relative to it, that is read first.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ConfigError: missing file, bad YAML, unknown or ill-typed key, value out of range; one line that says where.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        _apply(tree, override)
    return from_tree(tree, str(path))


def from_tree(tree: dict[str, Any], where: str = "config") -> Config:
    """Convert plain data into a checked Config.

    Raises:
        ConfigError: as `load`.
    """
    try:
        config = msgspec.convert(tree, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), tree)}") from None
    config.check()
    return config


def dump(config: Config) -> bytes:
    """The resolved config as YAML, as it is stored with the run."""
    return msgspec.yaml.encode(msgspec.to_builtins(config))


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` goes round in a circle")
    try:
        tree = msgspec.yaml.decode(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `data:` and `actor:`, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read_tree(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        node[last] = msgspec.yaml.decode(value.encode()) if value else None
    except msgspec.DecodeError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def _explain(error: str, tree: dict[str, Any]) -> str:
    """Turn msgspec's words into ours: the dotted key first, the nearest known key for an unknown one, what came."""
    text, _, where = error.partition(" - at `")
    path = where.rstrip("`").removeprefix("$").lstrip(".")
    unknown = re.search(r"unknown field `(.*?)`", text)
    missing = re.search(r"missing required field `(.*?)`", text)
    dotted = ".".join(part for part in (path, (unknown or missing or [None, ""])[1]) if part)
    if unknown:
        known = _keys(path)
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        everywhere = [f"{section}.{key}" for section in _keys("") for key in _keys(section)]
        elsewhere = [key for key in everywhere if key.endswith(f".{unknown[1]}")]
        hint = elsewhere[0] if elsewhere else (near[0] if near else None)
        prefix = f"{path}." if path and near and not elsewhere else ""
        tail = f"did you mean {prefix}{hint}?" if hint else f"known keys here: {', '.join(known)}"
        return f"unknown key {dotted}; {tail}"
    if missing:
        return f"{dotted} is missing and has no default"
    expected = text.partition(", got ")[0]
    if expected.startswith("Invalid enum value"):
        expected = f"expected {_type_name(_type_of(path))}"
    return f"{dotted}: {expected[0].lower()}{expected[1:]}, got {_show(_value_of(path, tree))}"


def _keys(path: str) -> list[str]:
    kind = _type_of(path)
    return list(kind.__struct_fields__) if _is_section(kind) else []


def _type_of(path: str) -> Any:
    """The declared type of a dotted key."""
    kind: Any = Config
    for part in filter(None, path.split(".")):
        name, entry, _ = part.partition("[")  # `each[0]` is an entry of the list `each`
        kind = typing.get_type_hints(kind).get(name) if _is_section(kind) else None
        if entry:
            kind = next(iter(typing.get_args(kind)), None)
    return kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _value_of(path: str, tree: dict[str, Any]) -> Any:
    """What stands at `critic.addresses[0]`; for an entry of a dict, which msgspec calls `[...]`, the whole dict."""
    node: Any = tree
    for part in re.findall(r"[^.\[\]]+", path):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def documentation() -> str:
    """docs/configuration.md, from the types and the docstrings in this file."""
    lines = [
        "# Configuration",
        "",
        "Generated from `asyncppo/config.py` by `asyncppo config docs`. A config file is YAML and says only what "
        "differs",
        "from these defaults. `base: other.yaml` takes another file first; `--set section.key=value` comes last.",
        "",
    ]
    hints = typing.get_type_hints(Config, include_extras=True)
    for section in Config.__struct_fields__:
        kind = hints[section]
        lines += [f"## {section}", "", str(kind.__doc__).splitlines()[0], ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        texts = {name: text for base in reversed(kind.__mro__[:-1]) for name, text in _field_docs(base).items()}
        types_of = typing.get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            default = "**required**" if field.required else f"`{_default(field)}`"
            lines.append(f"| `{field.name}` | {_type_name(types_of[field.name])} | {default} | {texts[field.name]} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default is not msgspec.NODEFAULT:
        return "null" if field.default is None else field.default
    return typing.cast(typing.Callable[[], Any], field.default_factory)()


def _field_docs(kind: type) -> dict[str, str]:
    if kind.__module__ != __name__:
        return {}
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(kind)).body[0]).body
    docs = {}
    for item, after in itertools.pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_text:
            text = typing.cast(ast.Constant, typing.cast(ast.Expr, after).value).value
            docs[item.target.id] = " ".join(str(text).split()).replace("|", "\\|")
    return docs


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        meta = args[1]
        bounds = [
            f"{sign} {value}"
            for sign, value in (("≥", meta.ge), (">", meta.gt), ("≤", meta.le), ("<", meta.lt))
            if value is not None
        ]
        return " ".join([_type_name(args[0]), ", ".join(bounds)]).strip()
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(dict.fromkeys(_type_name(arg) for arg in args))}"
    return str(getattr(kind, "__name__", kind))
