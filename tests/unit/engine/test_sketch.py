from __future__ import annotations

import pytest
import torch
from tiny_models import image_samples, save_llava, save_text_model, text_samples

from fedml_plugin_fedmosaic.config.sections import ModelSpec, SketchConfig
from fedml_plugin_fedmosaic.core.errors import IntegrationError
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.sketch import SketchEngine

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


def test_a_round_without_samples_gives_zeros(bundle):
    sketch = SketchEngine(bundle, SketchConfig(), 0).compute([], client_id=0, round_idx=0)
    assert sketch.shape == (12, 64)
    assert not sketch.any()


def test_a_proxy_with_another_norm_is_refused(tmp_path):
    bundle = load(save_text_model(tmp_path))
    bundle.final_norm.register_forward_hook(lambda module, args, output: output + 1.0)
    with pytest.raises(IntegrationError, match="is not the RMSNorm"):
        SketchEngine(bundle, SketchConfig(), 0)
