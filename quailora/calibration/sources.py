"""What a model is calibrated on: windows of a text, or batches that the caller has made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from .tokens import CalibrationTokens
from .windows import Calibration, CalibrationDtype, of_one_length, random_order


class CalibrationSource(ABC):
    """Gives the tokens that a model is calibrated on, and those that a distillation trains on."""

    @property
    @abstractmethod
    def dtype(self) -> CalibrationDtype:
        """Arithmetic of the pass; see `Calibration`."""

    @property
    @abstractmethod
    def seed(self) -> int:
        """Seed of what is drawn at random."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Number of sequences, and the length of the longest, known before a text is read."""

    @abstractmethod
    def check(self) -> None:
        """Raise a `CalibrationError` if the source has no tokens, as far as that is known without a tokenizer."""

    @abstractmethod
    def tokens(self, tokenizer: Any) -> CalibrationTokens:
        """Return the tokens to calibrate on.

        Args:
            tokenizer: a transformers tokenizer; not used where tokens are there already.

        Raises:
            CalibrationError: if there are too few.
        """

    @abstractmethod
    def training_windows(self, tokenizer: Any, count: int, length: int) -> Int[Tensor, "count length"]:
        """Draw `count` windows to train on, in random order and, where there are fewer, several times.

        Args:
            tokenizer: a transformers tokenizer.
            count: number of windows.
            length: tokens in a window at most; no more than those of calibration.

        Raises:
            CalibrationError: if there are too few tokens.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return what the sidecar of an adapter says of the calibration."""


@final
@dataclass(frozen=True)
class TextCalibration(CalibrationSource):
    """Windows of a text.

    Attributes:
        calibration: which text, and which windows of it.
    """

    calibration: Calibration

    @property
    @override
    def dtype(self) -> CalibrationDtype:
        return self.calibration.dtype

    @property
    @override
    def seed(self) -> int:
        return self.calibration.seed

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.calibration.samples, self.calibration.length

    @override
    def check(self) -> None:
        self.calibration.text.check()

    @override
    def tokens(self, tokenizer: Any) -> CalibrationTokens:
        return CalibrationTokens.of_windows(self.calibration.windows(tokenizer))

    @override
    def training_windows(self, tokenizer: Any, count: int, length: int) -> Int[Tensor, "count length"]:
        return self.calibration.other_windows(tokenizer, count, length)

    @override
    def described(self) -> dict[str, Any]:
        return asdict(self.calibration)


@final
@dataclass(frozen=True, eq=False)
class BatchCalibration(CalibrationSource):
    """Tokens in batches that the caller has made, such as those of a data loader.

    Attributes:
        given: the tokens.
        arithmetic: arithmetic of the pass; see `Calibration`.
        draw: seed of what is drawn at random.
    """

    given: CalibrationTokens
    arithmetic: CalibrationDtype = "auto"
    draw: int = 0

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, Any]]) -> BatchCalibration:
        """Return the tokens of batches; see `CalibrationTokens.of_batches`."""
        return cls(CalibrationTokens.of_batches(batches))

    @property
    @override
    def dtype(self) -> CalibrationDtype:
        return self.arithmetic

    @property
    @override
    def seed(self) -> int:
        return self.draw

    @property
    @override
    def size(self) -> tuple[int, int]:
        return len(self.given.sequences), self.given.longest

    @override
    def check(self) -> None:
        """Nothing is left to check, since an object without tokens cannot be made."""

    @override
    def tokens(self, tokenizer: Any) -> CalibrationTokens:
        del tokenizer
        return self.given

    @override
    def training_windows(self, tokenizer: Any, count: int, length: int) -> Int[Tensor, "count length"]:
        del tokenizer
        rows = of_one_length(self.given.sequences, length)
        return rows[random_order(len(rows), count, self.draw + 1)]

    @override
    def described(self) -> dict[str, Any]:
        return {"batches": self.given.digest, "sequences": len(self.given.sequences), "tokens": self.given.tokens}
