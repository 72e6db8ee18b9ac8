"""Two ranks train what one rank trains: the same weights, values and metrics, under ZeRO 1, 2 and 3. Gloo on the CPU.

One process and then two run tests/ranks.py over all cases; each test looks at one case.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from asyncppo import ports
from asyncppo.config import load
from asyncppo.weights import MANIFEST
from tests.model_maker import a_config, a_world, largest_difference, make_model
from tests.ranks import BATCHES, CASES, STAGES, SWITCHES
from trainer.model.policy import Policy
from trainer.model.states import MOMENTS, WEIGHT, Fragment, SavedState

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 120


def run_ranks(directory: Path, size: int) -> None:
    """tests/ranks.py on `size` ranks; fails with their output when one fails or hangs."""
    port = ports.free_port()
    outputs = [directory / f"rank-{size}-{rank}.log" for rank in range(size)]
    processes = []
    for rank, output in enumerate(outputs):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "DS_ACCELERATOR": "cpu",
        }
        with output.open("wb") as sink:
            command = [sys.executable, str(REPOSITORY / "tests" / "ranks.py"), str(directory)]
            processes.append(subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["hung"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * size, "\n".join(output.read_text()[-3000:] for output in outputs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any], Path]:
    directory = tmp_path_factory.mktemp("ranks")
    make_model(directory / "model", hidden=96)
    a_config(directory, model=directory / "model")
    settings = (directory / "config.yaml").read_text()
    # Steps of 1e-5: a wrong gradient changes Adam's first step by up to twice as much, rounding by far less.
    settings = settings.replace("learning_rate: 1.0e-4", "learning_rate: 1.0e-5")
    (directory / "config.yaml").write_text(settings.replace("learning_rate: 1.0e-3", "learning_rate: 1.0e-5"))
    for size in (1, 2):
        run_ranks(directory, size)
    one, two = (torch.load(directory / f"results-{size}.pt", weights_only=True) for size in (1, 2))
    return one, two, directory


@pytest.mark.parametrize(("stage", "batch"), CASES)
def test_two_ranks_train_the_same_weights_with_the_same_metrics(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str, batch: str
) -> None:
    one, two = results[0][stage, batch], results[1][stage, batch]
    for part in ("policy", "critic"):
        assert largest_difference(two[part], one[part]) < 1e-6
        other = next(other for known, other in CASES if known == stage and other != batch)
        moved = largest_difference(one[part], results[0][stage, other][part])
        assert moved > 5e-6  # other batches train other weights: the comparison above is not of what never moved
    assert two.keys() == one.keys()
    for name in ("logprobs", "entropy", "reference", "values"):
        if name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    assert two["critic metrics"] == pytest.approx(one["critic metrics"], rel=1e-4, abs=1e-5)
    for ours, theirs in zip(two["policy metrics"], one["policy metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stage", STAGES[1:])
def test_all_stages_train_the_same_weights(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str, batch: str
) -> None:
    for sizes in results[:2]:
        for part in ("policy", "critic"):
            assert largest_difference(sizes[stage, batch][part], sizes["1", batch][part]) < 1e-6


@pytest.mark.parametrize("batch", BATCHES[1:])
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_trains_other_weights(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], switch: str, batch: str
) -> None:
    plain, switched = results[0]["2", batch]["policy"], results[0][switch, batch]["policy"]
    assert largest_difference(switched, plain) > 5e-6


@pytest.mark.parametrize(("stage", "batch"), CASES)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_of_all(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str, batch: str
) -> None:
    for sizes in results[:2]:
        assert sizes[stage, batch]["poisoned"] == 1


@pytest.mark.parametrize(("stage", "batch"), CASES)
def test_two_ranks_go_on_from_a_save_bit_by_bit_even_after_a_skipped_step(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str, batch: str
) -> None:
    for sizes in results[:2]:
        assert all(sizes[stage, batch]["resumed"].values())


def whole_state(directory: Path) -> tuple[SavedState, dict[str, torch.Tensor]]:
    saved = SavedState(directory)
    tensors = {}
    for name, shape in saved.shapes.items():
        for kind in (WEIGHT, *MOMENTS):
            tensors[f"{kind} {name}"] = torch.full(shape, torch.nan)
            saved.read_into(Fragment(kind, name, 0, tensors[f"{kind} {name}"].view(-1)))
    return saved, tensors


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_rank_saved_two_ranks_go_on_from_with_the_same_bits(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str
) -> None:
    """Under ZeRO 2 the two ranks train in bfloat16, with the masters of the float32 that the one rank had."""
    one, expected = whole_state(results[2] / "state-1" / f"{stage}-6-0")
    two, tensors = whole_state(results[2] / "moved" / stage)
    assert two.progress == one.progress
    assert one.progress.optimizer_steps > 0
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    files = {path.name for path in (results[2] / "moved" / stage).glob("state-*")}
    assert files == {f"state-{rank}-of-2-000.safetensors" for rank in range(2)}  # each has written its part
    dtype = torch.bfloat16 if stage == "2" else torch.float32
    for name, weights in results[1]["moved", stage].items():
        assert torch.equal(weights, expected[f"weight hf.{name}"].to(dtype))


@pytest.mark.parametrize("into", ["1", "2", "3"])
@pytest.mark.parametrize("stage", ["1", "3 as for a large model"])
def test_what_two_ranks_saved_one_rank_goes_on_from_with_the_same_bits(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str, into: str, tmp_path: Path
) -> None:
    settings = [f"actor.zero_stage={into}", "actor.engine=deepspeed"]
    policy = Policy(load(results[2] / "config.yaml", settings), a_world())
    policy.load(results[2] / "state-2" / f"{stage}-6-0")
    policy.save(tmp_path)
    two, expected = whole_state(results[2] / "state-2" / f"{stage}-6-0")
    one, tensors = whole_state(tmp_path)
    assert one.progress == two.progress
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for name, weights in policy.weights().items():
        assert torch.equal(weights, expected[f"weight hf.{name}"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_on_one_or_two_ranks_publishes_the_same_files_bit_for_bit(
    results: tuple[dict[Any, Any], dict[Any, Any], Path], size: int, stage: str
) -> None:
    """The same float32 weights go in, and come out rounded to bfloat16."""
    expected, files = (
        {path.name: path.read_bytes() for path in (results[2] / f"published-{which}").iterdir()}
        for which in ("1-1", f"{size}-{stage}")
    )
    assert {"model.safetensors", "config.json", "tokenizer.json", MANIFEST} <= files.keys()
    assert files == expected
    saved, state = whole_state(results[2] / "state-1" / "1-6-0")
    with safe_open(results[2] / f"published-{size}-{stage}" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert names
        assert all(torch.equal(file.get_tensor(name), state[f"weight hf.{name}"].bfloat16()) for name in names)
    assert {f"hf.{name}" for name in names} == set(saved.shapes)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_has_the_same_probe(results: tuple[dict[Any, Any], dict[Any, Any], Path], stage: str) -> None:
    expected = torch.load(results[2] / "probe-1-1-0.pt", weights_only=True)
    assert expected.shape == (29,)
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        probe = torch.load(results[2] / f"probe-{size}-{stage}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(probe, expected, atol=1e-5, rtol=0)


def test_what_rank_0_shares_every_rank_has(results: tuple[dict[Any, Any], dict[Any, Any], Path]) -> None:
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        shared = torch.load(results[2] / f"shared-{size}-{rank}.pt", weights_only=True)
        assert shared["received"] == {
            "ids": ("<U8", ["p1", "prompt ü"]),
            "numbers": ("int32", [0, 1, 2, 3, 4]),
            "none": ("float64", []),
        }
        assert shared["nothing"] == {}
