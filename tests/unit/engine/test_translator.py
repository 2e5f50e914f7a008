"""Engines understand logits of models with another tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from letter_model import save_letter_model
from tiny_models import save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import (
    AdapterConfig,
    EvalConfig,
    ModelSpec,
    OptimConfig,
)
from fedml_plugin_fedmosaic.core.errors import AdapterError
from fedml_plugin_fedmosaic.core.types import Branch, View
from fedml_plugin_fedmosaic.core.work import Distillation, ModelRef, Pass, Probe, Samples
from fedml_plugin_fedmosaic.engine.digests import vocabulary_digest
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.engine.translator import Translator, texts_of
from fedml_plugin_fedmosaic.equations.translation import END

SAMPLES = text_samples(4)
ADAPTER = AdapterConfig(rank=2, alpha=4.0, num_blocks=2, target_modules=("q_proj", "v_proj"))
LOOK = Probe(name="look", models={"m": ModelRef()}, samples=Samples.PUBLIC, what="logits")


def engine_of(folder: Path) -> TorchEngine:
    bundle = load_model(folder.name, ModelSpec(path=str(folder)), torch.device("cpu"))
    optim = OptimConfig(learning_rate=2e-2, batch_size=2)
    return TorchEngine(bundle, ADAPTER, "lora", optim, EvalConfig(), 0)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TorchEngine]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    save_text_model(folder / "words", "llama", hidden=16, layers=2)
    save_letter_model(folder / "letters", hidden=16, layers=2)
    made = {name: engine_of(folder / name) for name in ("words", "letters")}
    yield made
    for engine in made.values():
        engine.close()


def acquainted(engines: dict[str, TorchEngine]) -> dict[str, str]:
    """Vocabulary digest by name; both engines know both."""
    digests = {name: engine.vocabulary() for name, engine in engines.items()}
    said = {digests[name]: e.translator.wording(SAMPLES) for name, e in engines.items()}
    for engine in engines.values():
        engine.translator.learn(said)
    return digests


def look(engine: TorchEngine) -> dict[str, torch.Tensor]:
    seen = engine.probe(LOOK, engine.initial_adapter(), {}, SAMPLES)
    return {key.removeprefix("m/"): value for key, value in seen.tensors.items()}


def test_special_tokens_say_nothing_but_the_end(engines: dict[str, TorchEngine]) -> None:
    for engine in engines.values():
        processor = engine._bundle.processor
        texts = texts_of(processor)
        tokenizer = processor.tokenizer
        assert len(texts) == len(tokenizer)
        assert texts[tokenizer.eos_token_id] == END
        assert texts[tokenizer.pad_token_id] == texts[tokenizer.unk_token_id] == ""
        assert "A" in texts


def test_the_template_says_which_token_ends_an_answer(
    engines: dict[str, TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines["words"]
    processor = engine._bundle.processor
    tokenizer = processor.tokenizer
    ends = frozenset({tokenizer.pad_token_id, tokenizer.eos_token_id})
    monkeypatch.setattr(processor, "end_ids", ends)
    translator = Translator(processor, engine._bundle.vocabulary_size)
    said = translator.wording(SAMPLES).texts
    assert {number for number, text in enumerate(said) if text == END} == ends
    # The padding token has the smaller id, and ends no answer.
    assert tokenizer.pad_token_id < tokenizer.eos_token_id
    assert translator._lexicon.exact(END) == tokenizer.eos_token_id


def test_answers_are_what_is_supervised(engines: dict[str, TorchEngine]) -> None:
    for name, count in (("words", 2), ("letters", 4)):
        wording = engines[name].translator.wording(SAMPLES)
        ids = wording.answers[SAMPLES[0].key]
        assert "".join(wording.said(ids)) == f"cat{END}"
        assert len(ids) == count


def test_letters_are_taught_by_words_and_words_by_letters(engines: dict[str, TorchEngine]) -> None:
    digests = acquainted(engines)
    for student, teacher in (("words", "letters"), ("letters", "words")):
        engine, sample = engines[student], SAMPLES[1]
        logits = look(engines[teacher])[sample.key]
        rows = engine.translator(logits, digests[teacher], sample, 16)
        answer = engine.translator.wording([sample]).answers[sample.key]
        assert rows.shape == (len(answer), engine._bundle.vocabulary_size)
        assert torch.allclose(rows.exp().sum(1), torch.ones(len(answer)))
        assert bool(rows[range(len(answer)), list(answer)].isfinite().all())
    # The probability of a word is the product of its letters'.
    asked = engines["letters"].translator.wording(SAMPLES).answers[sample.key]
    logits = look(engines["letters"])[sample.key]
    chain = logits.softmax(-1)[range(len(asked)), list(asked)]
    rows = engines["words"].translator(logits, digests["letters"], sample, 1)
    end = engines["words"].translator.wording(SAMPLES).answers[sample.key][-1]
    whole = engines["words"].translator.wording(SAMPLES).answers[sample.key][0]
    assert rows[0, whole].exp() >= chain[:-1].prod()
    assert rows[1, end].exp() >= chain[-1]


def test_a_student_learns_from_a_teacher_of_another_vocabulary(
    engines: dict[str, TorchEngine],
) -> None:
    digests = acquainted(engines)
    for student, teacher in (("words", "letters"), ("letters", "words")):
        received = {f"t/{key}": value for key, value in look(engines[teacher]).items()}
        foreign = dict.fromkeys([sample.key for sample in SAMPLES], digests[teacher])
        term = Distillation(weight=1.0, targets="t", vocabularies=foreign, top_k=8)
        pass_ = Pass(
            name="learn",
            view=View.LOCAL,
            train=frozenset({Branch.LOCAL}),
            num_steps=12,
            task_weight=0.0,
            distil=(term,),
        )
        engine = engines[student]
        result = engine.fit(
            pass_, engine.initial_adapter(), [SAMPLES] * 12, seed=0, tensors=received
        )
        assert result.losses[-1] < 0.9 * result.losses[0]


def test_positions_where_nothing_is_said_teach_nothing(engines: dict[str, TorchEngine]) -> None:
    digests = acquainted(engines)
    engine, sample = engines["words"], SAMPLES[0]
    own = look(engine)[sample.key]
    silent = own.clone()
    silent[0] = -torch.inf
    term = Distillation(weight=1.0, targets="t", vocabularies={sample.key: digests["words"]})
    pass_ = Pass(
        name="learn",
        view=View.LOCAL,
        train=frozenset({Branch.LOCAL}),
        num_steps=1,
        task_weight=0.0,
        distil=(term,),
    )
    teacher = 3.0 * own

    def loss(translate: torch.Tensor) -> float:
        engine.translator = lambda *_: translate  # type: ignore[assignment]
        tensors = {f"t/{sample.key}": teacher}
        return engine.fit(
            pass_, engine.initial_adapter(), [[sample]], seed=0, tensors=tensors
        ).losses[0]

    kept = engine.translator
    try:
        both, last = loss(teacher), loss(torch.where(silent.isneginf(), silent, teacher))
    finally:
        engine.translator = kept
    wanted = teacher.log_softmax(-1)
    gaps = (wanted.exp() * (wanted - own.log_softmax(-1))).sum(1)
    assert both == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert last == pytest.approx(float(gaps[1]) / 2, rel=1e-4)


def test_an_unknown_vocabulary_is_refused(engines: dict[str, TorchEngine]) -> None:
    with pytest.raises(AdapterError, match="'nobody'"):
        engines["words"].translator(torch.zeros(2, 5), "nobody", SAMPLES[0], 4)


def test_padded_heads_are_another_vocabulary(engines: dict[str, TorchEngine]) -> None:
    tokenizer = engines["words"]._bundle.processor.tokenizer
    plain = vocabulary_digest(tokenizer)
    assert engines["words"].vocabulary() == plain == vocabulary_digest(tokenizer, len(tokenizer))
    assert vocabulary_digest(tokenizer, 128) == f"{plain}-128"
