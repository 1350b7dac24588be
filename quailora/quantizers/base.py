"""The interface of all quantizers, and what a quantized weight can do."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from ..core.statistics import InputStatistics
from ..errors import CalibrationError, ConfigurationError, NumericalError


class QuantizedWeight(ABC):
    """A weight as it is stored: codes, scales and whatever else the format keeps.

    Laws: `dequantize` has the shape and dtype of the weight that was quantized; `nbytes` is the size of `tensors`;
    `rescaled(f).dequantize()` is `dequantize() * spread(f)`, up to the rounding of stored scales; and
    `recoded(c).dequantize()` is `decode(c)`, which does not fall where a code rises.
    """

    layout: ClassVar[str] = "float"
    """Which layers of stock packages compute with the weight: nf4 and int8 of bitsandbytes, gptq, hqq, torchao, or
    plain ones in floating point."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the weight."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that has to be stored to rebuild the weight, packed as it is stored."""

    @abstractmethod
    def dequantize(self) -> Float[Tensor, "out_features in_features"]:
        """Return `Q`, the weight that the quantized layer computes with."""

    def rounded(self) -> frozenset[str]:
        """Return the names of the `tensors` that a sum in floating point decides.

        They differ in their last digits from one number of threads to another, and from one device to another.
        """
        return frozenset()

    def packed(self) -> Mapping[str, Tensor]:
        """Return what a checkpoint that transformers loads has in place of the weight; empty where there is no format.

        Names are those inside the layer, such as `qweight`, or `weight.absmax`.
        """
        return {}

    @property
    def scale_count(self) -> int:
        """How many scales the weight has that may take other values; 0 where none may."""
        return 0

    def spread(self, factors: Float[Tensor, " scales"]) -> Float[Tensor, "out_features in_features"]:
        """Return the number of its scale for each weight; differentiable.

        Args:
            factors: a number for each scale, in the order that `rescaled` takes.

        Raises:
            ConfigurationError: if there are no such scales.
        """
        raise self._fixed("scales", factors)

    def rescaled(self, factors: Float[Tensor, " scales"]) -> QuantizedWeight:
        """Return the weight with the same codes and each scale multiplied by a factor, stored as the format has it.

        Args:
            factors: a factor for each scale.

        Raises:
            ConfigurationError: if there are no such scales.
        """
        raise self._fixed("scales", factors)

    @property
    def code_count(self) -> int:
        """How many codes a weight of the matrix may have; 0 where codes may not change."""
        return 0

    def on(self, device: torch.device) -> QuantizedWeight:
        """Return the weight with its tensors on a device.

        Raises:
            ConfigurationError: if neither codes nor scales may change.
        """
        del device
        raise ConfigurationError(f"A {type(self).__name__} stays where it is.")

    def code_matrix(self) -> UInt8[Tensor, "out_features in_features"]:
        """Return the code of each weight: levels are numbered from the lowest, 0, to the highest, `code_count - 1`.

        Raises:
            ConfigurationError: if codes may not change.
        """
        raise self._fixed("codes")

    def decode(self, codes: Shaped[Tensor, "out_features in_features"]) -> Float[Tensor, "out_features in_features"]:
        """Return the levels of codes, with the scales as they are, float32.

        Args:
            codes: a code for each weight, as `code_matrix` numbers them, on the device of the weight.

        Raises:
            ConfigurationError: if codes may not change.
        """
        raise self._fixed("codes", codes)

    def recoded(self, codes: Shaped[Tensor, "out_features in_features"]) -> QuantizedWeight:
        """Return the weight with the same scales and other codes.

        Args:
            codes: a code for each weight, as `code_matrix` numbers them, on the device of the weight.

        Raises:
            ConfigurationError: if codes may not change.
        """
        raise self._fixed("codes", codes)

    def _fixed(self, what: str, *_: Tensor) -> ConfigurationError:
        """Return the refusal of a format whose codes or scales may not change, whatever was to be done with them."""
        return ConfigurationError(f"The {what} of {type(self).__name__} stay as they are.")

    @final
    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: codes, scales, zero points, second-level scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @final
    @cached_property
    def digest(self) -> str:
        """A short hash of all stored tensors: equal weights in the same format have the same one."""
        return self._hash(frozenset())

    @final
    @cached_property
    def code_digest(self) -> str:
        """A short hash that leaves out the content of what `rounded` names: the same on any device and thread count."""
        return self._hash(self.rounded())

    def _hash(self, without: Collection[str]) -> str:
        # Names, shapes and dtypes are part of the hash, so that the same bytes in another format are another weight.
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            if name not in without:
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @final
    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, everything counted."""
        return 8 * self.nbytes / math.prod(self.shape)


class Quantizer(ABC):
    """Turns a weight matrix into fewer bits.

    Laws:

    - `quantize(w).dequantize()` has `w`'s shape and dtype and is finite; `w` is not changed.
    - Where the scheme is idempotent, quantizing `quantize(w).dequantize()` again changes nothing.
    - A quantizer with `needs_calibration = True` is never worse than rounding to nearest on the same grid, in the
      metric of the statistics it is given.

    A quantizer is either this class or final. Its hyper-parameters are the fields of a frozen dataclass.
    """

    name: ClassVar[str] = ""
    """Short name on the command line and in files; a class without one is named by its import path."""
    needs_calibration: ClassVar[bool] = False
    """Whether `quantize` needs the statistics of the layer's inputs."""

    @final
    def quantize(self, weight: Tensor, statistics: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize a weight.

        Args:
            weight: `W`, shape (out_features, in_features), any float dtype, any device.
            statistics: second moment of the layer's inputs; only calibrated quantizers look at it.

        Raises:
            ValueError: if the weight is not a matrix, or the statistics are of another width.
            NumericalError: if the weight has NaN or infinite entries.
            CalibrationError: if the quantizer is calibrated and there are no statistics.
        """
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"Expected a weight of shape (out_features, in_features), got {tuple(weight.shape)}.")
        check_finite(weight)
        if statistics is None and self.needs_calibration:
            raise CalibrationError(f"{self!r} needs calibration: pass the InputStatistics of the layer's inputs.")
        if statistics is not None and statistics.in_features != weight.shape[1]:
            raise ValueError(f"Expected statistics of width {weight.shape[1]}, got {statistics.in_features}.")
        with torch.no_grad():
            return self.encode(weight.detach(), statistics)

    def with_feedback(self, damping: float | None = None) -> Quantizer | None:
        """Return the quantizer that rounds to the same format with error feedback; None if there is none.

        Args:
            damping: of the feedback, see `GPTQ`; as this quantizer's own by default, or that of `GPTQ`. Correlations
                are shrunk only if this quantizer does so itself, since the published methods do not.
        """
        del damping
        return None

    def with_least_error(self) -> Quantizer | None:
        """Return the quantizer that rounds to the nearest levels of the same format, with scales of the least error.

        None if the format leaves no scales to choose.
        """
        return None

    @abstractmethod
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> QuantizedWeight:
        """Quantize a weight and statistics that have been checked."""

    @abstractmethod
    def stock_config(self) -> dict[str, object] | None:
        """Return the arguments of transformers' `BitsAndBytesConfig` that load exactly this base.

        None if stock transformers cannot quantize this way while loading; then the base has to be saved.
        """


def check_finite(weight: Tensor) -> None:
    """Raise a `NumericalError` that counts the bad entries unless all of them are finite."""
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise NumericalError(
            f"Expected finite weights, got {bad} NaN or infinite entries of {weight.numel()} "
            f"in a weight of shape {tuple(weight.shape)}. The checkpoint is damaged, or its dtype overflowed."
        )
