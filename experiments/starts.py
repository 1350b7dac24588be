"""Make the start of an arm once, in a folder that all of its runs load."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout
from transformers import AutoTokenizer

from quailora import LoraScaling, Output, initialize_model
from quailora.models.locate import resolve

from .arms import Arm
from .data import Data, calibration_batches
from .protocol import CalibrationText, Protocol


def start_folder(
    arm: Arm, rank: int, calibration: CalibrationText, data: Data, texts: Path, folder: Path, protocol: Protocol
) -> Path | None:
    """Return the folder of the start of an arm, which is made if it is not there; None for plain LoRA.

    Args:
        arm: the arm.
        rank: rank of the run.
        calibration: the text to calibrate on.
        data: the data of the experiment.
        texts: folder of the texts.
        folder: the folder in which the starts of all arms are.
        protocol: how much is calibrated on.
    """
    place = start_place(arm, rank, calibration, folder)
    if place is None or arm.recipe is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # another process may be making it
        if not place.exists():
            tokenizer = AutoTokenizer.from_pretrained(resolve(protocol.model))
            initialize_model(
                protocol.model,
                arm.recipe,
                calibration_batches(calibration, texts, tokenizer, data, protocol),
                scaling=LoraScaling(arm.start_rank(rank)),
                family=arm.family,
                out=Output(place, save_base=arm.base == "own"),
            )
    return place


def start_place(arm: Arm, rank: int, calibration: CalibrationText, folder: Path) -> Path | None:
    """Return the folder of the start of an arm, whether or not it is there; None for plain LoRA."""
    if arm.recipe is None:
        return None
    family = "" if arm.family is None else f"{arm.family.name}-"
    return folder / f"{family}{arm.recipe}-{calibration}-r{arm.start_rank(rank)}"


def being_made(place: Path) -> bool:
    """Whether another process is making a start."""
    lock = FileLock(f"{place}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False
