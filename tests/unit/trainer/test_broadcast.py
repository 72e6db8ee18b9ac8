"""Claims about the transport `broadcast`: the bits arrive, groups are reused as long as they are good, nothing hangs.

Members are threads of this process, each with its own end of a gloo group.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world, rendezvous

from asyncppo.errors import ConfigError, WeightsError
from asyncppo.messages import Bucket, GroupMember, WeightsReady
from tests.model_maker import a_config, a_world, make_model
from trainer.model.policy import Policy
from trainer.preflight import check_publishing
from trainer.publish import broadcast
from trainer.publish.broadcast import BroadcastTransport, address, plan

pytestmark = pytest.mark.unit

LIMIT = timedelta(seconds=20)
ALICE, BOB = b"alice", b"bob"


def some_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (300, 7), "b": (5,), "c": (64, 64), "d": (1,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


class Sender:
    """A transport with a small bucket, and what it announced last."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 20.0) -> None:
        monkeypatch.setattr(broadcast, "checkpoint_weights", lambda model, weights: weights)
        self.transport = BroadcastTransport(
            a_config(directory, f"rollout.swap_timeout_s={timeout_s}", "publish.transport=broadcast"),
            torch.device("cpu"),
        )
        self.transport._bucket_bytes = 5000
        self.ready = WeightsReady(policy_version=0, manifest="")
        self.weights: dict[str, torch.Tensor] = {}

    def put(self, version: int) -> None:
        self.weights = some_weights(version)
        self.ready = self.transport.put(version, self.weights, None)

    def begin(self, *members: tuple[bytes, int], group: str = "") -> dict[bytes, GroupMember]:
        return self.transport.begin(self.ready.policy_version, self.ready.manifest, members, group)

    def until_idle(self) -> None:
        until(lambda: not self.transport.busy)


@pytest.fixture
def sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    one = Sender(tmp_path, monkeypatch)
    yield one
    one.transport.close()


def until(done: Callable[[], bool], limit_s: float = 30.0) -> None:
    give_up_at = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


class Member:
    """An engine's rank in a group."""

    def __init__(self, place: GroupMember, rank: int | None = None) -> None:
        store = TCPStore(place.address, place.port, place.world_size, False, LIMIT, wait_for_workers=False)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = LIMIT
        inner = PrefixStore("cpu/", PrefixStore(f"{place.name}/", PrefixStore(place.name, store)))
        self._store = store  # as long as the group lives
        self._group: Any = ProcessGroupGloo(inner, rank or place.rank, place.world_size, options)

    def receive(self, buckets: Sequence[Bucket]) -> dict[str, torch.Tensor]:
        """As SGLang does: a flat tensor of bytes for each bucket, cut into views."""
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        tensors = {}
        for bucket in buckets:
            kinds = [getattr(torch, dtype) for dtype in bucket.dtypes]
            sizes = [kind.itemsize * int(np.prod(shape)) for kind, shape in zip(kinds, bucket.shapes, strict=True)]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            self._group.broadcast([flat], options).wait()
            for name, kind, shape, part in zip(bucket.names, kinds, bucket.shapes, flat.split(sizes), strict=True):
                tensors[name] = part.view(kind).reshape(shape)
        return tensors


