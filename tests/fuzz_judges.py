"""When the result of a command that ended well is provably wrong: each judge says why, or nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fuzz_shop import Shop
from safetensors.torch import load_file
from torch import Tensor


def why_no_adapter(folder: Path, expected: Path | None = None, *, products_of: Path | None = None) -> str:
    """Judge an adapter that a run has written.

    Args:
        folder: the adapter.
        expected: an adapter that it has to equal bit for bit.
        products_of: an adapter whose corrections it has to have, with any scaling.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad or not tensors:
        return f"{bad[0]} is not finite" if bad else "no tensors"
    if any(".base_layer." in name or "lora_A.default" in name for name in tensors):
        return "layers inside another adapter"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for layer in report["layers"]:
        none, error, least = layer["error_none"], layer["error"], layer["error_optimal"]
        if not 0 <= least <= 1.001 * error + 1e-9 * none or not error <= 1.001 * none < math.inf:
            return f"errors {none}, {error}, {least} of {layer['name']}"
    if products_of is not None:
        found, wanted = products(folder), products(products_of)
        far = [name for name in wanted if not near(found.get(name), wanted[name])]
        return f"another correction of {far[0]}" if far else ""
    return "" if expected is None else difference(tensors, load_file(expected / "adapter_model.safetensors"))


def products(folder: Path) -> dict[str, Tensor]:
    """Return `s lora_B lora_A` of each layer of an adapter, for one rank and one alpha."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    scale = config["lora_alpha"] / config["r"]
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {stem: scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] for stem in stems}


def near(found: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether a matrix is another one up to rounding."""
    if found is None or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= tolerance * (expected.norm() + 1e-12))


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return which tensors are not those of another file, or nothing."""
    names = [name for name in {**found, **expected} if not same(found.get(name), expected.get(name))]
    return f"{len(names)} tensors differ, {names[0]} first" if names else ""


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two tensors are the same bit for bit."""
    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def quantized_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in the blocks of a checkpoint, from the files that its index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))  # transformers loads all that is in them
        found = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    else:
        found = load_file(single)
    return {name: tensor for name, tensor in found.items() if ".self_attn." in name or ".mlp." in name}


def why_not_accepted(base: Path, original: Path) -> str:
    """Judge a base that was said to be the one of an adapter.

    Tensors of no layer of the model count nothing, indices of groups that are in order may be left out, and numbers may
    be stored in another floating-point type.
    """
    found, expected = (
        {name: as_number(tensor) for name, tensor in quantized_tensors(folder).items()} for folder in (base, original)
    )
    implied = {name for name, tensor in expected.items() if name.endswith("g_idx") and bool((tensor.diff() >= 0).all())}
    expected = {name: tensor for name, tensor in expected.items() if name in found or name not in implied}
    return difference({name: tensor for name, tensor in found.items() if name.startswith("model.")}, expected)


def as_number(tensor: Tensor) -> Tensor:
    """Return floating-point numbers in float64, and everything else as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


def why_not_evaluated(result: Path, expected: Path | None = None) -> str:
    """Judge perplexities: finite, and those of another result if there is one."""
    found = perplexities(result)
    if not all(map(math.isfinite, found.values())):
        return f"perplexities {found}"
    wanted = found if expected is None else perplexities(expected)
    far = [name for name in wanted if not math.isclose(found.get(name, math.nan), wanted[name], rel_tol=1e-6)]
    return f"{far[0]} is {found.get(far[0])}, not {wanted[far[0]]}" if far else ""


def perplexities(result: Path) -> dict[str, float]:
    """Return the perplexities that `evaluate` wrote down."""
    content = json.loads(result.read_text(encoding="utf-8"))
    return {name: entry["perplexity"] for name, entry in content["results"].items()}


def why_not_loaded(adapter: Path, shop: Shop) -> str:
    """Judge an adapter that was evaluated: stock PEFT has to load every tensor, and none may be missing."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(shop.model), str(adapter))
    there = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    written = load_file(adapter / "adapter_model.safetensors")
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in written.items()}
    return difference(there, whole)  # PEFT keeps the factors in float32


def why_no_conversion(out: Path, trained: Path, before: Path) -> str:
    """Judge the result of `convert`: it has to be what the trained adapter has beyond the initial one."""
    found, after, start = products(out), products(trained), products(before)
    if not all(bool(matrix.isfinite().all()) for matrix in found.values()):
        return "not finite"
    if found.keys() != after.keys() or found.keys() != start.keys():
        return f"{len(found)} layers from {len(after)} and {len(start)}"
    scale = {name: (after[name].norm() + start[name].norm()).item() for name in found}
    far = [name for name in found if not (found[name] - after[name] + start[name]).norm() <= 1e-5 * scale[name]]
    return f"another change of {far[0]}" if far else ""


def why_other_documents(file: Path) -> str:
    """Judge a text that was calibrated on: the documents have to be what a strict reader finds in the file."""
    from quailora.calibration.text import TextSource

    try:
        expected = as_far_as_read(strict_documents(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"read although {type(error).__name__}: {error}"
    found = as_far_as_read(document for document in TextSource(str(file)).documents() if document.strip())
    return "" if found == expected else f"read {found[:1]!r:.60} for {expected[:1]!r:.60}"


def as_far_as_read(documents: Iterator[str]) -> list[str]:
    """Return the documents up to the 64 characters for each needed token that calibration reads."""
    read, characters = [], 64 * 4 * 32
    for document in documents:
        read.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return read


def strict_documents(file: Path) -> Iterator[str]:
    """Yield the documents of a file; raise where it is not what its name says."""
    data = file.read_bytes()
    marked = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    if file.suffix == ".jsonl" and data[:2] not in marked:  # line by line: calibration stops reading when it has enough
        lines = (line.decode() for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        yield from texts_of(json.loads(line) for line in lines if line.strip())
        return
    content = data.decode(marked.get(data[:2], "utf-8-sig"))
    if file.suffix == ".txt":
        yield io.StringIO(content, newline=None).read()
        return
    lines = (line for line in content.split("\n") if line.strip())
    yield from texts_of(json.loads(content) if file.suffix == ".json" else map(json.loads, lines))


def texts_of(records: Iterable[Any]) -> Iterator[str]:
    """Yield the texts of records; raise where one has no text."""
    for record in records:
        text = record["text"]
        if text is not None and not isinstance(text, str):
            raise TypeError("a field that is no text")
        if text and text.strip():
            yield text


def why_not_compared(found: Path, expected: Path) -> str:
    """Judge a comparison that went on from changed rows: its table has to be that of the one left alone."""
    tables = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"] for folder in (found, expected)]
    rows = [{row["name"]: row["scores"] for row in table} for table in tables]
    far = [name for name in rows[1] if not close(rows[0].get(name), rows[1][name])]
    return f"another row {far[0]}" if far else ""


def close(found: Any, expected: Any) -> bool:
    """Return whether two nests of numbers are equal up to rounding."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(close(found[k], expected[k]) for k in found)
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(close, found, expected))
    return isinstance(found, (int, float)) and math.isclose(found, expected, rel_tol=1e-6)
