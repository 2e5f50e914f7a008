"""The experiments of FedMosaic (arXiv 2506.11024) as data: clients, tasks, models, settings.

Scenario files and configurations under ``configs/`` are written from this table. Names of data
sets and their subset numbers are those of the published repositories; where only the *number* of
clients per model is published, ``assigned_here`` says that who has which model is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Task = tuple[str, int]

LLAMA_1B, LLAMA_3B, LLAMA_8B = (
    "thkim0305/llama3.2_1B_vl",
    "thkim0305/llama3.2_3B_vl",
    "thkim0305/llama3.1_8B_vl",
)
QWEN_05B, QWEN_15B, QWEN_3B = (
    "thkim0305/qwen2.5_0.5B_vl",
    "thkim0305/qwen2.5_1.5B_vl",
    "thkim0305/qwen2.5_3B_vl",
)
TEXT_1B, TEXT_3B, TEXT_8B = (
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.1-8B",
)
SIZES: Mapping[str, str] = {
    LLAMA_1B: "1B",
    LLAMA_3B: "3B",
    LLAMA_8B: "8B",
    QWEN_05B: "0.5B",
    QWEN_15B: "1.5B",
    QWEN_3B: "3B",
    TEXT_1B: "1B",
    TEXT_3B: "3B",
    TEXT_8B: "8B",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Hyper-parameters that the experiments of one benchmark share.

    Attributes:
        source: data set shelf member.
        root: folder of the data, beside ``configs/``.
        title: for headers.
        steps: local steps per round of plain training; strategies spend their share.
        learning_rate: of A and B.
        pq_learning_rate: of P, Q and the gate.
        schedule: within a round.
        rank: of the adapters; alpha is twice the rank.
        rounds_per_task: rounds in which a task's samples arrive.
        open_metric: metric of open-ended tasks that name none.
    """

    source: str
    root: str
    title: str
    steps: int
    learning_rate: str
    pq_learning_rate: str
    schedule: str
    rank: int
    rounds_per_task: int = 5
    open_metric: str = "RougeL"


