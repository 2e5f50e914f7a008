"""``eval_args: {evaluation: {judge: ...}}``: a language model that grades answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class JudgeConfig:
    """Who grades the answers of tasks with the metric ``Judge``."""

    record: str | None = None
    """JSON-lines file of prompts and responses; what is in it is not asked again."""
    url: str | None = None
    """Address of a chat completion service; without it only recorded responses are used."""
    model: str = "gpt-4o-mini"
    """Model that the service is asked for."""
    key_variable: str = "FEDMOSAIC_JUDGE_KEY"
    """Environment variable with the service's key; none is sent if it is not set."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.2
    """Sampling temperature of the judge."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for one response, in seconds."""

    def __post_init__(self) -> None:
        """There is somebody to ask.

        Raises:
            ValueError: neither recorded responses nor a service.
        """
        if self.record is None and self.url is None:
            raise ValueError("a judge needs a record of responses, or the url of a service")
