"""Claims about preflight: whatever cannot work is refused before anything expensive starts, in one line that helps."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig

from asyncppo.config import Config
from asyncppo.errors import AddressError, ConfigError, DataError, ModelError, UserError
from asyncppo.fingerprints import model_fingerprint
from tests.model_maker import a_config, a_model, make_model
from trainer import preflight

pytestmark = pytest.mark.unit


@pytest.fixture
def config(tmp_path: Path, free_port: int) -> Callable[..., Config]:
    return lambda *overrides: a_config(tmp_path, f"stream.address=tcp://127.0.0.1:{free_port}", *overrides)


def refusal(config: Config, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        preflight.check(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_can_work_comes_back_as_tokenised_prompts(config: Callable[..., Config]) -> None:
    data = preflight.check(config("eval.sets={small: " + config().data.train + "}", "eval.limit=2"))
    assert [prompt.prompt_id for prompt in data.train] == ["0", "1", "2", "3"]
    assert data.train[2].answer == "3"
    tokenizer = AutoTokenizer.from_pretrained(a_model())
    text = "<|im_start|>user\nCompute 2+1.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(data.train[2].prompt_ids.tolist()) == text
    assert data.train[2].prompt_ids.dtype == np.int32
    assert [len(prompts) for prompts in data.eval_sets.values()] == [2]
    assert (data.tokenizer_directory / "tokenizer.json").read_bytes() == (a_model() / "tokenizer.json").read_bytes()


HUB_MODEL = """
import sys
from asyncppo.config import load
from trainer import preflight
config = load(sys.argv[1], ["actor.path=nobody/tiny"])
preflight.check_models(config)
print(preflight.load_data(config).tokenizer_directory)
"""


def test_a_hub_models_tokenizer_files_are_found_in_the_cache(tmp_path: Path) -> None:
    a_config(tmp_path)
    cached = tmp_path / "hub" / "models--nobody--tiny"
    shutil.copytree(a_model(), cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    ended = subprocess.run(
        [sys.executable, "-c", HUB_MODEL, str(tmp_path / "config.yaml")],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    found = Path(ended.stdout.splitlines()[-1])
    assert (found / "tokenizer.json").read_bytes() == (a_model() / "tokenizer.json").read_bytes()
    assert (found / "chat_template.jinja").is_file()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["actor.path", "critic.path"])
def test_a_missing_model_directory_is_refused(config: Callable[..., Config], tmp_path: Path, key: str) -> None:
    message = refusal(config(f"{key}={tmp_path}/nothing"), ModelError)
    assert message.startswith(f"{tmp_path}/nothing: there is no such model directory")


@pytest.mark.parametrize("key", ["actor.path", "critic.path"])
def test_a_directory_without_a_model_is_refused(config: Callable[..., Config], tmp_path: Path, key: str) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(config(f"{key}={tmp_path}/empty"), ModelError)
    assert message.startswith(f"{tmp_path}/empty: expected a Hugging Face model directory, found no config.json")


@pytest.mark.parametrize("key", ["actor.path", "critic.path"])
def test_a_model_that_is_no_causal_language_model_is_refused(
    config: Callable[..., Config], tmp_path: Path, key: str
) -> None:
    bert = BertConfig(architectures=["BertForSequenceClassification"])
    bert.save_pretrained(tmp_path / "bert")
    message = refusal(config(f"{key}={tmp_path}/bert"), ModelError)
    assert message == f"{tmp_path}/bert: expected a causal language model, it says BertForSequenceClassification"


def test_a_critic_with_another_tokenizer_is_refused_at_the_first_token_that_differs(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    other = shutil.copytree(a_model(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(config(f"critic.path={other}"), ModelError)
    assert message.startswith(
        f"{other}: the critic's tokenizer differs from that of the actor {a_model()} (first at 'A':"
    )


def test_a_critic_with_too_few_embeddings_is_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    other = shutil.copytree(a_model(), tmp_path / "other")
    settings = json.loads((other / "config.json").read_text()) | {"vocab_size": 300}
    (other / "config.json").write_text(json.dumps(settings))
    assert refusal(config(f"critic.path={other}"), ModelError) == f"{other}: has 300 embeddings for 343 tokens"


@pytest.mark.parametrize("index", [0, 1])
def test_every_critics_own_checkpoint_is_looked_at(config: Callable[..., Config], tmp_path: Path, index: int) -> None:
    each = ["{}", "{}"]
    each[index] = f"{{path: {tmp_path}/nothing}}"
    message = refusal(config(f"critic.each=[{', '.join(each)}]"), ModelError)
    assert message == f"{tmp_path}/nothing: there is no such model directory"


def test_a_reference_is_looked_at_where_it_is_used(config: Callable[..., Config], tmp_path: Path) -> None:
    named = f"algorithm.reference={tmp_path}/nothing"
    assert refusal(config(named, "algorithm.kl_coef=0.1"), ModelError).startswith(f"{tmp_path}/nothing: there is no")
    preflight.check(config(named))


def test_a_reference_with_another_tokenizer_is_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    other = shutil.copytree(a_model(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(config(f"algorithm.reference={other}", "algorithm.kl_coef=0.1"), ModelError)
    assert message.startswith(f"{other}: the reference's tokenizer differs from that of the actor {a_model()}")


def test_another_critic_with_the_same_tokens_is_accepted_and_without_critics_nobody_looks(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    make_model(tmp_path / "critic", seed=5, hidden=16)
    preflight.check(config(f"critic.path={tmp_path}/critic"))
    preflight.check(config(f"critic.path={tmp_path}/nothing", "algorithm.critics=0"))


def test_a_model_without_a_tokenizer_or_a_chat_template_is_refused(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    mute = shutil.copytree(a_model(), tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    assert refusal(config(f"actor.path={mute}"), ModelError) == f"{mute}: its tokenizer has no chat template"
    (mute / "tokenizer.json").write_text("{}")
    assert refusal(config(f"actor.path={mute}"), ModelError).startswith(f"{mute}: its tokenizer cannot be loaded")
    (mute / "tokenizer.json").unlink()  # transformers would make one without any token
    assert refusal(config(f"actor.path={mute}"), ModelError).startswith(f"{mute}: expected a tokenizer.json")


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "reason", "key"),
    [
        (None, "there is no such dataset file", "bad.jsonl"),
        ([], "the dataset is empty", "bad.jsonl"),
        ([{"question": "1+1", "answer": "2"}], "row 0 has no 'prompt'", "data.prompt_column"),
        ([{"prompt": "1+1", "solution": "2"}], "row 0 has no 'answer'", "data.answer_column"),
        ([{"prompt": "1+1", "answer": ""}], "row 0 has no 'answer'", "data.answer_column"),
    ],
)
@pytest.mark.parametrize("which", ["data.train", "eval.sets.hard"])
def test_a_dataset_that_is_missing_empty_or_lacks_a_column_is_refused(
    config: Callable[..., Config], tmp_path: Path, rows: list[dict] | None, reason: str, key: str, which: str
) -> None:
    path = tmp_path / "bad.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refusal(config(f"{which}={path}"), DataError)
    assert message.startswith(str(path))
    assert reason in message
    assert key in message


def test_a_dataset_whose_prompts_are_all_too_long_is_refused(config: Callable[..., Config]) -> None:
    message = refusal(config("data.max_prompt_tokens=3"), DataError)
    assert "all 4 prompts are longer than 3 tokens" in message


# --- addresses -------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_refused(config: Callable[..., Config]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        message = refusal(config(f"stream.address=tcp://127.0.0.1:{port}"), AddressError)
    assert message.startswith(f"cannot listen on tcp://127.0.0.1:{port}: address already in use")
    assert "stream.address" in message


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "*", "example.org"])
def test_an_address_that_others_can_reach_is_refused(config: Callable[..., Config], free_port: int, host: str) -> None:
    message = refusal(config(f"stream.address=tcp://{host}:{free_port}"), AddressError)
    assert message.startswith(f"tcp://{host}:{free_port} is not loopback")
    assert "stream.insecure" in message


@pytest.mark.parametrize("host", ["0.0.0.0", "*"])
def test_such_an_address_is_accepted_where_it_was_asked_for(
    config: Callable[..., Config], free_port: int, host: str
) -> None:
    preflight.check_stream_address(config(f"stream.address=tcp://{host}:{free_port}", "stream.insecure=true"))


def test_localhost_is_loopback(config: Callable[..., Config], free_port: int) -> None:
    preflight.check_stream_address(config(f"stream.address=tcp://localhost:{free_port}"))


def test_a_port_that_does_not_exist_is_refused(config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"^stream\.address is tcp://127\.0\.0\.1:70000: ports end at 65535$"):
        config("stream.address=tcp://127.0.0.1:70000")


def test_an_address_of_no_interface_here_is_refused(config: Callable[..., Config]) -> None:
    message = refusal(config("stream.address=tcp://192.0.2.1:5757", "stream.insecure=true"), AddressError)
    assert message.startswith("cannot listen on tcp://192.0.2.1:5757: ")


# --- devices ---------------------------------------------------------------------------------------------------------


def test_fewer_gpus_than_processes_are_refused_unless_they_are_shared_by_name(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"3 processes, one for each GPU, but there are 2 GPUs") as caught:
        preflight.check_devices(config())
    assert "actor.devices" in str(caught.value)
    preflight.check_devices(config("actor.devices=[0]", "critic.devices=[1, 1]"))
    preflight.check_devices(config("algorithm.critics=1"))


def test_the_identity_is_that_of_the_actors_directory(config: Callable[..., Config]) -> None:
    identity = preflight.identity(config())
    assert identity.model == model_fingerprint(str(a_model()))
    assert identity.agreement == config().agreement_hash()
