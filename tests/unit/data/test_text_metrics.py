"""Text metrics: what the libraries compute over our words, and what they need."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.core.registry import METRICS
from fedml_plugin_fedmosaic.data import text_metrics
from fedml_plugin_fedmosaic.data.text_metrics import (
    bleu,
    cider,
    find_wordnet,
    library,
    meteor,
    meteor_stem,
    reference_scores,
    rouge_l,
    words,
)
from fedml_plugin_fedmosaic.data.wordnet import WordNet

GOLDS = ["the cat sat on the mat", "a dog runs in the park today", "two birds fly over the sea"]
SAID = ["the cat is on the mat", "a dog ran in a park", "two birds fly over the sea"]


def test_words_of_many_scripts() -> None:
    assert words("It's 3 o'clock, Émile_2!") == ["it", "s", "3", "o", "clock", "émile", "2"]
    assert words("你好 world") == ["你", "好", "world"]
    assert words("สวัส") == list("สวัส")
    assert words("Привет, мир") == ["привет", "мир"]
    assert words(" - ") == []


def test_rouge_l_is_the_f_measure_of_the_common_subsequence() -> None:
    assert rouge_l(["The cat sat."], ["the cat sat"]) == pytest.approx(1.0)
    assert rouge_l(["fish"], ["the cat"]) == 0.0
    precision, recall, beta = 2 / 3, 2 / 4, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(["a x c"], ["a b c d"]) == pytest.approx(expected)
    assert rouge_l(["a x c"], ["a b c d"], beta=1.0) == pytest.approx(4 / 7)
    assert rouge_l(["", "yes"], ["no", "yes"]) == pytest.approx(0.5)
    # Answers in other scripts count, too.
    assert rouge_l(["да нет"], ["да"]) > 0.5


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_rouge_l_stays_between_zero_and_one(first: list[str], second: list[str]) -> None:
    score = rouge_l([" ".join(first)], [" ".join(second)])
    assert 0 <= score <= 1 + 1e-12
    assert (score == 0) == (not set(first) & set(second))


def coco(texts: list[str]) -> dict[int, list[str]]:
    return {number: [" ".join(words(text))] for number, text in enumerate(texts)}


def test_rouge_and_bleu_agree_with_the_scorers_of_the_released_code() -> None:
    rouge = library("pycocoevalcap.rouge.rouge", "pycocoevalcap").Rouge()
    assert rouge_l(SAID, GOLDS) == pytest.approx(rouge.compute_score(coco(GOLDS), coco(SAID))[0])
    scorer = library("pycocoevalcap.bleu.bleu", "pycocoevalcap").Bleu(4)
    expected = scorer.compute_score(coco(GOLDS), coco(SAID), verbose=0)[0]
    found = [bleu(SAID, GOLDS, order) for order in (1, 2, 3, 4)]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == sorted(found, reverse=True)


def test_bleu_by_hand() -> None:
    # 3 of 4 words, 1 of 3 pairs; as long as the gold answer, so no penalty
    assert bleu(["a b x d"], ["a b c d"], 1) == pytest.approx(3 / 4)
    assert bleu(["a b x d"], ["a b c d"], 2) == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    assert bleu(["x y"], ["a b"], 4) == 0.0


def test_cider_rewards_rare_words() -> None:
    assert cider(GOLDS, GOLDS) == pytest.approx(10.0)
    assert cider(["no match here", "nothing", "none"], GOLDS) == pytest.approx(0.0)
    common = cider(["the", GOLDS[1], GOLDS[2]], GOLDS)
    rare = cider(["cat", GOLDS[1], GOLDS[2]], GOLDS)
    assert common < rare < 10


WORDNET = {
    "noun": {"00001740": ("car", "auto"), "00001890": ("mouse",)},
    "verb": {"00001100": ("run", "go")},
    "adj": {"00001000": ("good(p)", "fine")},
    "adv": {"00002000": ("well",)},
}


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """WordNet's database files with six words in them, as its own distribution has them."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for pos, synsets in WORDNET.items():
        kind = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[pos]
        text = "  1 WordNet 3.0 Copyright 2006 by Princeton University.  \n"
        offsets: dict[str, int] = {}
        for lemmas in synsets.values():
            offset = len(text)
            listed = " ".join(f"{lemma} 0" for lemma in lemmas)
            frames = " 01 + 02 00" if pos == "verb" else ""
            text += f"{offset:08d} 03 {kind} {len(lemmas):02x} {listed} 000{frames} | gloss  \n"
            offsets.update(dict.fromkeys((lemma.partition("(")[0] for lemma in lemmas), offset))
        (folder / f"data.{pos}").write_text(text)
        rows = [f"{lemma} {kind} 1 0 1 0 {offset:08d}  \n" for lemma, offset in offsets.items()]
        (folder / f"index.{pos}").write_text("  1 licence\n" + "".join(sorted(rows)))
        (folder / f"{pos}.exc").write_text("mice mouse\n" if pos == "noun" else "")
    monkeypatch.setenv(text_metrics.WORDNET_VARIABLE, str(folder))
    return folder


