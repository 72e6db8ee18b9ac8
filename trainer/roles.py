"""The two roles of the trainer: how a learner and a critic are put together from their parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from asyncppo.config import Config
from asyncppo.errors import ConfigError
from asyncppo.messages import ToCritic, ToLearner
from asyncppo.metrics import Journal
from asyncppo.transport.zmq import ZmqChannel, ZmqHub, check_address
from trainer import preflight
from trainer.checkpoint import Checkpoints
from trainer.feed import Feed
from trainer.learner import Learner
from trainer.model.critic import Critic, serve
from trainer.model.critics import Critics
from trainer.model.policy import Policy
from trainer.model.world import World
from trainer.publish import Publisher
from trainer.stream.intake import Intake
from trainer.stream.prompts import Prompts

log = logging.getLogger("asyncppo.trainer")


def check_addresses(addresses: Sequence[str], insecure: bool) -> None:
    """Refuse TCP addresses that other hosts can reach, unless that was asked for.

    Raises:
        AddressError: one is not loopback and `insecure` is not set.
    """
    for address in addresses:
        if address.startswith("tcp://"):
            check_address(address, insecure)


def learner(config: Config, critic_addresses: Sequence[str], should_stop: Callable[[], bool]) -> int:
    """One rank of the learner, to the end of the run; returns the exit code.

    It ends in this order: the critics, the stream, published versions, the process group. Rollout servers are told to
    stop only when the run is complete: otherwise they wait for the trainer to come back (rollout.connect_timeout_s).

    Raises:
        UserError: what was given cannot work.
    """
    if len(critic_addresses) != config.algorithm.critics:
        raise ConfigError(
            f"the learner has the addresses of {len(critic_addresses)} critics, and algorithm.critics is "
            f"{config.algorithm.critics}: give --address for each, or critic.addresses in the config"
        )
    check_addresses([config.stream.address, *critic_addresses], config.stream.insecure)
    data = preflight.load_data(config)
    world = World()
    first = world.rank == 0
    critics = intake = publisher = journal = None
    if first:  # answer servers before the models are loaded: their engines start meanwhile
        hub = ZmqHub(config.stream.address, config.stream.max_message_mb << 20)
        journal = Journal(config.run_directory)
        prompts = Prompts(data.train, config.run.seed, config.data.shuffle)
        intake = Intake(config, hub, prompts, preflight.identity(config), journal)
        critics = Critics(config, [ZmqChannel(address, ToLearner, bind=False) for address in critic_addresses])
        log.info("listening for rollout servers on %s", hub.address)
    reason, complete = "the trainer failed", False
    try:
        resumed = Checkpoints(config).latest()
        version = resumed[1].policy_version if resumed else 0
        if intake:
            intake.start(resumed[1].ledger if resumed else None)
            publisher = Publisher(config, data.tokenizer_directory)
        policy = Policy(config, world)
        if critics:
            critics.wait_until_ready()
        if resumed:
            policy.load(resumed[0] / "actor")
            if critics:
                critics.load(resumed[0])
            log.info("going on from %s", resumed[0])
        errors = resumed[1].critic_errors if resumed else ()
        feed = Feed(config, world, intake, journal, data.eval_sets, data.tokenizer_directory, should_stop)
        if journal:
            journal.event("start", version=version, resumed=bool(resumed))
        reached = Learner(config, world, feed, policy, critics, publisher, journal, errors).run(version)
        complete = reached == config.run.steps
        reason = "the run is complete" if complete else "the trainer was stopped"
        if journal:
            journal.event("end", version=reached, reason=reason)
        return 0
    finally:
        if critics:
            critics.stop(reason)
        if intake:
            intake.close(reason if complete else None)
        if publisher:
            publisher.close()
        if journal:
            journal.close()
        world.close()


def critic(config: Config, index: int, address: str, should_stop: Callable[[], bool]) -> int:
    """One rank of a critic, until the learner stops it; returns the exit code.

    Raises:
        UserError: what was given cannot work.
    """
    check_addresses([address], config.stream.insecure)
    preflight.check_models(config)
    world = World()
    channel = ZmqChannel(address, ToCritic, bind=True) if world.rank == 0 else None
    try:
        serve(Critic(config, index, world), channel, index, world, should_stop)
        return 0
    finally:
        if channel:
            channel.close()
        world.close()
