from __future__ import annotations

import pytest
import torch
from tiny_models import LLAMA_TEMPLATE, QWEN_TEMPLATE, build_tokenizer

from fedml_plugin_fedmosaic.core.errors import ConfigError, DataError
from fedml_plugin_fedmosaic.data.prompt import IGNORE, PromptEncoder, collate

END = {"llama": "<|eot_id|>", "qwen2": "<|im_end|>"}


def supervised(tokenizer, encoded):
    """Texts of the runs of supervised tokens."""
    runs, current = [], []
    for token, label in zip(encoded.ids.tolist(), encoded.labels.tolist(), strict=True):
        if label == IGNORE:
            if current:
                runs.append(current)
            current = []
        else:
            assert label == token
            current.append(token)
    runs += [current] if current else []
    return [tokenizer.convert_ids_to_tokens(run) for run in runs]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_answers_and_their_end_tokens_are_supervised(family):
    tokenizer = build_tokenizer(family)
    encoded = PromptEncoder(tokenizer).conversation(
        ("what is this ?", "a cat", "what colour is the cat ?", "red and blue")
    )
    assert supervised(tokenizer, encoded) == [
        ["a", "cat", END[family]],
        ["red", "and", "blue", END[family]],
    ]
    assert encoded.num_supervised == 7


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_ids_are_those_of_the_whole_rendered_text(family):
    tokenizer = build_tokenizer(family)
    turns = ("what is this ?", "a cat", "hello", "world")
    messages = [
        {"role": "assistant" if k % 2 else "user", "content": turn} for k, turn in enumerate(turns)
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert PromptEncoder(tokenizer).conversation(turns).ids.tolist() == expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prompt_is_the_unsupervised_head_of_its_conversation(family):
    encoder = PromptEncoder(build_tokenizer(family))
    whole = encoder.conversation(("what is this ?", "a cat"))
    prompt = encoder.prompt(("what is this ?",))
    answer = encoder.answer(("what is this ?", "a cat"))
    first = int((whole.labels != IGNORE).nonzero()[0])
    assert torch.equal(whole.ids[:first], prompt.ids)
    assert torch.equal(whole.ids[first : first + len(answer)], answer)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_end_of_turn_is_the_templates(family):
    tokenizer = build_tokenizer(family)
    expected = tokenizer.convert_tokens_to_ids(END[family])
    assert PromptEncoder(tokenizer).end_of_turn() == expected


def test_an_answer_that_occurs_in_the_question_is_supervised_once():
    tokenizer = build_tokenizer("llama")
    encoded = PromptEncoder(tokenizer).conversation(("cat cat cat", "cat"))
    assert supervised(tokenizer, encoded) == [["cat", "<|eot_id|>"]]


def test_image_marks_become_image_tokens_where_they_stand():
    tokenizer = build_tokenizer("llama")
    encoder = PromptEncoder(tokenizer, image_token_id=2, tokens_per_image=3)
    ids = encoder.prompt(("<image>first <image><image>",)).ids
    words = tokenizer.convert_ids_to_tokens(ids.tolist())
    start = words.index("<image>")
    assert words[start : start + 10] == ["<image>"] * 3 + ["first"] + ["<image>"] * 6
    assert int((ids == 2).sum()) == 9


def test_an_image_mark_is_refused_by_a_text_model():
    with pytest.raises(DataError, match="text-only model"):
        PromptEncoder(build_tokenizer()).prompt(("<image> what is this ?",))


def test_a_template_that_wants_content_parts_is_served():
    template = LLAMA_TEMPLATE.replace(
        "m['content'] | trim",
        "m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join",
    )
    tokenizer = build_tokenizer("llama", template)
    plain = PromptEncoder(build_tokenizer("llama")).conversation(("hello", "world"))
    parts = PromptEncoder(tokenizer).conversation(("hello", "world"))
    assert torch.equal(plain.ids, parts.ids)
    assert torch.equal(plain.labels, parts.labels)


def test_a_template_without_generation_prompt_keeps_its_header_unsupervised():
    template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}<|im_end|>\n{% endfor %}"
    tokenizer = build_tokenizer("qwen2", template)
    encoder = PromptEncoder(tokenizer)
    encoded = encoder.conversation(("hello", "good", "world", "bad"))
    assert supervised(tokenizer, encoded) == [["good", "<|im_end|>"], ["bad", "<|im_end|>"]]
    prompt = tokenizer.convert_ids_to_tokens(encoder.prompt(("hello",)).ids.tolist())
    assert prompt[-2:] == ["assistant", ":"]


def test_a_template_that_rewrites_earlier_answers_still_gets_labels():
    # Like templates that drop the reasoning of all but the last turn.
    template = QWEN_TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}! {% endif %}{{ m['content'] }}",
    )
    tokenizer = build_tokenizer("qwen2", template)
    encoded = PromptEncoder(tokenizer).conversation(("hello", "good", "world", "bad"))
    assert supervised(tokenizer, encoded) == [["good", "<|im_end|>"], ["bad", "<|im_end|>"]]


def test_a_tokenizer_without_template_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        PromptEncoder(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_the_side_that_is_asked_for(side):
    encoder = PromptEncoder(build_tokenizer())
    rows = [encoder.conversation((text, "cat")) for text in ("hello", "hello world good")]
    batch = collate(rows, 0, side=side)
    assert batch["input_ids"].shape == (2, len(rows[1].ids))
    for number, row in enumerate(rows):
        kept = batch["attention_mask"][number].bool()
        assert torch.equal(batch["input_ids"][number][kept], row.ids)
        assert torch.equal(batch["labels"][number][kept], row.labels)
        assert (batch["labels"][number][~kept] == IGNORE).all()
    padded = batch["attention_mask"][0]
    assert padded[0 if side == "left" else -1] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_was_encoded_before_changes_no_bit(family):
    tokenizer = build_tokenizer(family)
    conversations = [
        ("hello", "cat"),
        ("hello world", "cat", "what is this ?", "dog"),
        ("what is this ? " * 40, "dog"),
        ("hello", "dog"),
    ]
    used = PromptEncoder(tokenizer)
    for turns in (*conversations, *conversations):
        fresh, again = PromptEncoder(tokenizer).conversation(turns), used.conversation(turns)
        assert torch.equal(fresh.ids, again.ids)
        assert torch.equal(fresh.labels, again.labels)
        assert fresh.num_supervised == again.num_supervised
        assert torch.equal(PromptEncoder(tokenizer).answer(turns), used.answer(turns))
        assert torch.equal(
            PromptEncoder(tokenizer).prompt(turns[:1]).ids, used.prompt(turns[:1]).ids
        )


def test_a_short_text_is_tokenised_once_and_a_long_one_is_not_kept():
    tokenizer = build_tokenizer()
    encoder = PromptEncoder(tokenizer)
    seen, encode = [], tokenizer.encode

    def counted(text, **options):
        seen.append(text)
        return encode(text, **options)

    tokenizer.encode = counted
    long = "what is this ? " * 40
    for question in (long, "hello", long, "hello"):
        encoder.conversation((question, "cat"))
    assert sum(long.strip() in text for text in seen) == 2
    assert sum("hello" in text for text in seen) == 1
    assert sum("cat" in text for text in seen) == 1
