"""FedML's trainer and aggregator hooks in the order of its cross-silo loop.

FedML's simulators call none of ``on_before_local_training``, ``on_after_local_training``,
``on_before_aggregation`` and ``on_after_aggregation``; its cross-silo managers call all of them.
:class:`FedMLHooks` calls them on the flat tensor dictionaries of a round, so that ``dp_args`` means
the same here as there: local noise on each update, or central clipping of the updates and noise on
what the clients receive. The sketch in an update's header has its own noise (``sketch_args``).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import derive_seed

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.core.types import ClientUpdate, SharedTensors
    from fedml_plugin_fedmosaic.runtime.hooks import RoundHooks

LOG = logging.getLogger(__name__)


def make_hooks(experiment: Experiment) -> RoundHooks | None:
    """FedML's hooks for a run, or None when differential privacy is off.

    Imports FedML (seconds) only when it is on.

    Raises:
        ConfigError: FedML refuses the privacy options.
    """
    return FedMLHooks(experiment) if experiment.dp.enable_dp else None


def _fedml_args(experiment: Experiment) -> SimpleNamespace:
    """What FedML's privacy classes read. Its central clipping norm is called max_grad_norm."""
    dp = experiment.dp
    return SimpleNamespace(
        enable_dp=True,
        dp_solution_type=dp.dp_solution_type,
        mechanism_type=dp.mechanism_type,
        epsilon=dp.epsilon,
        delta=dp.delta,
        sensitivity=dp.sensitivity,
        max_grad_norm=dp.clipping_norm,
        comm_round=experiment.train.comm_round,
        client_num_in_total=experiment.train.client_num_in_total,
        client_num_per_round=experiment.train.client_num_per_round,
        federated_optimizer=experiment.train.federated_optimizer,
    )


def _trainer_and_aggregator(args: SimpleNamespace) -> tuple[Any, Any]:
    """A FedML client trainer and server aggregator that only hold a flat dictionary."""
    from fedml.core import ClientTrainer, ServerAggregator

    class FlatTrainer(ClientTrainer):
        """Holds what a client received or is about to send."""

        params: dict[str, Tensor] = {}  # noqa: RUF012 - replaced, never changed

        def get_model_params(self) -> dict[str, Tensor]:
            return self.params

        def set_model_params(self, model_parameters: dict[str, Tensor]) -> None:
            self.params = model_parameters

        def train(self, train_data: Any, device: Any, args: Any) -> None:
            raise NotImplementedError("the engine trains")

    class FlatAggregator(ServerAggregator):
        """Has no model of its own: every client receives its own."""

        def get_model_params(self) -> dict[str, Tensor]:
            return {}

        def set_model_params(self, model_parameters: dict[str, Tensor]) -> None:
            raise NotImplementedError("there is no global model")

        def test(self, test_data: Any, device: Any, args: Any) -> None:
            raise NotImplementedError("the runtime evaluates")

        def test_all(self, *args: Any) -> None:
            raise NotImplementedError("the runtime evaluates")

    return FlatTrainer(None, args), FlatAggregator(None, args)


class FedMLHooks:
    """Calls FedML's hooks on the tensors of a round.

    FedML's mechanisms draw from the global generators of torch and numpy; here each call draws
    from its own stream of the run's seed, so results do not depend on the number of ranks, and
    the global generators are left as they were. (Noise from a seed that is known protects nobody:
    this simulates the accuracy under privacy, as FedML's own seeded simulation does.)

    Args:
        experiment: the run; ``dp`` says what to do.

    Raises:
        ConfigError: FedML refuses the options, e.g. Gaussian noise with epsilon above 1.
    """

    def __init__(self, experiment: Experiment) -> None:
        from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy

        self._seed = experiment.common.random_seed
        self._args = _fedml_args(experiment)
        self._holder = FedMLDifferentialPrivacy
        self._privacy = FedMLDifferentialPrivacy()
        self._round_idx = -1
        said = io.StringIO()
        try:
            # FedML prints its choice; a run's standard output belongs to the command line.
            with self._our_privacy(), contextlib.redirect_stdout(said):
                self._trainer, self._aggregator = _trainer_and_aggregator(self._args)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"dp_args: FedML refuses these options: {error}",
                hint="FedML's Gaussian mechanism takes 0 < epsilon <= 1 and 0 < delta < 1",
            ) from error
        LOG.debug("FedML: %s", said.getvalue().strip())

    @contextmanager
    def _our_privacy(self) -> Iterator[None]:
        """FedML keeps one privacy object per process; ours is in its place only during a call."""
        before = self._holder._dp_instance
        self._holder._dp_instance = self._privacy
        try:
            yield
        finally:
            self._holder._dp_instance = before

    @contextmanager
    def _call(self, *purpose: str | int) -> Iterator[None]:
        """Our privacy object, and global generators seeded for one purpose and restored."""
        seed = derive_seed(self._seed, "dp", *purpose)
        numpy_state = np.random.get_state()  # noqa: NPY002 - FedML's Laplace draws from it
        with self._our_privacy(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            try:
                yield
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002

    def begin_round(self, round_idx: int) -> None:
        """Noise belongs to a round, so that a resumed run draws the same."""
        self._round_idx = round_idx

    def before_local_training(self, client_id: int, downlink: SharedTensors) -> SharedTensors:
        """FedML's ``on_before_local_training`` on what the client received."""
        with self._call("before_local_training", client_id):
            self._trainer.set_id(client_id)
            self._trainer.set_model_params(dict(downlink))
            self._trainer.on_before_local_training(None, None, self._args)
        return _plain(self._trainer.get_model_params())

    def after_local_training(self, update: ClientUpdate) -> ClientUpdate:
        """FedML's ``on_after_local_training``: local noise on every tensor of the update."""
        header = update.header
        with self._call("after_local_training", header.client_id, header.round_idx):
            self._trainer.set_id(header.client_id)
            self._trainer.set_model_params(dict(update.tensors))
            self._trainer.on_after_local_training(None, None, self._args)
        return replace(update, tensors=_plain(self._trainer.get_model_params()))

    def before_aggregation(self, updates: Mapping[int, ClientUpdate]) -> Mapping[int, ClientUpdate]:
        """FedML's ``on_before_aggregation``: central clipping, client by client.

        Called once per round on every rank, also on one whose clients sit the round out.
        """
        order = sorted(updates)
        if not order:
            return updates
        raw = [
            # FedML clips in place; the client keeps its own tensors.
            (updates[i].header.num_examples, {k: t.clone() for k, t in updates[i].tensors.items()})
            for i in order
        ]
        with self._call("before_aggregation", self._round_idx):
            clipped, _ = self._aggregator.on_before_aggregation(raw)
        return {
            i: replace(updates[i], tensors=_plain(tensors))
            for i, (_, tensors) in zip(order, clipped, strict=True)
        }

    def after_aggregation(
        self, downlinks: Mapping[int, SharedTensors]
    ) -> Mapping[int, SharedTensors]:
        """FedML's ``on_after_aggregation``: central noise on what each client will receive."""
        noised = {}
        for client_id, tensors in downlinks.items():
            with self._call("after_aggregation", client_id, self._round_idx):
                noised[client_id] = _plain(self._aggregator.on_after_aggregation(dict(tensors)))
        return noised


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain dictionary of float32 tensors: FedML's Laplace noise is float64."""
    return {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
