"""Keys for TCP: one directory, made by `asyncppo keys`, of which each host has the part that it needs.

    trainer.key  trainer.key_secret      the trainer; whoever connects to it has to know its public key
    critics.key  critics.key_secret      critics on hosts of their own (`critic.addresses`), all with one key
    servers/NAME.key                     rollout servers that are let in; take one away, and it is not any more
    servers/NAME.key_secret              the key of the rollout server of that --name, or of all: `pool`

The trainer's host has trainer.key_secret, critics.key and servers/*.key; a rollout server's has trainer.key and its
servers/NAME.key_secret (or pool's); a critic's has trainer.key and critics.key_secret. Files are pyzmq's certificates,
the secret ones readable by their owner alone; nothing ever prints them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from asyncppo.errors import ConfigError
from asyncppo.transport.zmq import ClientKeys, KeyPair, ServerKeys, make_key_files, read_key_file

POOL = "pool"
"""Name of the key that rollout servers without one of their own share."""
_TRAINER, _CRITICS, _SERVERS = "trainer", "critics", "servers"


def make(directory: Path, servers: Sequence[str] = ()) -> list[Path]:
    """Make what is missing in a directory of keys: the trainer's, the critics', and the rollout servers'.

    Args:
        directory: made if it is not there; keys that it holds stay as they are.
        servers: names of rollout servers that get a key each; without names there is one for the whole pool.

    Returns:
        The files that were made.

    Raises:
        ConfigError: a name that cannot be a file's, or a directory that cannot be written.
    """
    for name in servers:
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", name):
            raise ConfigError(f"--server {name!r}: expected letters, digits, and . _ - (as for --name)")
    wanted = [(directory, _TRAINER), (directory, _CRITICS)]
    wanted += [(directory / _SERVERS, name) for name in servers or ([] if _has_servers(directory) else [POOL])]
    made: list[Path] = []
    mask = os.umask(0o077)
    try:
        for place, name in wanted:
            place.mkdir(parents=True, exist_ok=True)
            if not (place / f"{name}.key").exists():
                make_key_files(place, name)
                (place / f"{name}.key_secret").chmod(0o600)
                made += [place / f"{name}.key", place / f"{name}.key_secret"]
    except OSError as error:
        raise ConfigError(f"{directory}: keys cannot be written: {error}") from None
    finally:
        os.umask(mask)
    return made


def of_trainer(directory: str | None) -> ServerKeys | None:
    """What the trainer listens for rollout servers with; None where there are no keys (`stream.keys`).

    Who is let in is looked up at every handshake, so that keys can be added and taken away while a run goes on.

    Raises:
        ConfigError: what is missing, and how to get it.
    """
    if directory is None:
        return None
    servers = Path(directory) / _SERVERS
    if not _has_servers(Path(directory)):
        raise ConfigError(f"{servers} holds no key of a rollout server: none could join; asyncppo keys {directory}")
    return ServerKeys(_pair(directory, _TRAINER), lambda key: key in _public_keys(servers))


def of_rollout_server(directory: str | None, name: str) -> ClientKeys | None:
    """What the rollout server of this name connects with: its own key, or the pool's.

    Raises:
        ConfigError: what is missing, and how to get it.
    """
    if directory is None:
        return None
    servers = Path(directory) / _SERVERS
    for owner in (name, POOL):
        if (servers / f"{owner}.key_secret").exists():
            return ClientKeys(_pair(str(servers), owner), _public(directory, _TRAINER))
    raise ConfigError(
        f"{servers} has neither {name}.key_secret nor {POOL}.key_secret: make one where the trainer's keys are "
        f"(asyncppo keys {directory} --server {name}), and copy it here"
    )


def of_critic(directory: str | None) -> ServerKeys | None:
    """What a critic listens with: it lets in the trainer alone.

    Raises:
        ConfigError: what is missing, and how to get it.
    """
    if directory is None:
        return None
    trainer = _public(directory, _TRAINER)
    return ServerKeys(_pair(directory, _CRITICS), lambda key: key == trainer)


def to_critic(directory: str | None) -> ClientKeys | None:
    """What the learner connects to its critics with.

    Raises:
        ConfigError: what is missing, and how to get it.
    """
    if directory is None:
        return None
    return ClientKeys(_pair(directory, _TRAINER), _public(directory, _CRITICS))


def _pair(directory: str, owner: str) -> KeyPair:
    path = Path(directory) / f"{owner}.key_secret"
    public, secret = _read(path)
    if secret is None:
        raise ConfigError(f"{path}: expected a secret key, and there is none in it; asyncppo keys {directory}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
    return KeyPair(public, secret)


def _public(directory: str, owner: str) -> bytes:
    return _read(Path(directory) / f"{owner}.key")[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return read_key_file(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; this host needs it (stream.keys): make keys with asyncppo keys, or "
            "copy it from where they were made"
        ) from None
    except ValueError:
        raise ConfigError(f"{path} is no key file: make keys with asyncppo keys") from None


def _public_keys(servers: Path) -> set[bytes]:
    found = set()
    for path in servers.glob("*.key"):
        try:
            found.add(read_key_file(path)[0])
        except (OSError, ValueError):
            continue  # being written, or taken away: its holder is not let in
    return found


def _has_servers(directory: Path) -> bool:
    return any((directory / _SERVERS).glob("*.key"))
