"""Aligned A and B of one model, from public samples that stream past it and its anchor.

Source: FedMosaic (arXiv 2506.11024), alignment of A and B. Three passes, each in constant memory:
A is trained to give the anchor's A outputs at matched block ends and made row-orthonormal; B is
turned by the canonical correlations of the outputs of both A; and samples that neither pass has
seen say how well all that worked, and how similar the layers of the two models are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.adapters.initial import orthonormal_rows
from fedml_plugin_fedmosaic.adapters.pq_lora.factors import check_rank
from fedml_plugin_fedmosaic.adapters.structure import Target
from fedml_plugin_fedmosaic.config.sections import AdapterConfig
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.rng import derive_seed, python_random
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.observe import ActivationObserver, Observed
from fedml_plugin_fedmosaic.equations.alignment import nearest_row_orthonormal
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers
from fedml_plugin_fedmosaic.equations.canonical import turned_outputs
from fedml_plugin_fedmosaic.equations.layer_similarity import BlockSimilarity, unmatched_blocks
from fedml_plugin_fedmosaic.equations.matching import Pairs, fit_a
from fedml_plugin_fedmosaic.equations.moments import PairMoments
from fedml_plugin_fedmosaic.runtime.alignment_options import (
    AlignOptions,
    Progress,
    default_rate,
    split_samples,
)
from fedml_plugin_fedmosaic.runtime.alignment_quality import (
    PairAlignment,
    PairQuality,
    linear_quality,
)
from fedml_plugin_fedmosaic.runtime.alignment_rows import PairedBatch, RowPairing

_WINDOW = 16
"""Batches among which samples of one length are put together, to pad less."""
_CKA_ROWS = 256
_SCALE_SAMPLES = 32


def initial_factors(targets: Mapping[str, Target], rank: int, seed: int) -> dict[str, Tensor]:
    """Random orthonormal A and B: the anchor's for good, another model's to begin with.

    The same as a run with this seed and without alignment would draw.

    Args:
        targets: linears by ``<block>/<module>``.
        rank: rank r.
        seed: root seed.

    Returns:
        ``<block>/<module>/A`` (r, d_in) and ``/B`` (d_out, r), float64.

    Raises:
        AdapterError: the rank is larger than a linear's width.
    """
    adapter_seed = derive_seed(seed, "adapter")
    factors: dict[str, Tensor] = {}
    for key, target in targets.items():
        where = f"layer {target.layer}, {target.module}"
        check_rank(rank, target.in_features, target.out_features, where)
        name = (int(key.partition("/")[0]), target.module)
        factors[f"{key}/A"] = orthonormal_rows(rank, target.in_features, adapter_seed, *name, "A")
        columns = orthonormal_rows(rank, target.out_features, adapter_seed, *name, "B")
        factors[f"{key}/B"] = columns.T.contiguous()
    return factors


class PairAligner:
    """Aligns one model with an anchor.

    Args:
        anchor: model whose coordinates count.
        model: model that gets them.
        adapter: rank, blocks and modules.
        options: how.
        progress: is told how far it is.

    Attributes:
        model_targets: the model's linears by ``<block>/<module>``.

    Raises:
        AdapterError: a model lacks a linear or is too small for the rank or the blocks.
    """

    def __init__(
        self,
        anchor: ModelBundle,
        model: ModelBundle,
        adapter: AdapterConfig,
        options: AlignOptions,
        progress: Progress | None = None,
    ) -> None:
        self._options = options
        self._progress = progress or _nobody
        self._pairing = RowPairing(anchor, model, options.positions)
        self._names = (anchor.info.name, model.info.name)
        modules, blocks = adapter.target_modules, adapter.num_blocks
        self._anchor = ActivationObserver(anchor, modules, blocks)
        self._model = ActivationObserver(model, modules, blocks)
        self.model_targets: Mapping[str, Target] = self._model.targets
        self._keys = tuple(self._anchor.targets)
        self._ends = (
            block_end_layers(anchor.num_layers, blocks),
            block_end_layers(model.num_layers, blocks),
        )
        self._scales = dict.fromkeys(self._keys, 1.0)
        self._width = model.final_norm.get_parameter("weight").shape[0]
        self._rank = adapter.rank
        self._devices = (anchor.device, model.device)
        self._anchor_factors = initial_factors(self._anchor.targets, adapter.rank, options.seed)
        self._before = initial_factors(self._model.targets, adapter.rank, options.seed)
        self._anchor_a = {
            key: self._anchor_factors[f"{key}/A"].to(anchor.device, torch.float32)
            for key in self._keys
        }

    def run(self, samples: Sequence[Sample]) -> PairAlignment:
        """Aligns on public samples.

        Raises:
            AdapterError: no token corresponds, or activations are not finite.
            DataError: there are too few samples, or one cannot be encoded.
        """
        fit, check = split_samples(samples, self._options)
        self._pairing.settle(fit)
        if self._options.match_scale:
            self._scales = self.matched_scales(fit)
        options = self._options
        updates = max(1, options.epochs * len(self._batches(fit)) // options.accumulate)
        rate = options.learning_rate or default_rate(updates, self._width)
        start = {
            key: self._before[f"{key}/A"].to(self._devices[1], torch.float32) for key in self._keys
        }
        fitted = fit_a(
            start,
            self._fit_stream(fit, updates * options.accumulate),
            num_updates=updates,
            accumulate=options.accumulate,
            learning_rate=rate,
            penalty=options.penalty,
        )
        own_a = {key: value.float() for key, value in fitted.factors.items()}
        moments = self.moments(fit[: options.output_samples], own_a)
        factors: dict[str, Tensor] = {}
        quality: dict[str, tuple[tuple[float, ...], int]] = {}
        for key in self._keys:
            turned, found = turned_outputs(
                self._anchor_factors[f"{key}/B"], self._before[f"{key}/B"], moments[key]
            )
            if options.orthonormal_outputs and found.rank == self._rank:
                turned = nearest_row_orthonormal(turned.T).T
            factors[f"{key}/A"] = own_a[key].cpu().contiguous()
            factors[f"{key}/B"] = turned.float().contiguous()
            quality[key] = (tuple(found.correlations.tolist()), found.rank)
        before, after, similarity = self._checked(check, start, own_a)
        cka = similarity.matrix()
        ends = cka[list(self._ends[0])][:, list(self._ends[1])]
        return PairAlignment(
            factors=factors,
            quality=PairQuality(
                linears={
                    key: linear_quality(
                        moments[key],
                        before[key],
                        after[key],
                        correlations=quality[key][0],
                        rank=quality[key][1],
                        scale=self._scales[key],
                    )
                    for key in self._keys
                },
                losses=fitted.losses,
                rows={
                    "outputs": next(iter(moments.values())).count,
                    "check": next(iter(after.values())).count,
                },
                pairing="direct" if self._pairing.direct else "tokens",
                positions=self._pairing.positions,
                learning_rate=rate,
                cka=tuple(tuple(row) for row in cka.tolist()),
                anchor_ends=self._ends[0],
                model_ends=self._ends[1],
                unmatched=unmatched_blocks(ends),
            ),
        )

    def matched_scales(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Root mean square of the model's random A outputs over that of the anchor's."""
        squares = {key: torch.zeros(2, dtype=torch.float64) for key in self._keys}
        for pairs in self.rows(samples[:_SCALE_SAMPLES]):
            for key, (inputs, targets) in pairs.items():
                a = self._before[f"{key}/A"].to(inputs.device, torch.float32)
                outputs = inputs.float() @ a.T
                both = [float(values.double().square().sum()) for values in (outputs, targets)]
                squares[key] += torch.tensor(both, dtype=torch.float64)
        self._refuse_nothing(2 if all(bool((two > 0).all()) for two in squares.values()) else 0)
        return {key: float((two[0] / two[1]).sqrt()) for key, two in squares.items()}

    def rows(self, samples: Sequence[Sample]) -> Iterator[Pairs]:
        """What A is fitted on, batch by batch: inputs ``(k, d_in)`` and targets ``(k, r)``.

        Batches without a matching token are left out.
        """
        for batch in self._batches(samples):
            paired = self._pairing(batch)
            if len(paired.kept):
                yield self._pairs(paired)

    def moments(
        self, samples: Sequence[Sample], own_a: Mapping[str, Tensor]
    ) -> dict[str, PairMoments]:
        """Moments of the A outputs: x the anchor's ``(n, r)``, y the model's ``(n, r)``.

        Args:
            samples: any number; they pass in constant memory.
            own_a: the model's A per ``<block>/<module>``, ``(r, d_in)`` on its device.
        """
        moments = {key: PairMoments.empty(self._rank, self._rank) for key in self._keys}
        total = len(self._batches(samples))
        for done, pairs in enumerate(self.rows(samples)):
            for key, (inputs, targets) in pairs.items():
                outputs = inputs.float() @ own_a[key].T
                moments[key] = moments[key].added(targets.cpu(), outputs.cpu())
            self._progress("B", done + 1, total)
        self._refuse_nothing(next(iter(moments.values())).count)
        return moments

    def _checked(
        self, samples: Sequence[Sample], start: Mapping[str, Tensor], own_a: Mapping[str, Tensor]
    ) -> tuple[dict[str, PairMoments], dict[str, PairMoments], BlockSimilarity]:
        before = {key: PairMoments.empty(self._rank, self._rank) for key in self._keys}
        after = dict(before)
        similarity: BlockSimilarity | None = None
        batches = self._batches(samples)
        for number, batch in enumerate(batches):
            paired = self._pairing(batch)
            seen = (
                self._anchor.observe(paired.anchor, layers=True),
                self._model.observe(paired.model, layers=True),
            )
            for key, (inputs, targets) in self._pairs(paired, seen).items():
                x, z = inputs.float(), targets.cpu()
                before[key] = before[key].added(z, (x @ start[key].T).cpu())
                after[key] = after[key].added(z, (x @ own_a[key].T).cpu())
            found = _similarity(paired, *seen)
            if found is not None:
                similarity = found if similarity is None else similarity.merged(found)
            self._progress("check", number + 1, len(batches))
        self._refuse_nothing(next(iter(after.values())).count)
        if similarity is None:
            raise AdapterError(
                "layers cannot be compared: no batch of the check has 4 matching tokens",
                hint="give longer public samples, larger batches, or --positions all",
            )
        return before, after, similarity

    def _pairs(
        self, paired: PairedBatch, seen: tuple[Observed, Observed] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Per linear: the model's inputs ``(k, d)`` and the anchor's A outputs ``(k, r)``."""
        first, second = seen or (
            self._anchor.observe(paired.anchor),
            self._model.observe(paired.model),
        )
        outputs = [first.inputs[key].float() @ self._anchor_a[key].T for key in self._keys]
        targets = paired.anchor_rows(torch.cat(outputs, dim=-1)).to(self._devices[1])
        # Linears with one input share its rows.
        kept = {
            id(value): paired.model_rows(value)
            for value in {id(value): value for value in second.inputs.values()}.values()
        }
        split = torch.split(targets, self._rank, dim=-1)
        return {
            key: (kept[id(second.inputs[key])], split[place] * self._scales[key])
            for place, key in enumerate(self._keys)
        }

    def _fit_stream(self, samples: Sequence[Sample], wanted: int) -> Iterator[Pairs]:
        """Micro-batches without end; those without a matching token are left out."""
        done = 0
        epoch = 0
        while True:
            found = False
            for batch in self._batches(samples, epoch):
                paired = self._pairing(batch)
                if len(paired.kept):
                    found = True
                    done += 1
                    self._progress("A", done, wanted)
                    yield self._pairs(paired)
            if not found:
                self._refuse_nothing(0)
            epoch += 1

    def _batches(self, samples: Sequence[Sample], epoch: int = 0) -> list[Sequence[Sample]]:
        """Samples of similar length together, within windows; then the batches in random order."""
        rng = python_random(self._options.seed, "alignment", "order", epoch)
        order = list(samples)
        if epoch:
            rng.shuffle(order)
        size = self._options.batch_size
        batches: list[Sequence[Sample]] = []
        for begin in range(0, len(order), size * _WINDOW):
            window = sorted(
                order[begin : begin + size * _WINDOW],
                key=lambda sample: sum(len(text) for text in sample.turns),
            )
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches

    def _refuse_nothing(self, count: int) -> None:
        if count < 2:
            raise AdapterError(
                f"models {self._names[0]!r} and {self._names[1]!r}: {count} token positions of "
                "the public samples correspond; expected many",
                hint="use --positions all, or public samples with longer answers",
            )


def _similarity(paired: PairedBatch, anchor: Observed, model: Observed) -> BlockSimilarity | None:
    """CKA of all layers on one batch, or on evenly spaced rows of a large one."""
    if len(paired.kept) < 4:
        return None
    step = -(-len(paired.kept) // _CKA_ROWS)
    return BlockSimilarity.of(
        [paired.anchor_rows(layer)[::step].cpu() for layer in anchor.layers],
        [paired.model_rows(layer)[::step].cpu() for layer in model.layers],
    )


def _nobody(stage: str, done: int, total: int) -> None:
    """Progress that is not shown."""
