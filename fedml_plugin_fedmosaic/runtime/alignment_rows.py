"""Which activations of two models belong together.

Models with one tokenizer see the same tokens: their positions correspond directly. Others are
compared where their tokens stand for the same text: the anchor's outputs are averaged over the
positions that match a token of the other model.

The first position is never used. It is the same in every text, and decoders park activations there
that are larger than all others by orders of magnitude (Sun et al., arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.prompt import IGNORE
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.processor import Batch
from fedml_plugin_fedmosaic.engine.token_text import TokenTexts
from fedml_plugin_fedmosaic.equations.token_alignment import aligned_positions, pooled_rows

Positions = Literal["auto", "all", "supervised"]
_LONG_ANSWER = 16
"""Tokens per sample from which answers alone are enough."""
_PROBED = 64


@dataclass(frozen=True, slots=True)
class PairedBatch:
    """One batch of samples as both models see it, and which positions correspond.

    Attributes:
        anchor: the anchor's inputs.
        model: the other model's.
        partners: per sample and position of the model, the anchor's positions; None if positions
            correspond directly, and then ``kept`` says which.
        kept: ``(k, 2)`` sample and position in the model.
    """

    anchor: Batch
    model: Batch
    partners: list[list[list[int]]] | None
    kept: Tensor

    def model_rows(self, values: Tensor) -> Tensor:
        """Rows ``(k, d)`` of the model's values ``(n, T, d)``."""
        return values[self.kept[:, 0].to(values.device), self.kept[:, 1].to(values.device)]

    def anchor_rows(self, values: Tensor) -> Tensor:
        """Rows ``(k, d)`` of the anchor's values ``(n, T', d)``, averaged over partners."""
        if self.partners is None:
            return self.model_rows(values)
        return pooled_rows(values, self.partners)[0]


class RowPairing:
    """Encodes samples for two models and pairs their positions.

    Args:
        anchor: the model whose coordinates the other takes.
        model: the other model.
        positions: ``supervised``: only where the next token belongs to an answer, as published for
            models with different tokenizers; ``all``: everywhere, as published for others;
            ``auto``: as published, unless answers are too short to say anything.

    Attributes:
        direct: whether both models see the same tokens.
        positions: as chosen; ``auto`` stands for ``all`` until :meth:`settle` is called.
    """

    def __init__(
        self, anchor: ModelBundle, model: ModelBundle, positions: Positions = "auto"
    ) -> None:
        self._anchor, self._model = anchor, model
        self.direct = _one_tokenizer(anchor, model)
        self._is_open = positions == "auto"
        self.positions: Literal["all", "supervised"] = "all" if positions == "auto" else positions
        self._anchor_texts = TokenTexts(anchor.processor.tokenizer)
        self._model_texts = TokenTexts(model.processor.tokenizer)

    def settle(self, samples: Sequence[Sample]) -> None:
        """Decides what ``auto`` means for these samples, from the first of them.

        Raises:
            DataError: a sample cannot be encoded.
        """
        if self._is_open and not self.direct and samples:
            some = samples[:_PROBED]
            batches = (self._model.processor.encode_train([sample]) for sample in some)
            tokens = sum(int(_usable(batch, "supervised").sum()) for batch in batches)
            if tokens >= _LONG_ANSWER * len(some):
                self.positions = "supervised"
        self._is_open = False

    def __call__(self, samples: Sequence[Sample]) -> PairedBatch:
        """Pairs one batch.

        Raises:
            DataError: a sample cannot be encoded.
        """
        anchor = self._anchor.processor.encode_train(samples)
        model = self._model.processor.encode_train(samples)
        own = _usable(model, self.positions)
        # Vocabularies may agree while merges or normalisation do not: then by text.
        if self.direct and torch.equal(anchor["input_ids"], model["input_ids"]):
            return PairedBatch(anchor, model, None, own.nonzero())
        partners = self._partners(anchor, model, own)
        kept = [
            (row, place)
            for row, found in enumerate(partners)
            for place, matched in enumerate(found)
            if matched
        ]
        return PairedBatch(
            anchor, model, partners, torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)
        )

    def _partners(self, anchor: Batch, model: Batch, own: Tensor) -> list[list[list[int]]]:
        """Per sample and position of the model: positions of the anchor with the same text."""
        own = own & ~_image_tokens(self._model, model)
        theirs = _usable(anchor, self.positions) & ~_image_tokens(self._anchor, anchor)
        length = model["input_ids"].shape[1]
        result = []
        for row in range(len(own)):
            places, texts = _texts(self._model_texts, model["input_ids"][row], own[row])
            others, other_texts = _texts(self._anchor_texts, anchor["input_ids"][row], theirs[row])
            matched = aligned_positions(texts, other_texts, marks=())
            partners: list[list[int]] = [[] for _ in range(length)]
            for place, found in zip(places, matched, strict=True):
                partners[place] = [others[index] for index in found]
            result.append(partners)
        return result


def _texts(say: TokenTexts, ids: Tensor, usable: Tensor) -> tuple[list[int], list[str]]:
    """Positions that hold more than spaces, and what they say."""
    places = usable.nonzero()[:, 0].tolist()
    found = zip(places, say(ids[places].tolist()), strict=True)
    pairs = [(place, text) for place, text in found if text]
    return [place for place, _ in pairs], [text for _, text in pairs]


def _usable(batch: Batch, positions: Literal["all", "supervised"]) -> Tensor:
    """Positions that may be compared: bool ``(n, T)`` on the CPU."""
    usable = batch["attention_mask"].bool().cpu()
    if positions == "supervised":
        answers = batch["labels"].cpu()[:, 1:] != IGNORE
        usable[:, :-1] &= answers
        usable[:, -1] = False
    usable[:, 0] = False
    return usable


def _image_tokens(bundle: ModelBundle, batch: Batch) -> Tensor:
    """Where a batch holds image tokens: they are no text, and models cut images differently."""
    ids = batch["input_ids"].cpu()
    known = bundle.processor.image_tokens
    return torch.zeros_like(ids, dtype=torch.bool) if known is None else ids == known[0]


def _one_tokenizer(anchor: ModelBundle, model: ModelBundle) -> bool:
    """Whether two models cut texts and images into the same tokens."""
    first, second = anchor.processor, model.processor
    return bool(
        first.image_tokens == second.image_tokens
        and first.tokenizer.chat_template == second.tokenizer.chat_template
        and first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    )
