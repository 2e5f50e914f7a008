"""The section that lets data and clients change over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]

Rounds = tuple[_Count, _Count]
"""First and last round, counted from 1 as everywhere on the screen."""

NOVEL_KINDS = ("task", "label", "group")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ShiftConfig:
    """``shift_args: {shift: ...}``: what changes over the rounds; nothing by default."""

    label_alpha: _Positive | None = None
    """Dirichlet parameter of each answer's share over a task's rounds; small: few rounds each."""
    group_alpha: _Positive | None = None
    """The same for groups of samples; both together multiply."""
    group_field: str | None = None
    """Field of a sample that names its group; the folder of its first image when omitted."""
    time_field: str | None = None
    """Field of a sample by which a task's samples arrive, ascending; random when omitted."""
    task_order: Literal["scenario", "rotated", "shuffled"] = "scenario"
    """Order of a client's tasks in time; ``rotated``: client i begins with task i."""
    overlap: _NonNegative = 0.0
    """How long a task goes on beside the next, in units of its length (dynamic split)."""
    windows: Mapping[str, Rounds] = Field(default_factory=dict)
    """Task name -> ``[first, last]`` round of its samples, e.g. ``{VSR-0: [3, 6]}``."""
    novel: str | None = None
    """What nobody has at first: ``task:NAME``, ``label:ANSWER`` or ``group:NAME``."""
    novel_round: _Count = 1
    """Round in which client 0 gets the first of it."""
    novel_lag: _NonNegative = 0.0
    """Rounds from one client to the next, in the order of their ids; 0: everywhere at once."""
    present: Mapping[str, tuple[Rounds, ...]] = Field(default_factory=dict)
    """Client id -> list of ``[first, last]`` rounds of its presence, e.g. ``{"3": [[1, 4]]}``."""
    late_share: _Share = 0.0
    """Share of the other clients that join after round 1, each at a random round."""
    leave_rate: _Share = 0.0
    """Chance per round that one of the other clients that is there goes away."""
    return_rate: _Share = 0.5
    """Chance per round that one that went away comes back; 0: never."""
    min_present: _Count = 1
    """Clients that are there at least; others come back earlier if needed."""

    def __post_init__(self) -> None:
        """Checks relations between the options.

        Raises:
            ValueError: two options contradict each other, or a range of rounds is empty.
        """
        if self.time_field is not None and (self.label_alpha or self.group_alpha):
            raise ValueError(
                "time_field fixes the order of the samples, so label_alpha and group_alpha cannot "
                "choose it; leave one of them out"
            )
        for name, rounds in self.windows.items():
            _check_rounds(f"windows of task {name}", rounds)
        for client, ranges in self.present.items():
            if not (client.isascii() and client.isdigit()):
                raise ValueError(f"present has client {client!r}; expected an id such as '3'")
            for rounds in ranges:
                _check_rounds(f"present of client {client}", rounds)
        kind, _, value = (self.novel or "task:-").partition(":")
        if kind not in NOVEL_KINDS or not value:
            raise ValueError(
                f"novel is {self.novel!r}; expected task:NAME, label:ANSWER or group:NAME"
            )

    @property
    def attendance(self) -> dict[int, tuple[Rounds, ...]]:
        """``present`` by client id."""
        return {int(client): ranges for client, ranges in self.present.items()}

    @property
    def moves_data(self) -> bool:
        """Whether samples arrive otherwise than ``data.split`` says."""
        return (
            self.label_alpha is not None
            or self.group_alpha is not None
            or self.time_field is not None
            or self.task_order != "scenario"
            or self.overlap > 0
            or bool(self.windows)
            or self.novel is not None
        )

    @property
    def moves_clients(self) -> bool:
        """Whether some client may be away in some round."""
        return bool(self.present) or self.late_share > 0 or self.leave_rate > 0


def _check_rounds(what: str, rounds: Rounds) -> None:
    if rounds[0] > rounds[1]:
        raise ValueError(f"{what}: expected [first, last] with first <= last, got {[*rounds]}")
