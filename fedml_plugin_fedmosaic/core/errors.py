"""Every error this package raises on purpose.

Tree::

    FedMosaicError            exit code 1
    ├── ConfigError           2   a file, key, value or command-line option is wrong
    │   └── RegistryError     2   a name is not on its shelf
    ├── DataError             2   a data folder, sample or image is wrong
    ├── AdapterError          3   adapter tensors or options do not fit a model
    ├── PlanError             3   a mixing plan cannot be carried out
    ├── ClientFailure         4   a client failed (client, round and stage are named)
    ├── CommError             5   ranks could not talk to each other
    ├── LaunchError           6   a job could not be started
    ├── CheckpointError       7   a checkpoint is missing, damaged or does not fit
    │   └── RunInUse          7   another process runs in the same run folder
    ├── IntegrationError      8   the installed FedML or PEFT is not what we know
    ├── OutOfMemory           9   a model does not fit, or memory ran out outside a client's work
    └── RunInterrupted       75   a signal stopped the run after saving; it can be resumed

A message says what is wrong, where, what was expected, what was found, and what to do.
"""

from __future__ import annotations


class FedMosaicError(Exception):
    """Base of all errors of this package.

    Args:
        message: one sentence that says what is wrong and where.
        hint: one sentence that says what to do about it (optional).

    Attributes:
        exit_code: of the process that it ends.
        everywhere: whether every rank of the job raises the same error, so that one may speak.
    """

    exit_code: int = 1
    everywhere: bool = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  -> {self.hint}"


class ConfigError(FedMosaicError):
    """A configuration file, key, value or command-line option is wrong."""

    exit_code = 2


class RegistryError(ConfigError):
    """A name is not known on its shelf, or is registered twice."""


class DataError(FedMosaicError):
    """A data folder, scenario, sample or image is wrong."""

    exit_code = 2


class AdapterError(FedMosaicError):
    """Adapter tensors or options do not fit the model."""

    exit_code = 3


class PlanError(FedMosaicError):
    """A mixing plan names tensors or clients that are not there, or do not fit."""

    exit_code = 3


class ClientFailure(FedMosaicError):
    """A client failed; the original error is the cause.

    Args:
        client_id: the client that failed.
        round_idx: 0-based round.
        stage: "prepare", "fit", "sketch", "finish", "update", "deadline" or "evaluate".
        message: what went wrong.
        hint: what to do about it (optional).
    """

    exit_code = 4

    def __init__(
        self, client_id: int, round_idx: int, stage: str, message: str, *, hint: str | None = None
    ) -> None:
        text = f"client {client_id}, round {round_idx + 1}, {stage}: {message}"
        super().__init__(text, hint=hint)
        self.client_id = client_id
        self.round_idx = round_idx
        self.stage = stage


class QuorumError(FedMosaicError):
    """Too few clients delivered an update, several rounds in a row."""

    exit_code = 4


class CommError(FedMosaicError):
    """Ranks could not talk to each other."""

    exit_code = 5


class LaunchError(FedMosaicError):
    """A job could not be started."""

    exit_code = 6


class CheckpointError(FedMosaicError):
    """A checkpoint is missing, damaged or does not fit."""

    exit_code = 7


class RunInUse(CheckpointError):
    """Another process runs or resumes the same run folder; nothing in it was touched."""


class IntegrationError(FedMosaicError):
    """The installed FedML, PEFT or transformers is not what this package knows."""

    exit_code = 8


class OutOfMemory(FedMosaicError):
    """Memory ran out where no client was at work: a model is loaded or evaluated as it is."""

    exit_code = 9


class RunInterrupted(FedMosaicError):
    """A signal asked the run to stop; everything is saved, and the run can be resumed.

    The exit code is ``EX_TEMPFAIL`` of ``sysexits.h``: try again later.
    """

    exit_code = 75
