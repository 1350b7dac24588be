"""Every published method as one row: a metric, a solver, a schedule, a rounding and the inputs it looks at.

Rows are compositions of the same parts on the same statistics, so differences between them are the methods' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from ..adapters.lora import LoraScaling
from ..calibration.walk import InputsOf
from ..core.metrics import MetricName
from ..errors import ConfigurationError
from ..layer.asymmetric import TRUST
from ..layer.initializer import Initializer
from ..quantizers import Quantizer
from ..quantizers.variants import with_feedback
from ..schedules import SRR, Alternate, HeldOut, MagR, Once, ProjQ, Schedule
from ..solvers import SVD, AlternatingLeastSquares, Optimal, Solver, Zero
from .distillation import Polish
from .method import Method

Rounding = Literal["as given", "feedback"]


@final
@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        source: where it is from.
        differs: what is not as in the source.
        solver: finds the correction.
        metric: in which norm.
        schedule: how quantization and correction follow each other.
        rounding: of the quantizer that it is run with: as it is, or with error feedback on the same grid.
        inputs: of which network; see `Walk`.
        polish: training of the whole model that follows, if any.
        trust: for asymmetric inputs, see `initialize_asymmetric`.
    """

    source: str
    solver: Solver
    differs: str = ""
    metric: MetricName = "gram"
    schedule: Schedule = Once()  # noqa: RUF009 # frozen
    rounding: Rounding = "as given"
    inputs: InputsOf = "full"
    polish: Polish | None = None
    trust: float = TRUST

    @property
    def changes_base(self) -> bool:
        """Whether the base is another one than the quantizer alone gives, so that it has to be saved."""
        return self.schedule.changes_base or self.rounding != "as given"

    def method(self, quantizer: Quantizer, scaling: LoraScaling) -> Method:
        """Return the method for a base and ranks.

        Raises:
            ConfigurationError: if it needs error feedback and there is none for this quantizer.
        """
        chosen = quantizer if self.rounding == "as given" else with_feedback(quantizer)
        initializer = Initializer(chosen, self.solver, scaling.rank, self.metric, self.schedule)
        return Method(initializer, scaling, self.polish, self.trust)


RECIPES: dict[str, Recipe] = {
    "qlora": Recipe("Dettmers et al., 2023, arXiv 2305.14314", Zero(), "", "identity"),
    "lorc": Recipe("ZeroQuant-V2, Yao et al., 2023, arXiv 2303.08302", SVD(), "factors are not quantized", "identity"),
    "loftq": Recipe(
        "Li et al., 2023, arXiv 2310.08659",
        SVD(),
        "the best iterate is kept, and PEFT's scaling divided out",
        "identity",
        Alternate(rounds=5),
    ),
    "qpissa": Recipe(
        "Meng et al., 2024, arXiv 2404.02948",
        SVD(),
        "the correction is fitted once more to the last base; the best iterate is kept",
        "identity",
        Alternate(rounds=5, start="low-rank"),
    ),
    "lq-lora": Recipe(
        "Guo et al., 2023, arXiv 2311.12023, Fisher-weighted",
        Optimal(),
        "the same bits for all layers; the best iterate is kept",
        "fisher",
        Alternate(rounds=5),
    ),
    "lqer": Recipe(
        "L2QER, Zhang et al., 2024, arXiv 2402.02446",
        Optimal(),
        "mean magnitudes over all tokens, not the largest of each batch's; factors are not quantized",
        "magnitude",
    ),
    "qera-approx": Recipe("Zhang et al., 2024, arXiv 2410.06040, theorem 2", Optimal(), "", "diagonal"),
    "qera-exact": Recipe(
        "Zhang et al., 2024, arXiv 2410.06040, theorem 1", Optimal(), "solved without roots or inverses of H"
    ),
    "quailora": Recipe("Lawton et al., 2024, arXiv 2410.14713", AlternatingLeastSquares(), "updates by QR"),
    "eora": Recipe(
        "Liu et al., 2024, arXiv 2410.21271",
        Optimal(),
        "a true mean in place of a moving average of second moments; within a block in the order layers run in",
        inputs="quantized",
    ),
    "cloq": Recipe(
        "Deng et al., 2025, arXiv 2501.18475",
        Optimal(),
        "factors are balanced",
        schedule=MagR(),
        rounding="feedback",
    ),
    "caldera": Recipe(
        "Saha et al., 2024, arXiv 2405.18886",
        Optimal(),
        "GPTQ in place of an E8 lattice; factors are not quantized",
        schedule=Alternate(rounds=5),
        rounding="feedback",
    ),
    "odlri": Recipe(
        "Cho et al., 2025, arXiv 2506.02077",
        Optimal(),
        "as caldera; the first correction holds as many input channels as its rank exactly",
        schedule=Alternate(rounds=5, start="outliers"),
        rounding="feedback",
    ),
    "srr": Recipe(
        "Preserve-then-quantize, 2026, arXiv 2602.02001",
        Optimal(),
        "the whole rank is fitted again after quantizing; the better of that and of no preservation",
        schedule=SRR(),
    ),
    "projq": Recipe(
        "ProjQ, 2026, arXiv 2606.00494",
        Optimal(),
        "the exact projection; the best iterate is kept",
        schedule=ProjQ(),
        rounding="feedback",
    ),
    "asymmetric": Recipe(
        "exact reduced-rank regression; the target as in Qronos and QEP (arXiv 2504.09629)",
        Optimal(),
        "the ridge and the share of the target that do best for the layer on held-out tokens",
        inputs="asymmetric",
        trust=1.0,
    ),
    "rilq": Recipe(
        "Lee et al., 2024, arXiv 2412.01129",
        Zero(),
        "the loss is the divergence of the predictions; starts from plain LoRA",
        "identity",
        polish=Polish(learning_rate=1e-3),
    ),
    "shrunk": Recipe("quailora, the optimum with less trust in correlations", Optimal(), metric="shrunk"),
    "best": Recipe("quailora, for a base that stays as it is", Optimal(), inputs="asymmetric"),
    "best-joint": Recipe("quailora, for a base of its own", Optimal(), schedule=HeldOut(SRR()), inputs="asymmetric"),
    "polished": Recipe("quailora, best and a short distillation", Optimal(), inputs="asymmetric", polish=Polish()),
    "polished-joint": Recipe(
        "quailora, best-joint and a short distillation",
        Optimal(),
        schedule=HeldOut(SRR()),
        inputs="asymmetric",
        polish=Polish(),
    ),
    "fine-tuned": Recipe(
        "best and plain fine-tuning on the tokens of polished, to compare",
        Optimal(),
        inputs="asymmetric",
        polish=Polish(target="text"),
    ),
}
"""The short names that the command line knows."""


def find_recipe(name: str) -> Recipe:
    """Return a row by its name.

    Raises:
        ConfigurationError: if there is none of this name.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"Unknown recipe {name!r}. Expected one of {', '.join(RECIPES)}.")
    return RECIPES[name]
