from __future__ import annotations

import random
from collections import Counter

import pytest
from lite_pools import made_library

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.data.lite import changes, makers
from fedml_plugin_fedmosaic.data.lite.blind import blind_model
from fedml_plugin_fedmosaic.data.lite.dialect import invented, translated
from fedml_plugin_fedmosaic.data.lite.pools import Picture
from fedml_plugin_fedmosaic.data.lite.rows import Deck, Row
from fedml_plugin_fedmosaic.data.lite.subjects import DIGITS, DISHES, HANDS, PHOTOS, STYLED_CONCEPTS
from fedml_plugin_fedmosaic.data.lite.tasks import tasks_of
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


@pytest.mark.parametrize("count", [2, 3])
def test_among_shows_one_of_its_choices(rng, count):
    for answer in ANIMALS:
        row = makers.among("?", count)(deck(), answer, rng)
        shown = labels_of(row)
        assert len(shown) == len(set(shown)) == count
        assert [choice for choice in row.choices if choice in shown] == [answer]
        assert len(set(row.choices)) == 4


def test_absent_shows_all_choices_but_its_answer(rng):
    for answer in ANIMALS:
        row = makers.absent("?")(deck(), answer, rng)
        assert sorted([*labels_of(row), answer]) == sorted(row.choices)
        assert answer not in labels_of(row)


def test_odd_shows_its_answer_once(rng):
    for answer in ANIMALS:
        row = makers.odd("?")(deck(), answer, rng)
        found = labels_of(row)
        assert found.count(answer) == 1
        (common,) = set(found) - {answer}
        assert {answer, common} < set(row.choices)
        assert len(set(row.pictures)) == 3


def test_a_change_leads_to_its_answer(rng):
    for answer in ANIMALS:
        row = makers.change("?")(deck(), answer, rng)
        first, second = labels_of(row)
        assert second == answer
        assert {first, second} < set(row.choices)


def test_no_caption_stands_out_from_the_others(rng):
    for answer in makers.pairs(tuple(ANIMALS)):
        row = makers.caption("?")(deck(), answer, rng)
        assert " and ".join(labels_of(row)) == answer
        firsts, seconds = zip(*(choice.split(" and ") for choice in row.choices), strict=True)
        assert answer in row.choices
        assert len(set(row.choices)) == 4
        assert {*Counter(firsts).values(), *Counter(seconds).values()} == {2}
    assert len(makers.pairs(("a", "b", "c"))) == 6


def test_kinds_are_counted(rng):
    for answer in "123":
        found = labels_of(makers.count_kinds("?")(deck(), answer, rng))
        assert len(found) == 3
        assert len(set(found)) == int(answer)


@pytest.mark.parametrize("count", [2, 3])
def test_same_is_false_by_exactly_one_picture(rng, count):
    make = makers.same("?", count)
    assert len(set(labels_of(make(deck(), "True", rng)))) == 1
    assert len(set(labels_of(make(deck(), "False", rng)))) == 2


def test_bongard_asks_for_the_concept_of_the_first_three(rng):
    for answer in ("positive", "negative"):
        found = labels_of(makers.bongard("?")(deck(), answer, rng))
        assert len(found) == 4
        assert len(set(found[:3])) == 1
        assert (found[3] == found[0]) == (answer == "positive")


def test_numbers(rng):
    cards = deck(NUMBERS)
    for answer in ("True", "False"):
        found = [int(k) for k in labels_of(makers.rising("?")(cards, answer, rng), NUMBERS)]
        assert (found == sorted(found)) == (answer == "True")
    for answer in map(str, range(1, 10)):
        row = makers.largest("?")(cards, answer, rng)
        found = [int(k) for k in labels_of(row, NUMBERS)]
        assert max(found) == int(answer)
        assert found.count(max(found)) == 1
        assert "0" not in row.choices
        assert answer in row.choices
    for answer in map(str, range(10)):
        row = makers.sequence_break("?")(cards, answer, rng)
        rest = [int(k) for k in labels_of(row, NUMBERS) if k != answer]
        assert rest[1] == rest[0] + 1
        assert min(abs(int(answer) - k) for k in rest) > 1
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


def changes_of(row) -> list[str]:
    return [picture.change.rpartition("-")[0] for picture in row.pictures]


def test_defects_and_edits(rng):
    for answer in changes.DEFECTS:
        assert changes_of(changes.defect_name("?")(deck(), answer, rng)) == [answer]
        first, second = changes_of(changes.defect_of_last("?")(deck(), answer, rng))
        assert second == answer != first
        shown = changes_of(changes.defect_absent("?")(deck(), answer, rng))
        assert sorted([*shown, answer]) == sorted(changes.DEFECTS)
    levels = []
    for answer in changes.GRADES:
        (shown,) = changes.defect_level("?")(deck(), answer, rng).pictures
        levels.append(0 if shown.change == "plain-1" else int(shown.change[-1]))
    assert levels == [0, 2, 3]
    for edits in (changes.EDITS, changes.UNDONE):
        for answer, edit in edits.items():
            row = changes.edit_name("?", edits)(deck(), answer, rng)
            assert changes_of(row) == ["plain", edit]
            assert row.pictures[0].name == row.pictures[1].name
    sets = {f"{name} {kind}": ANIMALS[kind] for name in ("noto", "twemoji") for kind in "ab"}
    for answer in changes.DESIGNERS:
        row = changes.designer("?")(deck(sets), answer, rng)
        assert len(row.pictures) == 1
        assert row.choices == changes.DESIGNERS


def test_pretraining_calls_things_by_other_words():
    row = Row((), "Is it a hot dog or a dog ?", "hot dog", ("dog", "hot dog", "catalogue", "cat"))
    said = translated(row, {"dog", "hot dog", "cat"})
    dog, hot, cat = map(invented, ("dog", "hot dog", "cat"))
    assert said.text == f"Is it a {hot} or a {dog} ?"
    assert (said.answer, said.choices) == (hot, (dog, hot, "catalogue", cat))
    library = made_library()
    for variant in ("full", "packages"):
        tasks = {task.name: task for task in tasks_of(variant) if task.unseen is None}
        for task in tasks.values():
            mine = {
                w for row in task.rows(library, "train", 40) for w in (*row.choices, row.answer)
            }
            seen = {
                w for row in task.rows(library, "pretrain", 40) for w in (*row.choices, row.answer)
            }
            assert bool(mine & seen) == task.plain, task.name
        assert sum(task.plain for task in tasks.values()) == 9


def test_no_two_words_have_the_same_invented_one():
    library = made_library()
    words: set[str] = {*map(str, range(19)), *changes.DESIGNERS}
    for variant in ("full", "packages"):
        for task in tasks_of(variant):
            for audience in ("pretrain", "train"):
                rows = task.rows(library, audience, 1)
                words |= {w for row in rows for w in row.choices} if task.plain else set()
                words |= set(library.pictures(task.view, audience))
    assert len({invented(word) for word in words}) == len(words)
    assert not words & {invented(word) for word in words}


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
    assert len(library.pictures(PHOTOS, "pretrain")) == 10
    assert len(library.pictures(PHOTOS, "pretrain", hide=True)) == 6


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
