from __future__ import annotations

import pytest
import torch
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import ModelSpec, SketchConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError, IntegrationError
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine
from fedml_plugin_fedmosaic.equations.gradient import column_projection, compress
from fedml_plugin_fedmosaic.equations.relevance import (
    column_similarity,
    flat_similarity,
    unit_columns,
)

CPU = torch.device("cpu")


def load(folder):
    return load_model("proxy", ModelSpec(path=str(folder)), CPU)


def autograd(bundle, samples):
    """True gradient of the mean loss over all supervised tokens, in float64."""
    model = bundle.model.double()
    weight = bundle.last_down_proj.weight.requires_grad_(True)
    batch = bundle.processor.encode_train(samples)
    model(**batch).loss.backward()
    gradient = weight.grad.float()
    weight.requires_grad_(False)
    weight.grad = None
    model.float()
    return gradient


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load(save_text_model(tmp_path_factory.mktemp("proxy"), tied=True))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_gradient_is_autograds(tmp_path, family):
    bundle = load(save_text_model(tmp_path, family))
    samples = text_samples(5)
    actual = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    expected = autograd(bundle, samples)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def test_the_gradient_of_images_is_autograds(tmp_path):
    bundle = load(save_llava(tmp_path / "model"))
    samples = image_samples(tmp_path, 4)
    actual = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    expected = autograd(bundle, samples)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def test_a_sketch_is_the_mean_over_the_scheduled_updates(bundle):
    samples = text_samples(12)
    batches = [samples[k : k + 2] for k in range(0, 12, 2)]
    config = SketchConfig(frequency=2, row_fraction=1.0, rows="first", noise="none")
    engine = SketchEngine(bundle, config, 0)
    expected = sum(engine.gradient(batches[k]) for k in (0, 2, 4)) / 3
    actual = engine.compute(batches, client_id=0, round_idx=0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_only_the_last_sample_counts_if_asked(bundle):
    samples = text_samples(3)
    config = SketchConfig(samples="last", row_fraction=1.0, rows="first", noise="none")
    engine = SketchEngine(bundle, config, 0)
    actual = engine.compute([samples], client_id=0, round_idx=0)
    torch.testing.assert_close(actual, engine.gradient(samples[2:]))


def test_rows_are_shared_and_noise_is_not(bundle):
    samples = [text_samples(2)]
    quiet = SketchEngine(bundle, SketchConfig(noise="none"), 7)
    noisy = SketchEngine(bundle, SketchConfig(noise_std=0.1), 7)
    base = quiet.compute(samples, client_id=0, round_idx=0)
    assert base.shape == quiet.shape == (12, 64)
    assert torch.equal(base, quiet.compute(samples, client_id=1, round_idx=3))
    first = noisy.compute(samples, client_id=0, round_idx=0)
    assert torch.equal(first, noisy.compute(samples, client_id=0, round_idx=0))
    for other in ({"client_id": 1, "round_idx": 0}, {"client_id": 0, "round_idx": 1}):
        difference = noisy.compute(samples, **other) - first
        assert 0.1 < float(difference.std()) < 0.2  # sqrt(2) * 0.1


def test_columns_are_compressed_on_request(bundle):
    engine = SketchEngine(bundle, SketchConfig(columns=16, clip_norm=1.0), 0)
    assert engine.shape == (12, 16)
    assert engine.compute([text_samples(2)], client_id=0, round_idx=0).shape == (12, 16)


def averages(shape, count=6):
    """Running averages that have something in common; columns of very different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.linspace(-2, 2, shape[1]).exp()
    common = torch.randn(shape, generator=generator)
    own = torch.randn(count, *shape, generator=generator)
    return [(common + k * noise) * lengths for k, noise in enumerate(own)]


@pytest.mark.parametrize(
    ("kind", "exact"), [("columns", column_similarity), ("flat", flat_similarity)]
)
def test_the_similarity_of_compressed_sketches_estimates_that_of_the_sketches(bundle, kind, exact):
    engine = SketchEngine(bundle, SketchConfig(row_fraction=1.0, floats=512), 5)
    sketches = averages(engine.shape)
    shared = [engine.share(sketch, kind) for sketch in sketches]
    assert {tuple(vector.shape) for vector in shared} == {(512, 1)}
    found = column_similarity(shared)
    # One column: both ways to compare are the cosine of the vectors.
    torch.testing.assert_close(found, flat_similarity(shared), rtol=0, atol=1e-6)
    error = found - exact(sketches)
    assert 0 < float(error.abs().max()) < 4 * 512**-0.5
    assert float(exact(sketches)[0, 1]) > 0.6


def test_compressed_sketches_hold_the_plain_inner_products_of_unit_columns(bundle):
    engine = SketchEngine(bundle, SketchConfig(floats=100), 5)
    (sketch,) = averages(engine.shape, count=1)
    projection = column_projection(sketch.numel(), 100, 5)
    expected = compress(unit_columns(sketch), projection)
    assert torch.equal(engine.share(sketch).T, expected)
    scaled = engine.share(sketch * torch.linspace(1, 9, sketch.shape[1]))
    torch.testing.assert_close(scaled, engine.share(sketch))
    other_run = SketchEngine(bundle, SketchConfig(floats=100), 6)
    assert not torch.equal(other_run.share(sketch), engine.share(sketch))


def test_an_empty_sketch_is_compressed_to_zeros_and_none_is_without_the_option(bundle):
    empty = torch.zeros(12, 64)
    assert not SketchEngine(bundle, SketchConfig(floats=8), 0).share(empty).any()
    assert SketchEngine(bundle, SketchConfig(), 0).share(empty) is empty


def test_more_floats_than_entries_are_refused(bundle):
    SketchEngine(bundle, SketchConfig(floats=12 * 64), 0)
    with pytest.raises(ConfigError, match=r"sketch.floats is 769.* only 12 x 64 entries"):
        SketchEngine(bundle, SketchConfig(floats=769), 0)


def test_a_round_without_samples_gives_zeros(bundle):
    sketch = SketchEngine(bundle, SketchConfig(), 0).compute([], client_id=0, round_idx=0)
    assert sketch.shape == (12, 64)
    assert not sketch.any()


def test_a_proxy_with_another_norm_is_taken_through_autograd(tmp_path):
    bundle = load(save_text_model(tmp_path))
    bundle.final_norm.register_forward_hook(lambda module, args, output: output + 1.0)
    samples = text_samples(3)
    actual = SketchEngine(bundle, SketchConfig(), 0).gradient(samples)
    expected = autograd(bundle, samples)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))
    with pytest.raises(ConfigError, match="jacobian is diagonal"):
        SketchEngine(bundle, SketchConfig(jacobian="diagonal"), 0)


def test_logits_that_cannot_be_explained_are_refused(tmp_path):
    bundle = load(save_text_model(tmp_path))
    head = bundle.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output.square())
    with pytest.raises(IntegrationError, match="logits are not its final"):
        SketchEngine(bundle, SketchConfig(), 0)
