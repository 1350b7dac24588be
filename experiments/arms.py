"""The arms of the experiment: which base, which start, and how the start is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quailora.families import AdaLora, Dora, Family, FourierFT, GraLora, Miss, Shira

Base = Literal["full precision", "int8", "nf4", "own"]
Training = Literal[
    "all", "frozen", "slow A", "scaled", "half", "twice", "four times", "recalibrated", "input power", "decay"
]

_FROZEN: dict[Training, float] = {"half": 0.5, "frozen": 1, "twice": 2, "four times": 4}
"""Rank of a start that stays as it is, by how it is trained: so many times the rank of the run."""


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        title: what the tables call it.
        base: the weights under the adapter: "nf4" is bitsandbytes' own with double quantization, and "own" are codes
            of the same format that the recipe has chosen.
        recipe: recipe of the start; plain LoRA without one.
        training: "all" trains the factors of the start. "frozen" leaves them as they are, and trains a fresh adapter of
            the same rank beside them. "half" does so with half of the rank for each, and "twice" and "four times" with
            a start of so many times the rank. "slow A" trains the factors of the start with a lower rate for A.
            "scaled" makes A larger and B smaller before training, by the same factor, and "input power" splits the
            start by the inputs of each layer. "decay" lets the factors decay towards the start. "recalibrated" fits
            them again after each third of the training.
        family: kind of adapter; LoRA if None.
        size: what the family has in place of the rank of LoRA that is as large, where that is another number.
    """

    title: str
    base: Base = "nf4"
    recipe: str | None = None
    training: Training = "all"
    family: Family | None = None
    size: int | None = None

    def start_rank(self, rank: int) -> int:
        """Return the rank of the start in a run of a rank."""
        if self.size is not None:
            return self.size
        return int(rank * _FROZEN.get(self.training, 1))

    def trained_rank(self, rank: int) -> int:
        """Return how many directions are trained in a run of a rank."""
        if self.size is not None:
            return self.size
        return rank // 2 if self.training == "half" else rank

    @property
    def keeps_its_start(self) -> bool:
        """Whether the start stays as it is beside a fresh adapter."""
        return self.training in _FROZEN


ARMS = {
    "full": Arm("full precision, LoRA", "full precision"),
    "int8": Arm("int8, LoRA", "int8"),
    "qlora": Arm("NF4, QLoRA"),
    "loftq": Arm("NF4, `loftq`", "own", "loftq"),
    "quailora": Arm("NF4, `quailora`", recipe="quailora"),
    "best": Arm("NF4, `best`", recipe="best"),
    "distilled": Arm("NF4, `distilled`", recipe="distilled"),
    "best-joint": Arm("NF4, `best-joint`", "own", "best-joint"),
    "distilled-joint": Arm("NF4, `distilled-joint`", "own", "distilled-joint"),
    "loftq-frozen": Arm("NF4, `loftq`, start frozen", "own", "loftq", "frozen"),
    "quailora-frozen": Arm("NF4, `quailora`, start frozen", recipe="quailora", training="frozen"),
    "best-frozen": Arm("NF4, `best`, start frozen", recipe="best", training="frozen"),
    "distilled-frozen": Arm("NF4, `distilled`, start frozen", recipe="distilled", training="frozen"),
    "best-joint-frozen": Arm("NF4, `best-joint`, start frozen", "own", "best-joint", "frozen"),
    "distilled-joint-frozen": Arm("NF4, `distilled-joint`, start frozen", "own", "distilled-joint", "frozen"),
    "best-half": Arm("NF4, `best`, half frozen", recipe="best", training="half"),
    "best-twice": Arm("NF4, `best` of twice the rank, frozen", recipe="best", training="twice"),
    "best-joint-twice": Arm("NF4, `best-joint` of twice the rank, frozen", "own", "best-joint", "twice"),
    "best-joint-four": Arm("NF4, `best-joint` of four times the rank, frozen", "own", "best-joint", "four times"),
    "distilled-joint-twice": Arm("NF4, `distilled-joint` of twice the rank, frozen", "own", "distilled-joint", "twice"),
    "best-slow-a": Arm("NF4, `best`, lower rate for A", recipe="best", training="slow A"),
    "best-scaled": Arm("NF4, `best`, A larger and B smaller", recipe="best", training="scaled"),
    "best-input-power": Arm("NF4, `best`, split by inputs", recipe="best", training="input power"),
    "best-decay": Arm("NF4, `best`, decay towards the start", recipe="best", training="decay"),
    "best-recalibrated": Arm("NF4, `best`, recalibrated", recipe="best", training="recalibrated"),
}

_FAMILIES: dict[str, tuple[str, Family, int | None]] = {
    "dora": ("DoRA", Dora(), None),
    "adalora": ("AdaLoRA", AdaLora(total_step=120, target_r=8, tinit=20, tfinal=40), None),
    "shira": ("SHiRA", Shira(), None),
    "gralora": ("GraLoRA", GraLora(), None),
    "miss": ("MiSS", Miss(), 32),
    "fourierft": ("FourierFT", FourierFT(n_frequency=23_000), None),
}
"""Families other than LoRA, about as large as LoRA of rank 16: title, family, and rank where that is another number."""

for _name, (_title, _family, _size) in _FAMILIES.items():
    ARMS[_name] = Arm(f"{_title}, stock start", family=_family, size=_size)
    ARMS[f"{_name}-best"] = Arm(f"{_title}, `best`", recipe="best", family=_family, size=_size)

FAMILY_ARMS = tuple(name for name, arm in ARMS.items() if arm.family is not None)
"""The arms of families other than LoRA."""
