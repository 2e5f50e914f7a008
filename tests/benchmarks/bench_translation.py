"""Processor time of a student with 262,000 tokens to understand a teacher with 50,000.

Words are made of random syllables; half of the teacher's tokens are the student's, too.

    python tests/benchmarks/bench_translation.py
"""

from __future__ import annotations

import random
import time

import torch

from fedml_plugin_fedmosaic.core.rng import python_random, torch_generator
from fedml_plugin_fedmosaic.equations.lexicon import Lexicon
from fedml_plugin_fedmosaic.equations.translation import END, Wording, translated

STUDENT, TEACHER = 262_000, 50_000
SAMPLES, TOKENS, TOP_K = 20, 3, 128
_SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]


def make_words(count: int, numbers: random.Random) -> list[str]:
    """Different words of two to five syllables, most with a space in front."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(numbers.choices(_SYLLABLES, k=numbers.randint(2, 5)))
        found[(" " if numbers.random() < 0.7 else "") + word] = None
    return list(found)


def main() -> None:
    """Prints the times."""
    numbers = python_random(0, "words")
    words = make_words(STUDENT + TEACHER // 2, numbers)
    common = words[: TEACHER // 2]
    student = Wording(texts=[END, *words[:STUDENT]])
    teacher = Wording(texts=[END, *common, *words[STUDENT:]])
    began = time.process_time()
    lexicon = Lexicon(student.texts)
    print(f"lexicon of {STUDENT:,} texts: {time.process_time() - began:.2f} s")
    # A few words are probable everywhere, as in a language model.
    generator = torch_generator(0, "logits")
    ranks = torch.randperm(len(teacher.texts), generator=generator)
    usual = -1.1 * (ranks + 1.0).log()
    for life in ("first round", "next round"):
        began = time.process_time()
        for _ in range(SAMPLES):
            asked = [*(numbers.randrange(1, len(common) + 1) for _ in range(TOKENS)), 0]
            noise = torch.randn(len(asked), len(usual), generator=generator)
            translated(
                usual + noise,
                teacher,
                asked,
                asked,
                lexicon,
                student,
                width=len(student.texts),
                top_k=TOP_K,
            )
        seconds = time.process_time() - began
        print(
            f"{life}, {SAMPLES} samples of {TOKENS + 1} tokens, top {TOP_K}: {seconds:.2f} s, "
            f"{1000 * seconds / SAMPLES:.0f} ms per sample"
        )


if __name__ == "__main__":
    main()
