from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.evaluate import generate_answers, rank_choices
from fedml_plugin_fedmosaic.engine.models import load_model

CPU = torch.device("cpu")
CHOICES = ["cat", "red and blue fish", "dog", "a bird"]


@pytest.fixture(scope="module", params=["llama", "qwen2", "llava"])
def case(request, tmp_path_factory):
    """A model whose answers differ between samples, and samples of different lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        save_llava(folder / "model", "llama", seed=6)
        samples = image_samples(folder, 7)
    else:
        save_text_model(folder / "model", request.param, seed=6)
        samples = text_samples(7)
    bundle = load_model("tiny", ModelSpec(path=str(folder / "model")), CPU)
    return bundle, samples


def reference(bundle, sample, max_new_tokens):
    """Hugging Face's own greedy generation of one sample, cut by our repetition rule."""
    inputs = bundle.processor.encode_prompt([sample])
    output = bundle.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(bundle.processor.end_ids),
        pad_token_id=bundle.processor.pad_id,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    kept = []
    for token in output:
        if token in bundle.processor.end_ids:
            break
        kept.append(token)
        if len(kept) >= 4 and kept[-2:] == kept[-4:-2]:
            break
    return bundle.processor.decode(kept)


def test_batched_generation_gives_the_same_answers_as_hugging_face(case):
    bundle, samples = case
    answers = generate_answers(
        bundle.model, bundle.processor, samples, batch_size=4, max_new_tokens=8
    )
    assert answers == [reference(bundle, sample, 8) for sample in samples]
    assert len(set(answers)) > 1


def test_answers_do_not_depend_on_the_batch_size(case):
    bundle, samples = case
    answers = [
        generate_answers(bundle.model, bundle.processor, samples, batch_size=size, max_new_tokens=5)
        for size in (1, 3, 64)
    ]
    assert answers[0] == answers[1] == answers[2]


def brute_force(bundle, sample, choices):
    """Index of the best choice from whole forward passes, one per choice."""
    scores = []
    for choice in choices:
        row = Sample(sample_id="0", task="t", turns=(sample.prompt, choice), images=sample.images)
        batch = bundle.processor.encode_train([row])
        with torch.no_grad():
            scores.append(-float(bundle.model(**batch).loss) * int((batch["labels"] >= 0).sum()))
    return max(range(len(choices)), key=scores.__getitem__)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_ranking_is_by_the_log_probability_of_the_whole_answer(case, share_prompt):
    bundle, samples = case
    choices = [(CHOICES[k % 3 :] + CHOICES[: k % 3])[: 3 + k % 2] for k in range(len(samples))]
    best = rank_choices(
        bundle.model,
        bundle.processor,
        samples,
        choices,
        batch_size=3,
        share_prompt=share_prompt,
    )
    expected = [brute_force(bundle, s, c) for s, c in zip(samples, choices, strict=True)]
    assert best == expected
    assert len(set(best)) > 1


def test_nothing_to_do_is_done():
    assert generate_answers(None, None, [], batch_size=2, max_new_tokens=3) == []
    assert rank_choices(None, None, [], [], batch_size=2, share_prompt=True) == []


class Scripted:
    """Plays a model and a processor: row i answers ``script[i]`` token by token."""

    end_ids = frozenset({9})

    def __init__(self, *script):
        self.script = script
        self.calls = 0

    def prompt_length(self, sample):
        return 1

    def encode_prompt(self, samples):
        ones = torch.ones(len(samples), 1, dtype=torch.int64)
        return {"input_ids": ones, "attention_mask": ones}

    def decode(self, ids):
        return ids

    def __call__(self, **inputs):
        tokens = torch.tensor([row[self.calls] for row in self.script])
        self.calls += 1
        logits = torch.nn.functional.one_hot(tokens, 10).float()[:, None]
        return SimpleNamespace(logits=logits, past_key_values=None)


def play(*script, max_new_tokens=8):
    model = Scripted(*script)
    samples = text_samples(len(script))
    answers = generate_answers(model, model, samples, batch_size=8, max_new_tokens=max_new_tokens)
    return answers, model.calls


def test_each_sequence_ends_at_its_own_end_token():
    answers, calls = play([1, 9, 5, 5], [9, 1, 1, 1], [1, 2, 3, 9])
    assert answers == [[1], [], [1, 2, 3]]
    assert calls == 4


def test_a_stuck_sequence_stops_alone():
    stuck, healthy = [1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 9, 0, 0]
    answers, calls = play(stuck, healthy)
    assert answers == [[1, 2, 1, 2], [1, 2, 3, 4, 5]]
    assert calls == 6


def test_the_length_limit_holds():
    answers, calls = play([1, 2, 3, 4, 5], max_new_tokens=3)
    assert answers == [[1, 2, 3]]
    assert calls == 3
