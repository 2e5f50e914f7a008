"""Who trains what: ranks, clients and base models of a run, before anything is loaded.

Costs come from the models' configurations, so every rank can plan the whole job alone; the plan is
a pure function, so all ranks make the same. Only then does a rank load the base models that the
clients of its group need.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from fedml_plugin_fedmosaic.comm.base import Communicator
from fedml_plugin_fedmosaic.config.sections import Experiment, ModelSpec
from fedml_plugin_fedmosaic.core import errors
from fedml_plugin_fedmosaic.core.errors import CommError, ConfigError, FedMosaicError
from fedml_plugin_fedmosaic.core.registry import COMMUNICATORS, STRATEGIES
from fedml_plugin_fedmosaic.core.types import ClientManifest
from fedml_plugin_fedmosaic.data.base import FederatedData
from fedml_plugin_fedmosaic.engine.base import ModelInfo
from fedml_plugin_fedmosaic.engine.hub import require_models
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.engine.quantize import check_quantised
from fedml_plugin_fedmosaic.engine.sharded import check_sharded, load_sharded_model
from fedml_plugin_fedmosaic.launch.allocation import gpu_of_rank
from fedml_plugin_fedmosaic.launch.topology import ClientLoad, Topology, plan_topology
from fedml_plugin_fedmosaic.strategies.base import Strategy, relative_steps

LOG = logging.getLogger(__name__)
T = TypeVar("T")


def build_strategy(name: str, experiment: Experiment) -> Strategy:
    """A strategy with its options; strategies that are only compared with take their defaults.

    Raises:
        ConfigError: unknown strategy or wrong options.
    """
    strategy_class = STRATEGIES[name]
    options = dict(experiment.strategy) if name == experiment.algo else {}
    try:
        validated = TypeAdapter(strategy_class.Options).validate_python(options)
    except ValidationError as error:
        lines = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'strategy'}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(f"strategy_args.strategy of {name!r}: {lines}") from error
    strategy: Strategy = strategy_class(validated)
    return strategy


def check_clients(experiment: Experiment, data: FederatedData) -> None:
    """Whether the numbers of clients in the configuration are the scenario's.

    Raises:
        ConfigError: they are not.
    """
    total = experiment.train.client_num_in_total
    if total is not None and total != len(data.clients):
        raise ConfigError(
            f"train_args.client_num_in_total is {total}, but the scenario {data.name} has "
            f"{len(data.clients)} clients",
            hint="leave the key out to take the scenario's number",
        )
    drawn = experiment.train.client_num_per_round
    if drawn is not None and drawn > len(data.clients):
        raise ConfigError(
            f"train_args.client_num_per_round is {drawn}, but there are {len(data.clients)} clients"
        )


def used_models(experiment: Experiment, data: FederatedData) -> dict[str, ModelSpec]:
    """The models that the scenario and the sketches use, by name.

    Raises:
        ConfigError: one of them is not in the configuration, or is quantised and cannot be.
    """
    used = sorted({client.model_id for client in data.clients})
    unknown = [name for name in used if name not in experiment.models]
    if unknown:
        known = ", ".join(experiment.models) or "none"
        raise ConfigError(
            f"the scenario uses model(s) {', '.join(unknown)} that model_args.models does not "
            f"define; defined: {known}",
            hint="add one entry per model_id of the scenario: {path: FOLDER_OR_HUB_ID}",
        )
    proxy = experiment.sketch.proxy
    if proxy is not None and proxy not in experiment.models:
        raise ConfigError(
            f"sketch_args.sketch.proxy: no model {proxy!r}; defined: {', '.join(experiment.models)}"
        )
    names = used if proxy is None or proxy in used else [*used, proxy]
    models = {name: experiment.models[name] for name in names}
    check_quantised(models, used)
    return models


def outline_models(models: Mapping[str, ModelSpec]) -> dict[str, ModelInfo]:
    """What each model is, without loading it.

    Raises:
        ConfigError: hub models are missing in the cache (all are named), or one is damaged.
    """
    require_models(models)
    return {name: outline_model(name, spec) for name, spec in models.items()}


def choose_device(experiment: Experiment, world_size: int) -> torch.device:
    """Where this rank computes.

    Args:
        experiment: validated configuration.
        world_size: ranks of the job.

    Raises:
        ConfigError: a GPU is asked for, but torch sees none.
    """
    if not experiment.device.using_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "device_args.using_gpu is true, but torch sees no CUDA device",
            hint="set using_gpu: false, or start the job on a node with a GPU",
        )
    visible = torch.cuda.device_count()
    return torch.device("cuda", gpu_of_rank(visible, experiment.device.gpu_id, world_size))


def choose_proxy(experiment: Experiment, outlines: Mapping[str, ModelInfo]) -> str:
    """The model whose gradients are compared: the configured one, or the smallest."""
    return experiment.sketch.proxy or min(
        outlines, key=lambda name: (outlines[name].num_parameters, name)
    )


def client_loads(
    experiment: Experiment, data: FederatedData, outlines: Mapping[str, ModelInfo]
) -> list[ClientLoad]:
    """What each client asks of the ranks: parameters of its model times optimizer steps."""
    steps = experiment.optim.num_steps * relative_steps(build_strategy(experiment.algo, experiment))
    return [
        ClientLoad(
            client_id=client.client_id,
            ranks=experiment.models[client.model_id].ranks,
            cost=outlines[client.model_id].num_parameters * steps,
        )
        for client in data.clients
    ]


def plan_ranks(
    experiment: Experiment,
    data: FederatedData,
    outlines: Mapping[str, ModelInfo],
    world_size: int,
) -> Topology:
    """Which ranks train which clients.

    Raises:
        ConfigError: the world is too small, or a client on several ranks cannot be trained so.
    """
    loads = client_loads(experiment, data, outlines)
    wide = [load for load in loads if load.ranks > 1]
    if wide and experiment.comm.backend == "sp":
        model = next(c.model_id for c in data.clients if c.client_id == wide[0].client_id)
        needed = sum({load.ranks for load in loads})
        raise ConfigError(
            f"client {wide[0].client_id} needs {wide[0].ranks} ranks "
            f"(model_args.models.{model}.ranks), but backend sp is one process",
            hint=f"start the run with --backend MPI -np {needed}, or set ranks: 1",
        )
    if wide and experiment.dp.enable_dp:
        raise ConfigError(
            f"dp_args.enable_dp: client {wide[0].client_id} is trained by {wide[0].ranks} ranks, "
            "and each of them would draw noise of its own",
            hint="set ranks: 1 for all models of a run with differential privacy",
        )
    if wide and experiment.faults.round_deadline_s is not None:
        raise ConfigError(
            f"faults.round_deadline_s: client {wide[0].client_id} is trained by {wide[0].ranks} "
            "ranks, which would not stop at the same step by looking at their own clocks",
            hint="leave it out, or set ranks: 1 for all models",
        )
    return plan_topology(world_size, loads)


def open_communicator(experiment: Experiment, topology: Topology) -> Communicator:
    """The communicator of the run; with MPI all ranks call it.

    Raises:
        CommError: MPI cannot be loaded.
    """
    if experiment.comm.backend == "sp":
        local: Communicator = COMMUNICATORS["local"]()
        return local
    from fedml_plugin_fedmosaic.comm.mpi_groups import GroupCommunicator

    comm = GroupCommunicator([group.ranks for group in topology.groups], topology.owners)
    if topology.idle and comm.rank == 0:
        LOG.warning(
            "%d of %d ranks have no client; %d ranks would do",
            len(topology.idle),
            topology.size,
            topology.size - len(topology.idle),
        )
    _share_cores(experiment, comm.local_size)
    return comm


def _share_cores(experiment: Experiment, ranks_here: int) -> None:
    """Gives each rank of this node its part of the cores, unless someone has chosen."""
    if experiment.device.num_threads is not None or "OMP_NUM_THREADS" in os.environ:
        return
    visible = len(os.sched_getaffinity(0))
    share = max(1, (os.cpu_count() or 1) // ranks_here)
    torch.set_num_threads(min(visible, share))


def needed_models(
    data: FederatedData,
    comm: Communicator,
    strategies: Collection[str],
    proxy: str,
) -> list[str]:
    """Names of the base models that this rank loads.

    Those of its group's clients; on a leader whose clients send sketches also the proxy, which is
    loaded once if a client has the same model.
    """
    owned = set(comm.owned([client.client_id for client in data.clients]))
    names = {client.model_id for client in data.clients if client.client_id in owned}
    if names and comm.is_leader and any(STRATEGIES[name].needs_sketch for name in strategies):
        names.add(proxy)
    return sorted(names)


def load_bundles(
    experiment: Experiment,
    data: FederatedData,
    comm: Communicator,
    device: torch.device,
    needed: Sequence[str],
    proxy: str,
    strategies: Collection[str],
) -> dict[str, ModelBundle]:
    """Loads this rank's base models; the ranks of a group load their clients' models together.

    Sketches need a proxy with whole weights: one that is cut over the ranks for training is loaded
    once more on the leader, under :func:`proxy_key`.

    Args:
        experiment: the run.
        data: its data.
        comm: says which group this is.
        device: of this rank.
        needed: what :func:`needed_models` returned.
        proxy: the proxy's name.
        strategies: of the run.

    Raises:
        ConfigError: a model or the DeepSpeed configuration is wrong, or cannot be loaded.
    """
    owned = set(comm.owned([client.client_id for client in data.clients]))
    trained = {client.model_id for client in data.clients if client.client_id in owned}
    specs = experiment.models
    for name in sorted(used_models(experiment, data)):
        if specs[name].sharded:
            check_sharded(name, specs[name], experiment.engine, experiment.optim)
    # A dry run looks at the models in one process, whatever its group would be.
    shared = [
        name
        for name in sorted(trained)
        if specs[name].sharded and specs[name].ranks == comm.group_size
    ]
    # Before anything can fail on one rank alone: the whole group has to call it.
    world = comm.process_world() if shared else None

    def load() -> dict[str, ModelBundle]:
        bundles: dict[str, ModelBundle] = {}
        for name in needed:
            spec = specs[name]
            if world is None or name not in shared:
                bundles[name] = load_model(name, spec, device)
                continue
            bundles[name] = load_sharded_model(
                name, spec, device, world=world, engine=experiment.engine, optim=experiment.optim
            )
        sharding = bundles[proxy].sharding if proxy in bundles else None
        sketches = comm.is_leader and any(STRATEGIES[name].needs_sketch for name in strategies)
        if sketches and sharding is not None and sharding.cuts_weights:
            bundles[proxy_key(proxy)] = load_model(proxy, specs[proxy], device)
        return bundles

    return together(comm, load)


def proxy_key(proxy: str) -> str:
    """The name of a proxy that is loaded beside a sharded model of the same name."""
    return f"proxy of sketches: {proxy}"


def together(comm: Communicator, work: Callable[[], T]) -> T:
    """Does the work on every rank, and fails on every rank if it fails on one.

    The ranks whose work went well raise the error of the first rank whose work did not, so that
    nobody waits for a rank that is gone; such an error has ``everywhere`` set.

    Raises:
        FedMosaicError: what ``work`` raised on the first rank that failed.
    """
    result: list[T] = []
    problem: FedMosaicError | None = None
    try:
        result.append(work())
    except FedMosaicError as error:
        problem = error
    said = None
    if problem is not None:
        notes = list(getattr(problem, "__notes__", ()))
        said = [type(problem).__name__, problem.message, problem.hint, notes]
    for rank, text in enumerate(comm.share(json.dumps(said))):
        found = json.loads(text)
        if found is None:
            continue
        if problem is None or rank != comm.rank:
            problem = _rebuilt(rank, *found)
        problem.everywhere = True
        raise problem
    return result[0]


def _rebuilt(
    rank: int, name: str, message: str, hint: str | None, notes: Sequence[str]
) -> FedMosaicError:
    kind = getattr(errors, name, CommError)
    # An error class with arguments of its own cannot be made again from its message.
    plain = kind if kind.__init__ is FedMosaicError.__init__ else CommError
    error: FedMosaicError = plain(message, hint=hint)
    for note in notes:
        error.add_note(note)
    error.add_note(f"found by rank {rank}")
    return error


def share_manifests(
    comm: Communicator, mine: Sequence[ClientManifest]
) -> tuple[ClientManifest, ...]:
    """The manifests of all clients, ascending by client id, on every rank.

    Args:
        comm: all ranks call it.
        mine: manifests of the clients of this rank's group.
    """
    own = [asdict(manifest) for manifest in mine] if comm.is_leader else []
    records = [record for text in comm.share(json.dumps(own)) for record in json.loads(text)]
    manifests = [ClientManifest(**{**item, "tasks": tuple(item["tasks"])}) for item in records]
    return tuple(sorted(manifests, key=lambda manifest: manifest.client_id))
