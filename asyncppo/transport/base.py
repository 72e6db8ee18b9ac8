"""The seam between the processes: what a transport has to do. Both implementations pass the same contract tests."""

from __future__ import annotations

from typing import Any, Protocol

from asyncppo.messages import Message


class Hub(Protocol):
    """The trainer's end: one thread talks with any number of rollout servers."""

    @property
    def address(self) -> str:
        """Where links connect to."""

    def receive(self, timeout_s: float) -> tuple[bytes, Any] | None:
        """The next message with its sender, or None after `timeout_s` or a `wake`.

        Raises:
            MessageError: a message came that does not decode; it is gone, and the next call gives the next one.
        """

    def send(self, peer: bytes, message: Message) -> bool:
        """Queue a message for a peer without waiting; False when the peer is gone."""

    def wake(self) -> None:
        """Make a waiting `receive` return at once. The only method that other threads may call."""

    def close(self) -> None:
        """Send what is queued, for a second at most, and let go of the address."""


class Link(Protocol):
    """A rollout server's end, in its event loop. Reconnects by itself."""

    @property
    def hint(self) -> str:
        """Why nothing may come from the other end, for the message of one that gives up; may be empty."""

    async def receive(self) -> Any:
        """The next message from the trainer.

        Raises:
            MessageError: a message came that does not decode; it is gone, and the next call gives the next one.
        """

    async def send(self, message: Message) -> None:
        """Queue a message for the trainer, waiting while the queue is full."""

    def close(self) -> None:
        """Send what is queued, for a second at most."""


class Channel(Protocol):
    """Either end of the line between the learner and one critic; used by one thread."""

    @property
    def hint(self) -> str:
        """Why nothing may come from the other end, for the message of one that gives up; may be empty."""

    def send(self, message: Message) -> bool:
        """Queue a message for the other end; False when none has come within a second."""

    def receive(self, timeout_s: float) -> Any | None:
        """The next message, or None after `timeout_s`.

        Raises:
            MessageError: a message came that does not decode.
        """

    def close(self) -> None:
        """Send what is queued, for a second at most."""
