"""Keys: what is made, who may read it, who is let in with it, and what people are told when it does not fit."""

from __future__ import annotations

import asyncio
import logging
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from typer.testing import CliRunner

from asyncppo import cli, keys, ports
from asyncppo.errors import AddressError, ConfigError
from asyncppo.messages import Failed, Pulse, Stop, ToCritic, ToLearner
from asyncppo.transport.zmq import ClientKeys, ServerKeys, ZmqChannel, ZmqHub, ZmqLink

pytestmark = pytest.mark.unit

SOON_S = 5.0
"""Within so many seconds people are told, not after rollout.connect_timeout_s."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys", ["alice"])
    return tmp_path / "keys"


@pytest.fixture
def hub(directory: Path) -> Iterator[ZmqHub]:
    hub = ZmqHub("tcp://127.0.0.1:0", keys=keys.of_trainer(str(directory)))
    yield hub
    hub.close()


def secrets_in(directory: Path) -> list[str]:
    return [
        line.split('"')[1]
        for path in directory.rglob("*.key_secret")
        for line in path.read_text().splitlines()
        if "secret-key" in line and '"' in line
    ]


async def knock(address: str, client: ClientKeys | None) -> object:
    """What a rollout server with these keys hears first, after it has said something."""
    link = ZmqLink(address, b"alice", keys=client)
    try:
        await link.send(Failed(lease=7, reason="knock"))
        async with asyncio.timeout(SOON_S):
            return await link.receive()
    finally:
        link.close()


def refusal(address: str, client: ClientKeys | None) -> str:
    started = time.monotonic()
    with pytest.raises(AddressError) as refused:
        asyncio.run(knock(address, client))
    assert time.monotonic() - started < SOON_S
    return str(refused.value)


# --- what is made ----------------------------------------------------------------------------------------------------


def test_a_directory_of_keys_has_a_pair_for_each_and_only_the_owner_reads_the_secret_ones(tmp_path: Path) -> None:
    made = keys.make(tmp_path / "keys")
    names = {str(path.relative_to(tmp_path / "keys")) for path in made}
    pairs = ("trainer", "critics", "servers/pool")
    assert names == {f"{name}.{kind}" for name in pairs for kind in ("key", "key_secret")}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_further_server_leaves_the_keys_that_are_there(directory: Path) -> None:
    before = {path: path.read_bytes() for path in directory.rglob("*.key*")}
    made = keys.make(directory, ["alice", "bob"])
    assert {path.name for path in made} == {"bob.key", "bob.key_secret"}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert keys.make(directory) == []  # servers have keys: no pool's is added by the way


def test_the_command_prints_no_secret_and_says_which_host_needs_what(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["keys", str(tmp_path / "keys"), "--server", "gpu1"])
    assert result.exit_code == 0
    assert "trainer.key_secret" in result.output
    secrets = secrets_in(tmp_path / "keys")
    assert len(secrets) == 3
    assert not any(secret in result.output for secret in secrets)


@pytest.mark.parametrize("name", ["../x", "", "a b", ".hidden", "x" * 101])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        keys.make(tmp_path / "keys", [name])


def test_missing_keys_say_which_file_and_which_command(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither bob\.key_secret nor pool\.key_secret.*--server bob"):
        keys.of_rollout_server(str(directory), "bob")
    (directory / "trainer.key").unlink()
    with pytest.raises(ConfigError, match=r"trainer\.key: .*asyncppo keys"):
        keys.of_rollout_server(str(directory), "alice")
    (directory / "servers" / "alice.key").unlink()
    with pytest.raises(ConfigError, match="no key of a rollout server"):
        keys.of_trainer(str(directory))


def test_a_secret_that_others_can_read_is_refused(directory: Path) -> None:
    (directory / "trainer.key_secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.of_trainer(str(directory))


def test_a_file_that_is_no_key_is_named(directory: Path) -> None:
    (directory / "trainer.key_secret").write_text("hello")
    (directory / "trainer.key_secret").chmod(0o600)
    with pytest.raises(ConfigError, match=r"trainer\.key_secret is no key file"):
        keys.of_trainer(str(directory))


def test_keys_are_in_no_repr(directory: Path) -> None:
    held = [keys.of_trainer(str(directory)), keys.of_rollout_server(str(directory), "alice")]
    held += [keys.of_critic(str(directory)), keys.to_critic(str(directory))]
    assert not any(secret in repr(held) for secret in secrets_in(directory))


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_a_known_key_is_let_in_and_both_sides_are_heard(directory: Path, hub: ZmqHub) -> None:
    async def scenario() -> None:
        link = ZmqLink(hub.address, b"alice", keys=keys.of_rollout_server(str(directory), "alice"))
        await link.send(Failed(lease=7, reason=""))
        item = await asyncio.to_thread(hub.receive, SOON_S)
        assert item is not None
        assert (item[0], item[1].lease) == (b"alice", 7)
        assert hub.send(b"alice", Pulse(policy_version=3))
        async with asyncio.timeout(SOON_S):
            assert (await link.receive()).policy_version == 3
        link.close()

    asyncio.run(scenario())


def test_an_unknown_key_is_refused_within_seconds_and_both_ends_say_so(
    directory: Path, hub: ZmqHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys.make(tmp_path / "others", ["alice"])
    stranger = keys.of_rollout_server(str(tmp_path / "others"), "alice")
    ours = keys.of_rollout_server(str(directory), "alice")
    assert stranger is not None
    assert ours is not None
    with caplog.at_level(logging.DEBUG):
        assert "does not let this key in" in refusal(hub.address, ClientKeys(stranger.own, ours.server))
        assert hub.receive(0.1) is None
    assert f"unknown public key {stranger.own.public.decode()}" in caplog.text
    everything = caplog.text + "".join(map(str, caplog.records))
    assert not any(secret in everything for secret in secrets_in(directory) + secrets_in(tmp_path / "others"))


def test_no_key_and_a_trainer_without_keys_are_told_apart_from_silence(directory: Path, hub: ZmqHub) -> None:
    assert "this end has no keys" in refusal(hub.address, None)
    assert hub.receive(0.1) is None
    plain = ZmqHub("tcp://127.0.0.1:0")
    assert "this end has keys" in refusal(plain.address, keys.of_rollout_server(str(directory), "alice"))
    assert plain.receive(0.1) is None
    plain.close()


async def hint_of(link: ZmqLink) -> str:
    """What a link that hears nothing has to say for itself; a refusal raises."""
    receiving = asyncio.ensure_future(link.receive())
    try:
        async with asyncio.timeout(SOON_S):
            while not link.hint:
                assert not receiving.done(), receiving.exception()
                await asyncio.sleep(0.02)
        await asyncio.wait((receiving,), timeout=0.5)  # it goes on
        assert not receiving.done(), receiving.exception()
    finally:
        receiving.cancel()
    return link.hint


def test_another_trainers_key_is_no_refusal_to_zeromq_and_the_link_has_a_hint(hub: ZmqHub, tmp_path: Path) -> None:
    keys.make(tmp_path / "others", ["alice"])

    async def scenario() -> None:
        link = ZmqLink(hub.address, b"alice", keys=keys.of_rollout_server(str(tmp_path / "others"), "alice"))
        await link.send(Failed(lease=7, reason="knock"))
        assert "its keys do not fit (this end has keys" in await hint_of(link)
        link.close()

    asyncio.run(scenario())
    assert hub.receive(0.1) is None


def test_a_tunnel_that_accepts_for_a_trainer_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def scenario() -> None:
        tunnel = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = tunnel.sockets[0].getsockname()[1]
        link = ZmqLink(f"tcp://127.0.0.1:{port}", b"alice")
        await link.send(Failed(lease=7, reason="knock"))
        assert "away behind a tunnel" in await hint_of(link)
        tunnel.close()
        await tunnel.wait_closed()
        trainer = ZmqHub(f"tcp://127.0.0.1:{port}")
        item = await asyncio.to_thread(trainer.receive, SOON_S)
        assert item is not None
        assert item[1].lease == 7
        assert trainer.send(b"alice", Pulse(policy_version=1))
        assert isinstance(await link.receive(), Pulse)
        async with asyncio.timeout(SOON_S):
            while link.hint:
                await asyncio.sleep(0.02)
        link.close()
        trainer.close()

    asyncio.run(scenario())
    assert caplog.text.count("trying on") == 1


def test_a_key_that_is_added_or_taken_away_counts_without_a_restart(directory: Path, hub: ZmqHub) -> None:
    async def heard(name: str) -> bool:
        link = ZmqLink(hub.address, name.encode(), keys=keys.of_rollout_server(str(directory), name))
        await link.send(Failed(lease=1, reason=""))
        came = await asyncio.to_thread(hub.receive, 1.0)
        link.close()
        return came is not None

    keys.make(directory, ["bob"])
    assert asyncio.run(heard("bob"))
    (directory / "servers" / "bob.key").unlink()
    assert not asyncio.run(heard("bob"))
    assert asyncio.run(heard("alice"))


def test_nothing_of_a_message_can_be_read_on_the_way(directory: Path, hub: ZmqHub) -> None:
    """A man in the middle that copies bytes: with keys he sees none of the words, without he would."""
    assert b"a very secret answer" not in asyncio.run(overheard(hub, keys.of_rollout_server(str(directory), "alice")))
    plain = ZmqHub("tcp://127.0.0.1:0")
    assert b"a very secret answer" in asyncio.run(overheard(plain, None))
    plain.close()


async def overheard(hub: ZmqHub, client: ClientKeys | None) -> bytes:
    seen = bytearray()
    tasks: list[asyncio.Task[None]] = []
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            seen.extend(data)
            writer.write(data)

    async def middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", int(hub.address.rpartition(":")[2]))
        writers.extend((writer, back))
        tasks.extend(asyncio.create_task(copy(*ends)) for ends in ((reader, back), (there, writer)))

    server = await asyncio.start_server(middle, "127.0.0.1", 0)
    link = ZmqLink(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", b"alice", keys=client)
    await link.send(Failed(lease=1, reason="a very secret answer"))
    assert await asyncio.to_thread(hub.receive, SOON_S) is not None
    link.close()
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
    return bytes(seen)


# --- critics ---------------------------------------------------------------------------------------------------------


def test_a_critic_lets_in_the_trainer_alone(directory: Path) -> None:
    address = f"tcp://127.0.0.1:{ports.free_port()}"
    critic = ZmqChannel(address, ToCritic, bind=True, keys=keys.of_critic(str(directory)))
    learner = ZmqChannel(address, ToLearner, bind=False, keys=keys.to_critic(str(directory)))
    assert learner.send(Stop(reason="done"))
    assert critic.receive(SOON_S).reason == "done"
    learner.close()
    own, theirs = keys.of_rollout_server(str(directory), "alice"), keys.to_critic(str(directory))
    assert own is not None
    assert theirs is not None
    stranger = ZmqChannel(address, ToLearner, bind=False, keys=ClientKeys(own.own, theirs.server))
    time.sleep(0.5)
    with pytest.raises(AddressError, match="does not let this key in"):
        stranger.receive(0.1)
    assert critic.receive(0.1) is None
    stranger.close()
    critic.close()


def test_a_port_that_is_taken_is_an_address_error_with_keys_too_and_leaves_nothing_open(directory: Path) -> None:
    with zmq.Context.instance().socket(zmq.ROUTER) as holder:
        port = holder.bind_to_random_port("tcp://127.0.0.1")
        server = keys.of_critic(str(directory))
        assert isinstance(server, ServerKeys)
        with pytest.raises(AddressError, match="cannot listen"):
            ZmqHub(f"tcp://127.0.0.1:{port}", keys=server)
        with pytest.raises(AddressError, match="cannot listen"):
            ZmqChannel(f"tcp://127.0.0.1:{port}", ToCritic, bind=True, keys=server)