def test_meteor_counts_synonyms_and_stems(wordnet: Path) -> None:
    assert find_wordnet() == wordnet
    # One match of one word: F is 1, and its one chunk costs half of the penalty 0.5.
    assert meteor(["auto"], ["car"]) == pytest.approx(0.5)
    assert meteor_stem(["auto"], ["car"]) == 0.0
    assert meteor_stem(["running fast"], ["run fast"]) == meteor(["running fast"], ["run fast"])
    whole = meteor_stem(["a b c d"], ["a b c d"])
    assert whole == pytest.approx(1 - 0.5 * (1 / 4) ** 3)
    assert meteor_stem(["d c b a"], ["a b c d"]) < whole


@pytest.mark.parametrize(
    ("word", "synonyms"),
    [
        ("mice", {"mouse"}),
        ("autos", {"car", "auto"}),
        ("goes", {"run", "go"}),
        ("finest", {"good", "fine"}),
        ("well", {"well"}),
        ("unknown", set()),
    ],
)
def test_words_are_looked_up_by_their_base_forms(
    wordnet: Path, word: str, synonyms: set[str]
) -> None:
    found = WordNet(wordnet).synsets(word)
    assert {lemma.name() for synset in found for lemma in synset.lemmas()} == synonyms


def test_meteor_without_wordnet_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(text_metrics.WORDNET_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="synonyms in WordNet") as caught:
        meteor(["a"], ["a"])
    assert caught.value.hint is not None
    assert "wordnet-base" in caught.value.hint


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="needs no-such-package, which is not installed"):
        library("no_such_module.part", "no-such-package")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_of_the_shelf(name: str, wordnet: Path) -> None:
    metric: Callable[[list[str], list[str]], float] = METRICS[name]
    best, some, none = (metric(said, GOLDS) for said in (GOLDS, SAID, ["x", "y", "z"]))
    assert none < some < best
    assert none == pytest.approx(0.0, abs=1e-6)
    for said, golds in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(DataError, match="predictions for"):
            metric(said, golds)


def test_the_reference_scorer_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match="there is no java on the PATH"):
        reference_scores(["a"], ["a"])


@pytest.mark.slow
def test_the_reference_scorer_drops_what_is_not_ascii() -> None:
    found = reference_scores([*SAID, "да"], [*GOLDS, "нет"])
    assert set(found) == {"Bleu-1", "Bleu-2", "Bleu-3", "Bleu-4", "METEOR", "RougeL", "CIDEr"}
    # A wrong answer in Cyrillic is two empty texts, which its ROUGE-L takes for a perfect answer.
    assert found["RougeL"] == pytest.approx(0.75 * rouge_l(SAID, GOLDS) + 0.25)
    assert rouge_l([*SAID, "да"], [*GOLDS, "нет"]) == pytest.approx(0.75 * rouge_l(SAID, GOLDS))