class InThread:
    """What a function gives, called in a thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except RuntimeError as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._result


def same(received: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    return received.keys() == sent.keys() and all(torch.equal(received[name], sent[name]) for name in sent)


def test_every_member_gets_every_bit_of_two_versions_in_one_group(sender: Sender) -> None:
    sender.put(3)
    assert len(sender.ready.buckets) > 1
    places = sender.begin((BOB, 2), (ALICE, 1))
    assert sender.transport.busy
    assert {name: place.rank for name, place in places.items()} == {BOB: 1, ALICE: 3}  # bob has two engine ranks
    assert {place.world_size for place in places.values()} == {4}
    assert {place.backend for place in places.values()} == {"gloo"}
    ranks = [(places[BOB], 1), (places[BOB], 2), (places[ALICE], 3)]
    joining = [InThread(lambda place=place, rank=rank: Member(place, rank)) for place, rank in ranks]
    members: list[Member] = [one.result() for one in joining]
    for version in (3, 4):
        if version == 4:
            sender.put(4)
            again = sender.begin((BOB, 2), (ALICE, 1), group=places[ALICE].name)
            assert again == places  # the same group
        receiving = [InThread(lambda member=member: member.receive(sender.ready.buckets)) for member in members]
        assert all(same(one.result(), sender.weights) for one in receiving)
        sender.until_idle()


def test_a_member_that_joins_as_sglang_does_is_in_the_group(sender: Sender) -> None:
    """`init_custom_process_group` of SGLang 0.5.23, which the trainer's environment does not have."""
    a_world()
    sender.put(1)
    place = sender.begin((ALICE, 1))[ALICE]

    def join() -> dict[str, torch.Tensor]:
        url = f"tcp://{place.address}:{place.port}"
        store, rank, size = next(rendezvous(url, place.rank, place.world_size, timeout=LIMIT))
        inner = PrefixStore(place.name, store)
        group, _ = _new_process_group_helper(
            size, rank, [], Backend(place.backend), inner, group_name=place.name, timeout=LIMIT
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        tensors = {}
        for bucket in sender.ready.buckets:
            sizes = [2 * int(np.prod(shape)) for shape in bucket.shapes]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            dist.broadcast(flat, src=0, group=group)
            for name, shape, part in zip(bucket.names, bucket.shapes, flat.split(sizes), strict=True):
                tensors[name] = part.view(torch.bfloat16).reshape(shape)
        dist.destroy_process_group(group)
        return tensors

    assert same(InThread(join).result(), sender.weights)
    sender.until_idle()


def test_other_members_have_another_group_and_the_old_one_is_left(sender: Sender) -> None:
    sender.put(1)
    first = sender.begin((ALICE, 1))
    alice = InThread(lambda: Member(first[ALICE])).result()
    assert same(alice.receive(sender.ready.buckets), sender.weights)
    sender.until_idle()
    second = sender.begin((ALICE, 1), (BOB, 1))
    assert second[ALICE].name != first[ALICE].name
    assert second[ALICE].port != first[ALICE].port
    joining = [InThread(lambda place=place: Member(place)) for place in second.values()]
    receiving = [InThread(lambda one=one: one.result().receive(sender.ready.buckets)) for one in joining]
    assert all(same(one.result(), sender.weights) for one in receiving)


def test_a_group_that_a_member_has_left_is_not_used_again(sender: Sender) -> None:
    sender.put(1)
    first = sender.begin((ALICE, 1))
    assert same(InThread(lambda: Member(first[ALICE])).result().receive(sender.ready.buckets), sender.weights)
    sender.until_idle()
    second = sender.begin((ALICE, 1), group="")  # its engine was restarted
    assert second[ALICE].name != first[ALICE].name
    assert same(InThread(lambda: Member(second[ALICE])).result().receive(sender.ready.buckets), sender.weights)


def test_a_round_that_begins_while_one_runs_or_for_what_is_not_held_is_refused(sender: Sender) -> None:
    with pytest.raises(WeightsError, match="none is held"):
        sender.begin((ALICE, 1))
    sender.put(1)
    old = sender.ready
    sender.put(2)
    for version, manifest in ((1, old.manifest), (2, old.manifest), (1, sender.ready.manifest)):
        with pytest.raises(WeightsError, match=f"version {version} .* cannot be sent: version 2 is held"):
            sender.transport.begin(version, manifest, [(ALICE, 1)], "")
    sender.begin((ALICE, 1))
    with pytest.raises(WeightsError, match="one is running"):
        sender.begin((ALICE, 1))


def test_a_version_that_is_overtaken_while_it_is_sent_arrives_whole(sender: Sender) -> None:
    sender.put(1)
    ready, weights = sender.ready, sender.weights
    place = sender.begin((ALICE, 1))[ALICE]
    sender.put(2)
    member = InThread(lambda: Member(place)).result()
    assert same(member.receive(ready.buckets), weights)


def test_one_manifest_is_of_one_content(sender: Sender) -> None:
    sender.put(1)
    first = sender.ready.manifest
    sender.put(1)
    assert sender.ready.manifest == first
    sender.put(2)
    assert sender.ready.manifest != first
    changed = {**sender.weights, "d": sender.weights["d"] + 1}
    assert sender.transport.put(2, changed, None).manifest != sender.ready.manifest


@pytest.mark.parametrize("how", ["never comes", "comes and takes nothing", "dies"])
def test_a_member_that_fails_ends_the_round_in_time_and_the_next_group_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    sender = Sender(tmp_path, monkeypatch, timeout_s=2.0)
    sender.put(1)
    # so large that it does not fit into the sockets
    sender.ready = sender.transport.put(1, {"large": torch.zeros(50_000_000, dtype=torch.uint8)}, None)
    began = time.monotonic()
    place = sender.begin((ALICE, 1))[ALICE]
    member = InThread(lambda: Member(place)).result() if how != "never comes" else None
    if how == "dies":
        member._group = member._store = None
    sender.until_idle()
    assert time.monotonic() - began < 6
    assert "the broadcast of version 1 to 1 servers failed" in caplog.text
    if how != "dies":
        assert "within 2 s (rollout.swap_timeout_s)" in caplog.text
    sender.put(2)
    second = sender.begin((ALICE, 1), group=place.name)  # she may not know yet that it has failed
    assert second[ALICE].name != place.name
    anew = InThread(lambda: Member(second[ALICE])).result()
    assert same(anew.receive(sender.ready.buckets), sender.weights)
    sender.until_idle()
    assert sender.begin((ALICE, 1), group=second[ALICE].name) == second
    sender.transport.close()


def test_a_member_that_takes_no_part_holds_the_others_up_no_longer_than_it_takes_to_say_so(sender: Sender) -> None:
    sender.put(1)
    place = sender.begin((ALICE, 1), (BOB, 1))[ALICE]
    InThread(lambda: Member(place))
    began = time.monotonic()
    sender.transport.give_up(b"carol/1")  # who is in no round
    time.sleep(0.2)
    assert sender.transport.busy
    sender.transport.give_up(BOB)
    sender.until_idle()
    assert time.monotonic() - began < 5


def test_a_member_that_comes_late_and_then_hangs_does_not_make_the_round_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender(tmp_path, monkeypatch, timeout_s=3.0)
    sender.put(1)
    place = sender.begin((ALICE, 1))[ALICE]
    began = time.monotonic()
    time.sleep(2)
    store = TCPStore(place.address, place.port, 2, False, LIMIT, wait_for_workers=False)
    key = PrefixStore("cpu/", PrefixStore(f"{place.name}/", PrefixStore(place.name, store)))
    key.set("dead", b"x")  # an address behind which nobody answers, as of one that was killed just then
    sender.until_idle()
    assert time.monotonic() - began < 5
    sender.transport.close()


def test_a_fault_of_the_thread_is_raised_by_the_next_call(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a fault of ours")

    sender.put(1)
    monkeypatch.setattr(sender.transport, "_send", broken)
    sender.begin((ALICE, 1))
    sender.until_idle()
    with pytest.raises(TypeError, match="a fault of ours"):
        sender.put(2)
    with pytest.raises(TypeError, match="a fault of ours"):
        sender.begin((ALICE, 1))


HANGING_MEMBER = """
import os, sys, time
from asyncppo.messages import GroupMember
from tests.unit.trainer.test_broadcast import Member
name, port = sys.argv[1:]
place = GroupMember(name=name, address="127.0.0.1", port=int(port), rank=1, world_size=2, backend="gloo")
member = Member(place)
print("in", flush=True)
time.sleep(60)
"""

ENDING_SENDER = """
import subprocess, sys, tempfile, time
from pathlib import Path
import pytest, torch
from tests.unit.trainer.test_broadcast import ALICE, HANGING_MEMBER, Sender
sender = Sender(Path(tempfile.mkdtemp()), pytest.MonkeyPatch(), timeout_s=20.0)
sender.ready = sender.transport.put(0, {"large": torch.zeros(50_000_000, dtype=torch.uint8)}, None)
place = sender.begin((ALICE, 1))[ALICE]
member = subprocess.Popen([sys.executable, "-c", HANGING_MEMBER, place.name, str(place.port)], stdout=subprocess.PIPE)
member.stdout.readline()
time.sleep(0.5)
assert sender.transport.busy
began = time.monotonic()
sender.transport.close()
assert time.monotonic() - began < 5
member.kill()
"""


def test_a_process_ends_in_order_although_a_member_in_another_one_hangs(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDING_SENDER],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("come", [False, True])
def test_an_end_does_not_wait_for_a_member_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, come: bool
) -> None:
    sender = Sender(tmp_path, monkeypatch, timeout_s=20.0)
    sender.ready = sender.transport.put(0, {"large": torch.zeros(50_000_000, dtype=torch.uint8)}, None)
    place = sender.begin((ALICE, 1))[ALICE]
    member = InThread(lambda: Member(place)).result() if come else None
    time.sleep(0.2)
    assert sender.transport.busy
    began = time.monotonic()
    sender.transport.close()
    assert time.monotonic() - began < 3
    assert not sender.transport._thread.is_alive()
    with pytest.raises(WeightsError, match="the trainer ends"):
        sender.begin((ALICE, 1))
    del member


def test_buckets_hold_whole_tensors_of_one_dtype_in_order_and_are_no_larger_than_asked() -> None:
    weights = {
        "a": torch.zeros(10, dtype=torch.bfloat16),
        "b": torch.zeros(2, 5, dtype=torch.bfloat16),
        "c": torch.zeros(1, dtype=torch.bfloat16),
        "d": torch.zeros(3),
        "e": torch.zeros(100),
    }
    buckets = plan(weights, 40)
    assert [bucket.names for bucket in buckets] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert buckets[0] == Bucket(["a", "b"], ["bfloat16", "bfloat16"], [[10], [2, 5]])
    assert [bucket.dtypes for bucket in buckets[1:]] == [["bfloat16"], ["float32"], ["float32"]]


def test_what_is_sent_has_the_names_of_a_checkpoint_and_tied_weights_once(tmp_path: Path) -> None:
    config = a_config(tmp_path, "publish.transport=broadcast", model=make_model(tmp_path / "model", tied=True))
    policy = Policy(config, a_world())
    transport = BroadcastTransport(config, torch.device("cpu"))
    ready = transport.put(0, policy.weights(torch.bfloat16), policy.network.hf)
    names = [name for bucket in ready.buckets for name in bucket.names]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert {dtype for bucket in ready.buckets for dtype in bucket.dtypes} == {"bfloat16"}
    assert ready.directory == ""
    transport.close()


def test_more_names_than_a_message_holds_are_refused_with_what_would_do(sender: Sender) -> None:
    weights = {f"model.layers.{number}.{'x' * 40}": torch.zeros(1) for number in range(10_000)}
    with pytest.raises(ConfigError, match=r"10000 tensors .* set publish\.transport to disk"):
        sender.transport.put(0, weights, None)


@pytest.mark.parametrize(
    ("stream", "publish", "expected"),
    [
        ("tcp://127.0.0.1:5757", None, "127.0.0.1"),
        ("tcp://*:5757", "127.0.0.1", "127.0.0.1"),
        ("tcp://0.0.0.0:5757", "localhost", "localhost"),
    ],
)
def test_servers_are_told_an_address_that_reaches_the_trainer(
    tmp_path: Path, stream: str, publish: str | None, expected: str
) -> None:
    settings = [f"stream.address={stream}", *([f"publish.address={publish}"] if publish else [])]
    assert address(a_config(tmp_path, *settings, "publish.transport=broadcast")) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("stream.address=tcp://*:5757",), r"on every interface: set publish\.address"),
        (("stream.address=tcp://0.0.0.0:5757",), r"on every interface: set publish\.address"),
        (("publish.address=192.0.2.1",), r"192\.0\.2\.1 is no address of this host"),
        (("publish.address=no-such-host.invalid",), r"no-such-host\.invalid is no address of this host"),
    ],
)
def test_an_address_that_cannot_be_reached_is_refused(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        address(a_config(tmp_path, *settings, "publish.transport=broadcast"))


def test_an_address_is_refused_before_anything_starts_and_only_where_there_is_a_broadcast(tmp_path: Path) -> None:
    everywhere = ("stream.address=tcp://*:5757", "stream.insecure=true")
    with pytest.raises(ConfigError, match=r"set publish\.address"):
        check_publishing(a_config(tmp_path, *everywhere, "publish.transport=broadcast"))
    check_publishing(a_config(tmp_path, *everywhere, "publish.transport=disk"))


def test_the_port_of_a_group_is_open_on_the_address_that_the_servers_are_told_and_on_no_other(sender: Sender) -> None:
    sender.put(1)
    place = sender.begin((ALICE, 1))[ALICE]
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {local.split(":")[0] for _, local, _, state, *_ in listening if local.endswith(f":{place.port:04X}")}
    assert addresses == {"0100007F"}
