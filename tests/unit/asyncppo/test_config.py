"""The config: what is refused, what the refusal says, and what the documentation holds."""

from pathlib import Path

import msgspec
import pytest

from asyncppo import config
from asyncppo.config import Config
from asyncppo.errors import ConfigError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
LEAST = "data: {train: train.jsonl}\nactor: {path: model}\n"


@pytest.fixture
def least(tmp_path: Path) -> Path:
    """A file with the two keys that have no default."""
    path = tmp_path / "least.yaml"
    path.write_text(LEAST)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What is said when this config is refused; always one line."""
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_two_keys_are_enough_and_the_rest_are_the_papers_defaults(least: Path) -> None:
    loaded = config.load(least)
    assert (loaded.algorithm.critics, loaded.algorithm.shards, loaded.algorithm.utd) == (2, "disjoint", 1)
    assert (loaded.algorithm.mask_fraction, loaded.algorithm.entropy_filter) == (0.2, 0.2)
    assert (loaded.algorithm.clip_low, loaded.algorithm.clip_high) == (0.2, 0.2)
    assert (loaded.algorithm.gamma, loaded.algorithm.lam) == (1.0, 1.0)
    assert loaded.stream.max_staleness == 4
    assert loaded.stream.address.startswith("tcp://127.0.0.1:")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert config.load(path).run.steps > 0


def test_there_are_shipped_configs() -> None:
    assert list((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.udt=2", "unknown key algorithm.udt; did you mean algorithm.utd?"),
        ("algorithm.max_stalenes=2", "unknown key algorithm.max_stalenes"),
        ("algorithm.max_staleness=2", "unknown key algorithm.max_staleness; did you mean stream.max_staleness?"),
        ("algoritm.utd=2", "unknown key algoritm; did you mean algorithm?"),
        ("run.zzzzzz=2", "unknown key run.zzzzzz; known keys here: name, directory, seed"),
        ("critic.each=[{}, {pth: a}]", "unknown key critic.each[1].pth; did you mean critic.each[1].path?"),
        ("critic.each=[{zzzzzz: 1}]", "unknown key critic.each[0].zzzzzz; known keys here: path, learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(least: Path, override: str, said: str) -> None:
    assert said in refusal(least, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.utd=5", "algorithm.utd: expected `int` <= 4, got 5"),
        ("algorithm.utd=0", "algorithm.utd: expected `int` >= 1, got 0"),
        ("algorithm.utd=2.5", "algorithm.utd: expected `int`, got 2.5"),
        ("algorithm.utd=", "algorithm.utd: expected `int`, got null"),
        ("algorithm.aggregation=max", "algorithm.aggregation: expected `mean` or `min` or `confidence`, got 'max'"),
        ("stream.max_staleness=-1", "stream.max_staleness: expected `int` >= 0, got -1"),
        ("stream.max_staleness=65", "stream.max_staleness: expected `int` <= 64, got 65"),
        ("stream.max_staleness=four", "stream.max_staleness: expected `int`, got 'four'"),
        ("stream.address=localhost", "stream.address: expected `str` matching regex"),
        ("sampling.temperature=0", "sampling.temperature: expected `float` > 0.0, got 0"),
        ("actor.betas=[0.9]", "actor.betas: expected `array` of length 2, got [0.9]"),
        ("actor.betas=[0.9, 1.5]", "actor.betas[1]: expected `float` < 1.0, got 1.5"),
        ("critic.addresses=[7]", "critic.addresses[0]: expected `str`, got 7"),
        ("eval.sets={six: [1]}", "eval.sets[...]: expected `str`, got {'six': [1]}"),
        ("data=3", "data: expected `object`, got 3"),
        ("algorithm.mask_fraction=1", "algorithm.mask_fraction: expected `float` < 1.0, got 1"),
        ("algorithm.mask_fraction=[[0, 0], [5, 2]]", "algorithm.mask_fraction[1][1]: expected `float` < 1.0, got 2"),
        ("algorithm.entropy_filter=[[0.5, 0]]", "algorithm.entropy_filter[0][0]: expected `int`, got 0.5"),
        ("algorithm.mask_fraction=low", "algorithm.mask_fraction: expected `float | array`, got 'low'"),
        ("algorithm.lam_length_alpha=0", "algorithm.lam_length_alpha: expected `float` > 0.0, got 0"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip: expected `float` > 1.0, got 1"),
        ("algorithm.clip_low=1", "algorithm.clip_low: expected `float` < 1.0, got 1"),
        ("algorithm.behaviour_cap=0.5", "algorithm.behaviour_cap: expected `float` >= 1.0, got 0.5"),
        ("algorithm.divergence_limit=0", "algorithm.divergence_limit: expected `float` > 0.0, got 0"),
        ("algorithm.kl_coef=-1", "algorithm.kl_coef: expected `float` >= 0.0, got -1"),
        ("algorithm.ratio=group", "algorithm.ratio: expected `token` or `sequence` or `prefix-min`, got 'group'"),
        ("algorithm.trust=kl", "algorithm.trust: expected `clip` or `divergence`, got 'kl'"),
        ("guard.min_ess=1.5", "guard.min_ess: expected `float` <= 1.0, got 1.5"),
        ("guard.max_logprob_gap=0", "guard.max_logprob_gap: expected `float` > 0.0, got 0"),
        ("guard.recover_after=0", "guard.recover_after: expected `int` >= 1, got 0"),
        ("guard.max_skipped=0", "guard.max_skipped: expected `int` >= 1, got 0"),
        ("critic.lam=1.5", "critic.lam: expected `float` <= 1.0, got 1.5"),
        ("critic.value_clip=0", "critic.value_clip: expected `float` > 0.0, got 0"),
        ("critic.warmup_batches=-1", "critic.warmup_batches: expected `int` >= 0, got -1"),
        ("critic.each=[{epochs: 0}, {}]", "critic.each[0].epochs: expected `int` >= 1, got 0"),
        ("run.name=" + 99 * "/", "run.name: expected `str` matching regex"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_expected_and_what_came(least: Path, override: str, said: str) -> None:
    text = refusal(least, override)
    assert said in text
    assert ", got " in text


@pytest.mark.parametrize("utd", [1, 2, 3, 4])
def test_utd_goes_from_1_to_4(least: Path, utd: int) -> None:
    assert config.load(least, [f"algorithm.utd={utd}"]).algorithm.utd == utd


@pytest.mark.parametrize("bound", [0, 1, 64])
def test_max_staleness_goes_from_0_to_64(least: Path, bound: int) -> None:
    assert config.load(least, [f"stream.max_staleness={bound}"]).stream.max_staleness == bound


def test_a_missing_key_without_default_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("data: {train: x}\nactor: {dtype: float32}\n")
    assert "actor.path is missing and has no default" in refusal(path)


def test_files_that_are_no_config_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "there is no such config file" in refusal(tmp_path / "none.yaml")
    path = tmp_path / "some.yaml"
    path.write_text("- a\n- b\n")
    assert "expected sections such as `data:`" in refusal(path)
    path.write_text("a: [1\nb: 2")
    assert "cannot be read as YAML" in refusal(path)


def test_a_base_is_read_first_and_what_differs_goes_on_top(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(LEAST + "algorithm: {utd: 2, critics: 3}\nrun: {steps: 7}\n")
    (tmp_path / "sub").mkdir()
    above = tmp_path / "sub" / "above.yaml"
    above.write_text("base: ../below.yaml\nalgorithm: {utd: 4}\n")
    loaded = config.load(above)
    assert (loaded.algorithm.utd, loaded.algorithm.critics, loaded.run.steps) == (4, 3, 7)


def test_a_base_that_comes_back_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "goes round in a circle" in refusal(tmp_path / "a.yaml")


def test_overrides_come_last_and_are_yaml(least: Path) -> None:
    loaded = config.load(
        least,
        ["run.steps=3", "eval.limit=null", "critic.addresses=[]", "eval.sets={a: b=c.jsonl}", "run.steps=4"],
    )
    assert loaded.run.steps == 4
    assert loaded.eval.limit is None
    assert loaded.eval.sets == {"a": "b=c.jsonl"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("data.train.deep=3", "train is a value, not a section"),
        ("run.steps=[1", "the value is not YAML"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(least: Path, override: str, said: str) -> None:
    text = refusal(least, override)
    assert said in text
    assert "--set" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.critics=5", "sampling.group_size=4"], "disjoint shards need a response for each critic"),
        (["algorithm.critics=0", "sampling.group_size=1"], "a group needs 2 or more"),
        (["critic.addresses=['tcp://a:1']"], "critic.addresses has 1 entries for 2 critics"),
        (["actor.devices=[0, 1]"], "actor.devices has 2 GPUs for 1 processes"),
        (["critic.devices=[0]"], "critic.devices has 1 GPUs for 2 critic processes"),
        (["actor.minibatches=65"], "actor.minibatches is 65, more than the 64 groups"),
        (["actor.engine=plain", "actor.processes=2"], "actor.engine is plain, which trains in one process"),
        (["critic.each=[{}]"], "critic.each has 1 entries for 2 critics"),
        (["critic.each=[{}]", "algorithm.critics=0"], "critic.each has 1 entries for 0 critics"),
        (["critic.each=[{}, {minibatches: 65}]"], "critic.minibatches is 65, more than the 64 groups"),
        (
            ["algorithm.mask_signal=entropy", "algorithm.proximal=behaviour"],
            "algorithm.proximal is behaviour: set algorithm.proximal to recompute",
        ),
        (["algorithm.mask_signal=entropy", "algorithm.proximal=interpolate"], "algorithm.proximal is interpolate"),
        (["algorithm.mask_fraction=[]"], "algorithm.mask_fraction: expected points [version, value]"),
        (["algorithm.mask_fraction=[[3, 0.1], [3, 0.2]]"], "with rising versions, got [(3, 0.1), (3, 0.2)]"),
        (["algorithm.entropy_filter=[[3, 0.1], [2, 0.2]]"], "algorithm.entropy_filter: expected points"),
        (["reward.functions={a: .nan}"], "expected finite weights"),
        (["reward.functions={a: 1, b: .inf}"], "expected finite weights"),
        (
            ["reward.overlong_buffer=9", "sampling.max_response_tokens=8"],
            "reward.overlong_buffer is 9, more than the 8 tokens of a response",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(least: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(least, *overrides)


def test_what_is_dumped_loads_to_the_same_config(least: Path, tmp_path: Path) -> None:
    loaded = config.load(least, ["algorithm.utd=3", "eval.sets={a: b}", "actor.betas=[0.8, 0.9]"])
    again = tmp_path / "again.yaml"
    again.write_bytes(config.dump(loaded))
    assert config.load(again) == loaded


def test_what_can_be_derived_follows_from_the_keys(least: Path) -> None:
    loaded = config.load(
        least,
        [
            "run.steps=10",
            "stream.prompts_per_batch=8",
            "sampling.group_size=16",
            "stream.max_staleness=4",
            "algorithm.utd=2",
            "critic.minibatches=4",
        ],
    )
    derived = loaded.derived()
    assert derived["responses_per_batch"] == 128
    assert derived["max_admitted_groups"] == 40
    assert derived["actor_optimizer_steps"] == 20
    assert derived["critic_optimizer_steps"] == 80


@pytest.mark.parametrize(
    "override",
    [
        "sampling.group_size=8",
        "sampling.max_response_tokens=9",
        "sampling.temperature=0.9",
        "sampling.top_p=0.9",
        "sampling.top_k=50",
        "reward.function=a:b",
        "reward.functions={a:b: 1}",
        "reward.overlong_buffer=5",
        "reward.workers=2",
        "reward.timeout_s=1",
    ],
)
def test_the_agreement_changes_with_sampling_and_reward(least: Path, override: str) -> None:
    assert config.load(least, [override]).agreement_hash() != config.load(least).agreement_hash()


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "run.name=other",
        "data.train=other.jsonl",
        "eval.samples=8",
        "stream.address=tcp://127.0.0.1:1",
        "stream.max_staleness=0",
        "algorithm.utd=4",
        "actor.learning_rate=0.1",
        "critic.epochs=3",
        "critic.each=[{}, {path: other}]",
        "critic.warmup_batches=5",
        "algorithm.critics=1",
        "algorithm.mask_fraction=[[0, 0], [9, 0.5]]",
        "algorithm.ratio=sequence",
        "algorithm.kl_coef=1",
        "guard.min_ess=0",
        "run.inspect_every=1",
        "stream.drop_equal_rewards=true",
        "rollout.max_groups=3",
        "publish.directory=/tmp",
    ],
)
def test_the_agreement_changes_with_nothing_else(least: Path, override: str) -> None:
    assert config.load(least, [override]).agreement_hash() == config.load(least).agreement_hash()


def test_the_documentation_has_a_line_with_a_text_for_every_key() -> None:
    lines = config.documentation().splitlines()
    hints = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for section, kind in hints.items():
        start = lines.index(f"## {section}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        rows = {line.split("`")[1]: line for line in lines[start:end] if line.startswith("| `")}
        assert list(rows) == list(kind.__struct_fields__)
        for row in rows.values():
            assert len(row.removesuffix(" |").rsplit(" | ", 1)[1]) > 10


def test_the_configuration_page_is_the_generated_one() -> None:
    page = Path(__file__).parents[3] / "docs/configuration.md"
    assert page.read_text() == config.documentation() + "\n", "run: asyncppo config docs > docs/configuration.md"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("reward.functions={math_verify: 1.0, 'a:b': .nan}", "expected finite weights"),
        ("reward.functions={math_verify: .inf}", "expected finite weights"),
        ("reward.overlong_buffer=65", r"reward\.overlong_buffer is 65, more than the 64 tokens"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(least: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(least, ["sampling.max_response_tokens=64", override])
    config.load(least, ["sampling.max_response_tokens=64", "reward.overlong_buffer=64"])


@pytest.mark.parametrize("top_k", [0, 1])
def test_greedy_top_k_is_refused(top_k: int) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.top_k is"):
        config.load(ROOT / "configs/demo.yaml", [f"sampling.top_k={top_k}"])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (0.3, {0: 0.3, 99: 0.3}),
        ([(5, 0.4)], {0: 0.4, 5: 0.4, 9: 0.4}),
        ([(2, 0.1), (6, 0.5)], {0: 0.1, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.5, 99: 0.5}),
        ([(0, 0.0), (4, 0.8), (6, 0.2)], {0: 0.0, 1: 0.2, 4: 0.8, 5: 0.5, 6: 0.2, 7: 0.2}),
        ([(1, 0.5), (2, 0.0)], {0: 0.5, 1: 0.5, 2: 0.0}),
    ],
)
def test_a_scheduled_key_runs_in_straight_lines_between_its_points_and_is_constant_outside(
    points: float | list[tuple[int, float]], expected: dict[int, float]
) -> None:
    assert {version: config.at(points, version) for version in expected} == pytest.approx(expected)


def test_a_schedule_is_read_from_yaml(least: Path) -> None:
    loaded = config.load(least, ["algorithm.mask_fraction=[[0, 0.0], [100, 0.2]]"])
    assert config.at(loaded.algorithm.mask_fraction, 50) == pytest.approx(0.1)


def test_each_critic_has_its_entry_on_top_of_the_section(least: Path) -> None:
    loaded = config.load(
        least,
        [
            "critic.learning_rate=0.5",
            "critic.weight_decay=0.25",
            "critic.minibatches=2",
            "critic.each=[{path: mini, learning_rate: 0.125, epochs: 3}, {weight_decay: 0, warmup_steps: 7}]",
            "run.steps=10",
        ],
    )
    first, second = (loaded.critic_of(index) for index in range(2))
    assert (first.path, first.learning_rate, first.weight_decay, first.epochs) == ("mini", 0.125, 0.25, 3)
    assert (second.path, second.learning_rate, second.weight_decay, second.epochs) == ("model", 0.5, 0.0, 1)
    assert (first.warmup_steps, second.warmup_steps) == (0, 7)
    assert [section.minibatches for section in (first, second)] == [2, 2]
    assert loaded.critic_paths == ["mini", "model"]
    assert [loaded.critic_steps(index) for index in range(2)] == [10 * 3 * 2, 10 * 1 * 2]


@pytest.mark.parametrize(
    ("overrides", "epochs"),
    [
        (["algorithm.utd=3"], 3),
        (["algorithm.utd=3", "algorithm.reuse=replay"], 1),
        (["algorithm.utd=3", "critic.epochs=2"], 2),
    ],
)
def test_a_critics_epochs_follow_utd_unless_they_are_said(least: Path, overrides: list[str], epochs: int) -> None:
    assert config.load(least, overrides).critic_of(0).epochs == epochs


WARM = ["critic.warmup_batches=3"]


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "run.steps=7",
        "algorithm.utd=4",
        "algorithm.mask_fraction=0.5",
        "algorithm.lam=0.5",
        "actor.learning_rate=0.1",
        "critic.warmup_steps=5",
        "critic.schedule=cosine",
        "critic.epochs=3",
        "critic.fresh_values=true",
        "critic.timeout_s=5",
        "guard.min_ess=0",
        "stream.max_staleness=0",
    ],
)
def test_a_warm_start_does_not_depend_on_the_seed_or_on_what_comes_after_it(least: Path, override: str) -> None:
    assert config.load(least, [*WARM, override]).warmup_directory == config.load(least, WARM).warmup_directory


@pytest.mark.parametrize(
    "override",
    [
        "critic.warmup_batches=4",
        "critic.learning_rate=0.125",
        "critic.warmup_learning_rate=0.125",
        "critic.warmup_learning_rate=1e-6",  # the number of critic.learning_rate, but it falls
        "critic.each=[{}, {learning_rate: 0.125}]",
        "critic.path=other",
        "critic.minibatches=2",
        "critic.lam=0.5",
        "critic.value_clip=0.5",
        "critic.dtype=float32",
        "actor.path=other",
        "data.train=other.jsonl",
        "sampling.temperature=0.5",
        "reward.function=a:b",
        "stream.prompts_per_batch=8",
        "stream.drop_equal_rewards=true",
        "algorithm.critics=1",
        "algorithm.shards=shared",
        "algorithm.gamma=0.5",
        "algorithm.truncated=mask",
        "critic.warmup_directory=elsewhere",
    ],
)
def test_a_warm_start_is_kept_apart_from_every_other_that_would_come_out_otherwise(least: Path, override: str) -> None:
    assert config.load(least, [*WARM, override]).warmup_directory != config.load(least, WARM).warmup_directory


def test_warm_starts_are_in_the_run_directory_or_where_it_is_said(least: Path) -> None:
    loaded = config.load(least, WARM)
    assert loaded.warmup_directory.parent == loaded.run_directory / "warm_start"
    shared = config.load(least, [*WARM, "critic.warmup_directory=/some/where"])
    assert shared.warmup_directory == Path("/some/where") / loaded.warmup_directory.name


@pytest.mark.parametrize(("critics", "groups"), [(0, 0), (1, 192), (2, 192)])
def test_the_groups_of_a_warm_start_are_those_of_its_batches(least: Path, critics: int, groups: int) -> None:
    loaded = config.load(least, [*WARM, f"algorithm.critics={critics}", "run.steps=2"])
    assert loaded.warmup_groups == groups
    assert loaded.derived()["prompts_of_the_run"] == groups + 128
