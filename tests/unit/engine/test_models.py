from __future__ import annotations

import json
from copy import copy

import pytest
import torch
from PIL import Image
from tiny_models import image_samples, save_image, save_llava, save_text_model, text_samples
from torch import nn

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.engine.models import load_model, size_label
from fedml_plugin_fedmosaic.engine.processor import FeatureSource, PixelSource, pad_to_square

CPU = torch.device("cpu")


def load(folder, **spec):
    return load_model("tiny", ModelSpec(path=str(folder), **spec), CPU)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return load(save_llava(tmp_path_factory.mktemp("llava"), "qwen2"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_of_a_text_model_are_found(tmp_path, family, tied):
    bundle = load(save_text_model(tmp_path, family, tied=tied, layers=3))
    assert bundle.info.family == family
    assert bundle.num_layers == len(bundle.decoder_layers) == 3
    assert bundle.text_model is bundle.body is bundle.model.model
    assert bundle.final_norm is bundle.model.model.norm
    assert bundle.last_down_proj is bundle.model.model.layers[-1].mlp.down_proj
    assert bundle.lm_head is bundle.model.lm_head.weight
    assert (bundle.lm_head is bundle.model.model.embed_tokens.weight) == tied
    assert bundle.norm_eps == pytest.approx(1e-6)
    assert bundle.adapter is None
    assert not bundle.model.training
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())


def test_the_parts_of_an_image_text_model_are_found(llava):
    inner = llava.model.model
    assert llava.body is inner
    assert llava.text_model is inner.language_model
    assert llava.final_norm is inner.language_model.norm
    assert llava.last_down_proj is inner.language_model.layers[-1].mlp.down_proj
    assert llava.info.family == "qwen2"


def test_signatures_are_equal_exactly_for_equal_shapes(tmp_path):
    one = load(save_text_model(tmp_path / "a", seed=0)).info
    same = load(save_text_model(tmp_path / "b", seed=1)).info
    wider = load(save_text_model(tmp_path / "c", hidden=48)).info
    deeper = load(save_text_model(tmp_path / "d", layers=5)).info
    other = load(save_text_model(tmp_path / "e", "qwen2")).info
    vision = load(save_llava(tmp_path / "f")).info
    assert one.signature == same.signature == vision.signature
    assert len({info.signature for info in (one, wider, deeper, other)}) == 4


def test_size_is_counted_unless_given(tmp_path):
    folder = save_text_model(tmp_path)
    bundle = load(folder)
    count = sum(parameter.numel() for parameter in bundle.model.parameters())
    assert bundle.info.num_parameters == count
    assert bundle.info.size == f"{count / 1e3:.0f}K"
    assert load(folder, size="1B").info.size == "1B"
    assert [size_label(n) for n in (600_000, 4_200_000, 1_235_000_000)] == ["0.6M", "4.2M", "1.2B"]


def test_the_base_dtype_is_the_specifications(tmp_path):
    assert load(save_text_model(tmp_path), dtype="bfloat16").lm_head.dtype == torch.bfloat16


def test_training_batches_pad_right_and_prompts_pad_left(tmp_path):
    processor = load(save_text_model(tmp_path)).processor
    samples = text_samples(3)
    train, prompt = processor.encode_train(samples), processor.encode_prompt(samples)
    assert set(train) == {"input_ids", "attention_mask", "labels"}
    assert set(prompt) == {"input_ids", "attention_mask"}
    assert train["attention_mask"][0, 0] == 1
    assert train["attention_mask"][0, -1] == 0
    assert prompt["attention_mask"][0, 0] == 0
    assert prompt["attention_mask"][0, -1] == 1
    assert ((train["labels"] != -100).sum(1) == 2).all()
    assert [processor.prompt_length(sample) for sample in samples] == prompt["attention_mask"].sum(
        1
    ).tolist()


def test_prompt_and_choice_make_the_whole_conversation(tmp_path):
    processor = load(save_text_model(tmp_path)).processor
    (sample,) = text_samples(1)
    prompt = processor.encode_prompt([sample])["input_ids"][0]
    choice = processor.encode_choices(sample, ["dog", sample.answer])[1]
    whole = processor.encode_train([sample])["input_ids"][0]
    assert torch.equal(torch.cat([prompt, choice]), whole)
    assert int(choice[-1]) in processor.end_ids
    assert processor.decode(choice.tolist()) == "cat"


def test_one_two_and_no_images_in_one_batch(llava, tmp_path):
    samples = image_samples(tmp_path, 3)
    batch = llava.processor.encode_train(samples)
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    token = llava.model.config.image_token_id
    assert (batch["input_ids"] == token).sum(1).tolist() == [4, 8, 0]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert llava.model(**inputs).logits.shape[0] == 3
    only_text = llava.processor.encode_train(samples[2:])
    assert "pixel_values" not in only_text


def test_samples_that_differ_in_their_image_share_their_text_only(llava, tmp_path, monkeypatch):
    asked, encode = [], llava.processor._encoder.conversation
    monkeypatch.setattr(
        llava.processor._encoder, "conversation", lambda turns: asked.append(turns) or encode(turns)
    )
    samples = [
        Sample(
            sample_id=colour,
            task="t-0",
            turns=("<image> which of these two ?", "cat"),
            images=(save_image(tmp_path / f"{colour}.png", colour),),
        )
        for colour in ("red", "blue")
    ]
    together = llava.processor.encode_train(samples)
    assert asked == [samples[0].turns]
    assert torch.equal(together["input_ids"][0], together["input_ids"][1])
    assert not torch.equal(together["pixel_values"][0], together["pixel_values"][1])
    for row, sample in enumerate(samples):
        alone = llava.processor.encode_train([sample])
        for key in ("input_ids", "labels", "attention_mask", "pixel_values"):
            assert torch.equal(alone[key][0], together[key][row])


def test_a_refused_text_names_each_sample_that_has_it(tmp_path):
    processor = load(save_text_model(tmp_path)).processor
    for name in ("first", "second"):
        sample = Sample(sample_id=name, task="t-0", turns=("<image> what ?", "cat"))
        with pytest.raises(DataError, match=f"sample '{name}' of task 't-0'"):
            processor.encode_train([sample])


def test_a_prompt_takes_the_images_of_its_first_turn_only(llava, tmp_path):
    pictures = tuple(save_image(tmp_path / f"{k}.png", "red") for k in range(2))
    sample = Sample(
        sample_id="0",
        task="t-0",
        turns=("<image> what ?", "cat", "<image> this ?", "dog"),
        images=pictures,
    )
    assert len(llava.processor.encode_train([sample])["pixel_values"]) == 2
    assert len(llava.processor.encode_prompt([sample])["pixel_values"]) == 1


def test_images_of_a_text_model_are_refused(tmp_path):
    processor = load(save_text_model(tmp_path / "m")).processor
    with pytest.raises(DataError, match=r"sample '0' of task 'colours-0'.*text-only model"):
        processor.encode_train(image_samples(tmp_path, 1))


@pytest.mark.parametrize("content", [b"no image", b""])
def test_an_image_that_does_not_decode_names_sample_and_file(llava, tmp_path, content):
    samples = image_samples(tmp_path, 2)
    samples[1].images[1].write_bytes(content)
    with pytest.raises(
        DataError, match=r"sample '1' of task 'colours-0': image .*decodes"
    ) as caught:
        llava.processor.encode_train(samples)
    assert str(samples[1].images[1]) in str(caught.value)


def test_a_truncated_image_is_an_error_not_gray(llava, tmp_path):
    (sample,) = image_samples(tmp_path, 1)
    Image.effect_noise((64, 64), 50).convert("RGB").save(sample.images[0])
    sample.images[0].write_bytes(sample.images[0].read_bytes()[:3000])
    with pytest.raises(DataError, match="sample '0'"):
        llava.processor.encode_prompt([sample])


def test_a_lost_image_names_the_sample(llava, tmp_path):
    samples = image_samples(tmp_path, 1)
    samples[0].images[0].unlink()
    with pytest.raises(DataError, match=r"sample '0' of task 'colours-0'.*got nothing"):
        llava.processor.encode_train(samples)


def test_padding_keeps_the_whole_image():
    image = Image.new("RGB", (4, 2), "red")
    square = pad_to_square(image, (1, 2, 3))
    assert square.size == (4, 4)
    assert square.getpixel((0, 0)) == (1, 2, 3)
    assert square.getpixel((0, 1)) == square.getpixel((3, 2)) == (255, 0, 0)


def test_prepared_images_are_dropped_beyond_the_memory_limit(tmp_path):
    calls = []

    class Counting:
        image_mean = (0.5, 0.5, 0.5)

        def __call__(self, images, return_tensors):
            calls.append(images[0].size)
            return {"pixel_values": torch.ones(1, 3, 4, 4)}

    source = PixelSource(Counting(), max_bytes=2 * 3 * 4 * 4 * 4)
    paths = [save_image(tmp_path / f"{k}.png", "red") for k in range(3)]
    for order in ([0, 0, 1, 0], [2], [0], [1]):
        for index in order:
            source.load([paths[index]])
    assert len(calls) == 4
    assert calls[0] == (20, 20)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model 'tiny': expected a model folder at .*got nothing"
    ):
        load(tmp_path / "nowhere")


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a file config\.json"):
        load(tmp_path)


