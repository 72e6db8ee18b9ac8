"""Claims about the networks: packing changes no number, and a model that cannot be trained right is refused.

Everything is float32 and held against transformers' own models, one sequence at a time, with their default attention.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, Gemma2Config, MistralConfig, OlmoConfig, T5Config

from asyncppo.config import ActorConfig, CriticConfig
from asyncppo.errors import ModelError
from tests.model_maker import a_batch, a_model, largest_difference, weights_of
from trainer.model import networks
from trainer.model.networks import PolicyNet, ValueNet, check_causal_lm, check_critic
from trainer.model.packing import Packed, gather

pytestmark = pytest.mark.unit

TEMPERATURE = 0.7
TOLERANCE = 1e-5


def actor(**settings: object) -> PolicyNet:
    path = str(a_model())
    return PolicyNet(path, ActorConfig(path=path, dtype="float32", **settings)).train()


def critic(seed: int = 1, **settings: object) -> ValueNet:
    return ValueNet(str(a_model()), CriticConfig(dtype="float32", **settings), seed).train()


def packed(*which: int) -> Packed:
    batch = a_batch()
    chosen = which or range(len(batch.sequence_lengths))
    return gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, list(chosen), torch.device("cpu"))


def gradients_of(network: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def weighted(results: tuple[torch.Tensor, ...] | torch.Tensor) -> torch.Tensor:
    """A loss in which every token counts differently."""
    parts = results if isinstance(results, tuple) else (results,)
    return sum((part * torch.linspace(-1.0, 2.0, len(part)) * (k + 1)).sum() for k, part in enumerate(parts))


def one_by_one(forward: Callable[[Packed], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    results = [forward(packed(index)) for index in range(len(a_batch().sequence_lengths))]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def by_hand(model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Log-probs and entropies of softmax(logits / T), from a plain transformers model, one sequence at a time."""

    def forward(one: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=one.input_ids).logits[0, one.predict]
        logprobs = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        return logprobs[torch.arange(len(one.labels)), one.labels], -(logprobs.exp() * logprobs).sum(-1)

    return one_by_one(forward)


def test_no_kv_cache_is_kept_although_the_models_directory_asks_for_one() -> None:
    # with transformers' own attention, packed sequences leak into each other as soon as there is a cache
    assert json.loads((a_model() / "config.json").read_text())["use_cache"] is True
    assert actor().hf.base_model(**networks._inputs(packed())).past_key_values is None


def test_packed_log_probs_entropies_and_gradients_equal_those_of_plain_transformers_one_by_one() -> None:
    network = actor()
    plain = AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    ours, theirs = network(packed(), TEMPERATURE), by_hand(plain)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    gradients = gradients_of(network, weighted(ours))
    expected_gradients = {f"hf.{name}": value for name, value in gradients_of(plain, weighted(theirs)).items()}
    scale = max(float(value.abs().max()) for value in expected_gradients.values())
    assert largest_difference(gradients, expected_gradients) < TOLERANCE * scale


def test_packed_values_and_gradients_equal_those_of_plain_transformers_one_by_one() -> None:
    network = critic()
    plain = networks.AutoModelForTokenClassification.from_pretrained(
        a_model(), config=network.hf.config, dtype=torch.float32, attn_implementation="eager"
    )
    plain.load_state_dict(network.hf.state_dict())
    ours = network(packed())
    (theirs,) = one_by_one(lambda one: (plain(input_ids=one.input_ids).logits[0, one.predict, 0],))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    gradients = gradients_of(network, weighted(ours))
    expected_gradients = {f"hf.{name}": value for name, value in gradients_of(plain, weighted(theirs)).items()}
    scale = max(float(value.abs().max()) for value in expected_gradients.values())
    assert largest_difference(gradients, expected_gradients) < TOLERANCE * scale


def test_the_temperature_divides_the_logits() -> None:
    network = actor()
    assert not torch.allclose(network(packed(), 1.0)[0], network(packed(), TEMPERATURE)[0], atol=0.01)


def test_the_size_of_the_vocabulary_chunks_changes_neither_numbers_nor_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = actor()
    whole = network(packed(), TEMPERATURE)
    whole_gradients = gradients_of(network, weighted(whole))
    monkeypatch.setattr(networks, "_HEAD_CHUNK", 3)
    cut = network(packed(), TEMPERATURE)
    cut_gradients = gradients_of(network, weighted(cut))
    for got, expected in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    assert largest_difference(cut_gradients, whole_gradients) < TOLERANCE
    with torch.no_grad():
        torch.testing.assert_close(network(packed(), TEMPERATURE), tuple(cut), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("make", [actor, critic])
def test_gradient_checkpointing_changes_no_gradient(make: Callable[..., torch.nn.Module]) -> None:
    def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
        arguments = (packed(), TEMPERATURE) if isinstance(network, PolicyNet) else (packed(),)
        return gradients_of(network, weighted(network(*arguments)))

    assert largest_difference(gradients(make(gradient_checkpointing=True)), gradients(make())) < TOLERANCE


@pytest.mark.parametrize("make", [actor, critic])
def test_an_empty_micro_batch_gives_no_results_and_gradients_of_zero(make: Callable[..., torch.nn.Module]) -> None:
    network = make()
    batch = a_batch()
    nothing = gather(batch.input_ids, batch.sequence_lengths, batch.response_lengths, [], torch.device("cpu"))
    results = network(nothing, TEMPERATURE) if isinstance(network, PolicyNet) else network(nothing)
    loss = weighted(results)
    assert [len(part) for part in (results if isinstance(results, tuple) else (results,))] in ([0, 0], [0])
    assert all(not gradient.any() for gradient in gradients_of(network, loss).values())


def test_a_critic_in_training_gives_the_same_values_twice() -> None:
    network = critic()
    assert network.training
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.0]
    torch.testing.assert_close(network(packed()), network(packed()), atol=0, rtol=0)


