"""Conversations to token ids and labels, with the chat template of any Hugging Face tokenizer.

Labels are -100 except on assistant spans: from just after the assistant header up to and including
the end-of-turn token. Spans are found by rendering growing prefixes of the conversation, not by
searching for token sequences, so a new template needs no code. Every span is tokenised on its own:
a prompt has the same ids in training and in generation, whatever the tokenizer would have merged
across the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError

IMAGE_MARK = "<image>"
IGNORE = -100
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Answer: {{ message['content'] | trim }}{{ eos_token }}\n"
    "{% else %}{{ message['content'] | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
"""For tokenizers without a chat template: plain text, ``Answer:`` before each answer."""
_PROBE = "probe"
_MAX_PIECE = 256
_MAX_PIECES = 10_000


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Renders messages (``tokenize=False``)."""
        ...

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One conversation.

    Attributes:
        ids: int64 ``(T,)``.
        labels: int64 ``(T,)``, -100 where not supervised; not shifted.
        num_supervised: number of labels that are not -100.
    """

    ids: Tensor
    labels: Tensor
    num_supervised: int


class PromptEncoder:
    """Renders and tokenises conversations for one tokenizer.

    Args:
        tokenizer: with a chat template.
        image_token_id: id that stands for one image token; None if the model takes no images.
        tokens_per_image: how many of them an ``<image>`` mark becomes.

    Raises:
        ConfigError: the chat template is missing or does not render a plain conversation.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        image_token_id: int | None = None,
        tokens_per_image: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._tokens_per_image = tokens_per_image
        self._pieces: dict[str, tuple[int, ...]] = {}
        self._parts = False  # message content as a list of parts instead of a string
        self._parts = self._needs_parts()
        with_prompt = self._render((_PROBE,), generation=True)
        # Some templates ignore add_generation_prompt; then the header is taken from a full turn.
        self._has_generation_prompt = with_prompt != self._render((_PROBE,))

    @property
    def image_tokens(self) -> tuple[int, int] | None:
        """Image token id and tokens per image; None for a model that takes no images."""
        if self._image_token_id is None:
            return None
        return self._image_token_id, self._tokens_per_image

    def conversation(self, turns: Sequence[str]) -> Encoded:
        """Encodes a conversation with labels on all assistant turns.

        Args:
            turns: texts, user first, alternating; ends with an assistant turn.

        Raises:
            DataError: an image mark without a vision model, or a turn the template drops.
        """
        ids: list[int] = []
        labels: list[int] = []
        for text, supervised in self._segments(turns):
            segment = self._ids(text)
            ids += segment
            labels += segment if supervised else [IGNORE] * len(segment)
        return Encoded(
            ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            num_supervised=sum(label != IGNORE for label in labels),
        )

    def prompt(self, turns: Sequence[str]) -> Encoded:
        """Encodes everything up to where the assistant's next turn begins (no labels).

        Args:
            turns: texts, user first; ends with a user turn.
        """
        ids = torch.tensor(self._ids(self._prompt_text(turns)), dtype=torch.int64)
        return Encoded(ids=ids, labels=torch.full_like(ids, IGNORE), num_supervised=0)

    def answer(self, turns: Sequence[str]) -> Tensor:
        """Ids of the last assistant turn with its end-of-turn token: int64 ``(n,)``."""
        text, _ = [part for part in self._segments(turns) if part[1]][-1]
        return torch.tensor(self._ids(text), dtype=torch.int64)

    def end_of_turn(self) -> int | None:
        """Id of the token that ends an assistant turn; None if the template has none."""
        text, _ = next(part for part in self._segments((_PROBE, _PROBE)) if part[1])
        ids = self._ids(text[text.index(_PROBE) + len(_PROBE) :])
        return ids[0] if ids else None

    def _needs_parts(self) -> bool:
        failure = "it does not show the message's text"
        for parts in (False, True):
            self._parts = parts
            try:
                if _PROBE in self._render((_PROBE,)):
                    return parts
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                failure = str(error)
        raise ConfigError(
            f"the tokenizer's chat template cannot be used: {failure}",
            hint="use a model folder whose tokenizer has a chat template",
        )

    def _render(self, turns: Sequence[str], *, generation: bool = False) -> str:
        messages = [
            {
                "role": "assistant" if position % 2 else "user",
                "content": [{"type": "text", "text": turn}] if self._parts else turn,
            }
            for position, turn in enumerate(turns)
        ]
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        )

    def _prompt_text(self, turns: Sequence[str]) -> str:
        if self._has_generation_prompt:
            return self._render(turns, generation=True)
        full = self._render((*turns, _PROBE))
        return full[: full.rindex(_PROBE)]

    def _segments(self, turns: Sequence[str]) -> list[tuple[str, bool]]:
        """The rendered text cut into (text, supervised) pieces."""
        full = self._render(turns)
        segments: list[tuple[str, bool]] = []
        cursor = 0
        for position in range(1, len(turns), 2):
            # A conversation ends with its last answer, so the whole text goes through it.
            last = position + 1 == len(turns)
            through = full if last else self._render(turns[: position + 1])
            start, end = self._span(full, through, turns[: position + 1], cursor)
            segments += [(full[cursor:start], False), (full[start:end], True)]
            cursor = end
        segments.append((full[cursor:], False))
        return [segment for segment in segments if segment[0]]

    def _span(self, full: str, through: str, turns: Sequence[str], cursor: int) -> tuple[int, int]:
        """Where the last of ``turns`` lies in ``full``, end-of-turn token included.

        ``through`` is the rendered text of ``turns``, ``full`` that of the whole conversation.
        """
        before = self._prompt_text(turns[:-1])
        answer = turns[-1].strip()
        if full.startswith(through) and through.startswith(before):
            body = through[len(before) :]
            if body.lstrip().startswith(answer):
                # White space after the end-of-turn token belongs to no one.
                return len(before), len(before) + len(body.rstrip())
        # The template rewrites earlier turns, so prefixes do not agree: look for the texts.
        question = full.find(turns[-2].strip(), cursor)
        start = full.find(answer, question + len(turns[-2].strip()))
        if question < 0 or start < 0:
            raise DataError(
                f"the chat template does not show turn {len(turns) - 1} of a conversation: "
                f"expected {answer[:60]!r} in the rendered text",
                hint="use a tokenizer whose chat template keeps all turns",
            )
        ending = through[through.rindex(answer) + len(answer) :].rstrip()
        end = start + len(answer)
        return start, end + len(ending) if full.startswith(ending, end) else end

    def _ids(self, text: str) -> list[int]:
        pieces = text.split(IMAGE_MARK)
        if len(pieces) > 1 and self._image_token_id is None:
            raise DataError(
                f"a sample with {IMAGE_MARK} marks was given to a text-only model",
                hint="give the client a model with a vision tower, or a task without images",
            )
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number:
                ids += [self._image_token_id or 0] * self._tokens_per_image
            if piece:
                ids += self._piece_ids(piece)
        return ids

    def _piece_ids(self, piece: str) -> Sequence[int]:
        # Short ones recur in every conversation: turn headers, multiple-choice answers.
        known = self._pieces.get(piece)
        if known is None:
            known = tuple(self._tokenizer.encode(piece, add_special_tokens=False))
            if len(piece) <= _MAX_PIECE:
                if len(self._pieces) >= _MAX_PIECES:
                    self._pieces.clear()
                self._pieces[piece] = known
        return known


def collate(
    rows: Sequence[Encoded], pad_id: int, *, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Pads conversations to the longest one.

    Args:
        rows: at least one.
        pad_id: padding token.
        side: where the padding goes; right for training, left for generation.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: int64 ``(len(rows), T)``.
    """
    lengths = torch.tensor([row.ids.shape[0] for row in rows])
    ids = pad_sequence([row.ids for row in rows], True, pad_id, padding_side=side)
    labels = pad_sequence([row.labels for row in rows], True, IGNORE, padding_side=side)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
