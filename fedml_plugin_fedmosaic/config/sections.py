"""The typed sections of an experiment.

A configuration file is FedML's YAML. FedML's own sections hold flat FedML keys; each of our
sections holds exactly one mapping, so that ``fedml.load_arguments`` still reads the file::

    train_args:
      federated_optimizer: FedMosaic
      comm_round: 8
    adapter_args:
      adapter: {type: auto, rank: 16}

Field constraints are checked by pydantic; relations between fields in ``__post_init__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedml_plugin_fedmosaic.config.judge import JudgeConfig
from fedml_plugin_fedmosaic.config.privacy import PrivacyConfig
from fedml_plugin_fedmosaic.config.shift import ShiftConfig

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CommonArgs:
    """FedML's ``common_args``."""

    training_type: Literal["simulation", "cross_silo"] = "simulation"
    """How FedML runs the job."""
    random_seed: NonNegativeInt = 0
    """Root seed: the same seed gives the same result on any number of ranks."""
    config_version: str | None = None
    """Accepted because FedML's own files have it; unused."""
    scenario: Literal["horizontal"] | None = None
    """FedML's cross-silo scenario; unused in simulation."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainArgs:
    """FedML's ``train_args``."""

    federated_optimizer: str = "FedMosaic"
    """Strategy, in FedML's spelling; compared without case to the strategy names."""
    client_num_in_total: PositiveInt | None = None
    """Number of clients; must equal the scenario's when given."""
    client_num_per_round: PositiveInt | None = None
    """Clients drawn per round; all when omitted."""
    comm_round: PositiveInt = 8
    """Communication rounds."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeviceArgs:
    """FedML's ``device_args``."""

    using_gpu: bool = False
    """Train on the first visible accelerator."""
    gpu_id: NonNegativeInt = 0
    """Which accelerator, when ``using_gpu`` is true."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; all visible cores when omitted."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CommArgs:
    """FedML's ``comm_args``."""

    backend: Literal["sp", "MPI"] = "sp"
    """``sp``: one process. ``MPI``: clients spread over the ranks of one MPI job."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrackingArgs:
    """FedML's ``tracking_args``; everything off, because no run opens a socket."""

    enable_tracking: Literal[False] = False
    """FedML's own tracking needs an account and the internet."""
    using_mlops: Literal[False] = False
    """The same."""
    enable_wandb: Literal[False] = False
    """Weights & Biases needs the internet."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """``data_args: {data: ...}``: scenario, samples and their order in time."""

    source: str = "quickstart"
    """Data set shelf member: ``quickstart`` (bundled), ``drake-lite`` (built), ``drake``, ``hflb``,
    ``folder`` (published layout) or ``text``."""
    root: str | None = None
    """Folder that holds ``dataset/<name>/{train,test}/dataset-<subset>.json``."""
    scenario: str | None = None
    """Scenario JSON: a path, or a name known to the data set."""
    split: Literal["static", "dynamic"] = "dynamic"
    """PFL-Static: tasks shuffled together. PFL-Dynamic: tasks arrive in scenario order."""
    rounds_per_task: PositiveFloat | None = None
    """Rounds per task; ``comm_round / tasks`` when omitted. May be fractional if dynamic."""
    stream: Literal["memory", "balanced", "stream_only"] = "memory"
    """Online memory sampling; the same with all answers of all tasks equally often; or the samples
    in order of arrival."""
    memory_size: PositiveInt = 100_000
    """Capacity of a client's online memory, in samples."""
    max_train_samples: PositiveInt | None = None
    """Upper bound of training samples per task and client."""
    max_test_samples: PositiveInt | None = None
    """Upper bound of test samples per task."""
    public: str | None = None
    """Public samples (a JSON file or data root) for strategies that need them."""
    public_samples: PositiveInt | None = None
    """Public samples that are used; a fifth of a round's training samples when omitted."""
    reserve: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training samples that a strategy may keep away from training, or make public."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelSpec:
    """One entry of ``model_args: {models: ...}``."""

    path: str
    """Folder, ``*.gguf`` file, ``pip:PACKAGE``, ``bundled:NAME``, ``cached:SET/NAME`` or hub id."""
    layers: PositiveInt | None = None
    """Decoder layers that a depth cut keeps; all when omitted."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen base weights; adapters are float32."""
    size: str | None = None
    """Label for tables, e.g. ``1B``; counted from the parameters when omitted."""
    ranks: PositiveInt = 1
    """MPI ranks that train a client of this model together."""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """What trains it; ``auto``: DeepSpeed if ``ranks`` is more than 1, else plain PyTorch."""
    quantization: Literal["none", "int8", "bnb_int8", "bnb_nf4"] = "none"
    """``int8``: torchao, for a mere proxy. ``bnb_int8``, ``bnb_nf4``: bitsandbytes, 8 or 4 bits."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernels; ``auto``: the fastest that model and machine have."""

    def __post_init__(self) -> None:
        """Plain PyTorch trains on one rank, and nothing trains 8-bit weights.

        Raises:
            ValueError: it is to be trained otherwise.
        """
        if self.engine == "torch" and self.ranks > 1:
            raise ValueError(
                f"engine 'torch' trains on one rank, but ranks is {self.ranks}; "
                "set engine: auto or deepspeed"
            )
        if self.quantization != "none" and self.sharded:
            raise ValueError(
                f"quantization {self.quantization!r} is for the proxy, whose weights are whole on "
                "one rank; set ranks: 1 and engine: auto, or quantization: none"
            )

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed trains this model."""
        return self.engine == "deepspeed" or (self.engine == "auto" and self.ranks > 1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdapterConfig:
    """``adapter_args: {adapter: ...}``: where adapters sit and how large they are."""

    type: str = "auto"
    """Adapter shelf member; ``auto`` takes the one the strategy trains."""
    rank: PositiveInt = 16
    """LoRA rank r."""
    alpha: PositiveFloat = 32.0
    """LoRA alpha; the scaling is alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    num_blocks: PositiveInt = 4
    """Blocks per model (N_B); the last layer of each block carries PQ-LoRA."""
    gate: Literal["scalar", "input"] = "scalar"
    """How local and global branch are balanced."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linears of every decoder layer that carry an adapter; ``[all-linear]``: all it has."""
    alignment: str | None = None
    """Folder that ``fedmosaic align`` wrote; ``bundled`` takes the files beside bundled models."""
    anchor: str | None = None
    """Model whose coordinates ``fedmosaic align`` gives the others; the smallest when omitted."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    """``optim_args: {optim: ...}``: local training."""

    learning_rate: PositiveFloat = 2e-5
    """Learning rate of A and B."""
    pq_learning_rate: PositiveFloat = 5e-5
    """Learning rate of P, Q and the gate."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Learning rate of the last round relative to the first; linear over the rounds."""
    num_steps: PositiveInt = 100
    """Optimizer steps per round at the cost of plain training; strategies spend their share."""
    batch_size: PositiveInt = 4
    """Samples per micro-batch."""
    grad_accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Within a round; cosine has 10 % warm-up and ends at 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    max_grad_norm: PositiveFloat | None = None
    """Gradient clipping by norm; none when omitted."""
    moments: Literal["reset", "keep"] = "reset"
    """AdamW's moments of a client: fresh in every round, or kept from its last one."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EngineConfig:
    """``engine_args``: how local training is carried out, in flat keys."""

    deepspeed: str | None = None
    """DeepSpeed's JSON configuration for models with ``ranks`` above 1 or ``engine: deepspeed``."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    collective_timeout_s: PositiveFloat = 1800.0
    """Longest wait of a rank for the other ranks of its group, in seconds."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SketchConfig:
    """``sketch_args: {sketch: ...}``: the sanitised proxy gradient."""

    proxy: str | None = None
    """Model whose gradients are compared: a name from ``models``; the smallest when omitted."""
    frequency: PositiveInt = 10
    """Optimizer steps between two gradients (m)."""
    schedule: Literal["regular", "official"] = "regular"
    """``regular``: updates 1, 1+m, ..; ``official``: the reference code's irregular one."""
    samples: Literal["update", "last"] = "update"
    """Samples per gradient: the whole update's, or one as in the reference code."""
    jacobian: Literal["exact", "diagonal"] = "exact"
    """RMSNorm Jacobian: exact, or the reference code's diagonal form."""
    rows: Literal["random", "first"] = "random"
    """Which rows of the gradient are kept: random with a shared seed, or the first."""
    row_fraction: Fraction = 0.4
    """Fraction of rows kept (rho)."""
    clip_norm: PositiveFloat | None = None
    """Frobenius norm to which each gradient is clipped before the noise; none when omitted."""
    noise: Literal["gaussian", "laplace", "none"] = "gaussian"
    """Noise on every kept entry; Laplace takes ``noise_std`` as its scale."""
    noise_std: NonNegativeFloat = 1e-4
    """Noise level (sigma)."""
    columns: PositiveInt | None = None
    """Compress to this many columns by a shared random projection; none when omitted."""
    floats: PositiveInt | None = None
    """Send this many numbers that estimate the relevance, not the sketch; none when omitted."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Weight of the previous sketch in the running average."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """``eval_args: {evaluation: ...}``."""

    mode: Literal["generate", "likelihood"] = "generate"
    """Greedy generation with multi-choice parsing, or ranking of the choices by likelihood."""
    batch_size: PositiveInt = 64
    """Samples per evaluation batch."""
    max_new_tokens: PositiveInt = 16
    """Length limit of generated answers."""
    every: NonNegativeInt = 1
    """Evaluate Self every so many rounds; 0 means only after the last."""
    round_samples: PositiveInt | None = None
    """Test samples per task in the evaluations between rounds; all when omitted."""
    others: bool = True
    """After the last round, evaluate every client on every task (Others)."""
    others_samples: PositiveInt | None = None
    """Test samples per task that is not the client's own; all when omitted. The untouched base
    models are always asked all."""
    views: tuple[Literal["local", "global", "gated"], ...] = ()
    """Further views to report after the last round, beside the strategy's own."""
    compare: tuple[str, ...] = ("local",)
    """Strategies to run beside the main one at equal compute, for the table."""
    base: bool = True
    """Evaluate the untouched base models, for the table."""
    judge: JudgeConfig | None = None
    """Grades tasks with the metric ``Judge``: keys url, model, record, key_variable; see docs."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FaultsConfig:
    """``faults_args: {faults: ...}``: what happens when a client does not deliver."""

    policy: Literal["abort", "drop"] = "abort"
    """``abort``: the run ends. ``drop``: the client is left out of the round and goes on later."""
    quorum: Fraction | None = None
    """Smallest share of a cohort that must deliver; one client when omitted. Needs ``drop``."""
    max_failed_rounds: PositiveInt = 3
    """Rounds in a row that may miss the quorum before the run ends."""
    round_deadline_s: PositiveFloat | None = None
    """Seconds after which clients of a round that are not done have failed; never when omitted."""
    staleness_limit: NonNegativeInt | None = None
    """Rounds after which a client's last update is no longer mixed; never when omitted."""
    max_update_norm: PositiveFloat | None = None
    """L2 norm over all tensors of an update above which it is refused; no limit when omitted."""
    max_norm_growth: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Refuse an update whose norm is over so many times that of the client's last one."""

    def __post_init__(self) -> None:
        if self.quorum is not None and self.policy == "abort":
            raise ValueError("quorum needs policy: drop; with abort the first failure ends the run")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """``run_args: {run: ...}``: where results go."""

    root: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder; strategy, data set and a counter when omitted."""
    resume: str | None = None
    """Folder of an interrupted run to go on with, as with ``--resume``."""
    save_every: PositiveInt = 1
    """Rounds between two checkpoints."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Write TensorBoard files."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LauncherConfig:
    """``launcher_args: {launcher: ...}``: what ``fedmosaic submit`` asks a cluster for."""

    type: str = "slurm"
    """Launcher shelf member: ``slurm``, ``local`` (processes here) or ``debug`` (this process)."""
    ranks: PositiveInt | None = None
    """MPI ranks; one group of ranks per model when omitted, and 1 with backend ``sp``."""
    nodes: PositiveInt | None = None
    """Machines; as many as the GPUs need when omitted."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs of one machine that the job uses; at most 4 when omitted, none without ``using_gpu``."""
    cpus_per_task: PositiveInt | None = None
    """Cores per rank; 8 with a GPU, 1 without when omitted."""
    mem_gib: PositiveFloat | None = None
    """Memory per machine in GiB; from the sizes of the models when omitted."""
    time_min: PositiveInt = 24 * 60
    """Time limit in minutes."""
    partition: str | None = None
    """Queue; the site's default when omitted."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the machines must have."""
    extra: Mapping[str, str] = Field(default_factory=dict)
    """Further ``sbatch`` options by long name, e.g. ``{exclude: n7}``."""
    mpi: str = "pmix"
    """Slurm's MPI plug-in, one of ``srun --mpi=list``; ``mpirun`` starts the ranks without srun."""
    python: str | None = None
    """Python of the ranks as shell words, e.g. ``apptainer exec --nv image.sif python``."""
    setup: tuple[str, ...] = ()
    """Shell lines before the ranks start, e.g. ``module load openmpi``."""
    environment: Mapping[str, str] = Field(default_factory=dict)
    """Variables of the ranks."""
    heterogeneous: bool = False
    """One component of a heterogeneous Slurm job per size class of clients."""
    requeue: bool = True
    """Queue the job again when it was stopped before its end."""
    signal_s: PositiveInt = 120
    """Seconds before the time limit at which the ranks save and stop."""
    chain: PositiveInt = 1
    """Jobs in a row, each going on where the one before was stopped, instead of requeueing."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Experiment:
    """A whole run: frozen, validated, written into the run folder."""

    common: CommonArgs = Field(default_factory=CommonArgs)
    train: TrainArgs = Field(default_factory=TrainArgs)
    device: DeviceArgs = Field(default_factory=DeviceArgs)
    comm: CommArgs = Field(default_factory=CommArgs)
    tracking: TrackingArgs = Field(default_factory=TrackingArgs)
    dp: PrivacyConfig = Field(default_factory=PrivacyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    shift: ShiftConfig = Field(default_factory=ShiftConfig)
    models: Mapping[str, ModelSpec] = Field(default_factory=dict)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sketch: SketchConfig = Field(default_factory=SketchConfig)
    strategy: Mapping[str, Any] = Field(default_factory=dict)
    """Options of the strategy, checked against the strategy's own ``Options``."""
    evaluation: EvalConfig = Field(default_factory=EvalConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    launcher: LauncherConfig = Field(default_factory=LauncherConfig)

    @property
    def algo(self) -> str:
        """Registry name of the strategy."""
        return self.train.federated_optimizer.lower()


SECTION_OF: Mapping[str, tuple[str, str | None]] = {
    # field of Experiment: (YAML section, key inside it; None = the section's own flat keys)
    "common": ("common_args", None),
    "train": ("train_args", None),
    "device": ("device_args", None),
    "comm": ("comm_args", None),
    "tracking": ("tracking_args", None),
    "dp": ("dp_args", None),
    "data": ("data_args", "data"),
    "shift": ("shift_args", "shift"),
    "models": ("model_args", "models"),
    "adapter": ("adapter_args", "adapter"),
    "optim": ("optim_args", "optim"),
    "engine": ("engine_args", None),
    "sketch": ("sketch_args", "sketch"),
    "strategy": ("strategy_args", "strategy"),
    "evaluation": ("eval_args", "evaluation"),
    "faults": ("faults_args", "faults"),
    "run": ("run_args", "run"),
    "launcher": ("launcher_args", "launcher"),
}
