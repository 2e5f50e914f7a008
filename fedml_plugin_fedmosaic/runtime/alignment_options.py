"""How models are aligned, with the published values as defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.equations.matching import PENALTY
from fedml_plugin_fedmosaic.runtime.alignment_rows import Positions

PUBLISHED_UPDATES = 1250
PUBLISHED_RATE = 5e-5
PUBLISHED_WIDTH = 2048
"""Width of the published 1B models; entries of A have size ``width ** -0.5``."""
_FURTHER = 4.0
_LARGEST_RATE = 1e-2
Progress = Callable[[str, int, int], None]
"""Called with a stage, the batches done and the batches in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignOptions:
    """How models are aligned; the defaults are the published values.

    Attributes:
        num_samples: public samples that A is trained on, at most.
        output_samples: those, among them, that B is turned with.
        check_samples: further ones that only the quality is measured with.
        batch_size: samples per micro-batch.
        accumulate: micro-batches per optimizer update.
        epochs: passes over the samples.
        learning_rate: AdamW's largest rate; published: 5e-5 for 1250 updates. None: by the number
            of updates and the model's width, see :func:`default_rate`.
        penalty: weight of the orthogonality penalty.
        positions: which token positions are compared.
        match_scale: compare with the anchor's A outputs times a factor per linear, so that both
            have one root mean square to begin with. Rows of A have length 1, so that a model with
            larger activations cannot give the anchor's numbers themselves. False: as published.
        orthonormal_outputs: make the columns of B orthonormal again; not published.
        seed: of the anchor, of the order of samples and of A and B before.
    """

    num_samples: int = 5000
    output_samples: int = 100
    check_samples: int = 100
    batch_size: int = 4
    accumulate: int = 1
    epochs: int = 1
    learning_rate: float | None = None
    penalty: float = PENALTY
    positions: Positions = "auto"
    match_scale: bool = True
    orthonormal_outputs: bool = False
    seed: int = 0


def split_samples(
    samples: Sequence[Sample], options: AlignOptions
) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit and samples to check with, drawn by the seed; they do not overlap.

    Raises:
        DataError: fewer than four samples.
    """
    if len(samples) < 4:
        raise DataError(
            f"alignment needs at least 4 public samples, got {len(samples)}",
            hint="the published alignment takes 5000; some hundred do for small models",
        )
    order = list(samples)
    python_random(options.seed, "alignment", "samples").shuffle(order)
    held = max(1, min(options.check_samples, len(order) // 4))
    return order[held:][: options.num_samples], order[:held]


def default_rate(updates: int, width: int) -> float:
    """Learning rate with which A moves as far, however many updates there are.

    AdamW moves an entry by about the rate per update, and entries of an orthonormal A have size
    ``width ** -0.5``. The published schedule moves them by about 1.4 times their size at width
    2048; four times that fits better (``tests/benchmarks/study_alignment.py``).

    Args:
        updates: optimizer updates.
        width: width of the model's residual stream.
    """
    scale = _FURTHER * PUBLISHED_UPDATES / updates * (PUBLISHED_WIDTH / width) ** 0.5
    return float(min(PUBLISHED_RATE * scale, _LARGEST_RATE))