_IMAGES: dict[str, Any] = {
    "steps": 100,
    "learning_rate": "2.0e-5",
    "pq_learning_rate": "5.0e-5",
    "schedule": "constant",
    "rank": 128,
}
_TEXT: dict[str, Any] = {"pq_learning_rate": "5.0e-4", "schedule": "cosine", "rank": 16}
DRAKE = Setting(source="drake", root="drake", title="DRAKE", **_IMAGES)
HFLB = Setting(source="hflb", root="hflb", title="HFLB", **_IMAGES)
FED_SCOPE = Setting(
    source="folder",
    root="fed_scope",
    title="Fed-Scope",
    steps=30,
    learning_rate="3.0e-4",
    **_TEXT,
)
FED_AYA = Setting(
    source="folder", root="fed_aya", title="Fed-aya", steps=50, learning_rate="3.0e-4", **_TEXT
)
FED_LLM = Setting(
    source="folder", root="fed_llm", title="Fed-LLM", steps=10, learning_rate="1.0e-4", **_TEXT
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperExperiment:
    """One configuration and its scenario.

    Attributes:
        file: configuration below ``configs/``, without ending.
        scenario: name of the scenario.
        what: one line for the header.
        setting: of its benchmark.
        tasks: of each client, in time order.
        models: of each client.
        proxy: model of the sketches; a client's own or one loaded beside.
        assigned_here: who has which model is our choice; only the numbers are published.
        note: further line for the header.
    """

    file: str
    scenario: str
    what: str
    setting: Setting
    tasks: tuple[tuple[Task, ...], ...]
    models: tuple[str, ...]
    proxy: str
    assigned_here: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Last part of the file's name."""
        return self.file.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """First part of the file's name."""
        return self.file.partition("/")[0]

    @property
    def rounds(self) -> int:
        """Communication rounds."""
        return self.setting.rounds_per_task * len(self.tasks[0])

    @property
    def used(self) -> tuple[str, ...]:
        """Models to load: the clients', smallest first, and the proxy."""
        own = sorted(set(self.models), key=lambda name: (_family(name), float(SIZES[name][:-1])))
        return (*own, *([] if self.proxy in own else [self.proxy]))


def _family(name: str) -> str:
    return "qwen" if "qwen" in name.lower() else "llama"


_OPEN = {("iconqa", 2): "F1", ("iconqa", 3): "F1"}
"""Open-ended tasks among the image tasks, with their metric; all others are multi-choice."""

DRAKE_TASKS: tuple[tuple[Task, ...], ...] = (
    (("Fashion200K", 0), ("MagicBrush", 0), ("VISION", 0), ("FashionIQ", 0)),
    (("VSR", 0), ("VISION", 1), ("Fashion200K", 2), ("NLVR2", 0)),
    (("SEED-Bench-2", 2), ("Fashion200K", 1), ("NLVR2", 1), ("CIRR", 0)),
    (("VizWiz", 0), ("IRFL", 2), ("Bongard-HOI", 1), ("MIT-States", 0)),
    (("IRFL", 1), ("Bongard-OpenWorld", 1), ("COMICS_Dialogue", 0), ("IRFL", 0)),
    (("Bongard-HOI", 2), ("Bongard-OpenWorld", 0), ("IRFL", 3), ("Bongard-HOI", 0)),
    (("WCVQA", 0), ("iconqa", 2), ("Co-Instruct-DB", 2), ("SEED-Bench-2", 1)),
    (("TQA", 0), ("WCVQA", 3), ("iconqa", 1), ("Co-Instruct-DB", 1)),
    (("Co-Instruct-DB", 0), ("dvqa", 0), ("WCVQA", 1), ("iconqa", 3)),
    (("iconqa", 0), ("Co-Instruct-DB", 3), ("SEED-Bench-2", 0), ("WCVQA", 2)),
)
HFLB_TASKS: tuple[tuple[Task, ...], ...] = tuple(
    tuple((dataset, first + number) for number in range(4))
    for dataset, first in (
        ("GQA", 10),
        ("GQA", 20),
        ("GQA", 30),
        ("Abstract", 0),
        ("SNLI-VE", 0),
        ("COCOQA", 0),
        ("NLVR2_feddat", 0),
        ("VizWiz-Original", 0),
        ("AQUA", 100),
    )
)
_FED_SCOPE_TASKS = tuple(
    tuple(("FS_LLM_Instruct", first + number) for number in range(4))
    for first in (0, 10, 14, 20, 24)
)
_FED_AYA_TASKS = tuple(
    tuple(("Fed-aya_topic", 10 * user + topic) for topic in range(4)) for user in range(8)
)


def _fed_llm_tasks() -> tuple[tuple[Task, ...], ...]:
    """52 clients with two tasks: 16 of FedDPA's sets, 16 of Fed-aya's topics, 20 of ChatbotIT."""
    dpa = [(("FedDPA", 2 * k), ("FedDPA", 2 * k + 1)) for k in range(16)]
    topics = [
        (("Fed-aya_topic", 10 * (k // 2) + 2 * (k % 2)),
         ("Fed-aya_topic", 10 * (k // 2) + 2 * (k % 2) + 1))
        for k in range(16)
    ]  # fmt: skip
    chats = [(("FedchatbotIT", 2 * k), ("FedchatbotIT", 2 * k + 1)) for k in range(20)]
    return (*dpa, *topics, *chats)


def _mix(groups: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    owner = {client: name for name, clients in groups.items() for client in clients}
    return tuple(owner[client] for client in range(len(owner)))


def _drake(
    mix: str, groups: Mapping[str, Sequence[int]], what: str, *, ours: bool = False
) -> PaperExperiment:
    kind = "homo" if len(groups) == 1 else "hetero"
    has_qwen = any(_family(name) == "qwen" for name in groups)
    return PaperExperiment(
        file=f"drake/{mix}",
        scenario=f"DRAKE_{kind}_llava_{mix}",
        what=what,
        setting=DRAKE,
        tasks=DRAKE_TASKS,
        models=_mix(groups),
        proxy=QWEN_05B if has_qwen else LLAMA_1B,
        assigned_here=ours,
    )


def _hflb(mix: str, groups: Mapping[str, Sequence[int]], what: str) -> PaperExperiment:
    return PaperExperiment(
        file=f"hflb/{mix}",
        scenario=f"HFLB_{'homo' if len(groups) == 1 else 'hetero'}_llava_{mix}",
        what=what,
        setting=HFLB,
        tasks=HFLB_TASKS,
        models=_mix(groups),
        proxy=LLAMA_1B,
    )


def _unseen(kind: str, tasks: Sequence[Task], what: str) -> PaperExperiment:
    return PaperExperiment(
        file=f"drake/unseen_{kind}",
        scenario=f"DRAKE_unseen_{kind}",
        what=what,
        setting=DRAKE,
        tasks=tuple((task,) for task in tasks),
        models=(LLAMA_3B,) * len(tasks),
        proxy=LLAMA_1B,
        note="From fresh adapters; 'fedmosaic adapt RUN --scenario NAME' starts from a run's.",
    )


_ALL = range(10)
EXPERIMENTS: tuple[PaperExperiment, ...] = (
    _drake("llama_1B", {LLAMA_1B: _ALL}, "ten clients with Llama-3.2-1B"),
    _drake("llama_3B", {LLAMA_3B: _ALL}, "ten clients with Llama-3.2-3B"),
    _drake("llama_8B", {LLAMA_8B: _ALL}, "ten clients with Llama-3.1-8B"),
    _drake("qwen_0_5B", {QWEN_05B: _ALL}, "ten clients with Qwen2.5-0.5B"),
    _drake("qwen_1_5B", {QWEN_15B: _ALL}, "ten clients with Qwen2.5-1.5B"),
    _drake("qwen_3B", {QWEN_3B: _ALL}, "ten clients with Qwen2.5-3B"),
    _drake(
        "llama_1B_3B",
        {LLAMA_1B: (0, 1, 8, 9), LLAMA_3B: range(2, 8)},
        "four clients with Llama-3.2-1B, six with 3B: the paper's main mix",
    ),
    _drake(
        "llama_1B_3B_8B",
        {LLAMA_1B: (0, 1, 8), LLAMA_3B: (2, 3, 5, 6, 7), LLAMA_8B: (4, 9)},
        "three clients with Llama-3.2-1B, five with 3B, two with Llama-3.1-8B",
    ),
    _drake(
        "llama_1B_3B_qwen_1_5B",
        {LLAMA_1B: (0, 1), LLAMA_3B: range(2, 7), QWEN_15B: (7, 8, 9)},
        "two clients with Llama-3.2-1B, five with 3B, three with Qwen2.5-1.5B",
        ours=True,
    ),
    _drake(
        "llama_3B_qwen_1_5B",
        {LLAMA_3B: range(2, 8), QWEN_15B: (0, 1, 8, 9)},
        "six clients with Llama-3.2-3B, four with Qwen2.5-1.5B",
        ours=True,
    ),
    _drake(
        "llama_3B_qwen_1_5B_3B",
        {LLAMA_3B: (2, 3, 4), QWEN_15B: (0, 1, 8, 9), QWEN_3B: (5, 6, 7)},
        "three clients with Llama-3.2-3B, four with Qwen2.5-1.5B, three with Qwen2.5-3B",
        ours=True,
    ),
    _drake(
        "qwen_0_5B_1_5B_3B",
        {QWEN_05B: (0, 1), QWEN_15B: (2, 8, 9), QWEN_3B: range(3, 8)},
        "two clients with Qwen2.5-0.5B, three with 1.5B, five with 3B",
        ours=True,
    ),
    _unseen(
        "newtasktype",
        (
            ("RecipeQA_ImageCoherence", 0),
            ("RecipeQA_VisualCloze", 0),
            ("Mantis_caption", 1),
            ("HQ_Edit", 0),
        ),
        "four task types that no DRAKE client has seen",
    ),
    _unseen(
        "newvisualdomain",
        (("DreamSim", 0), ("Mantis_caption", 0), ("imagecode", 0)),
        "three visual domains that no DRAKE client has seen",
    ),
    PaperExperiment(
        file="drake/ab_align",
        scenario="AB_align",
        what="a Llama-3.2-3B and a 1B client, for aligning the pair",
        setting=DRAKE,
        tasks=((("Fashion200K", 0),), (("Fashion200K", 0),)),
        models=(LLAMA_3B, LLAMA_1B),
        proxy=LLAMA_1B,
        note="Only its models matter: 'fedmosaic align' reads them and public data.",
    ),
    _hflb("llama_1B", {LLAMA_1B: range(9)}, "nine clients with Llama-3.2-1B"),
    _hflb("llama_3B", {LLAMA_3B: range(9)}, "nine clients with Llama-3.2-3B"),
    _hflb(
        "llama_1B_3B",
        {LLAMA_1B: (0, 1, 5), LLAMA_3B: (2, 3, 4, 6, 7, 8)},
        "three clients with Llama-3.2-1B, six with 3B",
    ),
    PaperExperiment(
        file="text/fed_scope",
        scenario="Fed-Scope_hetero_llama_3B_8B",
        what="one client with mathematics, two with instructions, two with code",
        setting=FED_SCOPE,
        tasks=_FED_SCOPE_TASKS,
        models=(TEXT_3B, TEXT_3B, TEXT_8B, TEXT_3B, TEXT_8B),
        proxy=TEXT_1B,
        assigned_here=True,
    ),
    PaperExperiment(
        file="text/fed_aya",
        scenario="Fed-aya_hetero_llama_1B_3B",
        what="eight users of several languages with four topics each",
        setting=FED_AYA,
        tasks=_FED_AYA_TASKS,
        models=(TEXT_1B, TEXT_3B) * 4,
        proxy=TEXT_1B,
        assigned_here=True,
    ),
    PaperExperiment(
        file="text/fed_llm",
        scenario="Fed-LLM_hetero_llama_1B_3B",
        what="52 clients with two tasks each, out of three collections",
        setting=FED_LLM,
        tasks=_fed_llm_tasks(),
        models=(TEXT_1B, TEXT_3B) * 26,
        proxy=TEXT_1B,
        note="The folders of its three collections and their subset numbers are our choice.",
    ),
)


def scenario_json(experiment: PaperExperiment) -> list[dict[str, Any]]:
    """A scenario in the published format: one object per client."""
    return [
        {"client_id": number, "model_id": model, "datasets": [_task(experiment, t) for t in tasks]}
        for number, (model, tasks) in enumerate(
            zip(experiment.models, experiment.tasks, strict=True)
        )
    ]


def _task(experiment: PaperExperiment, task: Task) -> dict[str, Any]:
    entry: dict[str, Any] = {"dataset": task[0], "subset_id": task[1]}
    is_text = experiment.setting.source == "folder"
    if is_text or task in _OPEN:
        metric = experiment.setting.open_metric if is_text else _OPEN[task]
        return {**entry, "type": "open-ended", "metric": metric}
    return {**entry, "type": "multi-choice"}
