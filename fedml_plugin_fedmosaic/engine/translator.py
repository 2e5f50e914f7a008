"""Received logits of another vocabulary in that of one model.

A model knows the other vocabularies of a run by their wordings, which the runtime exchanges once;
see :mod:`equations.translation` for what becomes of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.processor import Processor
from fedml_plugin_fedmosaic.engine.token_text import TokenTexts
from fedml_plugin_fedmosaic.equations.lexicon import Lexicon
from fedml_plugin_fedmosaic.equations.translation import END, Wording, translated


def texts_of(processor: Processor) -> tuple[str, ...]:
    """What each token id of a model says, in one alphabet for all tokenizers.

    The tokens that end an answer say :data:`END`; other special tokens, and ids without a token,
    say nothing.
    """
    tokenizer = processor.tokenizer
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    silent = set(tokenizer.all_special_ids)
    if processor.image_tokens is not None:
        silent.add(processor.image_tokens[0])
    texts = TokenTexts(tokenizer, spaces=True)(ids)
    return tuple(
        END if number in processor.end_ids else "" if number in silent else text
        for number, text in zip(ids, texts, strict=True)
    )


class Translator:
    """Knows one model's words, and those of other vocabularies after :meth:`learn`.

    Args:
        processor: of the model.
        width: of its logits.
    """

    def __init__(self, processor: Processor, width: int) -> None:
        self._processor = processor
        self._width = width
        self._others: dict[str, Wording] = {}

    def wording(self, samples: Sequence[Sample]) -> Wording:
        """What others need to understand this model's logits on some samples.

        Raises:
            DataError: a sample cannot be encoded.
        """
        answers = {sample.key: self._processor.answer_ids(sample) for sample in samples}
        return Wording(texts=self._texts, answers=answers)

    def learn(self, wordings: Mapping[str, Wording]) -> None:
        """Takes in vocabularies by digest; the model's own may be among them."""
        self._others.update(wordings)

    def __call__(self, logits: Tensor, vocabulary: str, sample: Sample, top_k: int) -> Tensor:
        """A sample's logits as log probabilities over the model's own tokens.

        Args:
            logits: float ``(supervised tokens of the teacher, its width)``.
            vocabulary: digest of the teacher's vocabulary.
            sample: which sample was answered.
            top_k: tokens per position that are translated.

        Returns:
            float32 ``(supervised tokens, width)``; rows of -inf where nothing corresponds.

        Raises:
            AdapterError: the vocabulary or its answer to the sample is not known, or the logits are
                for another number of tokens.
        """
        teacher = self._others.get(vocabulary)
        if teacher is None or sample.key not in teacher.answers:
            known = ", ".join(sorted(self._others)) or "none"
            raise AdapterError(
                f"received logits of sample {sample.key} are in vocabulary {vocabulary!r}, whose "
                f"answer to it is not known here; known vocabularies: {known}",
                hint="the strategy must say that it translates (Strategy.translates)",
            )
        return translated(
            logits.to(device="cpu"),
            teacher,
            teacher.answers[sample.key],
            self._processor.answer_ids(sample),
            self._lexicon,
            Wording(texts=self._texts),
            width=self._width,
            top_k=top_k,
        )

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return texts_of(self._processor)

    @cached_property
    def _lexicon(self) -> Lexicon:
        # Of several tokens that end an answer, the model's own template writes one.
        end = self._processor.end_of_turn
        known = [
            "" if text == END and end not in (None, number) else text
            for number, text in enumerate(self._texts)
        ]
        # A tokenizer may have more tokens than the model has logits.
        return Lexicon(known[: self._width])
