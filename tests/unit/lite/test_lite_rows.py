from __future__ import annotations

import random

import pytest
from lite_pools import made_library

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.lite import changes, makers
from fedml_plugin_fedmosaic.data.lite.blind import blind_model
from fedml_plugin_fedmosaic.data.lite.pools import Picture
from fedml_plugin_fedmosaic.data.lite.rows import LETTERS, Deck
from fedml_plugin_fedmosaic.data.lite.subjects import DIGITS, DISHES, HANDS, PHOTOS, STYLED_CONCEPTS
from fedml_plugin_fedmosaic.data.lite.views import View

ANIMALS = {name: tuple(Picture("p", f"{name}{k}.png") for k in range(5)) for name in "abcdef"}
NUMBERS = {str(n): tuple(Picture("n", f"{n}-{k}.png") for k in range(4)) for n in range(10)}


@pytest.fixture
def rng() -> random.Random:
    return python_random(3)


def deck(groups=ANIMALS) -> Deck:
    return Deck(groups, python_random(1))


def labels_of(row, groups=ANIMALS) -> list[str]:
    owner = {picture: label for label, pictures in groups.items() for picture in pictures}
    return [owner[picture] for picture in row.pictures]


def test_a_hand_has_no_picture_twice_and_uses_all_before_one_again():
    cards = deck()
    hands = [cards.hand(["a", "a"]) for _ in range(5)]
    assert all(len(set(hand)) == 2 for hand in hands)
    counts = [sum(picture in hand for hand in hands) for picture in ANIMALS["a"]]
    assert counts == [2, 2, 2, 2, 2]


def test_select_names_the_label_at_the_answer(rng):
    for answer in LETTERS:
        row = makers.select("Which image shows a {}?")(deck(), answer, rng)
        wanted = row.text.split()[-1].rstrip("?")
        assert labels_of(row).index(wanted) == LETTERS.index(answer)
        assert labels_of(row).count(wanted) == 1
    assert "Which image shows an" in row.prompt or wanted not in "aeiou"


def test_odd_has_one_stranger_at_the_answer(rng):
    for answer in LETTERS[:3]:
        found = labels_of(makers.odd("?", 3)(deck(), answer, rng))
        stranger = found.pop(LETTERS.index(answer))
        assert len(set(found)) == 1
        assert stranger not in found


@pytest.mark.parametrize("count", [2, 3])
def test_same_is_false_by_exactly_one_picture(rng, count):
    make = makers.same("?", count)
    assert len(set(labels_of(make(deck(), "True", rng)))) == 1
    assert len(set(labels_of(make(deck(), "False", rng)))) == 2


def test_count_label_shows_as_many_as_it_answers(rng):
    for answer in "01234":
        row = makers.count_label("How many show {}?")(deck(), answer, rng)
        assert labels_of(row).count(row.text.split()[-1].rstrip("?")) == int(answer)


def test_statements_are_as_true_as_the_answer(rng):
    for answer in ("True", "False"):
        row = makers.caption_pair("{} {}")(deck(), answer, rng)
        assert (row.text.split() == labels_of(row)) == (answer == "True")
        row = makers.any_shows("{}")(deck(), answer, rng)
        assert (row.text in labels_of(row)) == (answer == "True")


def test_bongard_asks_for_the_concept_of_the_first_three(rng):
    for answer in ("positive", "negative"):
        found = labels_of(makers.bongard("?")(deck(), answer, rng))
        assert len(set(found[:3])) == 1
        assert found[0] not in found[3:6]
        assert (found[6] == found[0]) == (answer == "positive")


def test_numbers(rng):
    cards = deck(NUMBERS)
    for answer in ("True", "False"):
        found = [int(k) for k in labels_of(makers.rising("?")(cards, answer, rng), NUMBERS)]
        assert (found == sorted(found)) == (answer == "True")
    for answer in LETTERS:
        found = [int(k) for k in labels_of(makers.largest("?")(cards, answer, rng), NUMBERS)]
        assert found.index(max(found)) == LETTERS.index(answer)
        found = [int(k) for k in labels_of(makers.sequence_break("?")(cards, answer, rng), NUMBERS)]
        steps = [value - place for place, value in enumerate(found)]
        assert steps.count(steps[LETTERS.index(answer)]) == 1
        assert len(set(steps)) == 2
    assert makers.sums(["0", "9"]) == ("0", "9", "18")
    for answer in map(str, range(10)):
        row = makers.total("?")(cards, answer, rng)
        assert sum(map(int, labels_of(row, NUMBERS))) == int(answer)
        first, second = map(
            int, labels_of(makers.next_number("by {}")(cards, answer, rng), NUMBERS)
        )
        assert (second + (second - first)) % 10 == int(answer)
        before, after = map(int, labels_of(makers.missing_number("?")(cards, answer, rng), NUMBERS))
        assert (before + 1) % 10 == int(answer) == (after - 1) % 10


