"""What a local step costs, so that all strategies spend the same compute in a round.

The unit is one forward pass of a client's model over one sample; a backward pass counts twice
that, the usual rule for transformers (Kaplan et al. 2020, arXiv 2001.08361). Plain training costs
one forward and one backward pass. A strategy that does more per step takes fewer steps::

    share = (3 - comparisons - public * PUBLIC_SHARE) / (forwards + 2 backwards + sketch)

rounded to whole percent, as the table of local updates of FedMosaic (arXiv 2506.11024) is.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKWARD = 2.0
"""Cost of a backward pass in forward passes."""

PLAIN = 1.0 + BACKWARD
"""Cost of one sample of plain training."""

PLAIN_SAMPLES = 400
"""Samples of a round of plain local training: 100 steps of 4 samples."""

PUBLIC_SAMPLES = 80
"""Public samples of such a round."""

PUBLIC_SHARE = PUBLIC_SAMPLES / PLAIN_SAMPLES
"""Public samples of a round relative to the samples of plain local training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a strategy declares.

    Attributes:
        forwards: forward passes per sample of a local step, also those of teachers.
        backwards: backward passes per sample of a local step.
        sketch: proxy gradients, in forward passes per sample of a local step.
        comparisons: forward passes over the client's samples besides training, per client and
            round, relative to ``PLAIN_SAMPLES``.
        public: work on public data of server and client together, in forward passes per public
            sample, per client and round.
    """

    forwards: float = 1.0
    backwards: float = 1.0
    sketch: float = 0.0
    comparisons: float = 0.0
    public: float = 0.0

    @property
    def step(self) -> float:
        """One sample of a local step, in forward passes."""
        return self.forwards + BACKWARD * self.backwards + self.sketch

    @property
    def share(self) -> float:
        """Local steps of a round relative to plain training at equal compute, in percent steps."""
        return round((PLAIN - self.comparisons - self.public * PUBLIC_SHARE) / self.step, 2)
