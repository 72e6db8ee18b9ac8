"""The errors that AsyncPPO raises on purpose.

    AsyncPPOError
    ├── UserError             what was given cannot work; shown as one line, exit code 2
    │   ├── ConfigError       a config file, an override, or a value in one
    │   ├── ModelError        a model or tokenizer directory
    │   ├── DataError         a dataset
    │   ├── AddressError      an address that cannot be bound, or not be used without keys
    │   └── ResumeError       checkpoints that this run cannot go on from (a CheckpointError, too)
    ├── RefusedError          the other end turned this process away, and said why; exit code 2
    ├── MessageError          a message that does not decode or does not make sense; never ends a process
    ├── EngineError           the inference engine failed, or replied something other than success
    ├── WeightsError          published weights that are incomplete or do not match their manifest
    ├── CheckpointError       a checkpoint that is not whole
    ├── JournalError          the run's metrics, events or ledger cannot be written
    ├── StallError            a wait passed its limit; says what was waited for, and how long
    └── ConservationError     the ledger's counts do not add up: a bug, the run must not go on

A message says what was expected, what came, and what to do.
"""

from __future__ import annotations


class AsyncPPOError(Exception):
    """Every error that AsyncPPO raises on purpose."""


class UserError(AsyncPPOError):
    """Something that was given cannot work: shown as one line, and the process exits with 2."""


class ConfigError(UserError):
    """A config file, an override on the command line, or a value in one of them."""


class ModelError(UserError):
    """A model or tokenizer directory that is missing or is not what it has to be."""


class DataError(UserError):
    """A dataset that is missing, empty, or lacks a column."""


class AddressError(UserError):
    """An address that cannot be bound, or that is not loopback and has no keys."""


class RefusedError(AsyncPPOError):
    """The other end turned this process away; the text is its reason."""


class MessageError(AsyncPPOError):
    """A message that does not decode, is too large, or does not make sense."""


class EngineError(AsyncPPOError):
    """The inference engine failed, or answered something other than success."""


class WeightsError(AsyncPPOError):
    """Published weights that are incomplete or do not match their manifest."""


class CheckpointError(AsyncPPOError):
    """A checkpoint that is not whole, or belongs to another run."""


class JournalError(AsyncPPOError):
    """The run's metrics, events or ledger cannot be written: it must not go on without them."""


class ResumeError(CheckpointError, UserError):
    """There are checkpoints, and this run cannot go on from them."""


class StallError(AsyncPPOError):
    """A wait that passed its limit."""


class TrainingError(AsyncPPOError):
    """Training does not get anywhere: numbers that are not finite, step after step."""


class ConservationError(AsyncPPOError):
    """admitted = in flight + buffered + consumed + dropped does not hold."""