def test_an_unknown_bundled_model_is_named():
    with pytest.raises(ConfigError, match="no bundled model 'nothing-here'"):
        load("bundled:nothing-here")


def test_a_hub_id_that_is_not_cached_is_not_downloaded(socket_disabled):
    with pytest.raises(ConfigError, match="nothing is downloaded in a run"):
        load("nobody/no-such-model")


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    folder = save_text_model(tmp_path, layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="are missing"):
        load(folder)


def test_damaged_weights_are_refused(tmp_path):
    folder = save_text_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(folder)


def test_a_model_is_loaded_without_touching_the_global_generator(tmp_path):
    folder = save_text_model(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    bundle = load(folder)
    assert torch.equal(torch.rand(1), expected)
    assert isinstance(bundle.final_norm, nn.Module)


def test_features_are_extracted_once_for_all_images_of_a_round(tmp_path):
    calls = []

    def extract(paths):
        calls.append(list(paths))
        return torch.stack([torch.full((1, 2), float(path.stem)) for path in paths])

    paths = [tmp_path / f"{number}.png" for number in range(4)]
    source = FeatureSource(extract)
    source.prefetch([paths[2], paths[0], paths[2]])
    assert source.load([paths[0], paths[2], paths[0]])[:, 0, 0].tolist() == [0.0, 2.0, 0.0]
    assert source.load([paths[3], paths[0]])[:, 0, 0].tolist() == [3.0, 0.0]
    assert calls == [[paths[2], paths[0]], [paths[3]]]


def test_a_broken_image_is_named_when_features_are_prefetched(llava, tmp_path):
    samples = image_samples(tmp_path, 3)

    def extract(paths):
        if samples[1].images[0] in paths:
            raise DataError("image broken.png does not decode", hint="replace it")
        return torch.zeros(len(paths), 1, 2)

    processor = copy(llava.processor)
    processor._images = FeatureSource(extract)
    with pytest.raises(DataError, match="sample '1' of task 'colours-0': image broken"):
        processor.prefetch(samples)
