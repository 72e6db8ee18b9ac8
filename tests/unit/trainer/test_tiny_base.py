"""Claims about the tiny base: its tokenizer, its files, and that it is made only once. Models are quick ones."""

import json
import multiprocessing
import random
from collections.abc import Iterator
from itertools import islice
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from asyncppo import chains_task, tiny_task
from asyncppo.errors import ConfigError, ModelError
from trainer.tiny_base import base as tiny_base
from trainer.tiny_base.jobs import Job, make_models
from trainer.tiny_base.pretrain import build_model, pin_padding, response_loss
from trainer.tiny_base.recipes import CHAINS, MICRO, MINI, TASKS, TINY, chosen_recipes, recipe_hash
from trainer.tiny_base.scores import boxed, evaluate_marks
from trainer.tiny_base.tokens import build_tokenizer, encode_documents, make_batches

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


@pytest.fixture(scope="module", params=["small", "large"])
def chains(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chains") / request.param
    tiny_base.make_base(directory, task="chains", size=request.param, quick=True)
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
        (document,) = encode_documents(build_tokenizer(), [(prompt, "\\boxed{1}")])
        assert document.prompt == served
        assert tokenizer.decode(document.response) == "\\boxed{1}<|im_end|>"


def test_the_loss_is_on_the_response_and_its_end_of_turn_only() -> None:
    tokenizer = build_tokenizer()
    texts = list(islice(tiny_task.draw_documents(random.Random(0), tiny_task.STAGE_1_MIX), 50))
    documents = encode_documents(tokenizer, texts)
    labelled = []
    for ids, labels in make_batches(documents, 8, random.Random(0)):
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
    model = build_model(MICRO, build_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 7, 8]])
    logprobs = model(ids).logits.log_softmax(dim=-1)
    expected = -(logprobs[0, 1, 7] + logprobs[0, 2, 8])
    torch.testing.assert_close(response_loss(model, ids, labels), expected)


def test_padded_ids_are_as_good_as_impossible_once_pinned() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(MINI, tokenizer)
    texts = list(islice(tiny_task.draw_documents(random.Random(0), tiny_task.STAGE_1_MIX), 50))
    documents = encode_documents(tokenizer, texts)

    def padded_mass() -> float:
        ids, labels = next(make_batches(documents, len(documents), random.Random(0)))
        probabilities = model(ids).logits[:, :-1][labels[:, 1:] != -100].softmax(dim=-1)
        return probabilities[:, len(tokenizer) :].sum(dim=-1).mean().item()

    before = padded_mass()
    pin_padding(model, len(tokenizer), documents)
    assert padded_mass() < before / 1000


def test_the_boxed_answer_is_the_last_one() -> None:
    assert boxed("\\boxed{1}\n\\boxed{23}") == "23"
    assert boxed("2-7=8") is None


def test_a_second_call_reuses_the_base_and_another_recipe_replaces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def fake_write(directory: Path, key: tuple[str, str], recipe: str, seed: int, quick: bool) -> None:
        made.append(directory)
        directory.mkdir()
        (directory / "base.json").write_text(json.dumps({"recipe_hash": recipe}))

    monkeypatch.setattr(tiny_base, "_write_base", fake_write)
    for task, seed in (("tiny", 0), ("tiny", 0), ("tiny", 1), ("chains", 1)):
        tiny_base.make_base(tmp_path / "base", task=task, seed=seed)
    assert len(made) == 3
    assert capsys.readouterr().out.count("reusing") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_base_json_records_the_recipe_the_versions_and_the_scores(base: Path) -> None:
    record = json.loads((base / "base.json").read_text())
    assert record["recipe_hash"] == recipe_hash(TINY, seed=0, quick=True)
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


# ---- chains ----


def test_chains_make_an_actor_and_three_critics_of_different_sizes_that_load(chains: Path) -> None:
    record = json.loads((chains / "base.json").read_text())
    assert (record["task"], record["size"]) == ("chains", chains.name)
    assert record["recipe_hash"] == recipe_hash(TASKS["chains", chains.name], seed=0, quick=True)
    sizes = {name: model["parameters"] for name, model in record["models"].items()}
    assert sizes["critic_small"] < sizes["critic"] < sizes["critic_symmetric"] == sizes["actor"]
    if chains.name == "small":
        assert (sizes["actor"], sizes["critic"]) == (172_576, 81_072)
    for name in sizes:
        assert AutoModelForCausalLM.from_pretrained(chains / name).num_parameters() == sizes[name]
        tokens = AutoTokenizer.from_pretrained(chains / name)
        assert len(tokens) <= 384
        critic = AutoModelForTokenClassification.from_pretrained(chains / name, num_labels=1)
        assert critic(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1)


