"""What an aligned pair is judged by: samples of the fit, and samples that were kept out of it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as strict_dataclass
from torch import Tensor

from fedml_plugin_fedmosaic.equations.canonical import canonical_map, correlations_along
from fedml_plugin_fedmosaic.equations.layer_similarity import (
    coordinate_agreement,
    explained_variance,
    residual_share,
)
from fedml_plugin_fedmosaic.equations.moments import PairMoments


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedQuality:
    """The measures of :class:`LinearQuality` on samples that A was fitted on: those of B.

    Attributes:
        residual: as there.
        explained: as there.
        agreement: as there.
    """

    residual: float
    explained: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearQuality:
    """How well one matched pair of linears corresponds.

    Attributes:
        residual_before: mean squared difference of both A outputs over the anchor's mean square,
            with the random A; about 2 for unrelated ones. On samples kept for the check.
        residual: the same with the aligned A; 0 is perfect.
        explained: share of the variance of the model's A outputs that the best linear map of the
            anchor's explains, likewise.
        correlations: falling canonical correlations of both A outputs, on the samples of B.
        rank: how many of them are above round-off.
        agreement: mean squared correlation of a coordinate with the same one of the anchor, on the
            samples of the check; what P relies on.
        scale: factor on the anchor's A outputs before they are compared; 1 unless scales are
            matched.
        new_correlations: correlations on the samples of the check, along the directions that gave
            ``correlations``; empty in files that were made without them.
        fitted: residual and the like on samples of the fit; None in such files.
    """

    residual_before: float
    residual: float
    explained: float
    correlations: tuple[float, ...]
    rank: int
    agreement: float
    scale: float
    new_correlations: tuple[float, ...] = ()
    fitted: FittedQuality | None = None


@strict_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PairQuality:
    """How well a model corresponds to its anchor; in the manifest as it is.

    Attributes:
        linears: ``<block>/<module>`` -> quality.
        losses: mean loss of each update.
        rows: token positions of the passes ``outputs`` and ``check``.
        pairing: ``direct`` or ``tokens``.
        positions: ``all`` or ``supervised``.
        learning_rate: as used.
        cka: unbiased CKA between all layers, anchor's in rows.
        anchor_ends: the anchor's block-end layers.
        model_ends: the model's.
        unmatched: blocks of the anchor that resemble another block of the model more than their
            partner, with that block.
    """

    linears: dict[str, LinearQuality]
    losses: tuple[float, ...]
    rows: dict[str, int]
    pairing: str
    positions: str
    learning_rate: float
    cka: tuple[tuple[float, ...], ...]
    anchor_ends: tuple[int, ...]
    model_ends: tuple[int, ...]
    unmatched: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAlignment:
    """A model aligned with its anchor.

    Attributes:
        factors: ``<block>/<module>/A`` (r, d_in) and ``/B`` (d_out, r), float32.
        quality: of the pair.
    """

    factors: dict[str, Tensor]
    quality: PairQuality


def linear_quality(
    fitted: PairMoments,
    before: PairMoments,
    after: PairMoments,
    *,
    correlations: tuple[float, ...],
    rank: int,
    scale: float,
) -> LinearQuality:
    """Judges one linear by the moments of both models' A outputs, x the anchor's.

    Args:
        fitted: with the aligned A, on the samples of B, which A was fitted on, too.
        before: with the random A, on samples of the check.
        after: with the aligned A, on samples of the check.
        correlations: canonical correlations of ``fitted``, in the coordinates of B.
        rank: of the map that turns B.
        scale: factor on the anchor's outputs.
    """
    new = correlations_along(canonical_map(fitted), after)
    return LinearQuality(
        residual_before=residual_share(before),
        residual=residual_share(after),
        explained=explained_variance(after),
        correlations=correlations,
        rank=rank,
        agreement=coordinate_agreement(after),
        scale=scale,
        new_correlations=tuple(new.tolist()),
        fitted=FittedQuality(
            residual=residual_share(fitted),
            explained=explained_variance(fitted),
            agreement=coordinate_agreement(fitted),
        ),
    )
