"""Random changes of valid inputs: of bytes, of JSON, of tensors. All is drawn from the generator that is given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**40,
    1e300,
    1e-300,
    math.nan,
    "",
    "x",
    "/",
    "é\u2028",
    [],
    [1],
    {},
)
"""Values of every JSON type, to put where another one belongs."""


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return data with some bits flipped, or a part cut off, blanked, repeated or filled in."""
    changed, size = bytearray(data), len(data)
    place = random.randrange(size + 1)
    length = random.choice([1, 4, 64, max(1, size // 3)])
    kind = random.choice(["flip", "flip", "cut", "end", "start", "blank", "repeat", "insert", "empty"])
    if kind == "flip" and size:
        for _ in range(random.choice([1, 1, 8, 64])):
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del changed[place : place + length]
    elif kind == "end":
        del changed[place:]
    elif kind == "start":
        del changed[:place]
    elif kind == "blank":
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    elif kind == "repeat":
        changed[place:place] = changed[place : place + length]
    elif kind == "insert":
        changed[place:place] = random.randbytes(length)
    elif kind == "empty":
        changed.clear()
    return bytes(changed)


def mutate_json(content: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one entry removed, renamed, doubled, or replaced by a strange one."""
    copy = json.loads(json.dumps(content))
    spots = list(_spots(copy))
    if not spots or random.random() < 0.05:
        return random.choice(STRANGE)
    container, key = random.choice(spots)
    kind = random.choice(["remove", "rename", "strange", "strange", "wrap", "number", "text"])
    value = container[key]
    if kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif kind == "wrap":
        container[key] = [value]
    elif kind == "number" and isinstance(value, (int, float)):
        container[key] = random.choice([value + 1, -value, value * 1000, value / 3])
    elif kind == "text" and isinstance(value, str):
        container[key] = random.choice([value[1:], f"{value}x", value.upper(), f"{value}\"\n'", f"../{value}"])
    else:
        container[key] = random.choice(STRANGE)
    return copy


def _spots(content: Any) -> Any:
    """Yield every container and key in a JSON value."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(pairs):
        yield content, key
        yield from _spots(value)


def mutate_tensors(tensors: dict[str, Tensor], random: Random) -> dict[str, Tensor]:
    """Return tensors with one of them removed, renamed, cut, turned, retyped, scaled, or made partly not finite."""
    name = random.choice(sorted(tensors))
    changed, tensor = dict(tensors), tensors[name]
    kind = random.choice([
        "remove",
        "rename",
        "cut",
        "turn",
        "type",
        "scale",
        "nan",
        "infinite",
        "entry",
        "extra",
        "swap",
    ])
    if kind in {"nan", "infinite"} and tensor.is_floating_point() and tensor.numel():
        flat = tensor.clone().flatten()
        flat[random.randrange(len(flat))] = math.nan if kind == "nan" else random.choice([math.inf, -math.inf])
        changed[name] = flat.view(tensor.shape)
    elif kind == "scale":
        changed[name] = tensor * 3
    elif kind == "entry" and tensor.numel():
        flat = tensor.clone().flatten()
        flat[random.randrange(len(flat))] = random.choice([0, 1, 100])
        changed[name] = flat.view(tensor.shape)
    elif kind == "cut" and tensor.ndim:
        changed[name] = tensor[: len(tensor) // 2].clone()
    elif kind == "turn" and tensor.ndim == 2:
        changed[name] = tensor.T.contiguous()
    elif kind == "type":
        changed[name] = tensor.to(random.choice([torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool]))
    elif kind == "rename":
        changed[f"x.{name}"] = changed.pop(name)
    elif kind == "extra":
        changed[f"extra.{name}"] = tensor.clone()
    elif kind == "swap":
        other = random.choice(sorted(tensors))
        changed[name], changed[other] = tensors[other].clone(), tensor.clone()
    else:
        del changed[name]
    return changed


def mutate_file(path: Path, random: Random) -> None:
    """Change a file in the way of its kind, or as bytes."""
    if path.suffix == ".safetensors" and random.random() < 0.6:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(mutate_tensors(load_file(path), random), path, metadata)
    elif path.suffix == ".json" and random.random() < 0.7:
        path.write_text(json.dumps(mutate_json(json.loads(path.read_text(encoding="utf-8")), random)), encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), random))