def test_two_critics_of_one_checkpoint_differ_in_the_head_and_in_nothing_else() -> None:
    first, second = weights_of(critic(seed=1)), weights_of(critic(seed=2))
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"hf.score.weight"}
    assert largest_difference(first, weights_of(critic(seed=1))) == 0


def test_an_actor_has_a_scalar_head_nowhere_and_keeps_its_checkpoints_weights() -> None:
    plain = AutoModelForCausalLM.from_pretrained(a_model(), dtype=torch.float32)
    ours = {name.removeprefix("hf."): value for name, value in weights_of(actor()).items()}
    assert largest_difference(ours, weights_of(plain)) == 0


def test_a_network_has_the_dtype_of_the_config_and_gives_float32() -> None:
    path = str(a_model())
    network = PolicyNet(path, ActorConfig(path=path, dtype="bfloat16"))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert [part.dtype for part in network(packed(), TEMPERATURE)] == [torch.float32, torch.float32]


def test_packed_attention_without_the_boundaries_is_an_error() -> None:
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        actor().hf(input_ids=packed().input_ids)


def a_config_directory(directory: Path, config: object, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("make", "architecture", "reason"),
    [
        (T5Config, "T5ForConditionalGeneration", "expected a causal language model, its model_type is 't5'"),
        (BertConfig, "BertForMaskedLM", "expected a causal language model, it says BertForMaskedLM"),
        (Gemma2Config, "Gemma2ForCausalLM", "changes its logits by final_logit_softcapping; not supported"),
    ],
)
def test_a_model_that_is_no_causal_language_model_or_caps_its_logits_is_refused(
    tmp_path: Path, make: type, architecture: str, reason: str
) -> None:
    path = a_config_directory(tmp_path / "model", make(), architecture)
    for build in (check_causal_lm, lambda path: PolicyNet(path, ActorConfig(path=path))):
        with pytest.raises(ModelError) as caught:
            build(path)
        assert str(caught.value).endswith(reason)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("missing", ["nothing", "empty", "broken"])
def test_a_directory_without_a_readable_config_is_refused_in_one_line(tmp_path: Path, missing: str) -> None:
    path = tmp_path / missing
    if missing != "nothing":
        path.mkdir()
    if missing == "broken":
        (path / "config.json").write_text("{not json")
    with pytest.raises(ModelError) as caught:
        check_causal_lm(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copy(a_model() / "config.json", tmp_path)
    path = str(tmp_path)
    for build in (
        functools.partial(PolicyNet, path, ActorConfig(path=path)),
        functools.partial(ValueNet, path, CriticConfig(), 1),
    ):
        with pytest.raises(ModelError) as caught:
            build()
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_a_weight_is_refused_instead_of_trained_from_a_random_one(tmp_path: Path) -> None:
    path = str(shutil.copytree(a_model(), tmp_path / "model"))
    weights = load_file(f"{path}/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    for build in (
        functools.partial(PolicyNet, path, ActorConfig(path=path)),
        functools.partial(ValueNet, path, CriticConfig(), 1),
    ):
        with pytest.raises(ModelError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight$"):
            build()


def test_a_model_without_a_token_classification_head_is_refused_as_a_critic(tmp_path: Path) -> None:
    path = a_config_directory(tmp_path / "model", OlmoConfig(), "OlmoForCausalLM")
    check_causal_lm(path)
    with pytest.raises(ModelError, match="cannot be a critic"):
        check_critic(path)


def test_attention_that_reaches_back_less_far_than_a_sequence_is_an_error_and_not_a_wrong_number() -> None:
    config = MistralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        use_cache=False,
        attn_implementation="segments",
    )
    model = AutoModelForCausalLM.from_config(config)
    inside, beyond = packed(1), packed(2)  # 4 and 12 tokens
    for one, fits in ((inside, True), (beyond, False)):
        arguments = {"input_ids": one.input_ids, "position_ids": one.position_ids, "cu_seq_lens_q": one.boundaries}
        if fits:
            assert model(**arguments).logits.shape[1] == 4
        else:
            with pytest.raises(ValueError, match="sliding window of 6"):
                model(**arguments)
