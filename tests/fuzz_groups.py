"""What the fuzzer changes, which command reads it, and when a result is provably wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from fuzz_judges import (
    why_no_adapter,
    why_no_conversion,
    why_not_accepted,
    why_not_compared,
    why_not_evaluated,
    why_not_loaded,
    why_other_documents,
)
from fuzz_shop import SMALL, WINDOWS, Shop
from mutations import STRANGE, mutate_bytes, mutate_file, mutate_json
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Trial:
    """One changed input.

    Attributes:
        change: what was changed, in words.
        arguments: the command that reads it.
        judge: says what is wrong with the result of a command that ended well; nothing if it is right.
        forbidden: a file that no command may write, however it ends.
    """

    change: str
    arguments: Sequence[object]
    judge: Callable[[], str]
    forbidden: Path = Path("/nonexistent")


def init(shop: Shop, out: Path, *options: object, model: Path | None = None) -> list[object]:
    """Return the command that makes a small adapter."""
    return ["init", model or shop.model, "--out", out, *SMALL, *options]


def model_weights(shop: Shop, folder: Path, random: Random) -> Trial:
    """The weights of the model."""
    shutil.copytree(shop.model, folder / "model")
    mutate_file(folder / "model" / "model.safetensors", random)
    options = ("--offload", random.choice(["always", "never"]))
    return Trial(
        "weights", init(shop, folder / "a", *options, model=folder / "model"), lambda: why_no_adapter(folder / "a")
    )


def model_files(shop: Shop, folder: Path, random: Random) -> Trial:
    """The small files of the model."""
    shutil.copytree(shop.model, folder / "model")
    file = random.choice([
        "config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ])
    mutate_file(folder / "model" / file, random)
    return Trial(file, init(shop, folder / "a", model=folder / "model"), lambda: why_no_adapter(folder / "a"))


def model_folder(shop: Shop, folder: Path, random: Random) -> Trial:
    """Files beside those of the model, and the index of its shards."""
    model = folder / "model"
    shutil.copytree(shop.model, model)
    change = random.choice(["adapter", "stray file", "pickle", "index", "stale shards", "escape", "lost shard"])
    tensors = load_file(model / "model.safetensors")
    if change == "adapter":
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(shop.adapter / name, model)
    elif change == "stray file":
        name = random.choice(["a.safetensors", "zz.safetensors", "model-old.safetensors", "consolidated.safetensors"])
        save_file({name: 3 * tensor for name, tensor in tensors.items()}, model / name, {"format": "pt"})
    elif change == "pickle":
        torch.save({name: 3 * tensor for name, tensor in tensors.items()}, model / "pytorch_model.bin")
    else:
        shard(model, stale=change == "stale shards")
        index = model / "model.safetensors.index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        if change == "index":
            index.write_text(json.dumps(mutate_json(content, random)), encoding="utf-8")
        elif change == "lost shard":
            next(iter(model.glob("model-0*"))).unlink()
        elif change == "escape":
            moved = next(iter(content["weight_map"].values()))
            (model / moved).rename(folder / moved)
            names = {key: f"../{name}" if name == moved else name for key, name in content["weight_map"].items()}
            index.write_text(json.dumps(content | {"weight_map": names}), encoding="utf-8")

    def judge() -> str:
        return (
            "a file outside the folder was read" if change == "escape" else why_no_adapter(folder / "a", shop.adapter)
        )

    return Trial(change, init(shop, folder / "a", model=model), judge)


def shard(folder: Path, *, stale: bool) -> None:
    """Split the weights of a folder into two shards with an index, beside three older ones if asked for."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names, places = sorted(tensors), {}
    for count, scale in ((3, 3), (2, 1)) if stale else ((2, 1),):
        for number in range(count):
            part = names[number * len(names) // count : (number + 1) * len(names) // count]
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            scaled = {key: tensors[key] * scale if tensors[key].is_floating_point() else tensors[key] for key in part}
            save_file(scaled, folder / name, {"format": "pt"})
            places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def base(kind: str) -> Callable[[Shop, Path, Random], Trial]:
    """Return the group of a base that is quantized already."""

    def make(shop: Shop, folder: Path, random: Random) -> Trial:
        changed = folder / "base"
        shutil.copytree(shop.folder / kind / "base", changed)
        change = random.choice(["model.safetensors"] * 4 + ["config.json", "stale shards", "index"])
        if change in {"stale shards", "index"}:
            shard(changed, stale=change == "stale shards")
            if change == "index":
                mutate_file(changed / "model.safetensors.index.json", random)
        else:
            mutate_file(changed / change, random)
        if random.random() < 0.5:
            arguments = ["check", shop.folder / kind, "--base", changed]
            return Trial(f"check, {change}", arguments, lambda: why_not_accepted(changed, shop.folder / kind / "base"))
        out = folder / "a"
        return Trial(f"init, {change}", init(shop, out, "--base", changed), lambda: why_no_adapter(out))

    return make


def adapter(shop: Shop, folder: Path, random: Random) -> Trial:
    """An adapter that is evaluated."""
    changed, result = folder / "adapter", folder / "result.json"
    shutil.copytree(shop.adapter, changed)
    change = random.choice(["adapter_model.safetensors", "adapter_model.safetensors", "adapter_config.json"])
    mutate_file(changed / change, random)
    arguments = ["evaluate", shop.model, "--adapter", changed, *WINDOWS, "--json", result]
    return Trial(change, arguments, lambda: why_not_evaluated(result) or why_not_loaded(changed, shop))


def trained(shop: Shop, folder: Path, random: Random) -> Trial:
    """A trained adapter, or the one that training started from, that is converted."""
    after, before, out = folder / "trained", folder / "initial", folder / "out"
    shop.trained(after)
    shutil.copytree(shop.adapter, before)
    place = random.choice([after, after, before])
    change = random.choice(["adapter_model.safetensors", "adapter_model.safetensors", "adapter_config.json"])
    mutate_file(place / change, random)
    arguments = ["convert", after, "--initial", before, "--out", out]
    return Trial(f"{place.name}, {change}", arguments, lambda: why_no_conversion(out, after, before))


def sidecar(shop: Shop, folder: Path, random: Random) -> Trial:
    """What is written down of an adapter."""
    changed, result = folder / "adapter", folder / "result.json"
    shutil.copytree(shop.adapter, changed)
    mutate_file(changed / "quailora.json", random)
    arguments = ["evaluate", shop.model, "--adapter", changed, *WINDOWS, "--json", result]
    return Trial("quailora.json", arguments, lambda: why_not_evaluated(result, shop.folder / "evaluated.json"))


def state(shop: Shop, folder: Path, random: Random) -> Trial:
    """The state of an unfinished run."""
    out = folder / "half"
    shutil.copytree(shop.folder / "half.partial", folder / "half.partial")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    file = random.choice(files)
    change = "removed" if random.random() < 0.1 else "changed"
    if change == "removed":
        file.unlink()
    else:
        mutate_file(file, random)
    arguments = init(shop, out, *shop.unfinished_options)
    return Trial(f"{file.name} {change}", arguments, lambda: why_no_adapter(out, shop.folder / "whole"))


def configuration(shop: Shop, folder: Path, random: Random) -> Trial:
    """A YAML file with options, which must not run code."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # as `python -m` does
    ran = folder / "ran"
    (folder / "canary.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Canary: pass\n", encoding="utf-8")
    content = yaml.safe_load((shop.adapter / "config.yaml").read_text(encoding="utf-8"))
    file, change = folder / "run.yaml", random.choice(["values", "values", "bytes", "class"])
    if change == "class":
        place = random.choice(["quantizer", "solver", "recipe", "rank_pattern", "calibration", "out"])
        content[place] = {"class_path": random.choice(["canary.Canary", "canary"]), "init_args": {}}
    elif change == "values":
        content = mutate_json(content, random)
    data = yaml.safe_dump(content).encode()
    file.write_bytes(mutate_bytes(data, random) if change == "bytes" else data)
    arguments = ["init", "--config", file, "--out", folder / "a"]
    return Trial(change, arguments, lambda: why_no_adapter(folder / "a"), ran)


def text(shop: Shop, folder: Path, random: Random) -> Trial:
    """A text to calibrate on."""
    suffix = random.choice([".jsonl", ".jsonl", ".json", ".txt"])
    file = folder / f"text{suffix}"
    records: list[Any] = [json.loads(line) for line in shop.records.read_text(encoding="utf-8").splitlines()]
    if random.random() < 0.5:
        records[random.randrange(20)] = mutate_json(records[0], random)
    data = {
        ".jsonl": "".join(f"{json.dumps(record)}\n" for record in records),
        ".json": json.dumps(records),
        ".txt": "\n".join(str(record.get("text") if isinstance(record, dict) else record) for record in records),
    }[suffix].encode(random.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")
    file.write_bytes(mutate_bytes(data, random) if random.random() < 0.6 else data)
    arguments = init(shop, folder / "a", "--calibration", file)
    return Trial(suffix, arguments, lambda: why_other_documents(file) or why_no_adapter(folder / "a"))


def options(shop: Shop, folder: Path, random: Random) -> Trial:
    """Options at and beyond their limits."""
    os.chdir(folder)
    (folder / "file").write_text("x", encoding="utf-8")
    out = random.choice(["a"] * 12 + ["", ".", "/", "file", "file/below", "a/", "~", "\0", "x" * 300])
    number = random.choice([*STRANGE, 3, 0.5, 10**9, 1e-30, -1e300])
    name = random.choice([
        *("alpha", "alpha", "rank", "seed", "samples", "sequence-length", "memory-limit", "targets", "rank-pattern"),
        *("alpha-pattern", "quantizer.block_size", "solver.damping", "solver.iterations", "device", "dtype", "metric"),
        *("recipe", "calibration", "calibration-fields", "calibration-split", "base", "inputs", "offload"),
    ])
    word = random.choice([
        "lm_head",
        "q_proj",
        "(",
        ".*",
        "cuda",
        "mps",
        "best",
        "1e999B",
        "float16",
        "quantized",
        "always",
    ])
    value = json.dumps(number) if random.random() < 0.6 else word
    if name.endswith("pattern"):
        value = json.dumps({random.choice(["q_proj", "(", "", "x"]): number})
    arguments = init(shop, Path(out) if out else Path(), f"--{name}={value}")
    arguments[3] = out
    expected = shop.adapter if name == "alpha" and out == "a" else None
    return Trial(
        f"--out {out[:20]!r} --{name} {value}", arguments, lambda: why_no_adapter(Path(out), products_of=expected)
    )


def comparison(shop: Shop, folder: Path, random: Random) -> Trial:
    """The finished rows of a comparison that goes on."""
    out = folder / "comparison"
    shutil.copytree(shop.comparison, out)
    files = sorted((out / "rows").glob("*"))
    file = random.choice(files)
    mutate_file(file, random)
    given = ("--recipes", "lorc", "--ranks", "2", "--baselines", "int8", "--window-length", "64", "--windows", "2")
    arguments = ["compare", shop.model, "--out", out, *given, *SMALL[2:]]
    return Trial(file.name, arguments, lambda: why_not_compared(out, shop.comparison))


GROUPS: dict[str, Callable[[Shop, Path, Random], Trial]] = {
    "weights": model_weights,
    "model-files": model_files,
    "model-folder": model_folder,
    "gptq-base": base("gptq"),
    "four-bit-base": base("four-bit"),
    "adapter": adapter,
    "trained": trained,
    "sidecar": sidecar,
    "state": state,
    "yaml": configuration,
    "text": text,
    "options": options,
    "comparison": comparison,
}
"""By name, in the order of the table."""
