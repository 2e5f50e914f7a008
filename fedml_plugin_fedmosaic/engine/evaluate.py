"""Answers of a model: batched greedy generation, and ranking of choices by likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.processor import Batch, Processor

_REPEATED = 2
"""A sequence whose last tokens equal the ones before them is stuck and is stopped."""


@torch.inference_mode()
def generate_answers(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to the first user turns.

    A sequence ends at an end-of-turn token, after ``max_new_tokens``, or when its last two tokens
    equal the two before them. (The released code applies the repetition rule to the first sequence
    of a batch and then stops the whole batch; here each sequence is judged by itself.)

    Args:
        model: in evaluation mode.
        processor: of the same model.
        samples: any number.
        batch_size: prompts per forward pass; similar lengths are put together.
        max_new_tokens: length limit.

    Returns:
        Decoded answers in the order of ``samples``.
    """
    answers = [""] * len(samples)
    for indices in _by_length(processor, samples, batch_size):
        inputs = processor.encode_prompt([samples[index] for index in indices])
        rows = _greedy(model, inputs, processor, max_new_tokens)
        for index, row in zip(indices, rows, strict=True):
            answers[index] = processor.decode(row)
    return answers


def _greedy(
    model: Any, inputs: Batch, processor: Processor, max_new_tokens: int
) -> list[list[int]]:
    """Generated ids of each row without the end-of-turn token."""
    mask = inputs["attention_mask"]
    position = _positions(mask)
    output = model(**inputs, position_ids=position, use_cache=True, logits_to_keep=1)
    ends = torch.tensor(sorted(processor.end_ids), device=mask.device)
    finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    lengths = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    new = mask.new_zeros(len(mask), 0)
    last = position[:, -1:]
    while True:
        token = output.logits[:, -1].argmax(-1)
        finished = finished | torch.isin(token, ends)
        lengths += ~finished
        new = torch.cat([new, token[:, None]], dim=1)
        finished = finished | _is_stuck(new)
        if new.shape[1] == max_new_tokens or bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        last = last + 1
        output = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=last,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return [row[:length] for row, length in zip(new.tolist(), lengths.tolist(), strict=True)]


def _is_stuck(new: Tensor) -> Tensor:
    if new.shape[1] < 2 * _REPEATED:
        return torch.zeros(len(new), dtype=torch.bool, device=new.device)
    return (new[:, -_REPEATED:] == new[:, -2 * _REPEATED : -_REPEATED]).all(1)


@torch.inference_mode()
def rank_choices(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int,
    share_prompt: bool,
) -> list[int]:
    """The most likely choice of each sample.

    A choice's score is the log-probability that the model answers it and then ends its turn: the
    sum over its tokens and the end-of-turn token. Ties go to the first.

    Args:
        model: in evaluation mode.
        processor: of the same model.
        samples: any number.
        choices: at least one per sample.
        batch_size: prompts per forward pass; all their choices are scored in one further pass.
        share_prompt: run each prompt once and reuse its key-value cache for all choices; false for
            models whose layers look at the whole sequence.

    Returns:
        Index of the best choice per sample.
    """
    best = [0] * len(samples)
    for indices in _by_length(processor, samples, batch_size):
        chosen = [samples[index] for index in indices]
        answers = [processor.encode_choices(samples[index], choices[index]) for index in indices]
        score = _score_with_cache if share_prompt else _score_whole
        scores = score(model, processor, chosen, answers)
        start = 0
        for index, options in zip(indices, answers, strict=True):
            best[index] = int(scores[start : start + len(options)].argmax())
            start += len(options)
    return best


def _score_with_cache(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Log-probability of every answer, flattened over samples: float32 ``(rows,)``."""
    inputs = processor.encode_prompt(samples)
    mask = inputs["attention_mask"]
    position = _positions(mask)
    output = model(**inputs, position_ids=position, use_cache=True, logits_to_keep=1)
    counts = torch.tensor([len(options) for options in answers], device=mask.device)
    owner = torch.repeat_interleave(torch.arange(len(samples), device=mask.device), counts)
    tokens, known = _pad([answer for options in answers for answer in options], mask.device)
    first: Tensor = output.logits[:, -1].float().log_softmax(-1)[owner]
    total: Tensor = first.gather(1, tokens[:, :1])[:, 0]
    if tokens.shape[1] > 1:
        output.past_key_values.reorder_cache(owner)
        steps = torch.arange(1, tokens.shape[1], device=mask.device)
        following = model(
            input_ids=tokens[:, :-1],
            attention_mask=torch.cat([mask[owner], known[:, :-1].to(mask.dtype)], dim=1),
            position_ids=position[owner, -1:] + steps,
            past_key_values=output.past_key_values,
            use_cache=True,
        ).logits
        total = total + _token_scores(following, tokens[:, 1:], known[:, 1:])
    return total


def _score_whole(
    model: Any,
    processor: Processor,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[Tensor]],
) -> Tensor:
    """The same without a cache: every row is prompt and answer."""
    rows = [sample for sample, options in zip(samples, answers, strict=True) for _ in options]
    inputs = processor.encode_prompt(rows)
    tokens, known = _pad(
        [answer for options in answers for answer in options], inputs["input_ids"].device
    )
    mask = torch.cat([inputs["attention_mask"], known.to(inputs["attention_mask"].dtype)], dim=1)
    logits = model(
        **{
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1),
            "attention_mask": mask,
        },
        position_ids=_positions(mask),
        use_cache=False,
        logits_to_keep=tokens.shape[1] + 1,
    ).logits
    return _token_scores(logits[:, :-1], tokens, known)


def _token_scores(logits: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
    scores = logits.float().log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    return scores.masked_fill(~known, 0.0).sum(1)


def _pad(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right ``(n, T)`` and which entries are real ``(n, T)``."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(list(rows), batch_first=True)
    known = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens.to(device), known.to(device)


def _positions(mask: Tensor) -> Tensor:
    """Position of each token inside its own sequence; 0 on the padding."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def _by_length(
    processor: Processor, samples: Sequence[Sample], batch_size: int
) -> Iterator[list[int]]:
    """Batches of indices with prompts of similar length; a fixed order for equal lengths."""
    order = sorted(range(len(samples)), key=lambda index: processor.prompt_length(samples[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
