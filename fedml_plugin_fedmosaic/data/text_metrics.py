"""Scores of free text by kept libraries: sacreBLEU, rouge-score, NLTK and pycocoevalcap.

A member of the METRICS shelf takes answers and gold answers and returns a number in [0, 1], higher
is better (CIDEr may exceed 1). All work on :func:`words`, which also cuts scripts that put no
blanks between words. The released code of FedMosaic (arXiv 2506.11024) replaces everything beyond
ASCII by blanks before it scores, which leaves nothing of most languages of Fed-aya;
:func:`reference_scores` does that, for parity.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.wordnet import wordnet

WORDNET_VARIABLE = "FEDMOSAIC_WORDNET"
"""Environment variable with the folder of WordNet's database files (``data.noun`` and so on)."""
_WORDNET_FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet")
# Scripts without blanks between words: Thai, Lao, Khmer, Burmese, kana, ideographs.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\U00020000-\U0003ffff]|[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


def words(text: str) -> list[str]:
    """Lower-case words; in scripts without blanks between words, single characters."""
    return _WORD.findall(text.lower())


def check_pairs(predictions: Sequence[object], golds: Sequence[object]) -> None:
    """Checks that there are as many predictions as gold answers.

    Raises:
        DataError: there are not, or there is none.
    """
    if not golds or len(predictions) != len(golds):
        raise DataError(
            f"{len(predictions)} predictions for {len(golds)} gold answers; expected as many, and "
            "at least one"
        )


def library(name: str, package: str) -> Any:
    """A library that computes a metric.

    Args:
        name: module to import.
        package: its name on PyPI.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(name.partition(".")[0]) is None:
        raise ConfigError(
            f"this metric needs {package}, which is not installed",
            hint="pip install 'fedml-plugin-fedmosaic[metrics]'",
        )
    return import_module(name)


class _Words:
    """:func:`words` as rouge-score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_l(predictions: Sequence[str], golds: Sequence[str], beta: float = 1.2) -> float:
    """Mean ROUGE-L (Lin, 2004) by rouge-score: F measure of the longest common subsequence.

    Args:
        predictions: generated answers.
        golds: gold answers.
        beta: weight of recall against precision; 1.2 is customary for captions and the released
            code's, 1 is rouge-score's own.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: no answer, or not as many predictions as gold answers.
        ConfigError: rouge-score is not installed.
    """
    check_pairs(predictions, golds)
    module = library("rouge_score.rouge_scorer", "rouge-score")
    scorer = module.RougeScorer(["rougeL"], tokenizer=_Words())
    total = 0.0
    for prediction, gold in zip(predictions, golds, strict=True):
        found = scorer.score(gold, prediction)["rougeL"]
        below = found.recall + beta**2 * found.precision
        total += (1 + beta**2) * found.precision * found.recall / below if below else 0.0
    return total / len(golds)


def bleu(predictions: Sequence[str], golds: Sequence[str], order: int = 4) -> float:
    """Corpus BLEU (Papineni et al., 2002) by sacreBLEU, over :func:`words`, without smoothing.

    Args:
        predictions: generated answers.
        golds: gold answers.
        order: longest n-gram, 1 to 4.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: no answer, or not as many predictions as gold answers.
        ConfigError: sacrebleu is not installed.
    """
    check_pairs(predictions, golds)
    metric = library("sacrebleu.metrics", "sacrebleu").BLEU(
        tokenize="none", smooth_method="none", max_ngram_order=order, force=True
    )
    said, meant = ([" ".join(words(text)) for text in texts] for texts in (predictions, golds))
    return float(metric.corpus_score(said, [meant]).score) / 100


