"""What share of the published bfloat16 values a version changes: what a transport of differences could save.

    .venvs/trainer/bin/python scripts/measure_delta.py --sizes 0.1,10 --versions 24

Random Qwen3 models (weights of standard deviation 0.02, as real ones have), float32 masters, AdamW and clipping as in
configs/qwen3_*.yaml, and a policy gradient on responses that the model itself has drawn: batches of 16 responses of 64
tokens, advantages of ±1, an entropy bonus. The masters start twice: at bfloat16 values, as a run from a downloaded
checkpoint does, where a weight has to move half a unit before anything changes; and anywhere between, as they are
after thousands of steps. A difference is an index and a value for each that changed: 2 bytes for the gap to the one
before, or 4 where they are further apart, and 2 for the value. Figures are means over the last half of the versions;
the last line is JSON.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncppo.config import from_tree
from trainer.model.engine import PlainEngine

RESPONSES, PROMPT, TOKENS = 16, 8, 64
BACK = (1, 4, 16)
"""Versions between the base of a difference and its target: a server that skipped some has an older base."""
SHAPES = {"0.1": (512, 64, 128, 2), "1": (2048, 128, 384, 4), "10": (8192, 320, 960, 6)}
"""Millions of parameters to vocabulary, hidden and intermediate size, layers."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    parameters: int
    learning_rate: float
    masters: str
    back: int
    changed: float
    """Share of the values."""
    delta: float
    """Bytes of the difference over bytes of the whole."""
    worst_tensor: float
    """The largest share of any tensor's values."""


def model_of(size: str, seed: int) -> Any:
    """A random Qwen3 with tied embeddings, float32."""
    vocabulary, hidden, intermediate, layers = SHAPES[size]
    torch.manual_seed(seed)
    heads = max(1, hidden // 64)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=2 * heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=PROMPT + TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def gradient(model: Any, engine: PlainEngine, generator: torch.Generator) -> None:
    """Draw a batch of responses and add the gradient of the policy loss: the ratio is 1 in a version's first pass."""
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (RESPONSES, PROMPT), generator=generator)
    with torch.no_grad():  # the tokens of one forward over noise: as likely under the model as what it would generate
        context = torch.randint(vocabulary, (RESPONSES, TOKENS), generator=generator)
        logits = model(torch.cat([prompt, context], 1)).logits[:, PROMPT - 1 : -1]
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(RESPONSES, TOKENS)
    ids = torch.cat([prompt, drawn], 1)
    logprobs = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(-1, drawn[..., None])[..., 0]
    advantages = torch.randint(2, (RESPONSES, 1), generator=generator) * 2.0 - 1.0
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    engine.backward(-(advantages * chosen).mean() - 0.01 * entropy.mean())


def published(model: Any) -> dict[str, torch.Tensor]:
    """What a version holds: bfloat16, as bits."""
    return {name: p.detach().to(torch.bfloat16).view(torch.int16) for name, p in model.named_parameters()}


def compare(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Share of values that differ, bytes of the difference over the whole, largest share of a tensor."""
    count = changed = size = 0
    worst = 0.0
    for name, values in new.items():
        where = (values != old[name]).flatten().nonzero()[:, 0]
        gaps = torch.diff(where, prepend=torch.tensor([-1]))
        size += int(torch.where(gaps < 1 << 16, 4, 6).sum())
        count, changed = count + values.numel(), changed + where.numel()
        worst = max(worst, where.numel() / values.numel())
    return changed / count, size / (2 * count), worst


def measure(size: str, learning_rate: float, versions: int, masters: str) -> list[Row]:
    """Train for so many versions and compare each with those before."""
    model = model_of(size, seed=0)
    if masters == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    else:  # norms start at exactly 1; after long training they are anywhere near it
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.01 * torch.randn_like(parameter)
    actor = from_tree(
        {"data": {"train": "-"}, "actor": {"path": "-", "learning_rate": learning_rate, "max_grad_norm": 1.0}}
    ).actor
    engine = PlainEngine(model, actor, versions, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    before: deque[dict[str, torch.Tensor]] = deque([published(model)], maxlen=max(BACK))
    found: dict[int, list[tuple[float, float, float]]] = {back: [] for back in BACK}
    for version in range(1, versions + 1):
        gradient(model, engine, generator)
        engine.step()
        now = published(model)
        for back in BACK:
            if back <= len(before) and version > versions // 2:
                found[back].append(compare(before[-back], now))
        before.append(now)
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for back, measured in found.items():
        if measured:
            changed, delta, worst = (sum(column) / len(measured) for column in zip(*measured, strict=True))
            rows.append(Row(count, learning_rate, masters, back, changed, delta, worst))
    return rows


def main(
    sizes: Annotated[str, typer.Option(help=f"Millions of parameters, of {', '.join(SHAPES)}.")] = "0.1,10",
    rates: Annotated[str, typer.Option(help="Learning rates; the paper's is 1e-6.")] = "1e-6,1e-5,3e-4",
    versions: Annotated[int, typer.Option(min=2, help="Versions of each run.")] = 24,
) -> None:
    """Print the table, and JSON."""
    torch.set_num_threads(1)
    print("parameters    rate  masters   versions back  values changed  bytes of the whole  most changed tensor")
    rows = []
    for size in sizes.split(","):
        for rate in map(float, rates.split(",")):
            for masters in ("bfloat16", "anywhere"):
                for row in measure(size, rate, versions, masters):
                    rows.append(row)
                    print(
                        f"{row.parameters:>10,}  {rate:6.0e}  {masters:<9} {row.back:>12}  {row.changed:>14.3%}"
                        f"  {row.delta:>18.3%}  {row.worst_tensor:>19.3%}",
                        flush=True,
                    )
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    typer.run(main)
