"""The hand-run scripts in ``slurm/``: the launcher's own text with a block for the user.

``fedmosaic submit --scripts FOLDER`` writes them; a test keeps those of the repository equal.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedml_plugin_fedmosaic.config.loader import bundled_config, load_experiment
from fedml_plugin_fedmosaic.config.sections import Experiment
from fedml_plugin_fedmosaic.launch.base import Component
from fedml_plugin_fedmosaic.launch.resources import default_resources, het_components
from fedml_plugin_fedmosaic.launch.slurm_script import (
    MPI_HINT,
    Script,
    job_options,
    render,
    resource_options,
)

_RULE = "# " + "-" * 78
_OPTIONAL = {"partition": "YOUR_PARTITION", "account": "YOUR_ACCOUNT", "qos": "YOUR_QOS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One script.

    Attributes:
        config: file below ``configs/``.
        about: comment lines on top.
        overrides: ``section.key=value`` texts that shape the resources.
        backend: of the run.
        grid: key -> values; each combination is one element of a job array.
        max_parallel: elements that run at once.
    """

    config: str
    about: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    backend: str = "MPI"
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_parallel: int = 4


def _usage(path: str, *, is_array: bool) -> list[str]:
    """How to start a script, as comment lines."""
    folder = "RUN_ROOT" if is_array else "RUN_DIR"
    rows = (
        (f"sbatch {path}", ""),
        (f"sbatch {path} --set comm_round=2", "one key of the configuration changed"),
        (f"CONFIG=mine.yaml sbatch {path}", "another configuration"),
        (f"{folder}=runs/big sbatch {path}", "another folder; what started there goes on"),
    )
    width = max(len(left) for left, _ in rows)
    lines = [f"  {left:<{width}}   {right}".rstrip() for left, right in rows]
    return [
        "",
        *lines,
        "",
        "Start it in the folder that holds configs/. Near the time limit, or when preempted, all",
        "ranks save and stop, and the job queues itself again; REQUEUE=0 prevents that.",
    ]


RECIPES: Mapping[str, Recipe] = {
    "quickstart_cpu": Recipe(
        config="quickstart.yaml",
        about=(
            "The bundled quickstart on one machine without a GPU: 9 small clients over 4 ranks.",
            "A first check of a cluster: nothing to download, a few minutes.",
        ),
        overrides=("launcher_args.launcher.time_min=30", "launcher_args.launcher.signal_s=60"),
    ),
    "drake_small": Recipe(
        config="drake/small.yaml",
        about=(
            "DRAKE on one machine with 4 GPUs: Llama 1B and 3B clients.",
            "Fetch data and models first, where there is internet: see docs/cluster.md.",
        ),
    ),
    "drake_large": Recipe(
        config="drake/large_cross_family.yaml",
        about=(
            "DRAKE on 3 machines with 4 GPUs each: Llama 1B, 3B, 8B and Qwen 1.5B, 3B clients.",
            "An 8B client is sharded over 4 GPUs, a 3B client over 2 (ZeRO-3).",
            "Fetch data and models first, where there is internet: see docs/cluster.md.",
        ),
    ),
    "drake_large_het": Recipe(
        config="drake/large_cross_family.yaml",
        about=(
            "As drake_large.sh, as a heterogeneous job: one component per size of client (8B over",
            "4 GPUs; 3B over 2; 1B and 1.5B on one). Takes 7 GPUs and asks for no more.",
            "Where a site forbids such jobs, drake_large.sh does the same with equal machines.",
        ),
        overrides=("launcher_args.launcher.heterogeneous=true",),
    ),
    "sweep": Recipe(
        config="quickstart.yaml",
        about=(
            "Three relevance temperatures with three seeds each, as one job array of 9 runs, of",
            "which at most 4 run at once. Edit the lists, and --array to match their product.",
            "'fedmosaic sweep' makes such arrays from any grid, restarts failed runs and collects.",
        ),
        overrides=(
            "launcher_args.launcher.time_min=60",
            "launcher_args.launcher.signal_s=60",
        ),
        backend="sp",
        grid={
            "strategy_args.strategy.temperature": ("0.1", "0.5", "1.0"),
            "common_args.random_seed": ("1", "2", "3"),
        },
    ),
}


