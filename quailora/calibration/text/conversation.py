"""A conversation as the text that a model sees: by the chat template of its tokenizer, where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CalibrationError
from .json_files import is_turn
from .records import one_line
from .tokens import added_tokens

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of what templates call so


def turns_of(value: Any) -> list[dict[str, Any]] | None:
    """Return the turns of a conversation, or None if a value is none.

    A conversation is a list of turns, or an object of lists, which is what the package `datasets` makes of a
    `Sequence` of objects.
    """
    if is_turn(value) and all(isinstance(parts, list) for parts in value.values()):
        if len(set(map(len, value.values()))) != 1:
            return None
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) and value and all(map(is_turn, value)) else None


def render(turns: Sequence[Mapping[str, Any]], tokenizer: Any, place: str) -> str:
    """Return a conversation as text.

    Special tokens that the tokenizer puts before any text are left out at its start, since they come again with the
    tokens of the text.

    Args:
        turns: with `role` and `content`, or `from` and `value`.
        tokenizer: its chat template is used; without one, the texts of the turns are joined by line breaks.
        place: where the record is, for messages.

    Raises:
        CalibrationError: if a turn holds something else than text, or the template refuses the conversation.
    """
    messages = [_message(turn, place) for turn in turns]
    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(message["content"] for message in messages if message["content"])
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        raise CalibrationError(
            f"The chat template of the tokenizer refuses {place}: {one_line(error)}. Take this conversation out, or "
            "name fields of text."
        ) from error
    # Templates write BOS as text, and tokenizing adds it again; once is enough.
    added = "".join(tokenizer.convert_ids_to_tokens(list(added_tokens(tokenizer).before)))
    return text.removeprefix(added)


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a turn as templates expect it: no keys that are null, and one string of text, never a list of parts."""
    if "role" in turn:
        message = {key: value for key, value in turn.items() if value is not None}
        return {**message, "content": _text(turn["content"], place)}
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": _text(turn["value"], place)}


def _text(content: Any, place: str) -> str:
    """Return the text of a turn: a string, a list of parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise CalibrationError(f"Expected turns of text in {place}, got one that holds an image or something else.")
    return "\n".join(strings)
