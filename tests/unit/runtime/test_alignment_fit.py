"""Rows that belong together, and factors that are aligned on them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from letter_model import save_letter_model
from tiny_models import WORDS, image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, ModelSpec
from fedml_plugin_fedmosaic.core.errors import AdapterError, DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.equations.blocks import block_end_layers
from fedml_plugin_fedmosaic.runtime.alignment_fit import PairAligner, initial_factors
from fedml_plugin_fedmosaic.runtime.alignment_options import (
    AlignOptions,
    default_rate,
    split_samples,
)
from fedml_plugin_fedmosaic.runtime.alignment_rows import RowPairing

CPU = torch.device("cpu")
ADAPTER = AdapterConfig(rank=4, num_blocks=2)
OPTIONS = AlignOptions(batch_size=4, epochs=4, learning_rate=1e-2, positions="all")
LETTERS = "which bird is this ?"


def load(folder, name="m"):
    return load_model(name, ModelSpec(path=str(folder)), CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A word-level anchor, a wider and deeper word-level model, and one that reads letters."""
    root = tmp_path_factory.mktemp("models")
    return {
        "anchor": load(save_text_model(root / "a", hidden=16, layers=2), "anchor"),
        "wide": load(save_text_model(root / "w", hidden=32, layers=5, seed=1), "wide"),
        "letters": load(save_letter_model(root / "l", hidden=32, layers=4, seed=2), "letters"),
    }


@pytest.fixture(scope="module")
def aligned(models):
    """Per model: the pair's aligner and result."""
    result = {}
    for name in ("wide", "letters"):
        pair = PairAligner(models["anchor"], models[name], ADAPTER, OPTIONS)
        result[name] = (pair, pair.run(text_samples(40)))
    return result


def tokens(bundle, batch, row):
    return bundle.processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][row].tolist())


