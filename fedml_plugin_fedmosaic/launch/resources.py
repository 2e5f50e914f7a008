"""What a configuration needs of a cluster, before any model or data is loaded.

Ranks follow from the models (``ModelSpec.ranks``), machines from the GPUs, memory from the sizes
in the models' names. What ``launcher_args`` says stands above all of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from fedml_plugin_fedmosaic.config.sections import Experiment, LauncherConfig, ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.launch.base import Component, Resources

DEFAULT_GPUS_PER_NODE = 4
_CPUS_WITH_GPU = 8
_PROCESS_GIB = 2.5
_LOADING = 1.25
_SMALL_PARAMETERS = 0.1e9
_UNKNOWN_PARAMETERS = 8e9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SEPARATORS = str.maketrans("-_/", "   ")
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z0-9])")


def parameters_of(name: str, spec: ModelSpec) -> float:
    """Parameters of a model by its label or name (``1B``, ``Llama-3.2-3B``); 8e9 if they say none.

    Args:
        name: the model's name in the configuration.
        spec: its entry.
    """
    if spec.path.startswith(("bundled:", "cached:")):
        return _SMALL_PARAMETERS
    for text in (spec.size or "", spec.path.rpartition("/")[2], name):
        found = _SIZE.search(text.translate(_SEPARATORS))
        if found:
            unit = 1e9 if found[2] in "bB" else 1e6
            return float(found[1]) * unit
    return _UNKNOWN_PARAMETERS


def rank_memory_gib(experiment: Experiment, names: Sequence[str]) -> float:
    """Memory of one rank that loads these models, in GiB.

    Weights are read into the machine's memory before they go to a GPU; each rank also holds the
    proxy model.
    """
    models = experiment.models
    sizes = {
        name: parameters_of(name, spec) * _BYTES[spec.dtype] / 2**30
        for name, spec in models.items()
    }
    if not sizes:
        return _PROCESS_GIB
    proxy = (
        sizes[experiment.sketch.proxy] if experiment.sketch.proxy in sizes else min(sizes.values())
    )
    largest = max((sizes[name] for name in names), default=0.0)
    return _PROCESS_GIB + _LOADING * (largest + proxy)


def default_resources(experiment: Experiment) -> Resources:
    """What one homogeneous job needs.

    One group of ranks per model, rounded up to full machines, because equal numbers of tasks per
    machine keep the ranks of a group together.

    Raises:
        ConfigError: the given nodes and GPUs do not hold the ranks.
    """
    config = experiment.launcher
    if experiment.comm.backend == "sp":
        ranks, per_node = 1, 1
        nodes = 1
    else:
        wanted = config.ranks or max(1, sum(spec.ranks for spec in experiment.models.values()))
        nodes, per_node = _machines(experiment, wanted)
        ranks = nodes * per_node
    memory = config.mem_gib
    if memory is None:
        names = tuple(experiment.models)
        memory = math.ceil(_node_memory(experiment, names, per_node))
    return _resources(experiment, nodes, per_node, memory, min(ranks, nodes * per_node))


def _node_memory(experiment: Experiment, names: Sequence[str], per_node: int) -> float:
    """Memory of the fullest machine: the ranks of the largest models together."""
    by_rank = sorted(
        (
            rank_memory_gib(experiment, [name])
            for name in names
            for _ in range(experiment.models[name].ranks)
        ),
        reverse=True,
    )
    largest = by_rank[:per_node] or [_PROCESS_GIB]
    return sum(largest) + (per_node - len(largest)) * largest[0]


def _machines(experiment: Experiment, ranks: int) -> tuple[int, int]:
    """Machines, and ranks on each."""
    config = experiment.launcher
    if not experiment.device.using_gpu:
        nodes = config.nodes or 1
        return nodes, math.ceil(ranks / nodes)
    gpus = config.gpus_per_node
    if gpus == 0:
        raise ConfigError(
            "device_args.using_gpu is true, but launcher_args.launcher.gpus_per_node is 0",
            hint="every rank trains on a GPU of its own: give the GPUs of one machine",
        )
    if gpus is None:
        # With the number of machines given, as many GPUs as hold the ranks.
        gpus = (
            math.ceil(ranks / config.nodes) if config.nodes else min(ranks, DEFAULT_GPUS_PER_NODE)
        )
    nodes = config.nodes or math.ceil(ranks / gpus)
    if nodes * gpus < ranks:
        raise ConfigError(
            f"{nodes} machine(s) with {gpus} GPU(s) each are {nodes * gpus} GPUs, but the models "
            f"need {ranks} ranks with a GPU each",
            hint=f"ask for --nodes {math.ceil(ranks / gpus)}, or lower model_args.models.*.ranks",
        )
    return nodes, min(gpus, math.ceil(ranks / nodes))


def _resources(
    experiment: Experiment, nodes: int, per_node: int, memory: float, ranks: int
) -> Resources:
    config = experiment.launcher
    on_gpu = experiment.device.using_gpu
    return Resources(
        nodes=nodes,
        ntasks=ranks,
        ntasks_per_node=per_node,
        cpus_per_task=config.cpus_per_task or (_CPUS_WITH_GPU if on_gpu else 1),
        gpus_per_node=per_node if on_gpu else (config.gpus_per_node or None),
        mem_gib=memory,
        time_min=config.time_min,
        partition=config.partition,
        account=config.account,
        qos=config.qos,
        constraint=config.constraint,
        extra=dict(config.extra),
    )


def size_classes(models: Mapping[str, ModelSpec]) -> dict[int, tuple[str, ...]]:
    """Ranks per client -> names of the models that need so many, the most ranks first."""
    needs = sorted({spec.ranks for spec in models.values()}, reverse=True)
    return {
        need: tuple(name for name, spec in models.items() if spec.ranks == need) for need in needs
    }


def het_components(experiment: Experiment) -> tuple[Component, ...]:
    """One component per size class of clients, in the order in which groups get their ranks.

    Each class has one group: then there is one way only to place the groups, and it is that of
    the components.

    Raises:
        ConfigError: backend ``sp``, a single size class, or ``ranks`` is set.
    """
    config: LauncherConfig = experiment.launcher
    classes = size_classes(experiment.models)
    if experiment.comm.backend == "sp" or len(classes) < 2:
        found = "backend sp" if experiment.comm.backend == "sp" else f"ranks: {list(classes)}"
        raise ConfigError(
            "launcher_args.launcher.heterogeneous needs backend MPI and models of at least two "
            f"sizes (model_args.models.*.ranks), got {found}",
            hint="leave heterogeneous out: all ranks get the same machines",
        )
    if config.ranks is not None or config.nodes is not None:
        raise ConfigError(
            "launcher_args.launcher: ranks and nodes follow from the size classes when "
            "heterogeneous is true",
            hint="leave ranks and nodes out; gpus_per_node says how large a machine is",
        )
    parts = []
    for need, names in classes.items():
        nodes, per_node = _machines(experiment, need)
        memory = config.mem_gib
        if memory is None:
            memory = math.ceil(per_node * rank_memory_gib(experiment, names))
        resources = _resources(experiment, nodes, per_node, memory, need)
        parts.append(Component(name="+".join(names), resources=resources))
    return tuple(parts)
