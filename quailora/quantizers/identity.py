"""What tells one quantized base from another, for a layer or for many layers together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from .base import QuantizedWeight

_NUMBERS = 8
_SAME = 0.03  # of the quantization error: six times what threads and devices change, a third of scales 1 % larger
_LEAST_ERROR = 1e-4  # of the weight: what float32 sums need where quantization loses nothing


@final
@dataclass(frozen=True)
class BaseIdentity:
    """What tells one quantized base from another.

    Bitsandbytes computes the mean of the scales of a layer in float32, so the scales of one and the same base differ in
    their last digits between machines. `exact` tells these apart, `codes` does not, and `sketch` says how far apart two
    bases are: its first number is `ln |Q|`, each other one is `u^T Q v / |Q|` for two vectors of random signs, the same
    for all layers of a shape. It differs by about `|Q - Q'| / |Q|` between two bases (Johnson and
    Lindenstrauss, 1984).

    Attributes:
        exact: hash of everything that is stored; empty where only the dequantized weight is known.
        codes: hash of everything stored that no sum in floating point decides; empty in the same case.
        sketch: nine numbers; of several layers, the sum over them, divided by the root of how many they are.
        error: `|W - Q| / |Q|`, Frobenius norms; of several layers, the root of the mean square. 0 if `W` is not known.
    """

    exact: str
    codes: str
    sketch: tuple[float, ...]
    error: float = 0.0

    @classmethod
    def of(cls, stored: QuantizedWeight, weight: Tensor | None = None) -> BaseIdentity:
        """Return the identity of a quantized weight.

        Args:
            stored: the quantized weight.
            weight: `W`, shape (out_features, in_features).
        """
        sketched = cls.of_dequantized(stored.dequantize(), weight)
        return cls(stored.digest, stored.code_digest, sketched.sketch, sketched.error)

    @classmethod
    def of_dequantized(
        cls, quantized: Float[Tensor, "out_features in_features"], weight: Tensor | None = None
    ) -> BaseIdentity:
        """Return the part of the identity that follows from the dequantized weight alone, without hashes."""
        quantized = quantized.detach().float()
        norm = quantized.norm().item()
        error = (weight.detach().float() - quantized).norm().item() / norm if weight is not None and norm else 0.0
        return cls("", "", sketch(quantized, norm), float(f"{error:.6g}"))

    @classmethod
    def together(cls, layers: Mapping[str, BaseIdentity]) -> BaseIdentity:
        """Return the identity of several layers, in which their names count and their order does not."""
        # Sketches of different layers are independent, so their sum over the root of how many there are has the mean
        # square of a typical layer: distances between two models come out like those between two layers.
        ordered = sorted(layers.items())
        root = math.sqrt(max(1, len(ordered)))
        sums = [sum(numbers) / root for numbers in zip(*(identity.sketch for _, identity in ordered), strict=True)]
        error = math.sqrt(sum(identity.error**2 for _, identity in ordered)) / root
        known = all(identity.exact for _, identity in ordered)
        hashes = [
            _hash(f"{name} {getattr(identity, which)}" for name, identity in ordered) if known else ""
            for which in ("exact", "codes")
        ]
        return cls(hashes[0], hashes[1], tuple(float(f"{number:.6g}") for number in sums), float(f"{error:.6g}"))

    @classmethod
    def read(cls, content: Any) -> BaseIdentity:
        """Build what `dataclasses.asdict` wrote down, after a trip through JSON.

        Raises:
            ModelError: if it is something else.
        """
        try:
            sketch = tuple(float(number) for number in content["sketch"])
            return cls(str(content["exact"]), str(content["codes"]), sketch, float(content["error"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"Expected the hashes and the sketch of a quantized base, got {content!r:.80}. It is damaged, or was "
                "written by another version of quailora."
            ) from error

    @classmethod
    def of_hash(cls, exact: str) -> BaseIdentity:
        """Return the identity of a layer of which only the hash of everything that is stored is known."""
        return cls(exact, "", ())

    def is_comparable(self, other: BaseIdentity) -> bool:
        """Return whether both identities hold hashes, or both hold sketches, so that they can be told apart."""
        return bool((self.exact and other.exact) or (self.sketch and other.sketch))

    def distance(self, other: BaseIdentity) -> float:
        """Return an estimate of `|Q - Q'| / |W - Q|`: by which share of the corrected error two bases differ."""
        if len(other.sketch) != len(self.sketch) or not self.sketch:
            return math.inf
        # Each number u^T Q v / |Q| is linear in Q but for the norm, so two bases differ there by u^T (Q - Q') v / |Q|.
        # Its mean square over random signs is |Q - Q'|^2 / |Q|^2; eight of them estimate it to about a third. The norms
        # are compared by themselves, since scaling Q as a whole would cancel in the others.
        scale, *others = (mine - theirs for mine, theirs in zip(self.sketch, other.sketch, strict=True))
        apart = math.sqrt(sum(number**2 for number in others) / max(1, len(others)))
        return max(abs(scale), apart) / max(self.error, _LEAST_ERROR)

    def is_same(self, other: BaseIdentity, *, exactly: bool = False) -> bool:
        """Return whether the other base is this one, up to what threads and devices change, or exactly."""
        hashes_only = not (self.sketch and other.sketch)
        # Equal hashes of everything decide at once. Otherwise the codes have to be equal where both are known, and the
        # sketches have to agree up to what threads and devices change in the scales.
        if self.exact and other.exact and (exactly or hashes_only or self.exact == other.exact):
            return self.exact == other.exact
        return (self.codes == other.codes or not other.codes) and self.distance(other) < _SAME


def sketch(quantized: Float[Tensor, "out_features in_features"], norm: float) -> tuple[float, ...]:
    """Return `ln |Q|` and eight numbers `u^T Q v / |Q|`, to six digits."""
    if not norm:
        return (0.0,) * (1 + _NUMBERS)
    left, right = (signs(size).to(quantized.device) for size in quantized.shape)
    numbers = ((quantized @ right).double() * left.double()).sum(0) / norm
    return tuple(float(f"{number:.6g}") for number in (math.log(norm), *numbers.tolist()))


def signs(size: int) -> Float[Tensor, "size numbers"]:
    """Return random signs, always the same ones for a size."""
    # Drawn on the processor from a generator of their own: integers are the same on every machine and in every process.
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 2, (size, _NUMBERS), generator=generator).float() * 2 - 1


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