def bleu_1(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """BLEU of single words; see :func:`bleu`."""
    return bleu(predictions, golds, 1)


def bleu_2(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """BLEU of up to 2 words; see :func:`bleu`."""
    return bleu(predictions, golds, 2)


def bleu_3(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """BLEU of up to 3 words; see :func:`bleu`."""
    return bleu(predictions, golds, 3)


class _NoSynonyms:
    """WordNet without words."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def find_wordnet() -> Path:
    """The folder of WordNet's database files.

    Looked for where ``FEDMOSAIC_WORDNET`` says, then where Debian's package wordnet-base and
    WordNet's own distribution put them. Nothing is downloaded.

    Raises:
        DataError: they are nowhere.
    """
    named = os.environ.get(WORDNET_VARIABLE)
    for folder in [named] if named else _WORDNET_FOLDERS:
        if (Path(folder) / "data.noun").is_file():
            return Path(folder)
    raise DataError(
        f"METEOR looks up synonyms in WordNet, which is not in {named or _WORDNET_FOLDERS[0]}",
        hint="install it (Debian: apt-get install wordnet-base), or set FEDMOSAIC_WORDNET to the "
        "folder of data.noun; the metric METEOR-stem does without synonyms",
    )


def meteor(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Mean METEOR (Banerjee and Lavie, 2005) by NLTK: exact, stem and synonym matches, order.

    Args:
        predictions: generated answers.
        golds: gold answers.

    Returns:
        A number in [0, 1]. The matcher and its weights are NLTK's, which looks up stemmed words;
        the Java METEOR 1.5 of :func:`reference_scores` has others, and paraphrases.

    Raises:
        DataError: no answer, not as many predictions as gold answers, or no WordNet.
        ConfigError: nltk is not installed.
    """
    return _meteor(predictions, golds, wordnet(str(find_wordnet())))


def meteor_stem(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """METEOR with exact and stem matches only, which needs no data; see :func:`meteor`."""
    return _meteor(predictions, golds, _NoSynonyms())


def _meteor(predictions: Sequence[str], golds: Sequence[str], synonyms: Any) -> float:
    check_pairs(predictions, golds)
    score = library("nltk.translate.meteor_score", "nltk").single_meteor_score
    values = [
        score(words(gold), words(prediction), wordnet=synonyms)
        for prediction, gold in zip(predictions, golds, strict=True)
    ]
    return float(sum(values)) / len(values)


def cider(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Mean CIDEr-D (Vedantam et al., 2015) by pycocoevalcap: TF-IDF weighted n-grams.

    The documents of the inverse frequencies are the gold answers of the same call; with one answer
    all of them are 0, and so is the score.

    Args:
        predictions: generated answers.
        golds: gold answers.

    Returns:
        A number in [0, 10].

    Raises:
        DataError: no answer, or not as many predictions as gold answers.
        ConfigError: pycocoevalcap is not installed.
    """
    check_pairs(predictions, golds)
    scorer = library("pycocoevalcap.cider.cider", "pycocoevalcap").Cider()
    said, meant = (
        {number: [" ".join(words(text))] for number, text in enumerate(texts)}
        for texts in (predictions, golds)
    )
    value, _ = scorer.compute_score(meant, said)
    return float(value)


def reference_scores(predictions: Sequence[str], golds: Sequence[str]) -> Mapping[str, float]:
    """All scores of the released open-ended scorer, by pycocoevalcap's Java programs.

    Non-ASCII characters become blanks, then Stanford's PTB tokenizer cuts the words. Two texts
    without any ASCII letter are thus both empty, for which its ROUGE-L gives 1.

    Args:
        predictions: generated answers.
        golds: gold answers.

    Returns:
        ``Bleu-1`` to ``Bleu-4``, ``METEOR`` (1.5), ``RougeL`` and ``CIDEr``.

    Raises:
        DataError: no answer, or not as many predictions as gold answers.
        ConfigError: pycocoevalcap is not installed, or there is no Java.
    """
    check_pairs(predictions, golds)
    base = "pycocoevalcap"
    tokenizer = library(f"{base}.tokenizer.ptbtokenizer", base).PTBTokenizer()
    if shutil.which("java") is None:
        raise ConfigError(
            "the reference scorer runs Java programs, but there is no java on the PATH",
            hint="install a Java runtime (8 or later), or use the metrics of this module",
        )
    said, meant = (
        tokenizer.tokenize(
            {n: [{"caption": re.sub(r"[^\x00-\x7f]", " ", t)}] for n, t in enumerate(texts)}
        )
        for texts in (predictions, golds)
    )
    scores = library(f"{base}.bleu.bleu", base).Bleu(4).compute_score(meant, said, verbose=0)[0]
    found = {f"Bleu-{order}": float(value) for order, value in enumerate(scores, start=1)}
    for label, module, name in (
        ("METEOR", "meteor.meteor", "Meteor"),
        ("RougeL", "rouge.rouge", "Rouge"),
        ("CIDEr", "cider.cider", "Cider"),
    ):
        scorer = getattr(library(f"{base}.{module}", base), name)()
        found[label] = float(scorer.compute_score(meant, said)[0])
    return found
