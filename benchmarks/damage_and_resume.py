"""Kill runs at random moments and damage their state, go on until they are complete, and compare the adapters.

    python benchmarks/damage_and_resume.py --runs 20
    python benchmarks/damage_and_resume.py --runs 20 --moment end
    python benchmarks/damage_and_resume.py --runs 20 --damage_state true

Prints how many adapters are identical bit by bit to that of a run left alone. Every run overwrites an older adapter,
so that the last move, folder for folder, is among what is killed; `--moment end` kills around it only. `--damage_state`
also flips a bit of a random file of the state before the run goes on; a kill that leaves no state is tried again. Runs
are forks of one process that has imported everything, so that nearly all moments lie in the work itself;
`kill_and_resume.py` kills commands. The model is random.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from jsonargparse import auto_cli

from quailora import RECIPES, Calibration, LoraScaling, Output, initialize_model
from quailora.models.locate import resolve

Moment = Literal["any", "end"]


def random_model(folder: Path) -> None:
    """Save a random Llama of six blocks with the demo's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def work(model: Path, out: Path, inputs: str, seed: int) -> None:
    """Do one run, in a process of its own."""
    logging.disable(logging.WARNING)
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 # for the rest of the process
    torch.set_num_threads(1)
    recipe = replace(RECIPES["quailora"], inputs=inputs)
    calibration = Calibration(samples=8, sequence_length=256, seed=seed)
    initialize_model(model, recipe, calibration, scaling=LoraScaling(8), out=Output(out, overwrite=True))


def content(adapter: Path) -> bytes:
    """Return what PEFT reads of an adapter."""
    return b"".join((adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))


def damage(state: Path, draw: random.Random) -> bool:
    """Flip a bit in one of the files of a state; return whether there was one."""
    files = sorted(
        file for file in state.rglob("*") if file.suffix in {".safetensors", ".json"} and file.stat().st_size
    )
    if not files:
        return False
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return True


def wait(process: multiprocessing.context.ForkProcess, out: Path, moment: Moment, seconds: float) -> None:
    """Let a run go on for a while: of its time, or of the time after it has begun to write the result."""
    if moment == "any":
        time.sleep(seconds)
        return
    while process.is_alive() and not out.with_name(f".{out.name}.new").exists():
        time.sleep(0.0005)
    time.sleep(seconds / 20)


def main(
    runs: int = 20, moment: Moment = "any", damage_state: bool = False, inputs: str = "full", seed: int = 0
) -> None:
    """Print the counts.

    Args:
        runs: runs to kill.
        moment: "any", or the "end" only: from when the result is being written.
        damage_state: flip a bit of the state before a run goes on.
        inputs: as in `quailora init`.
        seed: seed of the moments.
    """
    draw, forks, count = random.Random(seed), multiprocessing.get_context("fork"), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        model, alone, older, out = (Path(name) / part for part in ("model", "alone", "older", "killed"))
        random_model(model)

        def start(place: Path, drawn: int = 0) -> multiprocessing.context.ForkProcess:
            process = forks.Process(target=work, args=(model, place, inputs, drawn))
            process.start()
            return process

        start(older, 1).join()
        began = time.perf_counter()
        start(alone).join()
        seconds = time.perf_counter() - began
        expected = content(alone)
        while count["runs"] < runs:
            shutil.copytree(older, out)
            process = start(out)
            wait(process, out, moment, draw.uniform(0.0, 1.0) * seconds)
            count["killed"] += process.is_alive()
            process.kill()
            process.join()
            kept = out if out.exists() else out.with_name(f".{out.name}.old")
            count["whole"] += content(kept) in {expected, content(older)}
            if damage_state and not damage(out.with_name(f"{out.name}.partial"), draw):
                count["again"] += 1  # killed before there was any state, or after
                start(out).join()
                shutil.rmtree(out)
                continue
            count["runs"] += 1
            start(out).join()
            count["same"] += content(out) == expected
            count["left"] += len(list(Path(name).iterdir())) - 4
            shutil.rmtree(out)
    print(f"{inputs} inputs: {count['same']} of {runs} adapters identical to the uninterrupted one")
    attempts = count["runs"] + count["again"]
    damaged = count["runs"] if damage_state else 0
    print(f"{count['killed']} of {attempts} runs of {seconds:.1f} s killed, {damaged} states with a flipped bit")
    print(f"{count['whole']} of {attempts} times the old or the new adapter was complete after the kill")
    print(f"{count['left']} files left over at the end")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
