"""How a run trains and is scored, and which run it is: everything that a result depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

CalibrationText = Literal["train", "wikitext2", "c4"]


@dataclass(frozen=True)
class Protocol:
    """What all runs of one file of results share.

    Attributes:
        name: name of the protocol, under which its results are kept.
        model: hub name or folder of the full-precision model, or "demo" for SmolLM2-135M-Instruct.
        steps: updates of a training.
        batch: packed windows in a step.
        length: tokens in a packed window of training.
        held_out: pairs of the data that are never trained on.
        longest: tokens after which a held-out pair is cut off.
        wikitext_windows: windows of 512 tokens of the WikiText-2 test set, which show what was forgotten.
        calibration_windows: windows of `length` tokens that starts are calibrated on.
        evaluate_every: steps between two scores on the held-out pairs in runs with a curve.
        ranks: the ranks of the experiment, smallest first.
        rates: learning rates that every arm is tried with at first, a factor of two apart.
        seeds: seeds of the order of the batches and of the fresh directions.
    """

    name: str = "reference"
    model: str = "demo"
    steps: int = 120
    batch: int = 2
    length: int = 256
    held_out: int = 100
    longest: int = 512
    wikitext_windows: int = 8
    calibration_windows: int = 128
    evaluate_every: int = 20
    ranks: tuple[int, ...] = (8, 16, 64)
    rates: tuple[float, ...] = (4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3, 1.28e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


REFERENCE = Protocol()
SMOKE = Protocol("smoke", steps=3, held_out=4, longest=64, wikitext_windows=1, calibration_windows=16, evaluate_every=2,
                 ranks=(4,), rates=(4e-4, 8e-4), seeds=(0,))  # fmt: skip
LARGE = Protocol("large", steps=1000, batch=16, length=512, calibration_windows=256, evaluate_every=100,
                 rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3))  # fmt: skip

PROTOCOLS = {protocol.name: protocol for protocol in (REFERENCE, SMOKE, LARGE)}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: name of an arm, see `arms.ARMS`.
        rank: rank that is trained.
        rate: peak learning rate.
        seed: seed of the order of the batches and of the fresh directions.
        calibration: the text that the start is calibrated on.
        curve: whether the held-out pairs are scored during training, too.
    """

    arm: str
    rank: int = 16
    rate: float = 1.6e-3
    seed: int = 0
    calibration: CalibrationText = "train"
    curve: bool = False

    @property
    def key(self) -> str:
        """Name of the run, which is unique in a protocol whether or not a curve is drawn."""
        text = "" if self.calibration == "train" else f"-{self.calibration}"
        return f"{self.arm}{text}-r{self.rank}-{self.rate:g}-s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Return the run for JSON."""
        return asdict(self)

    def at(self, **changes: Any) -> Run:
        """Return the run with some of its choices changed."""
        return replace(self, **changes)
