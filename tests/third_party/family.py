"""LoRA whose `lora_A` are the leading directions of the inputs, as in EVA, with the best `lora_B` for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from quailora import Family
from quailora.families import Change


@final
@dataclass(frozen=True)
class Inputwise(Family):
    """`C = E V^T V` for the leading eigenvectors `V` of `H`, by PEFT's LoRA.

    Attributes:
        skip: leading directions that are left out.
    """

    name: ClassVar[str] = "inputwise"
    peft_type: ClassVar[str] = "LORA"
    default_rank: ClassVar[int | None] = 8
    scales: ClassVar[bool] = True

    skip: int = 0

    def shapes(self, shape, rank):
        return {"lora_A.weight": (rank, shape[1]), "lora_B.weight": (shape[0], rank)}

    def solve(self, objective, rank):
        identity = torch.eye(objective.error.shape[1], dtype=torch.float64)
        _, vectors = torch.linalg.eigh(objective.metric.product(identity))
        lora_A = vectors.flip(1)[:, self.skip : self.skip + rank].T
        return {"lora_A.weight": lora_A, "lora_B.weight": objective.error.double() @ lora_A.T}

    def change(self, parameters, base=None):
        return Change(parameters["lora_B.weight"] @ parameters["lora_A.weight"])

    def config(self, sizes):
        return {"r": sizes["r"], "lora_alpha": sizes["lora_alpha"]}

    def scale(self, alpha, rank, *, rslora=False):
        return alpha / rank

    def stored(self, parameters, scale):
        return {**parameters, "lora_B.weight": parameters["lora_B.weight"] / scale}
