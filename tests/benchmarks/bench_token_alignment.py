"""Time to align the tokens of two tokenizers, against visiting all pairs.

Run: ``python tests/benchmarks/bench_token_alignment.py [--tokens 1000] [--plain]``

Texts: words with frequencies like those of natural language, and two hard cases: a line of one
repeated character, and code-like text with much indentation. Both cuts are random, of different
mean token lengths. ``--plain`` adds the time to look for a match at every pair of tokens, as the
published code does before its recurrence.
"""

from __future__ import annotations

import argparse
import random
import time

from fedml_plugin_fedmosaic.core.rng import python_random
from fedml_plugin_fedmosaic.equations.token_alignment import matching_spans

LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


def words(numbers: random.Random, count: int) -> str:
    stock = ["".join(numbers.choices(LETTERS, k=numbers.randint(1, 9))) for _ in range(5000)]
    shares = [1 / rank for rank in range(1, len(stock) + 1)]
    return "".join("\u0120" + word for word in numbers.choices(stock, shares, k=count))


def code(numbers: random.Random, count: int) -> str:
    lines = words(numbers, count).split("\u0120")
    return "".join(" " * 4 * numbers.randint(0, 4) + word + "(x);\n" for word in lines)


def cut(text: str, mean: int, tokens: int, numbers: random.Random) -> list[str]:
    """The first ``tokens`` pieces of 1 to ``2 mean - 1`` characters."""
    pieces, start = [], 0
    while start < len(text) and len(pieces) < tokens:
        stop = start + numbers.randint(1, 2 * mean - 1)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def plain_seconds(first: list[str], second: list[str]) -> float:
    """Time to look for a match at every pair of tokens, by joining strings until they compare."""
    start = time.perf_counter()
    found = 0
    for i in range(len(first)):
        for j in range(len(second)):
            before_i, before_j = i - 1, j - 1
            one, two = first[i], second[j]
            while len(one) != len(two) and before_i >= 0 and before_j >= 0:
                if len(one) < len(two):
                    one = first[before_i] + one
                    before_i -= 1
                else:
                    two = second[before_j] + two
                    before_j -= 1
            found += one == two
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    numbers = python_random(0, "token alignment")
    texts = {
        "words": words(numbers, args.tokens),
        "code": code(numbers, args.tokens),
        "one character": "=" * 4 * args.tokens,
    }
    for name, text in texts.items():
        first, second = cut(text, 4, args.tokens, numbers), cut(text, 3, args.tokens, numbers)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            spans = matching_spans(first, second)
            seconds.append(time.perf_counter() - start)
        covered = sum(stop - begin for (begin, stop), _ in spans)
        line = (
            f"{name:14} {len(first)} x {len(second)} tokens: {1e3 * min(seconds):7.1f} ms, "
            f"{covered / len(first):.0%} of the first matched"
        )
        if args.plain:
            line += f"; looking at all pairs {1e3 * plain_seconds(first, second):.1f} ms"
        print(line)


if __name__ == "__main__":
    main()
