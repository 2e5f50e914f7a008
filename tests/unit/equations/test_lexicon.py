"""The nearest text of a vocabulary, against comparing with all of them."""

from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.equations.lexicon import Lexicon, edit_distances


def plain_distance(first: str, second: str) -> int:
    """The definition, cell by cell."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        above, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (one != other)))
    return row[-1]


def plain_nearest(text: str, texts: list[str]) -> int | None:
    far = (len(text) + 1) // 2 + 1
    found = [(plain_distance(text, other), number) for number, other in enumerate(texts) if other]
    near = [
        (distance, number)
        for distance, number in found
        if distance < min(far, max(len(text), len(texts[number])))
    ]
    return min(near, default=(0, None))[1] if text else None


def words(count: int, letters: str, longest: int, seed: int) -> list[str]:
    numbers = python_random(seed, "words")
    return [
        "".join(numbers.choice(letters) for _ in range(numbers.randint(0, longest)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("abc", "", 3),
        ("Größe", "Grosse", 3),
        (" cat", "cat", 1),
        ("\U0001f642x", "x", 1),
    ],
)
def test_known_distances(first: str, second: str, distance: int) -> None:
    assert edit_distances(first, [second]).tolist() == [distance]


def test_distances_of_many_texts_at_once() -> None:
    texts = ["", *words(60, "abc ", 7, 0)]
    for text in words(20, "abcd", 8, 1):
        expected = [plain_distance(text, other) for other in texts]
        assert edit_distances(text, texts).tolist() == expected
    assert edit_distances("a", []).tolist() == []


@pytest.mark.parametrize("letters", ["ab", "abcdefgh ", "xyz\0é\ue000"])
def test_the_nearest_text_is_that_of_a_full_comparison(letters: str) -> None:
    texts = words(80, letters, 6, 2)
    lexicon = Lexicon(texts)
    for text in ["", *texts[:5], *words(150, letters + "q", 8, 3)]:
        assert lexicon.nearest(text) == plain_nearest(text, texts), text
        assert lexicon.exact(text) == (texts.index(text) if text and text in texts else None)


def test_nothing_in_common_is_no_match() -> None:
    lexicon = Lexicon(["cat", "", "dog"])
    assert lexicon.nearest("xyz") is None
    assert lexicon.nearest("") is None
    assert lexicon.nearest("cart") == 0
    assert Lexicon([]).nearest("cat") is None
    assert Lexicon(["", ""]).nearest("cat") is None
