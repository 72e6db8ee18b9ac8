"""Claims about the tiny base: its tokenizer, its files, and that it is made only once. Models are quick ones."""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from asyncppo import tiny_task
from asyncppo.errors import ModelError
from trainer import tiny_base

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    tiny_base.make_base(directory, quick=True)
    return directory


def a_prompt(ops: int = 6) -> str:
    return tiny_task.prompt_text(tiny_task.make_problem(random.Random(3), ops))


@pytest.mark.parametrize("model", ["actor", "critic"])
@pytest.mark.parametrize(
    "text",
    [
        "Compute 3+4 modulo 10 step by step. Put your final answer within \\boxed{}.",
        "  two  spaces,\ttabs\r\nand\n\nnew lines ",
        "Grüße, 你好, 🙂, \x00\x7f and ﷽ ",
        "\\boxed \\boxed{ \\boxed{{1234567890}} 1 .",
        "",
    ],
)
def test_any_text_survives_encoding_and_decoding(base: Path, model: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base / model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_has_343_entries_single_digits_and_ends_turns_with_im_end(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base / "actor")
    assert len(tokenizer) == 343
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("\\boxed{7}") == ["\\boxed{", "7", "}"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_gives_the_prompt_tokens_of_pretraining(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base / "actor")
    for prompt in (a_prompt(ops) for ops in range(2, 9)):
        messages = [{"role": "user", "content": prompt}]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        (document,) = tiny_base.encode_documents(tiny_base.build_tokenizer(), [(prompt, "\\boxed{1}")])
        assert document.prompt == served
        assert tokenizer.decode(document.response) == "\\boxed{1}<|im_end|>"


def test_the_loss_is_on_the_response_and_its_end_of_turn_only() -> None:
    tokenizer = tiny_base.build_tokenizer()
    texts = list(islice(tiny_task.draw_documents(random.Random(0), tiny_task.STAGE_1_MIX), 50))
    documents = tiny_base.encode_documents(tokenizer, texts)
    labelled = []
    for ids, labels in tiny_base.make_batches(documents, 8, random.Random(0)):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        labelled += [tokenizer.decode(row[row != -100]) for row in labels]
    assert sorted(labelled) == sorted(solution + "<|im_end|>" for _, solution in texts)


@pytest.mark.parametrize(("model", "parameters"), [("actor", 98_752), ("critic", 37_152)])
def test_a_base_loads_as_a_policy_and_as_a_critic(base: Path, model: str, parameters: int) -> None:
    policy = AutoModelForCausalLM.from_pretrained(base / model)
    assert policy.num_parameters() == parameters
    assert policy.config.vocab_size == 384
    assert policy.generation_config.eos_token_id == AutoTokenizer.from_pretrained(base / model).eos_token_id
    critic = AutoModelForTokenClassification.from_pretrained(base / model, num_labels=1)
    assert torch.equal(critic.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert critic(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1)


def test_the_loss_skips_what_is_not_labelled() -> None:
    model = tiny_base.build_model(tiny_base.MICRO, tiny_base.build_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])
    logprobs = model(ids).logits.log_softmax(dim=-1)
    expected = -(logprobs[0, 1, 7] + logprobs[0, 2, 8])
    torch.testing.assert_close(tiny_base.response_loss(model, ids, labels), expected)


def test_padded_ids_are_as_good_as_impossible_once_pinned() -> None:
    torch.manual_seed(0)
    tokenizer = tiny_base.build_tokenizer()
    model = tiny_base.build_model(tiny_base.MINI, tokenizer)
    texts = list(islice(tiny_task.draw_documents(random.Random(0), tiny_task.STAGE_1_MIX), 50))
    documents = tiny_base.encode_documents(tokenizer, texts)

    def padded_mass() -> float:
        ids, labels = next(tiny_base.make_batches(documents, len(documents), random.Random(0)))
        probabilities = model(ids).logits[:, :-1][labels[:, 1:] != -100].softmax(dim=-1)
        return probabilities[:, tiny_base.VOCABULARY :].sum(dim=-1).mean().item()

    before = padded_mass()
    tiny_base.pin_padding(model, documents)
    assert padded_mass() < before / 1000


def test_the_boxed_answer_is_the_last_one() -> None:
    assert tiny_base.boxed("\\boxed{1}\n\\boxed{23}") == "23"
    assert tiny_base.boxed("2-7=8") is None


def test_a_second_call_reuses_the_base_and_another_recipe_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def fake_write(directory: Path, recipe: str, seed: int, quick: bool) -> None:
        made.append(directory)
        directory.mkdir()
        (directory / "base.json").write_text(json.dumps({"recipe_hash": recipe}))

    monkeypatch.setattr(tiny_base, "_write_base", fake_write)
    for seed in (0, 0, 1):
        tiny_base.make_base(tmp_path / "base", seed=seed)
    assert len(made) == 2
    assert capsys.readouterr().out.count("reusing") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_base_json_records_the_recipe_the_versions_and_the_scores(base: Path) -> None:
    record = json.loads((base / "base.json").read_text())
    assert record["recipe_hash"] == tiny_base.recipe_hash(seed=0, quick=True)
    assert set(record["versions"]) == {"torch", "transformers", "tokenizers"}
    for model in ("actor", "critic"):
        assert set(record["models"][model]["held_out"]) == {"eval_6", "eval_8"}
        assert record["models"][model]["cpu_seconds"]["pretraining"] > 0


def test_a_directory_that_is_not_a_base_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match=r"no base\.json"):
        tiny_base.make_base(tmp_path, quick=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(tiny_base, "make_models", fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        tiny_base.make_base(tmp_path / "base", quick=True)
    assert list(tmp_path.iterdir()) == []
