"""Samples to model inputs, computed once per conversation and image.

Tokenising and decoding are kept in memory: a client sees its samples again every round, samples
of one task often differ in the image only, and for the small bundled models tokenising would cost
as much as training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.prompt import IGNORE, IMAGE_MARK, Encoded, PromptEncoder, collate

_MAX_ENCODED = 100_000
_MAX_PIXEL_BYTES = 1 << 30

Batch = dict[str, Tensor]


class ImageSource(Protocol):
    """Turns image files into what the vision tower takes."""

    def prefetch(self, paths: Sequence[Path]) -> None:
        """Computes many images at once, if that is cheaper than one by one."""
        ...

    def load(self, paths: Sequence[Path]) -> Tensor:
        """``pixel_values``, first axis ``len(paths)``, float32 on the CPU.

        Raises:
            DataError: a file is missing or does not decode.
        """
        ...


class FeatureSource:
    """Cached features of the frozen bundled tower, kept in memory by path.

    Args:
        extract: ``(paths) -> float32 (len(paths), tokens, dim)``.
    """

    def __init__(self, extract: Callable[[Sequence[Path]], Tensor]) -> None:
        self._extract = extract
        self._known: dict[Path, Tensor] = {}

    def prefetch(self, paths: Sequence[Path]) -> None:
        """Extracts all images that are not known yet in one go."""
        missing = [path for path in dict.fromkeys(paths) if path not in self._known]
        if missing:
            self._known.update(zip(missing, self._extract(missing), strict=True))

    def load(self, paths: Sequence[Path]) -> Tensor:
        """See :class:`ImageSource`."""
        self.prefetch(paths)
        return torch.stack([self._known[path] for path in paths])


@cache
def bundled_features() -> FeatureSource:
    """The features of the bundled tower, shared by all models of the process."""
    from fedml_plugin_fedmosaic.engine.tower import FeatureCache

    return FeatureSource(FeatureCache().extract)


class PixelSource:
    """Pixels by a Hugging Face image processor, padded to a square with its mean colour.

    The most recent images are kept in memory, up to a number of bytes.

    Args:
        image_processor: called as ``image_processor(images=[...], return_tensors="pt")``.
        max_bytes: memory for prepared images.
    """

    def __init__(self, image_processor: Any, max_bytes: int = _MAX_PIXEL_BYTES) -> None:
        self._image_processor = image_processor
        mean = getattr(image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        self._colour = tuple(int(value * 255) for value in mean)
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: dict[Path, Tensor] = {}

    def prefetch(self, paths: Sequence[Path]) -> None:
        """Does nothing: pixels of many images may not fit into memory."""

    def load(self, paths: Sequence[Path]) -> Tensor:
        """See :class:`ImageSource`."""
        return torch.stack([self._one(path) for path in paths])

    def blank(self) -> Tensor:
        """One image of the mean colour as ``pixel_values``, first axis 1."""
        return self._pixels(Image.new("RGB", (64, 64), self._colour))[None]

    def _pixels(self, image: Image.Image) -> Tensor:
        output = self._image_processor(images=[image], return_tensors="pt")
        return torch.as_tensor(np.asarray(output["pixel_values"]))[0].to(torch.float32)

    def _one(self, path: Path) -> Tensor:
        pixels = self._known.pop(path, None)
        if pixels is None:
            pixels = self._pixels(pad_to_square(open_image(path), self._colour))
            self._bytes += pixels.nbytes
        self._known[path] = pixels  # last in order: most recently used
        while self._bytes > self._max_bytes and len(self._known) > 1:
            oldest = next(iter(self._known))
            self._bytes -= self._known.pop(oldest).nbytes
        return pixels


def open_image(path: Path) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        DataError: the file is missing or does not decode.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(
            f"image {path}: expected a file, got nothing", hint="check the data folder"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"image {path}: expected an image that decodes, got: {error}",
            hint="replace the file or remove the samples that name it",
        ) from error


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centres an image on a square of one colour."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Processor:
    """Encodes samples for one model.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template and a padding token.
        encoder: prompt encoder over the same tokenizer.
        images: source of ``pixel_values``; None for a text-only model.
        device: where batches are put.
        dtype: dtype of ``pixel_values``.
        end_ids: tokens that end an answer.

    Attributes:
        tokenizer: as given.
        pad_id: padding token.
        end_ids: as given.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        encoder: PromptEncoder,
        images: ImageSource | None,
        device: torch.device,
        dtype: torch.dtype,
        end_ids: Collection[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.end_ids = frozenset(end_ids)
        self._encoder = encoder
        self._images = images
        self._device = device
        self._dtype = dtype
        # By text: ids depend on nothing else of a sample.
        self._conversations: dict[tuple[str, ...], Encoded] = {}
        self._prompts: dict[tuple[str, ...], Encoded] = {}
        self._choices: dict[tuple[str, str], Tensor] = {}

    @property
    def image_tokens(self) -> tuple[int, int] | None:
        """Id of the token that stands for a part of an image, and how many an image becomes."""
        return self._encoder.image_tokens

    @property
    def end_of_turn(self) -> int | None:
        """The one of ``end_ids`` with which the chat template ends an answer, if it does."""
        return self._encoder.end_of_turn()

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Computes features of all images at once; later calls find them in memory.

        Raises:
            DataError: an image of a sample is missing or does not decode.
        """
        if self._images is None:
            return
        wanted = list(dict.fromkeys(samples))
        try:
            self._images.prefetch([path for sample in wanted for path in sample.images])
        except DataError:
            for sample in wanted:
                self._load(sample)
            raise

    def encode_train(self, samples: Sequence[Sample]) -> Batch:
        """Whole conversations, padded on the right.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (int64 ``(n, T)``, labels -100 where not
            supervised) and, if there are images, ``pixel_values`` in the order of the marks.

        Raises:
            DataError: a sample cannot be encoded; it is named.
        """
        return self.encode_supervised(samples)[0]

    def encode_supervised(self, samples: Sequence[Sample]) -> tuple[Batch, Tensor, int]:
        """As :meth:`encode_train`, and where its labels are.

        Returns:
            The batch; the positions whose *next* token is supervised in some row, ascending int64
            ``(k,)``, found before the batch leaves the CPU; and the number of supervised tokens.
        """
        rows = [self._conversation(sample) for sample in samples]
        paths = [path for sample in samples for path in sample.images]
        batch = collate(rows, self.pad_id, side="right")
        positions = (batch["labels"] != IGNORE).any(0).nonzero()[:, 0] - 1
        num_tokens = sum(row.num_supervised for row in rows)
        return self._batch(samples, paths, batch), positions.to(self._device), num_tokens

    def encode_prompt(self, samples: Sequence[Sample]) -> Batch:
        """First user turns up to where the answer begins, padded on the left.

        Returns:
            As :meth:`encode_train`, without ``labels``.
        """
        rows = [self._prompt(sample) for sample in samples]
        batch = collate(rows, self.pad_id, side="left")
        del batch["labels"]
        paths = [path for sample in samples for path in prompt_images(sample)]
        return self._batch(samples, paths, batch)

    def encode_choices(self, sample: Sample, choices: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids of each choice as the answer to a sample, with the end-of-turn token.

        Returns:
            One int64 ``(n,)`` CPU tensor per choice; ``encode_prompt`` followed by one of them is
            the whole conversation.
        """
        for choice in choices:
            if (sample.prompt, choice) not in self._choices:
                ids = self._encoder.answer((sample.prompt, choice))
                _remember(self._choices, (sample.prompt, choice), ids)
        return tuple(self._choices[sample.prompt, choice] for choice in choices)

    def answer_ids(self, sample: Sample) -> tuple[int, ...]:
        """The supervised tokens of a conversation, in order.

        Raises:
            DataError: the sample cannot be encoded, or nothing in it is supervised.
        """
        labels = self._conversation(sample).labels
        return tuple(labels[labels != IGNORE].tolist())

    def prompt_length(self, sample: Sample) -> int:
        """Tokens of a sample's prompt."""
        return int(self._prompt(sample).ids.shape[0])

    def token_ids(self, text: str) -> list[int]:
        """Ids of a plain text without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _conversation(self, sample: Sample) -> Encoded:
        row = self._conversations.get(sample.turns)
        if row is None:
            with _naming(sample):
                row = self._encoder.conversation(sample.turns)
                if not row.num_supervised:
                    raise DataError("expected an answer to learn from, got no supervised token")
            _remember(self._conversations, sample.turns, row)
        return row

    def _prompt(self, sample: Sample) -> Encoded:
        turns = sample.turns[:1]
        row = self._prompts.get(turns)
        if row is None:
            with _naming(sample):
                row = self._encoder.prompt(turns)
            _remember(self._prompts, turns, row)
        return row

    def _batch(self, samples: Sequence[Sample], paths: Sequence[Path], batch: Batch) -> Batch:
        if paths and self._images is not None:
            try:
                pixels = self._images.load(paths)
            except DataError:
                for sample in samples:
                    self._load(sample)
                raise
            batch["pixel_values"] = pixels.to(self._dtype)
        if self._device.type == "cpu":
            return batch
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def _load(self, sample: Sample) -> None:
        """Loads a sample's images alone, to find out which sample is broken."""
        if sample.images and self._images is not None:
            with _naming(sample):
                self._images.load(sample.images)


def prompt_images(sample: Sample) -> tuple[Path, ...]:
    """The images of the first user turn."""
    return sample.images[: sample.prompt.count(IMAGE_MARK)]


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Says in an error which sample it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"sample {sample.sample_id!r} of task {sample.task!r}: {error.message}",
            hint=error.hint,
        ) from error


def _remember(known: dict[Any, Any], key: object, value: object) -> None:
    if len(known) >= _MAX_ENCODED:
        known.pop(next(iter(known)))
    known[key] = value
