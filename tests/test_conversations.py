"""Chat data: by the template of a tokenizer, or the turns' text; never Python's spelling of a list."""

from __future__ import annotations

import copy
import json

import pytest

from quailora.calibration.text import TextSource
from quailora.errors import CalibrationError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
RENDERED = "<user>Why?</><assistant>So.</>"
FORMS = {
    "messages": {"messages": TURNS},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "no text": {"text": None, "conversation": TURNS},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, TURNS[1]]},
    "object of lists": {"conversations": {"from": ["human", "gpt"], "value": ["Why?", "So."]}},
    "null keys": {"messages": [{**turn, "tool_calls": None} for turn in TURNS]},
}


@pytest.fixture
def with_template(tokenizer):
    """The tokenizer with a beginning of sequence, which it adds by itself, and a chat template, which adds it too."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<bos>"})
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", changed.bos_token_id)]
    )
    changed.chat_template = TEMPLATE
    return changed


def read(tmp_path, record, tokenizer=None, *fields):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(record), encoding="utf-8")
    return list(TextSource(str(file), fields).documents(tokenizer))


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_text(form, tmp_path, tokenizer, with_template):
    assert read(tmp_path, FORMS[form]) == read(tmp_path, FORMS[form], tokenizer) == ["Why?\nSo."]
    assert read(tmp_path, FORMS[form], with_template) == [RENDERED]  # its BOS comes with the tokens


def test_templates_keep_a_beginning_that_the_tokenizer_does_not_add(tmp_path, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": "<bos>"})
    changed.chat_template = TEMPLATE
    assert read(tmp_path, FORMS["messages"], changed) == [f"<bos>{RENDERED}"]


def test_text_comes_first_and_named_fields_before_it(tmp_path, with_template):
    record = {"text": "Plain.", "messages": TURNS, "title": "T"}
    assert read(tmp_path, record, with_template) == ["Plain."]
    assert read(tmp_path, record, with_template, "title", "messages") == [f"T\n{RENDERED}"]


def test_prompt_and_completion_are_one_conversation(tmp_path, with_template):
    record = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert read(tmp_path, record, with_template, "prompt", "completion") == [RENDERED]


def test_one_conversation_is_no_list_of_records(tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": TURNS}), encoding="utf-8")
    assert list(TextSource(str(file)).documents()) == ["Why?\nSo."]


def test_templates_that_refuse_name_the_record(tmp_path, with_template):
    with_template.chat_template = "{{ raise_exception('Roles must\n alternate.') }}"
    with pytest.raises(CalibrationError, match=r"refuses .*chat.jsonl:1: Roles must alternate. Take this conversation"):
        read(tmp_path, FORMS["messages"], with_template)


def test_turns_without_text_are_refused_or_nothing(tmp_path, with_template):
    silent = {"messages": [TURNS[0], {"role": "assistant", "content": None}]}
    assert read(tmp_path, silent) == ["Why?"]
    assert read(tmp_path, silent, with_template) == ["<user>Why?</><assistant></>"]
    picture = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}
    for tokenizer in (None, with_template):
        with pytest.raises(CalibrationError, match=r"chat.jsonl:1, got one that holds an image or something else"):
            read(tmp_path, picture, tokenizer)