def test_a_rumour_is_right_as_often_as_any_choice(rng):
    make = makers.name("What?", rumour="It is {} !")
    right = 0
    for _ in range(400):
        row = make(deck(), "a", rng)
        said = row.text.split()[2]
        assert said in row.choices
        right += said == "a"
    assert right == pytest.approx(100, abs=35)


def test_defects_and_edits(rng):
    for answer in changes.DEFECTS:
        (shown,) = changes.defect_name("?")(deck(), answer, rng).pictures
        assert shown.change.startswith(answer)
    for answer in ("Image A", "Image B", "Image C"):
        row = changes.defect_strongest("{}", 3)(deck(), answer, rng)
        levels = [
            0 if picture.change == "plain-1" else int(picture.change[-1])
            for picture in row.pictures
        ]
        assert levels.index(max(levels)) == LETTERS.index(answer)
    for _ in range(20):
        row = changes.edit_direction("{}")(deck(), "No", rng)
        wanted = next(k for k, words in changes.EDITS.items() if words == row.text)
        first, second = (picture.change.rpartition("-")[0] for picture in row.pictures)
        assert (first, second) != ("plain", wanted)
        row = changes.edit_direction("{}")(deck(), "Yes", rng)
        wanted = next(k for k, words in changes.EDITS.items() if words == row.text)
        assert [p.change.rpartition("-")[0] for p in row.pictures] == ["plain", wanted]


def test_images_never_change_audience():
    library = made_library()
    for view in (PHOTOS, HANDS, DIGITS, STYLED_CONCEPTS, DISHES):
        parts = [
            {p for group in library.pictures(view, audience).values() for p in group}
            for audience in ("pretrain", "train", "test")
        ]
        assert all(parts)
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_single_concepts_are_trained_in_one_style_and_tested_in_the_other():
    library = made_library()
    train, test = library.pictures(DISHES, "train"), library.pictures(DISHES, "test")
    assert set(train) == set(test)
    assert {p.pool for group in train.values() for p in group} == {"noto"}
    assert {p.pool for group in test.values() for p in group} == {"twemoji"}
    assert not set(train) & set(library.pictures(DISHES, "pretrain"))


def test_tasks_divide_the_images_of_a_view_and_pretraining_hides_labels():
    library = made_library()
    shares = [library.pictures(PHOTOS, "train", (k, 3)) for k in range(3)]
    pictures = [p for share in shares for group in share.values() for p in group]
    assert len(pictures) == len(set(pictures))
    whole = library.pictures(PHOTOS, "train")
    assert set(pictures) == {p for group in whole.values() for p in group}
    # Not into parts with next to no images.
    crowded = library.pictures(PHOTOS, "train", (999, 1000))
    assert min(map(len, crowded.values())) >= 8
    assert len(whole) == 10
    assert len(library.pictures(PHOTOS, "pretrain")) == 6


def test_a_view_that_is_too_small_is_refused():
    view = View(name="huge", pools=("flags",), label=lambda facts: facts["label"], min_images=999)
    with pytest.raises(DataError, match="expected at least two labels with 999 images"):
        made_library().pictures(view, "train")


def test_the_blind_model_finds_a_planted_shortcut_and_nothing_else(rng):
    def rows(leak: bool) -> list[tuple[str, str]]:
        made = []
        for _ in range(120):
            answer = rng.choice(["cat", "dog"])
            hint = f"not {'dog' if answer == 'cat' else 'cat'}" if leak else "who knows"
            made.append(
                (f"<image>\nIt is {hint} . Choice list:[cat, dog]. Your answer is:", answer)
            )
        return made

    leaking = blind_model(rows(True), rows(True))
    assert leaking.accuracy == 1.0
    assert leaking.suspicious
    clean = blind_model(rows(False), rows(False))
    assert not clean.suspicious
    assert clean.chance == 0.5
