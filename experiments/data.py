"""The instruction pairs, packed for training and one by one for scoring, and the other texts of the experiment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quailora import Calibration, TextSource
from quailora.calibration.windows import evaluation_windows

from .protocol import CalibrationText, Protocol

PAIRS, TEST = "dolly_hhrlhf_1000.jsonl", "wikitext2_raw_test.txt"
OTHER_TEXTS = {"wikitext2": "wikitext2_valid.txt", "c4": "c4_300.jsonl"}

_SPLIT_SEED = 0  # the same pairs are held out in every run
_WIKITEXT_LENGTH = 512


@dataclass(frozen=True)
class HeldOutPair:
    """A pair that is scored and never trained on.

    Attributes:
        ids: tokens of prompt, response and end of text.
        prompt: how many of them are the prompt.
    """

    ids: Tensor
    prompt: int


@dataclass(frozen=True)
class Data:
    """Everything that is read from text.

    Attributes:
        windows: packed windows of the training pairs, (count, length).
        held_out: the pairs that are held out.
        wikitext: windows of the WikiText-2 test set, (count, 512).
    """

    windows: Tensor
    held_out: list[HeldOutPair]
    wikitext: Tensor


def load_data(texts: Path, tokenizer: Any, protocol: Protocol) -> Data:
    """Return the data of the experiment.

    Args:
        texts: folder with the instruction pairs and the WikiText-2 test set.
        tokenizer: tokenizer of the model.
        protocol: how much of them is used.
    """
    pairs = shuffled_pairs(texts)
    held_out = [as_held_out(pair, tokenizer, protocol.longest) for pair in pairs[: protocol.held_out]]
    stream = [tokens_of(pair, tokenizer)[0] for pair in pairs[protocol.held_out :]]
    test = evaluation_windows(
        tokenizer,
        TextSource(str(texts / TEST)).documents(tokenizer),
        protocol.wikitext_windows,
        _WIKITEXT_LENGTH,
    )
    return Data(packed(torch.cat(stream), protocol.length), held_out, test)


def shuffled_pairs(texts: Path) -> list[dict[str, str]]:
    """Return the instruction pairs in the order of which the first ones are held out."""
    pairs = [json.loads(line) for line in (texts / PAIRS).read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    return [pairs[index] for index in order]


def prompt_of(pair: dict[str, str]) -> str:
    """Return the prompt of a pair without the first sentence of the template, which is the same in all prompts."""
    return pair["prompt"].split("\n\n", 1)[1]


def tokens_of(pair: dict[str, str], tokenizer: Any) -> tuple[Tensor, int]:
    """Return the tokens of a pair with the end of the text, and how many of them are the prompt."""
    prompt = tokenizer(prompt_of(pair)).input_ids
    response = tokenizer(pair["response"], add_special_tokens=False).input_ids
    return torch.tensor([*prompt, *response, tokenizer.eos_token_id]), len(prompt)


def write_training_pairs(texts: Path, protocol: Protocol, file: Path, *, mixed: bool = False) -> None:
    """Write the pairs that are not held out as a text file of records.

    Args:
        texts: folder with the instruction pairs.
        protocol: how many of them are held out.
        file: the file.
        mixed: put about as much text of C4 in between.
    """
    whole = [prompt_of(pair) + pair["response"] for pair in shuffled_pairs(texts)[protocol.held_out :]]
    if mixed:
        other = [json.loads(line)["text"] for line in (texts / OTHER_TEXTS["c4"]).read_text("utf-8").splitlines()]
        each = -(-len(whole) // len(other))
        whole = [text for n, one in enumerate(other) for text in (*whole[n * each : (n + 1) * each], one)]
    part = file.with_name(f"{file.name}.{os.getpid()}")  # several processes may be at it
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in whole), encoding="utf-8")
    part.replace(file)


def as_held_out(pair: dict[str, str], tokenizer: Any, longest: int) -> HeldOutPair:
    """Return a pair to be scored, cut off after `longest` tokens, of which at most half are the prompt."""
    ids, prompt = tokens_of(pair, tokenizer)
    kept = min(prompt, longest // 2)
    return HeldOutPair(torch.cat([ids[:kept], ids[prompt:]])[:longest], kept)


def packed(stream: Tensor, length: int) -> Tensor:
    """Return a stream of tokens cut into windows, (count, length); the rest at its end is left out."""
    return stream[: len(stream) // length * length].view(-1, length)


def calibration_batches(
    text: CalibrationText, texts: Path, tokenizer: Any, data: Data, protocol: Protocol
) -> list[dict[str, Tensor]]:
    """Return the batches that a start is calibrated on: as many tokens, whatever the text."""
    if text == "train":
        windows = data.windows[: protocol.calibration_windows]
    else:
        source = TextSource(str(texts / OTHER_TEXTS[text]))
        windows = Calibration(source, protocol.calibration_windows, protocol.length).windows(tokenizer)
    return [{"input_ids": part} for part in windows.split(4)]