def test_the_actor_is_judged_by_its_answers_and_a_graded_critic_by_its_marks(chains: Path) -> None:
    record = json.loads((chains / "base.json").read_text())["models"]
    lengths = {"small": {"eval_6", "eval_8"}, "large": {"eval_12", "eval_16"}}[chains.name]
    for name, model in record.items():
        assert set(model["held_out"]) == lengths
        assert {path.stem for path in (chains / "data").glob("eval*")} == lengths
        for score in model["held_out"].values():
            answers = {"sampled_pass_at_1", "sampled_pass_at_4", "greedy"}
            marks = {"accuracy", "after_a_slip", "before_a_slip"}
            assert set(score) == (answers if name == "actor" else marks)


def test_the_longest_solution_of_a_task_fits_its_limit_and_each_token_is_one_character_or_the_box() -> None:
    for size, lengths in (("small", chains_task.SHORT), ("large", chains_task.LONG)):
        task = TASKS["chains", size]
        tokenizer = build_tokenizer(task.prompt)
        problem = chains_task.make_problem(random.Random(0), max(lengths.training))
        solution = chains_task.write_solution(random.Random(0), problem)
        (document,) = encode_documents(tokenizer, [(chains_task.prompt_text(problem), solution)])
        assert [tokenizer.decode([token]) for token in document.response[:-1]] == chains_task.split_tokens(solution)
        assert len(document.response) <= task.max_response_tokens
        assert len(document.prompt) <= 64


def test_the_marks_have_no_meaning_in_a_plain_text_and_are_single_tokens() -> None:
    tokenizer = build_tokenizer(CHAINS.prompt)
    problem = chains_task.make_problem(random.Random(0), 6)
    for text in ("4-1,=3!", "\\boxed{,6!}"):
        (document,) = encode_documents(tokenizer, [(chains_task.prompt_text(problem), text)])
        ids = tokenizer.convert_tokens_to_ids(list(chains_task.MARKS))
        assert [token for token in document.response if token in ids] == ids


def test_the_symmetric_critic_gets_as_many_graded_steps_as_the_mini_critic() -> None:
    for size in ("small", "large"):
        recipes = TASKS["chains", size].recipes
        assert recipes["critic_symmetric"].shape == recipes["actor"].shape
        assert recipes["critic_symmetric"].steps == recipes["critic"].steps
        assert [recipe.grades for recipe in recipes.values()] == [False, True, True, True]


def test_a_weighted_token_counts_that_often_in_the_loss() -> None:
    model = build_model(MICRO, build_tokenizer())
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, -100, 7, 8]])
    weights = torch.ones(384)
    weights[8] = 4.0
    logprobs = model(ids).logits.log_softmax(dim=-1)
    expected = -(logprobs[0, 1, 7] + 4 * logprobs[0, 2, 8])
    torch.testing.assert_close(response_loss(model, ids, labels, weights), expected)


@pytest.mark.parametrize(("says_bad", "accuracy"), [("always", "after_a_slip"), ("never", "before_a_slip")])
def test_marks_are_judged_before_and_after_a_slip(says_bad: str, accuracy: str) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CHAINS.prompt)
    model = build_model(MICRO, tokenizer)
    good, bad = tokenizer.convert_tokens_to_ids(list(chains_task.MARKS))

    class Head(torch.nn.Module):
        """Logits that prefer one mark, whatever the state."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*hidden.shape[:-1], 384)
            logits[..., bad if says_bad == "always" else good] = 1.0
            return logits

    model.lm_head = Head()
    marking = evaluate_marks(model, tokenizer, ops=6, problems=64, seed=0)
    other = {"after_a_slip": "before_a_slip", "before_a_slip": "after_a_slip"}[accuracy]
    assert getattr(marking, accuracy) == 1.0
    assert getattr(marking, other) == 0.0
    after = [
        index >= slip if (slip := chains_task.slip_token(problem, text)) is not None else False
        for problem, text in islice(chains_task.draw_solutions(random.Random("marks 0"), [6], "eval"), 64)
        for index in range(len(chains_task.split_tokens(text)))
    ]
    share = sum(after) / len(after)
    assert marking.accuracy == pytest.approx(share if says_bad == "always" else 1 - share, abs=1e-4)


def test_a_task_or_size_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--task tiny --size large: .*expected one of: --task tiny --size small"):
        tiny_base.make_base(tmp_path / "base", task="tiny", size="large")


# ---- side by side ----


def test_two_processes_run_at_a_time_and_every_result_comes_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []
    start = SpawnProcess.start

    def counted_start(process: SpawnProcess) -> None:
        start(process)
        alive.append(len(multiprocessing.active_children()))

    monkeypatch.setattr(SpawnProcess, "start", counted_start)
    data = tmp_path / "data"
    chains_task.write_datasets(data, 0)
    recipe = chosen_recipes(CHAINS, quick=True)["critic_small"]
    made = [Job(name, ("chains", "small"), recipe, 0, tmp_path / name, data, problems=2) for name in "abc"]
    results = make_models(made, side_by_side=True)
    assert list(results) == ["a", "b", "c"]
    assert all((tmp_path / name / "model.safetensors").exists() for name in results)
    assert len(alive) == 3
    assert max(alive) == 2
