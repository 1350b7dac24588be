"""Load the base and the start of a run into stock PEFT, and train them by transformers' Trainer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from quailora import LoraScaling, RecalibrationCallback
from quailora.families import Family
from quailora.models.load import resolve_device
from quailora.models.locate import resolve

from .arms import Arm
from .data import Data
from .protocol import Protocol, Run
from .scoring import held_out_losses, rounds
from .ways import optimizer_of, split

_WARM_UP = 0.05  # share of the steps
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The layers of SmolLM2 that get an adapter; not every family of PEFT knows the name all-linear."""


def model_of(run: Run, arm: Arm, start: Path | None, protocol: Protocol) -> Any:
    """Return the `PeftModel` that a run trains, with only its trained factors requiring gradients."""
    base = base_of(arm, start, protocol)
    set_seed(run.seed)
    rank = arm.trained_rank(run.rank)
    if start is None and arm.family is not None:
        return get_peft_model(base, stock_config(arm.family, rank))
    fresh = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if start is None:
        return get_peft_model(base, fresh)
    if arm.keeps_its_start:
        return frozen(base, start, fresh)
    return PeftModel.from_pretrained(base, start, is_trainable=True)


def stock_config(family: Family, rank: int) -> Any:
    """Return PEFT's configuration of an adapter of a family that starts as PEFT starts it."""
    sizes = LoraScaling(rank).as_config()
    arguments = {name: value for name, value in family.config(sizes).items() if not name.startswith("init_")}
    if family.name == "adalora":
        arguments["init_r"] = rank
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[family.peft_type]
    return config(**arguments, target_modules=TARGETS, task_type="CAUSAL_LM")


class Pruning(TrainerCallback):
    """Lets AdaLoRA prune directions after each step, as its authors do."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, _: Any, state: Any, __: Any, **___: Any) -> None:
        """Note how much each direction matters, from its gradients, and prune."""
        self.model.base_model.update_and_allocate(state.global_step + 1)


def base_of(arm: Arm, start: Path | None, protocol: Protocol) -> Any:
    """Return the model under the adapter, ready for training; on the GPU where there is one."""
    device = resolve_device("auto")
    if arm.base == "own":
        assert start is not None
        base = AutoModelForCausalLM.from_pretrained(start / "base", dtype=torch.float32, device_map=device)
        return kept_as_it_is(base).train()
    config = {
        "full precision": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    }[arm.base]
    base = AutoModelForCausalLM.from_pretrained(
        resolve(protocol.model), quantization_config=config, dtype=torch.float32, device_map=device
    )
    return kept_as_it_is(base).train()


def kept_as_it_is(base: Any) -> Any:
    """Return a model whose 4-bit layers stay as they are when the model is run in evaluation mode.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks 4-bit weights for good at the first pass in evaluation mode.
    Gradients through repacked weights are wrong, so a model that has been evaluated could not be trained any more.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def frozen(base: Any, start: Path, fresh: LoraConfig) -> Any:
    """Return a model with the start as an adapter that is not trained, and a fresh adapter beside it."""
    model = PeftModel.from_pretrained(base, start, adapter_name="start")
    model.add_adapter("default", fresh)
    model.base_model.set_adapter(["start", "default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".default." in name)
    return model


class Watch(TrainerCallback):
    """Notes the seconds of each step, and the loss on the held-out pairs every so many steps.

    Attributes:
        seconds: seconds of each step.
        curve: `[step, loss]`, the mean over pairs in nats a token.
    """

    def __init__(self, model: Any, data: Data, every: int | None) -> None:
        self.model, self.data, self.every = model, data, every
        self.seconds: list[float] = []
        self.curve: list[list[float]] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
        """Stop the clock, and score."""
        self.seconds.append(time.perf_counter() - self._began)
        if self.every and state.global_step % self.every == 0:
            losses = held_out_losses(self.model, self.data.held_out)["all"]
            self.curve.append([state.global_step, round(fmean(losses), 5)])


@dataclass(frozen=True)
class Training:
    """What a training has shown.

    Attributes:
        online: loss of each batch before its update, in nats a token.
        gradient_norms: norm of the gradient of each step, before it is clipped.
        seconds: median seconds of a step.
        memory: in bytes, memory of the process at the end, or the most that was used of a GPU.
        curve: see `Watch`.
    """

    online: list[float]
    gradient_norms: list[float]
    seconds: float
    memory: int
    curve: list[list[float]]


def train(model: Any, run: Run, arm: Arm, data: Data, protocol: Protocol, scratch: Path) -> Training:
    """Train a model in place, and return what the training has shown."""
    watch = Watch(model, data, protocol.evaluate_every if run.curve else None)
    arguments = TrainingArguments(
        str(scratch),
        per_device_train_batch_size=protocol.batch,
        max_steps=protocol.steps,
        learning_rate=run.rate,
        lr_scheduler_type="linear",
        warmup_steps=round(_WARM_UP * protocol.steps),
        max_grad_norm=1.0,
        bf16=rounds(next(model.parameters()).device),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=run.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    split(model, arm, data.windows)
    callbacks: list[Any] = [watch]
    if arm.family is not None and arm.family.name == "adalora":
        callbacks.append(Pruning(model))
    if arm.training == "recalibrated":
        callbacks.append(recalibration(model, data, protocol))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(data.windows),
        optimizers=(optimizer_of(model, run, arm), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Training(
        [round(float(entry["loss"]), 5) for entry in steps],
        [round(float(entry["grad_norm"]), 4) for entry in steps],
        round(median(watch.seconds), 3),
        torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss,
        watch.curve,
    )


def recalibration(model: Any, data: Data, protocol: Protocol) -> RecalibrationCallback:
    """Return the callback that fits the adapter again after each third of the training, on its latest batches."""
    every = max(1, protocol.steps // 3)
    return RecalibrationCallback(
        model, every, weights=resolve(protocol.model), batches=min(every, len(data.windows) // protocol.batch)
    )


class Windows(torch.utils.data.Dataset):
    """Packed windows as the Trainer reads them."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}
