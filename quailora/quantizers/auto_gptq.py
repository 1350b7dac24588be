"""AutoGPTQ's own class, for comparisons with its codes where its package can still be imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from ..core.metrics import check_damping
from ..core.statistics import InputStatistics
from ..errors import ConfigurationError
from .base import Quantizer
from .grid import Grid, GridWeight, check_bits_and_group


@final
@dataclass(frozen=True)
class AutoGPTQ(Quantizer):
    """2 to 8 bits by the class `GPTQ` of auto-gptq, whose last release is of March 2024; `GPTQ` is ours.

    It needs an environment of that time. Unlike ours it is not compared with rounding to nearest, and groups inside one
    of its blocks are fitted to weights that feedback has not reached yet.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share a scale; None for one scale a row.
        symmetric: fixed zero point `2^(bits-1)` instead of a stored one.
        activation_order: round the columns with the largest inputs first (`desc_act`).
        static_groups: with `activation_order`, keep groups of consecutive columns.
        damping: added to the diagonal of `H`, relative to its mean.
    """

    name: ClassVar[str] = "auto_gptq"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    activation_order: bool = False
    static_groups: bool = False
    damping: float = 0.01

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group_size)
        check_damping(self.damping)

    @override
    def encode(
        self, weight: Float[Tensor, "out_features in_features"], statistics: InputStatistics | None
    ) -> GridWeight:
        assert statistics is not None  # `quantize` has checked it
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
        # The class adds up H from batches by itself. Setting H and a count of one gives it the statistics that there
        # are.
        run = backend()(layer)
        run.quantizer.configure(self.bits, perchannel=True, sym=self.symmetric, mse=False)
        run.H, run.nsamples = statistics.to(weight.device).second_moment.float().clone(), 1  # which it changes
        scale, zero_point, groups = run.fasterquant(
            percdamp=self.damping,
            group_size=self.group_size or -1,
            actorder=self.activation_order,
            static_groups=self.static_groups,
        )
        grid = Grid(scale.half().float(), zero_point.float(), self.bits)
        return GridWeight.store(
            grid.at(groups.long()).encode(layer.weight.data),
            grid,
            group_size=self.group_size or weight.shape[1],
            dtype=weight.dtype,
            group_index=groups,
        )

    @override
    def stock_config(self) -> dict[str, object] | None:
        return None


def backend() -> Any:
    """Return AutoGPTQ's class.

    Raises:
        ConfigurationError: if its package cannot be imported here.
    """
    try:
        from auto_gptq.quantization import GPTQ
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"auto-gptq cannot be imported here ({error}). It needs an environment of early 2024: auto-gptq 0.7.1 with "
            "transformers 4.38 to 4.44, and a GPU. The quantizer `GPTQ` is the same algorithm."
        ) from error
    return GPTQ
