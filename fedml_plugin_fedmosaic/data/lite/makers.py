"""One generator per kind of task over labelled pictures.

Each takes the words of the question and returns a maker, which makes a row for a wanted answer:
answers are chosen outside, equally often. Nothing but the pictures tells the answer: what else is
in a question or among its choices is drawn in the same way whatever the answer is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedml_plugin_fedmosaic.data.lite.rows import LETTERS, TRUTH, YES_NO, Deck, Maker, Row

_NUM_CHOICES = 4


def name(
    text: str,
    *,
    count: int = 1,
    choices: Sequence[str] = (),
    settings: Sequence[str] = (),
    rumour: str = "",
) -> Maker:
    """What do all pictures show? The answer is a label.

    Args:
        text: the question.
        count: pictures, all of one label.
        choices: what is offered; the label and three others in random order when empty.
        settings: sentences of which one comes before the question.
        rumour: a sentence with one of the choices, right or wrong, before the question.
    """

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        offered = list(choices)
        if not offered:
            offered = [answer, *deck.others(answer, _NUM_CHOICES - 1)]
            rng.shuffle(offered)
        before = f"{rng.choice(settings)} " if settings else ""
        if rumour:
            # Drawn among all choices, the right one included: it says nothing about the answer.
            before += f"{rumour.format(rng.choice(offered))} "
        return Row(deck.hand([answer] * count), before + text, answer, tuple(offered))

    return make


def select(text: str, count: int = 4) -> Maker:
    """Which picture shows the named label? The answer is a letter."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = rng.sample(deck.labels, count)
        wanted = labels[LETTERS.index(answer)]
        return Row(deck.hand(labels), text.format(wanted), answer, LETTERS[:count])

    return make


def odd(text: str, count: int = 4) -> Maker:
    """All but one have the same label: which one does not fit? The answer is a letter."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        common = rng.choice(deck.rich(count - 1))
        labels = [common] * count
        labels[LETTERS.index(answer)] = deck.other(common)
        return Row(deck.hand(labels), text, answer, LETTERS[:count])

    return make


def same(text: str, count: int = 2) -> Maker:
    """Do all pictures have one label? True or False."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        common = rng.choice(deck.rich(count))
        labels = [common] * count
        if answer == TRUTH[1]:
            labels[rng.randrange(count)] = deck.other(common)
        return Row(deck.hand(labels), text, answer, TRUTH)

    return make


def count_label(text: str, count: int = 4) -> Maker:
    """How many pictures show the named label? The answer is a number."""
    choices = tuple(str(number) for number in range(count + 1))

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        wanted = rng.choice(deck.labels)
        labels = [wanted] * int(answer)
        labels += [deck.other(wanted) for _ in range(count - len(labels))]
        rng.shuffle(labels)
        return Row(deck.hand(labels), text.format(wanted), answer, choices)

    return make


def caption_pair(text: str) -> Maker:
    """Does a sentence name the labels of two pictures in their order? True or False."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        shown = rng.sample(deck.labels, 2)
        said = shown if answer == TRUTH[0] else shown[::-1]
        return Row(deck.hand(shown), text.format(*said), answer, TRUTH)

    return make


def any_shows(text: str, count: int = 3) -> Maker:
    """Does at least one picture show the named label? True or False."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        wanted = rng.choice(deck.labels)
        labels = deck.others(wanted, count)
        if answer == TRUTH[0]:
            labels[rng.randrange(count)] = wanted
        return Row(deck.hand(labels), text.format(wanted), answer, TRUTH)

    return make


def matched(first: str, second: str) -> Maker:
    """Do two pictures of different pools show the same concept? Yes or No.

    Args:
        first: prefix of the labels of the first picture.
        second: of the second; a label is a prefix followed by the concept.
    """

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        concepts = [k.removeprefix(first) for k in deck.labels if k.startswith(first)]
        one = rng.choice([k for k in concepts if second + k in deck.groups])
        two = one
        while answer == YES_NO[1] and two == one:
            two = rng.choice(concepts)
        pictures = deck.hand([first + one, second + two])
        return Row(pictures, "Do both icons show the same thing?", answer, YES_NO)

    return make


def bongard(text: str) -> Maker:
    """Three pictures share a label, three do not: does the seventh? positive or negative."""
    choices = ("positive", "negative")

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        common = rng.choice(deck.rich(4))
        labels = [common] * 3 + [deck.other(common) for _ in range(3)]
        labels.append(common if answer == choices[0] else deck.other(common))
        return Row(deck.hand(labels), text, answer, choices)

    return make


def rising(text: str, count: int = 3) -> Maker:
    """Do the numbers rise from picture to picture? True or False."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = sorted(rng.sample(deck.labels, count), key=int)
        order = list(labels)
        while answer == TRUTH[1] and order == labels:
            rng.shuffle(order)
        return Row(deck.hand(order), text, answer, TRUTH)

    return make


def largest(text: str, count: int = 4) -> Maker:
    """Which picture shows the largest number? The answer is a letter."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = sorted(rng.sample(deck.labels, count), key=int)
        top = labels.pop()
        rng.shuffle(labels)
        labels.insert(LETTERS.index(answer), top)
        return Row(deck.hand(labels), text, answer, LETTERS[:count])

    return make


def total(text: str) -> Maker:
    """The sum of two numbers; an open question."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        pairs = [
            (first, second)
            for first in deck.labels
            for second in deck.labels
            if int(first) + int(second) == int(answer)
        ]
        return Row(deck.hand(rng.choice(pairs)), text, answer)

    return make


def sums(labels: Sequence[str]) -> tuple[str, ...]:
    """The answers of :func:`total` over some labels."""
    found = {int(first) + int(second) for first in labels for second in labels}
    return tuple(str(number) for number in sorted(found))


def next_number(text: str, step_words: Sequence[str] = ("one", "two")) -> Maker:
    """Two numbers count up by a named step: which comes next? After 9 comes 0; an open question."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        fitting = [
            (step, first, second)
            for step in range(1, len(step_words) + 1)
            for first, second in [
                (str((int(answer) - 2 * step) % 10), str((int(answer) - step) % 10))
            ]
            if first in deck.groups and second in deck.groups
        ]
        step, first, second = rng.choice(fitting)
        return Row(deck.hand([first, second]), text.format(step_words[step - 1]), answer)

    return make


def missing_number(text: str) -> Maker:
    """The number between two pictures that count up by one; after 9 comes 0."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        around = [str((int(answer) - 1) % 10), str((int(answer) + 1) % 10)]
        offered = [answer, *rng.sample([str(k) for k in range(10) if str(k) != answer], 3)]
        rng.shuffle(offered)
        return Row(deck.hand(around), text, answer, tuple(offered))

    return make


def sequence_break(text: str, count: int = 4) -> Maker:
    """Numbers count up by one, but for one picture. The answer is its letter."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        start = rng.randrange(0, 11 - count)
        labels = [str(start + step) for step in range(count)]
        away = [k for k in deck.labels if not start - 1 <= int(k) <= start + count]
        labels[LETTERS.index(answer)] = rng.choice(away)
        return Row(deck.hand(labels), text, answer, LETTERS[:count])

    return make
