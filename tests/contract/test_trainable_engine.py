"""The same claims about every trainable engine: plain PyTorch, and DeepSpeed with ZeRO 1, 2 and 3.

One process, float32, and a network of two layers; the reference is a PyTorch loop written here.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncppo.config import ActorConfig
from asyncppo.errors import CheckpointError
from tests.model_maker import a_world, largest_difference
from trainer.model import states
from trainer.model.build import build_engine
from trainer.model.engine import StepReport, TrainableEngine, schedule
from trainer.model.states import MOMENTS, WEIGHT, Fragment, Progress, SavedState

pytestmark = pytest.mark.unit

STEPS = 5
RATE = 0.01
ENGINES = {
    "plain": {"engine": "plain"},
    "zero-1": {"engine": "deepspeed", "zero_stage": 1},
    "zero-2": {"engine": "deepspeed", "zero_stage": 2},
    "zero-3": {"engine": "deepspeed", "zero_stage": 3},
}

Make = Callable[..., TrainableEngine]


def a_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def rows(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(engine: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """A sum over rows, so that the losses of parts add up."""
    return (engine(inputs).float() - 1.0).square().sum()


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Make:
    def build(total_steps: int = STEPS, **settings: object) -> TrainableEngine:
        defaults = {"dtype": "float32", "learning_rate": RATE, "max_grad_norm": 1e9, "weight_decay": 0.1}
        model = ActorConfig(path="", **(defaults | ENGINES[request.param] | settings))
        return build_engine(a_network(getattr(torch, model.dtype)), model, total_steps, a_world())

    build.exact = request.param == "plain"
    return build


def weights(engine: TrainableEngine) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in engine.parameters_in_full()}


def train(engine: TrainableEngine, steps: range) -> list[tuple[float, float]]:
    reports = []
    for step in steps:
        engine.backward(loss_of(engine, rows(step)))
        report = engine.step()
        reports.append((report.grad_norm, report.learning_rate))
    return reports


def reference(max_norm: float, rates: list[float]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after one AdamW step for each rate, and the gradient norms before clipping."""
    network = a_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.1)
    norms = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss_of(network, rows(step)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), max_norm)))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}, norms


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_five_steps_are_those_of_a_plain_pytorch_loop_and_norms_are_reported_before_clipping(
    make: Make, max_norm: float
) -> None:
    engine = make(max_grad_norm=max_norm)
    reports = train(engine, range(STEPS))
    expected, norms = reference(max_norm, [RATE] * STEPS)
    assert min(norms) > 0.5  # so that the smaller limit clips every step
    assert largest_difference(weights(engine), expected) <= (0 if make.exact else 1e-6)
    assert [norm for norm, _ in reports] == pytest.approx(norms, rel=1e-5)


def test_clipping_changes_the_weights_of_the_reference() -> None:
    # Adam forgets the size of equal gradients; with steps of unlike sizes, clipping shows.
    assert largest_difference(reference(1e9, [RATE] * STEPS)[0], reference(0.5, [RATE] * STEPS)[0]) > 1e-4


@pytest.mark.parametrize("parts", [2, 4])
def test_several_backward_calls_before_a_step_are_one_of_their_sum(make: Make, parts: int) -> None:
    whole, cut = make(), make()
    for step in range(2):
        whole.backward(loss_of(whole, rows(step)))
        for part in rows(step).chunk(parts):
            cut.backward(loss_of(cut, part))
        assert cut.step().grad_norm == pytest.approx(whole.step().grad_norm, rel=1e-5)
    assert largest_difference(weights(cut), weights(whole)) <= 1e-6