def test_models_of_one_tokenizer_are_paired_position_by_position(models):
    pairing = RowPairing(models["anchor"], models["wide"])
    samples = text_samples(3)  # of three lengths
    paired = pairing(samples)
    assert pairing.direct
    assert pairing.positions == "all"
    lengths = paired.model["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    # All but padding and the first position.
    expected = [[row, at] for row, length in enumerate(lengths) for at in range(1, length)]
    assert paired.kept.tolist() == expected
    values = torch.randn(3, max(lengths), 5)
    assert torch.equal(paired.anchor_rows(values), paired.model_rows(values))
    assert torch.equal(paired.model_rows(values)[0], values[0, 1])


def test_words_are_paired_with_the_mean_over_their_letters(models):
    pairing = RowPairing(models["letters"], models["anchor"], "all")
    paired = pairing([Sample(sample_id="0", task="t", turns=(LETTERS, "cat"))])
    assert not pairing.direct
    model = tokens(models["anchor"], paired.model, 0)
    anchor = tokens(models["letters"], paired.anchor, 0)
    values = torch.arange(float(len(anchor)))[None, :, None]
    rows = {
        model[at]: float(v)
        for (_, at), v in zip(paired.kept.tolist(), paired.anchor_rows(values), strict=True)
    }
    for word in ("which", "bird", "this", "cat"):
        start = next(i for i in range(len(anchor)) if anchor[i : i + len(word)] == list(word))
        assert rows[word] == pytest.approx(start + (len(word) - 1) / 2)
    assert "<|bos|>" not in rows


def test_letters_are_paired_with_the_word_they_are_in(models):
    paired = RowPairing(models["anchor"], models["letters"], "all")(
        [Sample(sample_id="0", task="t", turns=(LETTERS, "cat"))]
    )
    anchor = tokens(models["anchor"], paired.anchor, 0)
    model = tokens(models["letters"], paired.model, 0)
    place = next(i for i in range(len(model)) if model[i : i + 4] == list("bird"))
    assert [paired.partners[0][at] for at in range(place, place + 4)] == [
        [anchor.index("bird")]
    ] * 4


@pytest.mark.parametrize("direct", [True, False])
def test_supervised_positions_are_those_before_an_answers_tokens(models, direct):
    other = models["wide" if direct else "letters"]
    samples = [Sample(sample_id="0", task="t", turns=(LETTERS, "dog bird"))]
    paired = RowPairing(models["anchor"], other, "supervised")(samples)
    found = [tokens(other, paired.model, 0)[at] for _, at in paired.kept.tolist()]
    if direct:  # The header's last token says the first word; the end of turn says nothing.
        assert found == ["<|end_header_id|>", "dog", "bird"]
    else:
        assert found == ["<|end_header_id|>", *"dogbird"]


@pytest.mark.parametrize(
    ("answer", "name", "chosen"),
    [
        ("cat", "letters", "all"),
        ("cat dog " * 8, "letters", "supervised"),
        ("cat " * 20, "wide", "all"),
    ],
)
def test_answers_alone_are_compared_if_they_are_long(models, answer, name, chosen):
    pairing = RowPairing(models["anchor"], models[name])
    pairing.settle([Sample(sample_id="0", task="t", turns=(LETTERS, answer))])
    assert pairing.positions == chosen


def test_images_are_compared_only_where_they_are_cut_alike(tmp_path):
    samples = image_samples(tmp_path, 2, images=(2, 1))
    small = load(save_llava(tmp_path / "s", hidden=16, layers=2), "s")
    same = load(save_llava(tmp_path / "e", hidden=32, layers=2), "e")
    finer = load(save_llava(tmp_path / "f", hidden=32, layers=2, image_size=24), "f")
    image = small.model.config.image_token_id
    for other, direct in ((same, True), (finer, False)):
        pairing = RowPairing(small, other, "all")
        assert pairing.direct is direct
        paired = pairing(samples)
        ids = paired.model["input_ids"]
        kept = [int(ids[row, at]) for row, at in paired.kept.tolist()]
        assert (image in kept) is direct
        assert len(kept) > 20


def test_aligned_factors_are_orthonormal_and_better_than_random_ones(models, aligned):
    for name, (pair, found) in aligned.items():
        for key, target in pair._model.targets.items():
            a, b = found.factors[f"{key}/A"], found.factors[f"{key}/B"]
            assert a.shape == (4, target.in_features)
            assert b.shape == (target.out_features, 4)
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
        quality = found.quality.linears.values()
        before = sum(q.residual_before for q in quality) / len(quality)
        after = sum(q.residual for q in quality) / len(quality)
        assert after < 0.5 * before
        assert all(0.0 <= q.explained <= 1.0 for q in quality)
        assert sum(q.agreement for q in quality) / len(quality) > 0.1  # of random models
        assert all(1.0 + 1e-9 >= q.correlations[0] >= q.correlations[-1] >= 0 for q in quality)
        for q in quality:
            assert q.fitted is not None
            assert len(q.new_correlations) == 4
            assert all(-1.0 <= c <= 1.0 for c in q.new_correlations)
        assert found.quality.losses[-1] < found.quality.losses[0]
        assert len(found.quality.losses) == 4 * 8  # 30 samples for the fit, 10 for the check
        assert found.quality.pairing == ("direct" if name == "wide" else "tokens")
        layers = models[name].num_layers
        assert len(found.quality.cka) == 2
        assert {len(row) for row in found.quality.cka} == {layers}
        assert found.quality.anchor_ends == (0, 1)
        assert found.quality.model_ends == block_end_layers(layers, 2)


def test_b_keeps_its_column_space(models, aligned):
    for pair, found in aligned.values():
        before = initial_factors(pair._model.targets, 4, OPTIONS.seed)
        for key in pair._model.targets:
            old, new = before[f"{key}/B"], found.factors[f"{key}/B"].double()
            torch.testing.assert_close(old @ (old.T @ new), new, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wide", "letters"])
def test_moments_do_not_depend_on_how_the_data_are_cut(models, aligned, name):
    pair, found = aligned[name]
    own = {key: found.factors[f"{key}/A"] for key in pair._keys}
    samples = text_samples(13)
    by_size = {}
    for size in (1, 5, 13):
        other = PairAligner(
            models["anchor"], models[name], ADAPTER, replace(OPTIONS, batch_size=size)
        )
        by_size[size] = other.moments(samples, own)
    for key, whole in by_size[13].items():
        for size in (1, 5):
            part = by_size[size][key]
            assert part.count == whole.count
            for field in ("x_mean", "y_mean", "xx", "yy", "xy"):
                got, expected = getattr(part, field), getattr(whole, field)
                assert float((got - expected).norm()) <= 1e-5 * float(
                    whole.xx.norm() + whole.yy.norm()
                )


def test_a_model_corresponds_to_itself(models, tmp_path):
    twin = replace(models["anchor"], info=replace(models["anchor"].info, name="twin"))
    options = replace(OPTIONS, learning_rate=1e-9, output_samples=20)
    found = PairAligner(models["anchor"], twin, ADAPTER, options).run(text_samples(40))
    anchor = initial_factors(
        PairAligner(models["anchor"], twin, ADAPTER, options)._anchor.targets, 4, 0
    )
    for key, quality in found.quality.linears.items():
        assert quality.residual == pytest.approx(0.0, abs=1e-6)
        assert quality.explained == pytest.approx(1.0, abs=1e-3)
        assert quality.scale == 1.0
        if quality.rank == 4:
            for part in "AB":
                expected = anchor[f"{key}/{part}"].float()
                torch.testing.assert_close(
                    found.factors[f"{key}/{part}"], expected, atol=1e-3, rtol=0
                )
    assert sum(quality.rank == 4 for quality in found.quality.linears.values()) > 7
    assert [found.quality.cka[i][i] for i in range(2)] == pytest.approx([1.0, 1.0])
    assert found.quality.unmatched == ()


def test_scales_of_activations_are_matched_unless_told_otherwise(tmp_path):
    """A model with ten times larger inputs of its linears, otherwise the anchor itself."""
    anchor = load(save_text_model(tmp_path, hidden=16, layers=2), "anchor")
    loud = load(tmp_path, "loud")
    with torch.no_grad():
        for layer in loud.decoder_layers:
            for norm, linears in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight.mul_(10.0)
                for name in linears:
                    part = layer.self_attn if name in ("q_proj", "k_proj", "v_proj") else layer.mlp
                    part.get_submodule(name).weight.div_(10.0)
    still = replace(OPTIONS, learning_rate=1e-9)
    for match in (True, False):
        options = replace(still, match_scale=match)
        quality = PairAligner(anchor, loud, ADAPTER, options).run(text_samples(40)).quality.linears
        loudest = quality["1/q_proj"]
        assert loudest.scale == pytest.approx(10.0 if match else 1.0, rel=1e-3)
        assert loudest.residual == pytest.approx(0.0 if match else 81.0, abs=0.01)
        assert loudest.agreement == pytest.approx(1.0, abs=1e-4)  # at any scale
        assert quality["1/o_proj"].scale == pytest.approx(1.0, rel=1e-3)


def test_the_same_call_gives_the_same_bits(models, aligned):
    _, first = aligned["letters"]
    again = PairAligner(models["anchor"], models["letters"], ADAPTER, OPTIONS).run(text_samples(40))
    assert all(torch.equal(again.factors[key], value) for key, value in first.factors.items())
    assert (again.quality.linears, again.quality.losses, again.quality.cka) == (
        first.quality.linears,
        first.quality.losses,
        first.quality.cka,
    )
    other = PairAligner(models["anchor"], models["letters"], ADAPTER, replace(OPTIONS, seed=1)).run(
        text_samples(40)
    )
    assert not torch.equal(other.factors["0/q_proj/A"], first.factors["0/q_proj/A"])


def test_outputs_can_be_made_orthonormal_again(models):
    options = replace(OPTIONS, orthonormal_outputs=True, epochs=1)
    found = PairAligner(models["anchor"], models["wide"], ADAPTER, options).run(text_samples(40))
    full = [key for key, quality in found.quality.linears.items() if quality.rank == 4]
    assert full
    for key in full:
        b = found.factors[f"{key}/B"]
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)


def test_texts_without_a_common_token_are_refused(models):
    strange = tuple(
        Sample(sample_id=str(n), task="t", turns=("?", "\u4e16" * (n + 1))) for n in range(8)
    )
    options = replace(OPTIONS, positions="supervised")
    pair = PairAligner(models["anchor"], models["letters"], ADAPTER, options)
    pair._pairing._anchor_texts = lambda ids: ["" for _ in ids]
    with pytest.raises(AdapterError, match=r"'anchor' and 'letters': 0 token positions"):
        pair.run(strange)


def test_rank_and_number_of_samples_have_limits(models):
    wide = AdapterConfig(rank=17, num_blocks=2)
    with pytest.raises(AdapterError, match="rank 17 is too large"):
        PairAligner(models["anchor"], models["wide"], wide, OPTIONS)
    with pytest.raises(DataError, match="at least 4 public samples, got 3"):
        split_samples(text_samples(3), OPTIONS)


def test_samples_of_the_check_are_not_fitted_on():
    samples = text_samples(100)
    fit, check = split_samples(samples, AlignOptions(num_samples=50, check_samples=10))
    assert (len(fit), len(check)) == (50, 10)
    assert not {s.sample_id for s in fit} & {s.sample_id for s in check}
    assert split_samples(samples, AlignOptions(seed=1))[1] != check
    assert [len(part) for part in split_samples(samples[:8], AlignOptions())] == [6, 2]


def test_fewer_updates_take_larger_steps():
    assert default_rate(1250, 2048) == pytest.approx(2e-4)
    assert default_rate(125, 2048) == pytest.approx(2e-3)
    assert default_rate(1250, 512) == pytest.approx(4e-4)
    assert default_rate(1, 16) == 1e-2


def test_what_is_fitted_to_few_tokens_is_worse_on_new_ones(models):
    """One text has hardly more tokens than A has directions; samples of the check tell."""
    draw = random.Random(0)  # noqa: S311
    samples = tuple(
        Sample(sample_id=str(n), task="t", turns=(" ".join(draw.choices(WORDS, k=9)), "cat"))
        for n in range(60)
    )

    def gap(output_samples):
        options = replace(OPTIONS, epochs=1, output_samples=output_samples)
        found = PairAligner(models["anchor"], models["wide"], ADAPTER, options).run(samples)
        gaps = [
            sum(q.correlations) - sum(q.new_correlations) for q in found.quality.linears.values()
        ]
        return sum(gaps) / (4 * len(gaps))

    assert gap(1) > gap(45) + 0.05
