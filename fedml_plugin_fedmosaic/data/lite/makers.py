"""One generator per kind of task over labelled pictures.

Each takes the words of the question and returns a maker, which makes a row for a wanted answer:
answers are chosen outside, equally often. Nothing but the pictures tells the answer: what else is
in a question or among its choices is drawn in the same way whatever the answer is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedml_plugin_fedmosaic.data.lite.rows import TRUTH, YES_NO, Deck, Maker, Row

_NUM_CHOICES = 4
AND = " and "
"""Between the labels of an answer that names two of them."""


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
            offered = list(_offer(answer, deck.others(answer, _NUM_CHOICES - 1), rng))
        before = f"{rng.choice(settings)} " if settings else ""
        if rumour:
            # Drawn among all choices, the right one included: it says nothing about the answer.
            before += f"{rumour.format(rng.choice(offered))} "
        return Row(deck.hand([answer] * count), before + text, answer, tuple(offered))

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


def rising(text: str, count: int = 3) -> Maker:
    """Do the numbers rise from picture to picture? True or False."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = sorted(rng.sample(deck.labels, count), key=int)
        order = list(labels)
        while answer == TRUTH[1] and order == labels:
            rng.shuffle(order)
        return Row(deck.hand(order), text, answer, TRUTH)

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


def among(text: str, count: int = 3) -> Maker:
    """Which of the named labels does one of the pictures show? The answer is a label."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        others = deck.others(answer, count + _NUM_CHOICES - 2)
        shown = [answer, *others[: count - 1]]
        rng.shuffle(shown)
        return Row(deck.hand(shown), text, answer, _offer(answer, others[count - 1 :], rng))

    return make


def absent(text: str) -> Maker:
    """Which of the named labels does no picture show? The answer is a label."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        shown = deck.others(answer, _NUM_CHOICES - 1)
        return Row(deck.hand(shown), text, answer, _offer(answer, shown, rng))

    return make


def odd(text: str, count: int = 3) -> Maker:
    """All but one picture have the same label: which label has the other one?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        common, *others = deck.others(answer, _NUM_CHOICES - 1)
        labels = [common] * (count - 1)
        labels.insert(rng.randrange(count), answer)
        return Row(deck.hand(labels), text, answer, _offer(answer, [common, *others], rng))

    return make


def change(text: str) -> Maker:
    """Two pictures: what does the second one show? The label of the first one is a choice, too."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        first, *others = deck.others(answer, _NUM_CHOICES - 1)
        return Row(deck.hand([first, answer]), text, answer, _offer(answer, [first, *others], rng))

    return make


def caption(text: str) -> Maker:
    """Which of four pairs of labels names two pictures in their order?

    The choices are all pairs of one of two first and one of two second labels, so that none of
    them stands out. The wanted answer is one of :func:`pairs`.
    """

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        shown = answer.split(AND)
        others = rng.sample([label for label in deck.labels if label not in shown], 2)
        choices = [a + AND + b for a in (shown[0], others[0]) for b in (shown[1], others[1])]
        rng.shuffle(choices)
        return Row(deck.hand(shown), text, answer, tuple(choices))

    return make


def pairs(labels: Sequence[str]) -> tuple[str, ...]:
    """The answers of :func:`caption` over some labels."""
    return tuple(a + AND + b for a in labels for b in labels if a != b)


def count_kinds(text: str, count: int = 3) -> Maker:
    """How many different labels do the pictures have? The answer is a number from one on."""
    choices = tuple(str(number + 1) for number in range(count))

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        labels = [rng.choice(deck.rich(count))]
        labels += deck.others(labels[0], int(answer) - 1)
        labels += [labels[0]] * (count - len(labels))
        rng.shuffle(labels)
        return Row(deck.hand(labels), text, answer, choices)

    return make


def bongard(text: str, count: int = 3) -> Maker:
    """The first pictures share a label: does the last? positive or negative."""
    choices = ("positive", "negative")

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        common = rng.choice(deck.rich(count + 1))
        last = common if answer == choices[0] else deck.other(common)
        return Row(deck.hand([common] * count + [last]), text, answer, choices)

    return make


def largest(text: str, count: int = 2) -> Maker:
    """Which is the largest number? The answer is a number; any others are among the choices."""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        lower = [label for label in deck.labels if int(label) < int(answer)]
        labels = [answer, *rng.choices(lower, k=count - 1)]
        rng.shuffle(labels)
        others = deck.others(answer, len(deck.labels) - 1)
        # The smallest number is never the answer, which would tell something if it were offered.
        wrong = [label for label in others if label != deck.labels[0]]
        return Row(deck.hand(labels), text, answer, _offer(answer, wrong, rng))

    return make


def sequence_break(text: str) -> Maker:
    """Of three numbers two follow each other: which is the third?"""

    def make(deck: Deck, answer: str, rng: random.Random) -> Row:
        starts = [
            k for k in range(9) if {str(k), str(k + 1)} <= set(deck.labels)
            and not k - 1 <= int(answer) <= k + 2
        ]  # fmt: skip
        start = rng.choice(starts)
        labels = [str(start), str(start + 1)]
        labels.insert(rng.choice((0, 2)), answer)
        others = deck.others(answer, len(deck.labels) - 1)
        return Row(deck.hand(labels), text, answer, _offer(answer, others, rng))

    return make


def _offer(answer: str, wrong: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """The answer and the first wrong ones in random order."""
    offered = [answer, *wrong[: _NUM_CHOICES - 1]]
    rng.shuffle(offered)
    return tuple(offered)
