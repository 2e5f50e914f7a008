"""A teacher's answers in the words of a student with another tokenizer.

Both models have read the same text, cut into different tokens. Per position of the text, the
teacher's most probable tokens become texts, and these become tokens of the student.

* Positions: runs of tokens that stand for the same text (:mod:`equations.token_alignment`). In a
  run of teacher tokens t_1 .. t_b with probabilities p_j, the text so far followed by another token
  than t_j has the probability that the teacher leaves the run there::

      P(t_1 .. t_(j-1) v) = p_1 .. p_(j-1) p_j(v)  for v != t_j        P(t_1 .. t_b) = p_1 .. p_b

  Where the student cuts the run into s_1 .. s_a, its token i is taught with the texts that begin
  with s_1 .. s_(i-1), these left out. For one token on both sides that is the teacher's own
  distribution.
* Tokens: each text becomes the student's token of the same text, up to a space in front, or else of
  the smallest edit distance (:mod:`equations.lexicon`). Probabilities that fall on one token are
  added. What has no near token is left out, and the rest sums to 1 again.

Source: FedMKT (Fan et al., COLING 2025, arXiv 2406.02224), after FuseLLM (Wan et al. 2024, arXiv
2401.10491). Differences to the published code: of two texts that become one token it keeps the more
probable one; where tokens do not correspond one to one it teaches the student's own label or the
teacher's next token, whichever fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.equations.lexicon import Lexicon
from fedml_plugin_fedmosaic.equations.token_alignment import Span, matching_spans

END = "\ue000"
"""Stands for the end of an answer, which every tokenizer writes in a way of its own."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """A vocabulary, and the public answers in it.

    Attributes:
        texts: what each id says, in one alphabet for all tokenizers; spaces are kept, :data:`END`
            ends an answer, and an empty text says nothing.
        answers: sample key -> ids of the supervised tokens.
    """

    texts: Sequence[str]
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def said(self, ids: Sequence[int]) -> list[str]:
        """Texts of ids; ids beyond the tokenizer's say nothing."""
        return [self.texts[number] if number < len(self.texts) else "" for number in ids]


def translated(
    logits: Tensor,
    teacher: Wording,
    asked: Sequence[int],
    own: Sequence[int],
    lexicon: Lexicon,
    student: Wording,
    *,
    width: int,
    top_k: int,
) -> Tensor:
    """A teacher's logits on an answer as log probabilities over the student's tokens.

    Args:
        logits: float ``(len(asked), teacher's width)``, row j before the teacher's token j.
        teacher: the teacher's vocabulary.
        asked: the answer's ids in the teacher's vocabulary.
        own: the answer's ids in the student's.
        lexicon: of ``student.texts``.
        student: the student's vocabulary.
        width: of the student's logits.
        top_k: most probable tokens per row that are translated; the answer's own always is.

    Returns:
        float32 ``(len(own), width)``; -inf where no probability goes. A row of -inf only: the
        teacher says nothing there.

    Raises:
        AdapterError: the logits are for another number of tokens.
    """
    if len(logits) != len(asked):
        raise AdapterError(
            f"logits for {len(logits)} tokens of an answer that has {len(asked)} in its vocabulary",
            hint="clients of one vocabulary must have one chat template, too",
        )
    rows = torch.full((len(own), width), -math.inf)
    heard, spoken = teacher.said(asked), student.said(own)
    spans = matching_spans(
        [text.replace(" ", "") for text in spoken],
        [text.replace(" ", "") for text in heard],
        marks=(),
    )
    probabilities = logits.float().softmax(-1)
    for (start, stop), there in spans:
        run = _Run(probabilities, teacher, asked, there, top_k)
        pieces = spoken[start:stop]
        if not (run.label and all(pieces)):
            continue
        texts = run.in_manner_of(pieces[0])
        for number in range(stop - start):
            chosen = _taught(texts, "".join(pieces[:number]), lexicon)
            label = own[start + number]
            chosen[label] = chosen.get(label, 0.0) + run.whole
            _write(rows[start + number], chosen)
    return rows


class _Run:
    """What a teacher could have said instead of a run of its tokens.

    Attributes:
        label: text of the whole run; empty if one of its tokens says nothing.
        whole: its probability.
        others: probabilities of other texts.
    """

    def __init__(
        self,
        probabilities: Tensor,
        teacher: Wording,
        asked: Sequence[int],
        span: Span,
        top_k: int,
    ) -> None:
        self.label, self.whole = "", 1.0
        self.others: dict[str, float] = {}
        texts = teacher.said(asked[slice(*span)])
        if not all(texts):
            return
        for row, token, text in zip(range(*span), asked[slice(*span)], texts, strict=True):
            values, ids = probabilities[row].topk(min(top_k, probabilities.shape[1]))
            found = ids.tolist()
            for other, said, value in zip(found, teacher.said(found), values.tolist(), strict=True):
                if other != token and said:
                    whole = self.label + said
                    self.others[whole] = self.others.get(whole, 0.0) + self.whole * value
            self.whole *= float(probabilities[row, token])
            self.label += text

    def in_manner_of(self, piece: str) -> dict[str, float]:
        """The other texts with a space in front, or without, as the student's token has it.

        One tokenizer writes the first word of an answer with a space, and another one does not.
        """
        has, wants = self.label.startswith(" "), piece.startswith(" ")
        if has == wants:
            return self.others
        made: dict[str, float] = {}
        for text, value in self.others.items():
            if wants:
                new = text if text.startswith((" ", END)) else f" {text}"
            else:
                new = text.removeprefix(" ")
            made[new] = made.get(new, 0.0) + value
        return made


def _taught(texts: Mapping[str, float], before: str, lexicon: Lexicon) -> dict[int, float]:
    """Student's id -> probability of the texts that go on after ``before``."""
    chosen: dict[int, float] = {}
    for text, value in texts.items():
        if text.startswith(before):
            found = _token(text.removeprefix(before), lexicon)
            if found is not None:
                chosen[found] = chosen.get(found, 0.0) + value
    return chosen


def _token(text: str, lexicon: Lexicon) -> int | None:
    found = lexicon.exact(text)
    if found is None:
        # Some vocabularies have a word only with, or only without the space in front of it.
        found = lexicon.exact(text[1:] if text.startswith(" ") else f" {text}")
    return lexicon.nearest(text) if found is None else found


def _write(row: Tensor, chosen: Mapping[int, float]) -> None:
    total = sum(chosen.values())
    if total <= 0.0:
        return
    ids = torch.tensor(list(chosen), dtype=torch.int64)
    values = torch.tensor(list(chosen.values()), dtype=torch.float64)
    row[ids] = (values / total).log().float()