def test_a_step_forgets_its_gradients(make: Make) -> None:
    engine = make(weight_decay=0.0)
    train(engine, range(1))
    engine.backward(loss_of(engine, rows(0)) * 0.0)
    assert engine.step().grad_norm == 0.0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_from_the_first_step_on_and_then_follows_its_schedule(make: Make, kind: str) -> None:
    engine = make(total_steps=6, warmup_steps=2, schedule=kind)
    rates = [rate for _, rate in train(engine, range(6))]
    after = {
        "constant": [1.0, 1.0, 1.0, 1.0],
        "linear": [1.0, 0.75, 0.5, 0.25],
        "cosine": [0.5 * (1 + math.cos(math.pi * quarter / 4)) for quarter in range(4)],
    }[kind]
    factors = [0.5, 1.0, *after]
    assert rates == pytest.approx([RATE * factor for factor in factors])
    expected, _ = reference(1e9, rates)
    assert largest_difference(weights(engine), expected) <= (0 if make.exact else 1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_linear_and_cosine_reach_zero_when_all_steps_are_done_and_stay_there(kind: str) -> None:
    factor = schedule(ActorConfig(path="", warmup_steps=3, schedule=kind), 10)
    assert [factor(10), factor(11)] == [0.0, 0.0]
    falling = [factor(done) for done in range(3, 11)]
    assert falling[0] == 1.0
    assert falling == sorted(falling, reverse=True)


def test_a_warm_up_longer_than_the_run_still_rises_to_the_peak() -> None:
    factor = schedule(ActorConfig(path="", warmup_steps=4, schedule="linear"), 2)
    assert [factor(done) for done in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_parameters_in_full_are_the_networks_names_and_shapes(make: Make) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in weights(make()).items()}
    assert shapes == {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (2, 8), "2.bias": (2,)}
    initial = {name: parameter.detach() for name, parameter in a_network().named_parameters()}
    assert largest_difference(weights(make()), initial) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_goes_on_from_a_save_is_bit_identical(make: Make, tmp_path: Path, dtype: str) -> None:
    settings = {"total_steps": 8, "warmup_steps": 3, "schedule": "cosine", "dtype": dtype}
    engine = make(**settings)
    for step in range(3):
        good_step(engine, step)
    engine.save(tmp_path / "state")
    expected_reports = [good_step(engine, step) for step in range(3, 6)]
    resumed = make(**settings)
    good_step(resumed, 7)  # whatever was there before is gone
    resumed.load(tmp_path / "state")
    assert [good_step(resumed, step) for step in range(3, 6)] == expected_reports
    assert all(torch.equal(*pair) for pair in zip(bits(resumed), bits(engine), strict=True))


def whole_state(directory: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """What a save holds: every parameter and moment whole, by `kind name`."""
    saved = SavedState(directory)
    tensors = {}
    for name, shape in saved.shapes.items():
        for kind in (WEIGHT, *MOMENTS):
            tensors[f"{kind} {name}"] = torch.full(shape, math.nan)
            saved.read_into(Fragment(kind, name, 0, tensors[f"{kind} {name}"].view(-1)))
    return saved.progress, tensors


@pytest.mark.parametrize("other", ENGINES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_save_goes_on_in_every_other_engine_and_stage_with_the_same_bits(
    make: Make, tmp_path: Path, other: str, steps: int
) -> None:
    engine = make(warmup_steps=2)
    train(engine, range(steps))
    engine.save(tmp_path / "state")
    settings = {"dtype": "float32", "learning_rate": RATE, "max_grad_norm": 1e9, "weight_decay": 0.1, "warmup_steps": 2}
    model = ActorConfig(path="", **(settings | ENGINES[other]))
    moved = build_engine(a_network(), model, STEPS, a_world())
    train(moved, range(5, 6))
    moved.load(tmp_path / "state")
    moved.save(tmp_path / "moved")
    (progress, tensors), (progress_moved, tensors_moved) = (whole_state(tmp_path / at) for at in ("state", "moved"))
    assert progress == progress_moved == Progress(steps, steps)
    assert tensors.keys() == tensors_moved.keys()
    assert all(torch.equal(tensors[name], tensors_moved[name]) for name in tensors)
    assert any(tensors[name].any() for name in tensors if "exp_avg" in name) == (steps > 0)
    assert largest_difference(weights(moved), weights(engine)) == 0
    expected, reports = train(engine, range(6, 8)), train(moved, range(6, 8))
    assert [rate for _, rate in reports] == [rate for _, rate in expected]
    assert largest_difference(weights(moved), weights(engine)) <= 1e-6


def test_after_a_resume_the_learning_rate_is_what_the_config_says_now(make: Make, tmp_path: Path) -> None:
    engine = make(total_steps=8, warmup_steps=2, schedule="linear")
    train(engine, range(4))
    engine.save(tmp_path / "state")
    lower = make(total_steps=8, warmup_steps=2, schedule="linear", learning_rate=RATE / 10)
    lower.load(tmp_path / "state")
    assert [rate for _, rate in train(lower, range(2))] == pytest.approx([RATE / 10 * 4 / 6, RATE / 10 * 3 / 6])


def test_torchs_random_state_comes_back(make: Make, tmp_path: Path) -> None:
    engine = make()
    torch.manual_seed(5)
    engine.save(tmp_path / "state")
    drawn = torch.rand(3)
    torch.manual_seed(6)
    engine.load(tmp_path / "state")
    assert torch.equal(torch.rand(3), drawn)


def test_nothing_in_a_save_is_pickled(make: Make, tmp_path: Path) -> None:
    engine = make()
    train(engine, range(1))
    engine.save(tmp_path / "state")
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("what", ["a file", "another network", "an older format"])
def test_a_save_that_lacks_something_is_refused_by_name_and_nothing_is_loaded(
    make: Make, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_FILE_BYTES", 100)
    engine = make()
    train(engine, range(1))
    engine.save(tmp_path)
    match what:
        case "a file":
            next(tmp_path.glob("state-0-of-1-001*")).unlink()
            message = "ends at element"
        case "another network":
            head = (tmp_path / "engine.json").read_text()
            (tmp_path / "engine.json").write_text(head.replace("2.weight", "3.weight"))
            message = r"2\.weight of shape None, and the network has \(2, 8\)"
        case _:
            (tmp_path / "engine.json").unlink()
            (tmp_path / "plain.pt").touch()
            message = "of an earlier version of asyncppo"
    fresh = make()
    before = copy.deepcopy(weights(fresh))
    with pytest.raises(CheckpointError, match=message):
        fresh.load(tmp_path)
    assert largest_difference(weights(fresh), before) == 0


def test_a_save_in_many_files_is_the_same_save(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    train(engine, range(2))
    engine.save(tmp_path / "one")
    monkeypatch.setattr(states, "_FILE_BYTES", 100)
    engine.save(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("state-*"))) > len(list((tmp_path / "one").glob("state-*"))) == 1
    (_, one), (_, many) = whole_state(tmp_path / "one"), whole_state(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_float32_states_are_not_rounded_into_a_plain_bfloat16_network(tmp_path: Path) -> None:
    model = ActorConfig(path="", engine="plain", dtype="float32", learning_rate=RATE)
    build_engine(a_network(), model, STEPS, a_world()).save(tmp_path)
    narrow = build_engine(a_network(torch.bfloat16), model, STEPS, a_world())
    with pytest.raises(CheckpointError, match="would round"):
        narrow.load(tmp_path)


def test_loading_from_a_directory_without_a_save_is_a_checkpoint_error(make: Make, tmp_path: Path) -> None:
    engine = make()
    before = copy.deepcopy(weights(engine))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        engine.load(tmp_path)
    assert largest_difference(weights(engine), before) == 0


def test_zero_1_in_bfloat16_trains() -> None:
    model = ActorConfig(path="", dtype="bfloat16", learning_rate=RATE, zero_stage=1)
    engine = build_engine(a_network(torch.bfloat16), model, STEPS, a_world())
    losses = []
    for _ in range(STEPS):
        loss = loss_of(engine, rows(0, torch.bfloat16))
        engine.backward(loss)
        report = engine.step()
        losses.append(float(loss.detach()))
        assert report.grad_norm > 0
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert {parameter.dtype for _, parameter in engine.parameters_in_full()} == {torch.bfloat16}


def bits(engine: TrainableEngine) -> list[torch.Tensor]:
    return list(weights(engine).values())


def good_step(engine: TrainableEngine, step: int) -> StepReport:
    dtype = next(iter(weights(engine).values())).dtype
    engine.backward(loss_of(engine, rows(step, dtype)))
    return engine.step()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_whose_gradient_is_not_finite_is_as_if_it_had_not_been(
    make: Make, dtype: str, bad: float, parts: int
) -> None:
    settings = {"dtype": dtype, "warmup_steps": 3, "schedule": "linear", "max_grad_norm": 0.5, "total_steps": 8}
    engine, spared = make(**settings), make(**settings)
    for step in range(2):
        assert good_step(engine, step) == good_step(spared, step)
    before = bits(engine)
    for part in range(parts):  # of two backward calls, one is enough to spoil the step
        factor = bad if part == 0 else 1.0
        engine.backward(loss_of(engine, rows(7, before[0].dtype)) * factor)
    report = engine.step()
    assert report.skipped
    assert not math.isfinite(report.grad_norm)
    assert all(torch.equal(*pair) for pair in zip(bits(engine), before, strict=True))
    for step in range(2, 5):
        expected = good_step(spared, step)
        assert not expected.skipped
        assert good_step(engine, step) == expected  # the norm and the learning rate too
    assert all(torch.equal(*pair) for pair in zip(bits(engine), bits(spared), strict=True))
    assert any(not torch.equal(*pair) for pair in zip(bits(engine), before, strict=True))


def test_skipped_steps_in_a_row_change_nothing(make: Make) -> None:
    engine, spared = make(), make()
    for _ in range(3):
        engine.backward(loss_of(engine, rows(0)) * math.nan)
        assert engine.step().skipped
    assert train(engine, range(2)) == train(spared, range(2))
    assert largest_difference(weights(engine), weights(spared)) == 0


def test_a_skipped_step_is_not_in_a_save(make: Make, tmp_path: Path) -> None:
    settings = {"warmup_steps": 3, "schedule": "cosine", "total_steps": 8}
    engine, resumed = make(**settings), make(**settings)
    train(engine, range(2))
    engine.backward(loss_of(engine, rows(0)) * math.inf)
    assert engine.step().skipped
    engine.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    assert train(resumed, range(2, 5)) == train(engine, range(2, 5))
    assert largest_difference(weights(resumed), weights(engine)) == 0


def test_communication_buckets_are_hardly_larger_than_the_model() -> None:
    from trainer.model.deepspeed_engine import deepspeed_config

    def zero(parameters: int) -> dict[str, int]:
        return deepspeed_config(ActorConfig(path=""), on_cpu=True, parameters=parameters)["zero_optimization"]

    assert (zero(1000)["reduce_bucket_size"], zero(1000)["allgather_bucket_size"]) == (1024, 1024)
    assert zero(8_000_000_000)["reduce_bucket_size"] == 500_000_000
