"""The models and their pretraining."""

import random
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from asyncppo import chains_task
from trainer.tiny_base.recipes import Recipe, Shape, Stage, Task
from trainer.tiny_base.tokens import PADDED_VOCABULARY, Document, encode_documents, make_batches


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with tied embeddings, in float32."""
    config = Qwen3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Run the stages of `recipe` one after the other; `report(step, loss)` is called now and then."""
    done = 0
    for stage in recipe.stages:
        texts = list(islice(task.texts[stage.text](seed), stage.steps * recipe.batch))
        documents = encode_documents(tokenizer, texts)
        # A constant denominator: a mean over each batch would give short, direct answers a far larger weight.
        tokens_per_batch = recipe.batch * sum(len(document.response) for document in documents) / len(documents)
        weights = _token_weights(tokenizer, stage)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=stage.peak_lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(stage, recipe))
        for step, (ids, labels) in enumerate(make_batches(documents, recipe.batch, random.Random(seed)), start=1):
            loss = response_loss(model, ids, labels, weights) / tokens_per_batch
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0 or step == stage.steps:
                report(done + step, loss.item())
        done += stage.steps


def _learning_rate(stage: Stage, recipe: Recipe) -> Callable[[int], float]:
    """A linear warm-up, then a linear fall to `final_lr`, as a factor of the peak."""

    def factor(step: int) -> float:
        rising = (step + 1) / recipe.warmup
        falling = 1 - (1 - recipe.final_lr) * step / stage.steps
        return min(rising, falling)

    return factor


def _token_weights(tokenizer: PreTrainedTokenizerFast, stage: Stage) -> torch.Tensor:
    """The weight of each token's loss, [v]."""
    weights = torch.ones(PADDED_VOCABULARY)
    weights[tokenizer.convert_tokens_to_ids(list(chains_task.MARKS))] = stage.mark_weight
    return weights


def response_loss(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The summed cross-entropy of the labelled tokens, each times its weight, [v].

    Logits are computed only where there is a label. Padding is on the right and attention is causal, so no attention
    mask is needed.
    """
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    labelled = targets != -100
    logits = model.lm_head(hidden[labelled])
    return functional.cross_entropy(logits, targets[labelled], weights, reduction="sum")


def pin_padding(model: Qwen3ForCausalLM, vocabulary: int, documents: Sequence[Document]) -> None:
    """Make the ids that stand for no text (from `vocabulary` on) next to impossible to sample.

    The embedding is tied, so a row e of it gives the logit h·e of every hidden state h. All padded ids get one common
    row, fitted to make the sum over h of exp(h·e) / sum of exp(logits of h) small. Sixty steps take their probability
    from about 1e-6 to 1e-9 a token; many more would only buy a long row, which is worse on text unlike `documents`.
    """
    ids, labels = next(make_batches(documents, len(documents), random.Random(0)))
    with torch.no_grad():
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[labels[:, 1:] != -100]
        normaliser = model.lm_head(hidden)[:, :vocabulary].logsumexp(dim=-1)
    row = torch.zeros(hidden.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([row], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (hidden @ row - normaliser).logsumexp(dim=0).backward()
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight[vocabulary:] = row
