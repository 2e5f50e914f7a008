"""Makes the small base models of DRAKE-lite from the pretraining rows of a built folder.

The rows are in ``dataset/<name>/pretrain``: the clients' tasks over images that no client owns, in
which a part of the labels does not occur, captions, and words to repeat. So the models know the
forms of all tasks and most words, and what clients have to teach them is what things look like.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.config.sections import EvalConfig
from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import Sample, TaskSpec
from fedml_plugin_fedmosaic.data.drake import read_file
from fedml_plugin_fedmosaic.data.lite.build import PRETRAIN
from fedml_plugin_fedmosaic.engine.models import ModelBundle
from fedml_plugin_fedmosaic.engine.scoring import score_task
from fedml_plugin_fedmosaic.engine.tiny import LITE_ARCHITECTURES, words_of
from fedml_plugin_fedmosaic.engine.tower import FeatureCache
from fedml_plugin_fedmosaic.runtime.pretrain import fresh_model, save_model

LOG = logging.getLogger(__name__)

_EXTRA = ("Captions-0", "Words-0")
_BETAS = (0.9, 0.98)
_COMPONENT_IMAGES = 6000
_TOKEN_SCALE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteRecipe:
    """How a base model of DRAKE-lite is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: rows per step.
        chunks: parts of a batch, by length of the prompts, that are padded on their own.
        extra_share: share of captions and words among the rows.
        learning_rate: peak of AdamW's rate; linear warm-up, then cosine to 5 %.
        weight_decay: AdamW weight decay.
        warmup: steps of warm-up.
        max_grad_norm: gradient clipping by norm.
    """

    steps: int = 1600
    batch_size: int = 32
    chunks: int = 2
    extra_share: float = 0.15
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 150
    max_grad_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.05 + 0.95 * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteData:
    """What training needs of a built folder: rows by task, and every text for the vocabulary."""

    pretrain: Mapping[str, tuple[Sample, ...]]
    test: Mapping[str, tuple[Sample, ...]]
    specs: Mapping[str, TaskSpec]
    words: tuple[str, ...]


def build_lite_models(
    out: Path,
    folder: Path,
    *,
    seed: int = 0,
    recipe: LiteRecipe | None = None,
    names: Sequence[str] = tuple(LITE_ARCHITECTURES),
    log: Callable[[str], object] | None = None,
) -> None:
    """Trains and saves the base models of DRAKE-lite.

    Writes ``<out>/<name>/`` with config.json, model.safetensors (float16), the tokenizer and a
    model card with the accuracy on every task.

    Args:
        out: folder to write; models that are there are replaced.
        folder: DRAKE-lite as ``fedmosaic data build drake-lite`` makes it.
        seed: root seed of initialisation and order.
        recipe: how to train.
        names: which architectures.
        log: called with one line of progress at a time.

    Raises:
        ConfigError: an unknown architecture.
        DataError: the folder lacks the rows, or an image does not decode.
    """
    recipe = recipe or LiteRecipe()
    say = log or LOG.info
    unknown = sorted(set(names) - set(LITE_ARCHITECTURES))
    if unknown:
        raise ConfigError(
            f"no architecture {unknown[0]!r} for DRAKE-lite; known: {list(LITE_ARCHITECTURES)}"
        )
    data = read_lite(folder)
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            bundle = fresh_model(
                LITE_ARCHITECTURES[name], data.words, data.pretrain, Path(scratch, name), seed
            )
            project_components(bundle, data.pretrain, seed)
            loss = train_lite(bundle, data.pretrain, recipe, seed, say)
            seconds = time.perf_counter() - start
            scores = lite_scores(bundle, data)
            card = _card(bundle, recipe, seed, scores, loss, seconds)
            save_model(bundle, out / name, card)
        mean = sum(scores.values()) / len(scores)
        say(f"{name}: {seconds:.0f} s, loss {loss:.3f}, mean test accuracy {mean:.3f}")


def read_lite(folder: Path) -> LiteData:
    """Reads a built folder for pretraining.

    Raises:
        DataError: it is not one.
    """
    try:
        listing = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: expected DRAKE-lite, got no readable tasks.json",
            hint="run 'fedmosaic data build drake-lite' first",
        ) from error
    specs = [
        TaskSpec(
            dataset=entry["dataset"],
            subset_id=entry["subset_id"],
            kind=entry["type"],
            metric=entry.get("metric"),
        )
        for entry in listing
    ]
    seen = [spec for spec, entry in zip(specs, listing, strict=True) if entry["unseen"] is None]
    extra = [TaskSpec(dataset=name.partition("-")[0], subset_id=0) for name in _EXTRA]

    def read(spec: TaskSpec, split: str) -> tuple[Sample, ...]:
        path = folder / "dataset" / spec.dataset / split / f"dataset-{spec.subset_id}.json"
        return read_file(path, folder, spec.name)

    pretrain = {spec.name: read(spec, PRETRAIN) for spec in (*seen, *extra)}
    test = {spec.name: read(spec, "test") for spec in specs}
    train = (read(spec, "train") for spec in specs)
    every = (row for rows in (*pretrain.values(), *test.values(), *train) for row in rows)
    texts = {turn for row in every for turn in row.turns}
    return LiteData(
        pretrain=pretrain,
        test=test,
        specs={spec.name: spec for spec in specs},
        words=words_of(sorted(texts)),
    )


def project_components(
    bundle: ModelBundle, rows: Mapping[str, Sequence[Sample]], seed: int
) -> None:
    """Sets the projector to the principal components of the images' features.

    A random projector has to find out first what differs between images, which takes most of the
    steps of a short training. Half of the hidden units get the leading components, half-whitened,
    the others their negatives: ``gelu(x) - gelu(-x) = x``, so the second layer passes them on as
    they are, turned at random. Labels are not used.

    Args:
        bundle: a fresh model; changed in place.
        rows: samples by task, whose images are used.
        seed: of the choice of images and the turn.
    """
    model: Any = bundle.model
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    images = sorted({path for samples in rows.values() for row in samples for path in row.images})
    rng = python_random(seed, "lite components")
    chosen = rng.sample(images, min(len(images), _COMPONENT_IMAGES))
    features = FeatureCache().extract(chosen).reshape(len(chosen), -1)
    features = (features - tower.mean) * tower.scale
    _, values, vectors = torch.linalg.svd(features, full_matrices=False)
    width = projector.linear_2.weight.shape[0]
    count = min(width // 2, len(values))
    spread = (values[:count] / math.sqrt(len(chosen))).clamp_min(1e-6)
    down = vectors[:count] / spread.sqrt()[:, None]
    down = down / (features @ down.T).std()
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, :count]
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.zero_()
            layer.bias.zero_()
        projector.linear_1.weight[: 2 * count].copy_(torch.cat([down, -down]))
        projector.linear_2.weight[:, : 2 * count].copy_(_TOKEN_SCALE * torch.cat([turn, -turn], 1))


def train_lite(
    bundle: ModelBundle,
    rows: Mapping[str, Sequence[Sample]],
    recipe: LiteRecipe,
    seed: int,
    say: Callable[[str], object],
) -> float:
    """Trains all weights but the tower's; returns the running mean of the loss.

    Args:
        bundle: a fresh model; changed in place.
        rows: by task, with captions and words.
        recipe: how to train.
        seed: of the order of the rows.
        say: told about progress.
    """
    model = bundle.model
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, betas=_BETAS, weight_decay=recipe.weight_decay
    )
    rng = python_random(seed, "lite pretrain", bundle.info.name)
    tasks = [name for name in rows if name not in _EXTRA]
    extra = [name for name in rows if name in _EXTRA]
    running, start = 0.0, time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = []
        for _ in range(recipe.batch_size):
            pool = extra if extra and rng.random() < recipe.extra_share else tasks
            batch.append(rng.choice(rows[rng.choice(pool)]))
        loss = _backward(bundle, batch, recipe.chunks)
        torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        running = loss if step == 0 else 0.98 * running + 0.02 * loss
        if (step + 1) % 100 == 0:
            pace = (time.perf_counter() - start) / (step + 1)
            say(
                f"{bundle.info.name}: step {step + 1} of {recipe.steps}, loss {running:.3f}, "
                f"{pace * (recipe.steps - step - 1):.0f} s left"
            )
    model.eval()
    return running


def _backward(bundle: ModelBundle, batch: Sequence[Sample], chunks: int) -> float:
    """Adds the gradient of the mean loss over all supervised tokens of a batch; returns the loss.

    Rows of similar length go together: a batch of all tasks would be padded to its longest one.
    """
    ordered = sorted(batch, key=lambda sample: bundle.processor.prompt_length(sample))
    size = math.ceil(len(ordered) / chunks)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    encoded = [bundle.processor.encode_supervised(part) for part in parts]
    tokens = sum(count for _, _, count in encoded)
    total = 0.0
    for inputs, _, count in encoded:
        loss: Any = bundle.model(**inputs).loss * (count / tokens)
        loss.backward()
        total += float(loss.detach())
    return total


def lite_scores(bundle: ModelBundle, data: LiteData) -> dict[str, float]:
    """Score of a model on every test set, unseen tasks included."""
    config = EvalConfig(mode="likelihood", batch_size=120, max_new_tokens=4)
    return {
        name: score_task(
            bundle.model, bundle.processor, rows, data.specs[name], config, share_prompt=True
        ).value
        for name, rows in data.test.items()
    }


def _card(
    bundle: ModelBundle,
    recipe: LiteRecipe,
    seed: int,
    scores: Mapping[str, float],
    loss: float,
    seconds: float,
) -> str:
    arch = LITE_ARCHITECTURES[bundle.info.name]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    mean = sum(scores.values()) / len(scores)
    return f"""# {arch.name}

A small vision-language model for DRAKE-lite: `LlavaForConditionalGeneration` with a {arch.family}
text tower ({arch.layers} layers, hidden size {arch.hidden}, {arch.heads} heads, {arch.kv_heads}
key-value heads, {bundle.info.num_parameters:,} parameters) over features of the frozen ImageNet
EfficientNet-Lite0. It knows the words of DRAKE-lite and nothing else.

- Data: the pretraining rows of the built folder, over images that no client owns.
- Training: `fedmosaic models build-drake-lite`, seed {seed}, {recipe.steps} steps of
  {recipe.batch_size} rows, AdamW {recipe.learning_rate:g}, {seconds:.0f} s on
  {torch.get_num_threads()} thread(s) of a processor; last loss {loss:.3f}.

Scores on the test sets (accuracy by likelihood of the choices; F1 on open-ended tasks), mean
{mean:.3f}:

| task | score |
|---|---|
{table}
"""