def render_recipe(name: str, configs: Path) -> str:
    """The text of ``slurm/<name>.sh``.

    Args:
        name: key of ``RECIPES``.
        configs: the folder ``configs/``.
    """
    recipe = RECIPES[name]
    experiment = load_experiment(configs / recipe.config, recipe.overrides, backend=recipe.backend)
    launcher = experiment.launcher
    parts = _parts(experiment)
    output = "%x-%A_%a.out" if recipe.grid else "%x-%j.out"
    options = job_options(name, output, requeue=launcher.requeue, signal_s=launcher.signal_s)
    if recipe.grid:
        size = 1
        for values in recipe.grid.values():
            size *= len(values)
        options["array"] = f"0-{size - 1}%{recipe.max_parallel}"
    directives = [{**options, **resource_options(parts[0].resources)}]
    directives += [resource_options(part.resources) for part in parts[1:]]
    path = f"slurm/{name}.sh"
    return render(
        Script(
            title=[*recipe.about, *_usage(path, is_array=bool(recipe.grid))],
            directives=directives,
            optional=_OPTIONAL,
            block=_block(recipe, one_rank=sum(p.resources.num_tasks for p in parts) == 1),
            target=_target(name, recipe),
        )
    )


def _parts(experiment: Experiment) -> tuple[Component, ...]:
    if experiment.launcher.heterogeneous:
        return het_components(experiment)
    return (Component(name="all", resources=default_resources(experiment)),)


def _block(recipe: Recipe, *, one_rank: bool) -> list[str]:
    mpi = "none" if one_rank else "pmix"
    lines = [
        "# ---- your site: edit this block, and the ##SBATCH lines above (remove one #) " + "-" * 2,
        "# module load openmpi                     # the site's MPI (and CUDA), if it has one",
        '# source "$HOME/fedmosaic/bin/activate"   # the environment that holds the package',
        'PYTHON="${PYTHON:-python3}"               # or: apptainer exec --nv image.sif python3',
        f'MPI="${{MPI:-{mpi}}}"',
        f"# ^ {MPI_HINT}",
        'REQUEUE="${REQUEUE:-1}" MAX_RESTARTS="${MAX_RESTARTS:-100}"',
    ]
    for key, values in recipe.grid.items():
        lines.append(f"{_variable(key)}S=({' '.join(values)})")
    return [*lines, _RULE]


def _variable(key: str) -> str:
    return key.rpartition(".")[2].removeprefix("random_").upper()


def _target(name: str, recipe: Recipe) -> list[str]:
    lines = [f'CONFIG="${{CONFIG:-configs/{recipe.config}}}"']
    folder = f'RUN_DIR="${{RUN_DIR:-runs/{name}-$SLURM_JOB_ID}}"'
    settings: list[str] = []
    if recipe.grid:
        folder = f'RUN_DIR="${{RUN_ROOT:-runs/{name}-$SLURM_ARRAY_JOB_ID}}'
        index = "SLURM_ARRAY_TASK_ID"
        for key in reversed(list(recipe.grid)):
            word = _variable(key)
            lines.append(f"{word.lower()}=${{{word}S[{index} % ${{#{word}S[@]}}]}}")
            index = f"{index} / ${{#{word}S[@]}}"
        for key in recipe.grid:
            word = _variable(key).lower()
            folder += f"/{word}-${word}" if key == next(iter(recipe.grid)) else f"-{word}-${word}"
            settings.append(f'  --set "{key}=${word}"')
        folder += '"'
    run = '"${python[@]}" -m fedml_plugin_fedmosaic run'
    return [
        *lines,
        folder,
        'read -r -a python <<<"$PYTHON"',
        f'start=({run} --cf "$CONFIG" --backend {recipe.backend}',
        *settings,
        '  --run-dir "$RUN_DIR" "$@")',
        f'go_on=({run} --resume "$RUN_DIR")',
    ]


def write_recipes(folder: Path) -> list[Path]:
    """Writes ``slurm/*.sh`` and, where there is none yet, ``configs/`` into a folder.

    Returns:
        The scripts.
    """
    bundled = bundled_config().parent
    configs = folder / "configs"
    if not configs.exists():
        shutil.copytree(bundled, configs)
    files = []
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        path = folder / "slurm" / f"{name}.sh"
        path.write_text(render_recipe(name, bundled), encoding="utf-8")
        path.chmod(0o755)
        files.append(path)
    return files
