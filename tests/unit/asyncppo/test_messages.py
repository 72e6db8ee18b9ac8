"""Messages: arrays survive bit for bit and are not copied; what makes no sense is a MessageError, and only that."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncppo.errors import MessageError
from asyncppo.messages import (
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    Ack,
    Bucket,
    Cancel,
    Codec,
    CriticFailed,
    CriticReady,
    Done,
    ExportCritic,
    Failed,
    Goodbye,
    Group,
    GroupMember,
    Learn,
    Learned,
    Lease,
    LoadCritic,
    Message,
    Pulse,
    Refused,
    SaveCritic,
    StartCritic,
    Stop,
    Swap,
    SwapFailed,
    ToCritic,
    ToLearner,
    ToRollout,
    ToTrainer,
    Unknown,
    WeightsReady,
    Welcome,
)
from tests.stream_maker import a_group, a_group_of_version, a_hello, a_prepared, a_status, a_swapped

pytestmark = pytest.mark.unit

Anything = ToTrainer | ToRollout | ToCritic | ToLearner


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


STRANGE = floats(np.nan, -0.0, np.inf, -np.inf, 1e-45, 3.4e38)
"""Floats that a detour by text or by doubles could change."""

EXAMPLES: list[Message] = [
    a_hello(),
    a_group(step_rewards=STRANGE),
    Failed(lease=7, reason="the engine is down: ünïcode"),
    a_status(3, tokens=10**12),
    a_prepared(4),
    a_swapped(4, probe_gap=2.5e-7, attempts=2),
    SwapFailed(policy_version=4, reason="the probe is off by 1.5 nats", quarantined=True),
    Goodbye(reason="SIGTERM"),
    Welcome(run="demo", heartbeat_s=2.0, trainer="t1"),
    Refused(reason="model"),
    Lease(lease=2**62, epoch=3, prompt_id="p", prompt_ids=ints(5, 0, -1), answer="7", group_size=2, purpose="eval"),
    Ack(lease=1),
    Cancel(leases=[1, 2, 3]),
    WeightsReady(
        policy_version=9,
        manifest="c0ffee",
        buckets=[Bucket(["a.weight", "b"], ["bfloat16", "float32"], [[2, 3], []]), Bucket(["c"], ["bfloat16"], [[0]])],
        probe_ids=ints(5, 0, 1),
        probe_logprobs=STRANGE[:2],
        tolerance=0.05,
    ),
    Swap(
        policy_version=9,
        manifest="c0ffee",
        member=GroupMember(name="g-9-1", address="10.0.0.1", port=65535, rank=1, world_size=3, backend="gloo"),
    ),
    Pulse(policy_version=-1),
    Unknown(),
    Stop(reason="the run is complete"),
    Learn(
        step=1,
        input_ids=ints(1, 2, 3, 4),
        sequence_lengths=ints(4),
        response_lengths=ints(2),
        rewards=STRANGE,
        shard=flags(0),
        group_index=ints(0),
    ),
    SaveCritic(directory="/a"),
    LoadCritic(directory="/a"),
    ExportCritic(directory="/a"),
    StartCritic(directory="/a"),
    CriticReady(index=1, parameters=37152),
    Learned(
        step=1, values=floats(), fresh_values=floats(), metrics={"loss": 0.5, "grad_norm": float("inf")}, seconds=0.1
    ),
    Done(),
    CriticFailed(reason="out of memory"),
]

each_message = pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)


def over_the_wire(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in Codec(Anything).encode(message)]


def arrays_of(message: Message) -> dict[str, np.ndarray]:
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def assert_same(one: Message, other: Message) -> None:
    assert type(one) is type(other)
    for name in one.__struct_fields__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        else:
            assert mine == theirs


def refused(frames: list[bytes], match: str, receives: Any = ToTrainer) -> None:
    with pytest.raises(MessageError, match=match):
        Codec(receives).decode(frames)


# --- there and back --------------------------------------------------------------------------------------------------


def test_every_message_has_an_example_here() -> None:
    assert {type(message) for message in EXAMPLES} == set(typing.get_args(Anything))
    assert {type(message) for message in EXAMPLES} == leaves(Message)


def leaves(kind: type[Message]) -> set[type[Message]]:
    below = [each for each in kind.__subclasses__() if each.__module__ == Message.__module__]
    return set().union(*map(leaves, below)) if below else {kind}


@each_message
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert_same(Codec(Anything).decode(over_the_wire(message)), message)


@each_message
def test_encoding_does_not_copy_arrays_and_decoding_gives_read_only_views(message: Message) -> None:
    codec = Codec(Anything)
    frames = codec.encode(message)
    sent = [array for array in arrays_of(message).values() if array.size]
    raw = [np.frombuffer(frame, np.uint8) for frame in frames[1:] if len(frame)]
    assert all(np.shares_memory(array, frame) for array, frame in zip(sent, raw, strict=True))

    writable = [frames[0], *(bytearray(frame) for frame in frames[1:])]  # as a transport might hand them over
    for array in arrays_of(codec.decode(writable)).values():
        assert not array.flags.writeable
        assert not array.size or any(np.shares_memory(array, np.frombuffer(f, np.uint8)) for f in writable[1:])


def test_no_array_enters_the_header() -> None:
    long = a_group(1, [[(0, 100_000)]] * 2)
    header, *frames = over_the_wire(long)
    assert len(header) < 600
    assert sum(map(len, frames)) > 800_000


def test_strided_and_read_only_arrays_can_be_sent() -> None:
    ids = np.arange(8, dtype=np.int32)[::2]
    ids.flags.writeable = False
    lease = Lease(lease=1, epoch=0, prompt_id="p", prompt_ids=ids, answer="", group_size=1, purpose="train")
    assert Codec(ToRollout).decode(over_the_wire(lease)).prompt_ids.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("dtype", ["float64", "object", ">i4", "bool"])
def test_an_array_of_another_dtype_is_not_sent(dtype: str) -> None:
    message = a_group(rewards=None, lengths=np.array([3, 3]).astype(dtype))
    with pytest.raises(NotImplementedError, match="cannot encode an array of"):
        Codec(ToTrainer).encode(message)


def test_the_numbers_of_one_codec_do_not_run_into_the_next_message() -> None:
    codec = Codec(ToTrainer)
    first, second = codec.encode(a_group(1)), codec.encode(a_group(2))
    assert len(first) == len(second) == 11
    assert_same(codec.decode(first), a_group(1))
    assert_same(codec.decode(second), a_group(2))


# --- what is refused -------------------------------------------------------------------------------------------------


def header_of(message: Message, **changes: Any) -> bytes:
    """The header, with fields replaced by plain data."""
    tree = msgspec.msgpack.decode(over_the_wire(message)[0])
    return msgspec.msgpack.encode(tree | changes)


LEASE = Lease(lease=1, epoch=0, prompt_id="p", prompt_ids=ints(1, 2), answer="", group_size=1, purpose="train")
IDS = ints(1, 2).tobytes()


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        (["int64", [1], 1], "array of int64, expected int32"),
        (["float32", [2], 1], "array of float32, expected int32"),
        (["object", [2], 1], "array of object"),
        (["int32", [3], 1], r"shape \(3,\) in a frame of 8 bytes"),
        (["int32", [1], 1], r"shape \(1,\) in a frame of 8 bytes"),
        (["int32", [1, 2], 1], "shape that is not one number"),
        (["int32", [], 1], "shape that is not one number"),
        (["int32", [-2], 1], "shape that is not one number"),
        (["int32", [2**63], 1], "frame of 8 bytes"),
        (["int32", [2], 0], "without its frame"),
        (["int32", [2], 2], "without its frame"),
        (["int32", [2], -1], "without its frame"),
        (["int32", [2]], "does not decode"),
        ([1, [2], 1], "does not decode"),
        ([1, 2], "does not decode"),
        ("AQID", "does not decode"),
        (None, "does not decode"),
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_refused(reference: Any, match: str) -> None:
    refused([header_of(LEASE, prompt_ids=reference), IDS], match, ToRollout)


def test_missing_extra_and_doubly_used_frames_are_refused() -> None:
    frames = over_the_wire(a_group())
    refused(frames[:1], "without its frame")
    refused(frames[:-1], "without its frame")
    refused([*frames, b""], "12 frames, 10 arrays")
    refused([*over_the_wire(Goodbye(reason="")), b"stowaway"], "2 frames, 0 arrays")
    twice = header_of(a_group(), reward_errors=["uint8", [2], 9])  # as `truncated`
    refused([twice, *frames[1:-1]], "frame 9 is two arrays")
    refused([twice, *frames[1:]], "does not decode")
    refused([], "expected 1 to")
    refused([*frames, *[b""] * MAX_FRAMES], "expected 1 to")


def test_too_large_messages_are_refused_before_they_are_decoded() -> None:
    refused([b"\x00" * (MAX_HEADER_BYTES + 1)], "at most")
    frames = over_the_wire(a_group())
    size = sum(map(len, frames))
    assert_same(Codec(ToTrainer, max_bytes=size).decode(frames), a_group())
    with pytest.raises(MessageError, match=f"{size} bytes in all"):
        Codec(ToTrainer, max_bytes=size - 1).decode(frames)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"hello",
        b"\x80",
        msgspec.msgpack.encode({"type": "Group"}),
        msgspec.msgpack.encode({"type": "Nobody", "lease": 1}),
        msgspec.msgpack.encode({"type": 7}),
        msgspec.msgpack.encode(["Failed", 1, "reason"]),
        msgspec.msgpack.encode({"type": "Failed", "lease": "one", "reason": "r"}),
        msgspec.msgpack.encode({"type": "Failed", "lease": 2**64 - 1, "reason": b"\xff"}),
        msgspec.msgpack.encode({"type": "Failed", "lease": 1, "reason": "r"})[:-2] + b"\xa2\xff\xfe",
        msgspec.msgpack.encode({"type": "Failed", "lease": 1, "reason": "r"}) + b"\x00",
        b"\x91" * 100_000,
        b"\x82\xa4type\xa5Group\xacresponse_ids" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa4type\xdb\xff\xff\xff\xff",
    ],
    ids=lambda header: repr(header[:30]),
)
def test_garbage_is_refused(header: bytes) -> None:
    refused([header], "does not decode")


def test_a_list_that_claims_to_be_endless_costs_no_memory() -> None:
    claim = b"\x82\xa4type\xa6Cancel\xa6leases\xdd\xff\xff\xff\xff"
    refused([claim], "does not decode", ToRollout)
    nested = b"\x82\xa4type\xa5Lease\xaaprompt_ids\x81\xdd\x7f\xff\xff\xff"
    refused([nested], "does not decode", ToRollout)


def test_a_message_for_somebody_else_is_refused() -> None:
    refused(over_the_wire(Stop(reason="")), "does not decode", ToTrainer)
    refused(over_the_wire(a_group()), "does not decode", ToRollout)


@each_message
def test_a_header_that_was_cut_off_is_refused(message: Message) -> None:
    header, *frames = over_the_wire(message)
    for length in range(len(header)):
        refused([header[:length], *frames], "does not decode", Anything)


def decodes_or_is_refused(frames: list[bytes]) -> None:
    """Anything but a message or a MessageError fails the test; a group has to survive its check likewise."""
    try:
        message = Codec(Anything, max_bytes=1 << 16).decode(frames)
        if isinstance(message, Group):
            message.check(int(message.lengths.size))
    except MessageError:
        return
    assert isinstance(message, Message)
    # whatever is let through is a proper message, which can be sent on
    assert_same(Codec(Anything).decode(over_the_wire(message)), message)


def mutate(data: st.DataObject, frames: list[bytes]) -> list[bytes]:
    frames = list(frames)
    for _ in range(data.draw(st.integers(1, 3))):
        if not frames:
            break
        which = data.draw(st.integers(0, len(frames) - 1) | st.just(0))
        frame = bytearray(frames[which])
        place = data.draw(st.integers(0, max(0, len(frame) - 1)))
        match data.draw(st.sampled_from(["flip", "byte", "cut", "grow", "swap", "lose", "double"])):
            case "flip" if frame:
                frame[place] ^= 1 << data.draw(st.integers(0, 7))
                frames[which] = bytes(frame)
            case "byte" if frame:
                frame[place] = data.draw(st.integers(0, 255))
                frames[which] = bytes(frame)
            case "cut":
                frames[which] = bytes(frame[:place])
            case "grow":
                frames[which] = bytes(frame[:place]) + data.draw(st.binary(max_size=8)) + bytes(frame[place:])
            case "swap":
                other = data.draw(st.integers(0, len(frames) - 1))
                frames[which], frames[other] = frames[other], frames[which]
            case "lose":
                del frames[which]
            case "double":
                frames.insert(which, frames[which])
    return frames


@settings(max_examples=600, deadline=None)
@given(message=st.sampled_from(EXAMPLES) | st.just(a_group()), data=st.data())
def test_damaged_messages_are_refused_or_decode(message: Message, data: st.DataObject) -> None:
    decodes_or_is_refused(mutate(data, over_the_wire(message)))


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=40), max_size=4))
def test_random_bytes_are_refused_or_decode(frames: list[bytes]) -> None:
    decodes_or_is_refused(frames)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), message=st.sampled_from(EXAMPLES))
def test_headers_with_any_value_in_any_field_are_refused_or_decode(data: st.DataObject, message: Message) -> None:
    header, *frames = over_the_wire(message)
    tree = msgspec.msgpack.decode(header)
    tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(PLAIN)
    decodes_or_is_refused([msgspec.msgpack.encode(tree), *frames])


# --- Group.check -----------------------------------------------------------------------------------------------------

BROKEN = {
    "a response too few": ({"spans": [[(0, 3)]]}, "expected 2 responses, got 1"),
    "a response too many": ({"spans": [[(0, 3)]] * 3}, "expected 2 responses, got 3"),
    "rewards of another length": ({"rewards": floats(1)}, r"rewards has shape \(1,\), expected \(2,\)"),
    "truncated of another length": ({"truncated": flags(0)}, "truncated has shape"),
    "reward errors of another length": ({"reward_errors": flags(0, 0, 0)}, "reward_errors has shape"),
    "span counts of another length": ({"span_counts": ints(3)}, "span_counts has shape"),
    "step rewards of another length": (
        {"step_rewards": floats(0, 1)},
        r"step_rewards has shape \(2,\), expected \(6,\)",
    ),
    "log-probs of another length": ({"behaviour_logprobs": floats(0)}, r"behaviour_logprobs has shape \(1,\)"),
    "lengths that miss a token": ({"lengths": ints(3, 2)}, "lengths do not partition its 6 tokens"),
    "an empty response": ({"lengths": ints(6, 0)}, "lengths do not partition"),
    "a negative length": ({"lengths": ints(7, -1)}, "lengths do not partition"),
    "span lengths of another length": ({"span_lengths": ints(3, 3)}, "malformed version spans"),
    "an empty span": ({"span_lengths": ints(3, 3, 0)}, "malformed version spans"),
    "a response without spans": ({"span_counts": ints(3, 0)}, "malformed version spans"),
    "span counts that miss a span": ({"span_counts": ints(1, 1)}, "3 version spans, but the counts say otherwise"),
    "spans across responses": ({"span_lengths": ints(4, 1, 1)}, "do not partition the responses"),
    "spans that wrap around": ({"span_lengths": ints(3, 2**31 - 1, 2**31 - 1)}, "do not partition the responses"),
    "versions that fall": ({"span_versions": ints(0, 2, 1)}, "fall within a response"),
    "a negative version": ({"span_versions": ints(-1, 0, 1)}, "fall within a response"),
    "a negative token": ({"response_ids": ints(0, 1, 2, 3, 4, -5)}, "out of range"),
    "a flag that is not 0 or 1": ({"truncated": flags(0, 2)}, "out of range"),
    "an error that is not 0 or 1": ({"reward_errors": flags(255, 0)}, "out of range"),
    "a reward that is not a number": ({"rewards": floats(0, np.nan)}, "not finite"),
    "a step reward that is not a number": ({"step_rewards": floats(0, 0, 0, 0, 0, np.nan)}, "not finite"),
    "an infinite log-prob": ({"behaviour_logprobs": floats(0, 0, 0, 0, 0, -np.inf)}, "not finite"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_group_that_makes_no_sense_is_refused(what: str) -> None:
    changes, match = BROKEN[what]
    with pytest.raises(MessageError, match=match) as caught:
        a_group(7, **changes).check(group_size=2)
    assert "group of lease 7" in str(caught.value)


@pytest.mark.parametrize(
    "group",
    [
        a_group(),
        a_group_of_version(0),
        a_group(step_rewards=floats(0, 0.5, 0, -1, 0, 0)),
        a_group(1, [[(5, 1)], [(3, 1)]]),  # a later response may be of an older version
        a_group(1, [[(0, 1), (0, 2), (4, 1)], [(2, 1), (3, 9)]], rewards=[0.5, -1]),
        a_group(1, [[(0, 1)]] * 2, truncated=flags(1, 0), reward_errors=flags(0, 1)),
    ],
)
def test_a_group_that_makes_sense_passes(group: Group) -> None:
    group.check(group_size=2)
    decoded = Codec(ToTrainer).decode(over_the_wire(group))
    decoded.check(group_size=2)


def test_a_group_of_one_response_passes() -> None:
    a_group(1, [[(0, 2), (1, 1)]]).check(group_size=1)
