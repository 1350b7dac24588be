"""Bases that the package auto-round rounds (Cheng et al., 2023, arXiv 2309.05516), to compare ours with.

The package is no part of this environment, since it is needed for nothing else: `pip install auto-round==0.16.1`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quailora import Uniform
from quailora.models.layers import all_layers
from quailora.models.load import LoadedModel


def shuffled_windows(text: str, tokenizer: Any, samples: int, length: int, seed: int) -> Int[Tensor, "samples length"]:
    """Return windows of a text in random order.

    Raises:
        ValueError: if the text does not fill as many.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    order = list(range(len(ids) // length))
    if len(order) < samples:
        raise ValueError(f"Expected a text of {samples} windows of {length} tokens, got {len(order)}.")
    random.Random(seed).shuffle(order)
    return torch.tensor([ids[number * length : (number + 1) * length] for number in order[:samples]])


def auto_rounded(
    loaded: LoadedModel, windows: Int[Tensor, "samples length"], quantizer: Uniform, steps: int, tokens: int, seed: int
) -> dict[str, Tensor]:
    """Return the weights of all linear layers as auto-round rounds them, dequantized, in float32.

    All that is no argument here is as the package has it: signed gradient steps on roundings and on the ends of each
    group, with a rate of `1 / steps` that falls to zero, in bfloat16.

    Args:
        loaded: the model, which is quantized in place.
        windows: token ids to train on.
        quantizer: bits, group size, and whether levels are symmetric.
        steps: updates of each block.
        tokens: tokens in a step, as whole windows.
        seed: seed of the package.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if the weights are not of this format.
    """
    from auto_round import AutoRound

    batch = max(1, tokens // windows.shape[1])
    # The shape of the package's own data loader: batches of windows, without a mask of padding, of which there is none.
    dataset = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(windows, batch)]
    rounder = AutoRound(
        loaded.model,
        loaded.tokenizer,
        bits=quantizer.bits,
        group_size=quantizer.group_size,
        sym=quantizer.symmetric,
        iters=steps,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=batch,
        seed=seed,
        dataset=dataset,
        device_map=0 if torch.cuda.is_available() else "cpu",
        enable_torch_compile=False,
        quant_lm_head=False,
    )
    names = list(all_layers(loaded.model))
    model, _ = rounder.quantize()
    modules = dict(model.named_modules())
    return {name: decoded(name, modules[name], quantizer) for name in names}


def decoded(name: str, module: Any, quantizer: Uniform) -> Float[Tensor, "out_features in_features"]:
    """Return `scale * (code - zero point)` of a layer, with the scales and zero points that would be exported.

    Raises:
        ValueError: if the weights are not of this format.
    """
    # The package leaves the weight in the dtype of the model, which is bfloat16. That is less precise than a scale of
    # float16 times a small integer, which is what loads from a checkpoint.
    rows, columns = module.weight.shape
    size = quantizer.group_size or columns
    weight = module.weight.detach().cpu().float()
    groups = torch.nn.functional.pad(weight, (0, -columns % size)).reshape(rows, -1, size)
    scale = module.scale.detach().cpu().float().reshape(rows, -1, 1)
    zero = torch.as_tensor(module.zp).detach().cpu().float()
    zero = zero.reshape(rows, -1, 1) if zero.numel() > 1 else zero
    levels = (groups / scale).round()
    codes = (levels + zero).reshape(rows, -1)[:, :columns]
    off = ((levels * scale - groups) / scale).abs().max().item()
    if codes.min() < 0 or codes.max() >= 2**quantizer.bits or off > 0.1:
        raise ValueError(f"{name} is not rounded to {quantizer.bits} bits in groups of {size}: {off:.2f} steps off.")
    return (levels * scale).reshape(rows, -1)[:, :columns].contiguous()
