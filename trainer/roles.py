"""The two roles of the trainer: how a learner and a critic are put together from their parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncppo import keys
from asyncppo.config import Config
from asyncppo.errors import ConfigError
from asyncppo.messages import ToCritic, ToLearner
from asyncppo.metrics import Journal
from asyncppo.ports import is_loopback
from asyncppo.transport.zmq import ZmqChannel, ZmqHub, check_address
from asyncppo.waits import Watchdog, phase
from trainer import preflight
from trainer.checkpoint import Checkpoints, TrainerState, choose
from trainer.feed import Feed
from trainer.learner import Learner
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish.broadcast import BroadcastTransport
from trainer.publish.disk import Disk
from trainer.publish.publisher import Publisher, tolerance
from trainer.stream.intake import Intake
from trainer.stream.prompts import Prompts
from trainer.stream.state import StreamState

log = logging.getLogger("asyncppo.trainer")


def check_addresses(addresses: Sequence[str], config: Config) -> None:
    """Refuse TCP addresses that other hosts can reach, unless there are keys, or that was asked for.

    Raises:
        AddressError: one is not loopback, and neither `stream.keys` nor `stream.insecure` is set.
    """
    for address in addresses:
        if _is_tcp(address):
            check_address(address, config.stream.insecure, has_keys=config.stream.keys is not None)


def _is_tcp(address: str) -> bool:
    """Others, `ipc://`, have no keys: the file system says who may connect."""
    return address.startswith("tcp://")


def learner(config: Config, critic_addresses: Sequence[str], should_stop: Callable[[], bool]) -> int:
    """One rank of the learner, to the end of the run; returns the exit code.

    It ends in this order: the critics, the publisher, the stream, published versions, the process group. Rollout
    servers are told to stop only when the run is complete: otherwise they wait for the trainer to come back
    (rollout.connect_timeout_s).

    Raises:
        UserError: what was given cannot work.
    """
    if len(critic_addresses) != config.algorithm.critics:
        raise ConfigError(
            f"the learner has the addresses of {len(critic_addresses)} critics, and algorithm.critics is "
            f"{config.algorithm.critics}: give --address for each, or critic.addresses in the config"
        )
    check_addresses([config.stream.address, *critic_addresses], config)
    data = preflight.load_data(config)
    with Watchdog(_ranked("learner"), config.run_directory, config.guard.stall_s) as watchdog:
        return _learner(config, critic_addresses, data, should_stop, watchdog)


def _learner(
    config: Config,
    critic_addresses: Sequence[str],
    data: preflight.Data,
    should_stop: Callable[[], bool],
    watchdog: Watchdog,
) -> int:
    world = World(_collective_s(config))
    first = world.rank == 0
    critics = intake = transport = publisher = journal = trainer = None
    if first:  # answer servers before the models are loaded: their engines start meanwhile
        hub = ZmqHub(config.stream.address, config.stream.max_message_mb << 20, keys.of_trainer(config.stream.keys))
        journal = Journal(config.run_directory)
        watchdog.journal = journal.event
        prompts = Prompts(data.train, config.run.seed, config.data.shuffle)
        transport = _transport(config, world, data)
        sender = transport if isinstance(transport, BroadcastTransport) else None
        intake = Intake(config, hub, prompts, preflight.identity(config), journal, sender)
        channels = [
            ZmqChannel(
                address, ToLearner, bind=False, keys=keys.to_critic(config.stream.keys) if _is_tcp(address) else None
            )
            for address in critic_addresses
        ]
        come_back = config.critic.restarts > 0 or bool(config.critic.addresses)
        critics = Critics(config, channels, journal.event, come_back=come_back)
        log.info("listening for rollout servers on %s", hub.address)
    reason, complete = "the trainer failed", False
    try:
        resumed = choose(Checkpoints(config, journal) if first else None, world.share_text)
        version = resumed[1].policy_version if resumed else 0
        if intake and journal:
            intake.start(_stream(config, resumed, journal))
        with phase("building the actor"):
            policy = Policy(config, world)
        if critics:
            critics.wait_until_ready()
        if resumed:
            with phase("loading the actor's state"):
                policy.load(resumed[0] / "actor")
            if critics:
                critics.load(resumed[0])
            log.info("going on from %s", resumed[0])

        def stops() -> bool:
            if publisher:
                publisher.raise_failure()  # nothing comes any more: better said now than when the wait is over
            return should_stop()

        feed = Feed(config, world, intake, journal, data.eval_sets, data.tokenizer_directory, stops)
        probe_ids = preflight.probe_ids(config, data.train)
        if journal and transport:
            journal.event("start", version=version, resumed=bool(resumed))
            model = policy.network.hf
            publisher = Publisher(
                config, transport, model, feed.announce, feed.oldest_wanted_version, probe_ids, journal
            )
        before = resumed[1] if resumed else None
        trainer = Learner(config, world, feed, policy, critics, publisher, journal, before, probe_ids)
        reached = trainer.run(version)
        complete = reached == config.run.steps
        reason = "the run is complete" if complete else "the trainer was stopped"
        if journal:
            journal.event("end", version=reached, reason=reason)
        return 0
    finally:
        if trainer:
            trainer.close()
        if critics:
            critics.stop(reason)
        if publisher:
            publisher.close()
        if intake:
            intake.close(reason if complete else None)
        if transport:
            transport.close()
        if journal:
            journal.close()
        world.close()


def _transport(config: Config, world: World, data: preflight.Data) -> Disk | BroadcastTransport:
    """How weights travel in this run."""
    which, why = config.publish_transport
    log.info("weights are published by %s: %s", which, why)
    probed = f"probed to {tolerance(config):g} nats" if config.publish.probe else "not probed"
    log.info("the actor trains in %s, the engines serve %s, %s", config.actor.dtype, config.rollout.dtype, probed)
    if which == "disk":
        return Disk(config, data.tokenizer_directory)
    transport = BroadcastTransport(config, world.device)
    if not is_loopback(config.stream.address):
        log.warning("a broadcast is neither encrypted nor authenticated: keep it to a network that you trust")
    return transport


def _stream(config: Config, resumed: tuple[Path, TrainerState] | None, journal: Journal) -> StreamState | None:
    """The stream of the checkpoint that the run goes on from, if there is one; the journal is cut where it was made."""
    if resumed is None:
        state, metrics_bytes, ledger_bytes = None, 0, 0
    else:
        path, trainer = resumed
        state = StreamState.read(trainer.ledger, path / "stream", config.stream.max_message_mb << 20)
        metrics_bytes, ledger_bytes = trainer.ledger.metrics_bytes, trainer.ledger.ledger_bytes
    steps = journal.roll_back(metrics_bytes, ledger_bytes)
    if steps:
        version = resumed[1].policy_version if resumed else 0
        log.warning("%d steps after version %d are in no checkpoint: they are done again", steps, version)
        journal.event("rolled_back", steps=steps, version=version)
    return state


def critic(config: Config, index: int, address: str, should_stop: Callable[[], bool]) -> bool:
    """One rank of a critic, until the learner stops it or this process is told to end; whether it was the learner.

    Raises:
        UserError: what was given cannot work.
    """
    check_addresses([address], config)
    server_keys = keys.of_critic(config.stream.keys) if _is_tcp(address) else None
    preflight.check_models(config)
    with Watchdog(_ranked(f"critic {index}"), config.run_directory, config.guard.stall_s):
        world = World(_collective_s(config))
        channel = ZmqChannel(address, ToCritic, bind=True, keys=server_keys) if world.rank == 0 else None
        try:
            with phase("building the critic"):
                member = Critic(config, index, world)
            return serve(member, channel, index, world, should_stop)
        finally:
            if channel:
                channel.close()
            world.close()


def _ranked(role: str) -> str:
    """The role, and which of its processes this one is."""
    rank = os.environ.get("RANK", "0")
    return role if rank == "0" else f"{role} rank {rank}"


def _collective_s(config: Config) -> float:
    """How long one rank may wait for another: rank 0 waits for the stream and the critics meanwhile.

    A rank that hangs is ended by its own watchdog long before.
    """
    stream = config.stream.batch_timeout_s * max(1, len(config.eval.sets))
    critics = config.critic.timeout_s * (2 + config.critic.restarts)  # some of them may have to catch up
    return config.guard.stall_s + max(stream, critics)
