"""Every published method as one row: a metric, a solver, a schedule, a rounding and the inputs it looks at.

Rows are compositions of the same parts on the same statistics, so differences between them are the methods' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, final

from ..adapters.lora import LoraScaling
from ..bases import ExistingBase
from ..calibration.walk import InputsOf
from ..core.weightings import (
    DiagonalWeighting,
    FirstTokenWeighting,
    FisherWeighting,
    GramWeighting,
    IdentityWeighting,
    MagnitudeWeighting,
    ShrunkWeighting,
    TokenMeansWeighting,
    Weighting,
)
from ..errors import ConfigurationError
from ..layer.asymmetric import STEP
from ..layer.initializer import Initializer
from ..quantizers import Quantizer
from ..schedules import SRR, Alternate, HeldOut, MagR, Once, ProjQ, Schedule
from ..solvers import SVD, AlternatingLeastSquares, Optimal, Solver, Zero
from ..support.choices import did_you_mean
from .block_training import BlockTraining
from .distillation import Distillation
from .method import Method, with_feedback

Rounding = Literal["as given", "feedback"]


@final
@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        source: the paper that the method is from.
        differs: what is not as in the source.
        solver: finds the correction.
        weighting: which errors count how much.
        schedule: how quantization and correction follow each other.
        rounding: of the quantizer that it is run with: as it is, or with error feedback on the same grid.
        inputs: whose inputs layers are fitted to; see `Walk`.
        distillation: training of the whole model that follows, if any.
        step: length of the step to the asymmetric target; see `initialize_asymmetric`.
        blocks: training of codes, scales and corrections block by block, if any.
    """

    source: str
    solver: Solver
    differs: str = ""
    weighting: Weighting = GramWeighting()  # noqa: RUF009 # frozen
    schedule: Schedule = Once()  # noqa: RUF009 # frozen
    rounding: Rounding = "as given"
    inputs: InputsOf = "full"
    distillation: Distillation | None = None
    step: float = STEP
    blocks: BlockTraining | None = None

    @property
    def changes_base(self) -> bool:
        """Whether the base is another one than the quantizer alone gives, so that it has to be saved."""
        trained = self.blocks is not None and self.blocks.changes_base
        return self.rounding == "feedback" or self.schedule.changes_base or trained

    def method(
        self,
        quantizer: Quantizer | None,
        scaling: LoraScaling,
        base: ExistingBase | None = None,
        quantizers: Mapping[str, Quantizer | None] = MappingProxyType({}),
    ) -> Method:
        """Return the method for a base and ranks.

        Args:
            quantizer: quantizer of the base; None if the base is quantized already.
            scaling: ranks and alphas of layers.
            base: the base, if it is quantized already.
            quantizers: quantizers of single layers by module name; None for a layer that stays in full precision.

        Raises:
            ConfigurationError: if the method needs error feedback and there is none for this base.
        """
        chosen, requested = quantizer, None
        if self.rounding == "feedback":
            chosen, requested = with_feedback(quantizer), quantizer
            quantizers = {name: one and with_feedback(one) for name, one in quantizers.items()}
        initializer = Initializer(chosen, self.solver, scaling.rank, self.weighting, self.schedule)
        return Method(
            initializer,
            scaling,
            self.inputs,
            requested,
            self.distillation,
            self.step,
            base,
            blocks=self.blocks,
            quantizers=dict(quantizers),
        )


RECIPES: dict[str, Recipe] = {
    # Without a look at the inputs: no correction, one decomposition of the error, or quantization and decomposition in
    # turns.
    "qlora": Recipe("Dettmers et al., 2023, arXiv 2305.14314", Zero(), "", IdentityWeighting()),
    "lorc": Recipe(
        "ZeroQuant-V2, Yao et al., 2023, arXiv 2303.08302", SVD(), "factors are not quantized", IdentityWeighting()
    ),
    "loftq": Recipe(
        "Li et al., 2023, arXiv 2310.08659",
        SVD(),
        "the best iterate is kept, and PEFT's scaling divided out",
        IdentityWeighting(),
        Alternate(rounds=5),
    ),
    "qpissa": Recipe(
        "Meng et al., 2024, arXiv 2404.02948",
        SVD(),
        "the correction is fitted once more to the last base; the best iterate is kept",
        IdentityWeighting(),
        Alternate(rounds=5, start="low-rank"),
    ),
    # With weights for single outputs and input channels, and without correlations between channels.
    "lq-lora": Recipe(
        "Guo et al., 2023, arXiv 2311.12023, Fisher-weighted",
        Optimal(),
        "the same bits for all layers; the best iterate is kept",
        FisherWeighting(),
        Alternate(rounds=5),
    ),
    "lqer": Recipe(
        "L2QER, Zhang et al., 2024, arXiv 2402.02446",
        Optimal(),
        "mean magnitudes over all tokens, not the largest of each batch's; factors are not quantized",
        MagnitudeWeighting(),
    ),
    "qera-approx": Recipe("Zhang et al., 2024, arXiv 2410.06040, theorem 2", Optimal(), "", DiagonalWeighting()),
    # The output error with all correlations, on a base that is rounded to nearest.
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
    "nncf": Recipe(
        "lora_correction of OpenVINO NNCF, 2024, openvinotoolkit/nncf#2816",
        AlternatingLeastSquares(iterations=3),
        "starts from the plain SVD, not from one of an error scaled by groups; factors are not quantized",
        TokenMeansWeighting(),
    ),
    # With a base that is chosen for the correction: error feedback, or a weight that is prepared before it is rounded.
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
    # Across layers: fitted to the outputs of the full-precision network, or trained as a whole afterwards.
    "asymmetric": Recipe(
        "exact reduced-rank regression; the target as in Qronos and QEP (arXiv 2504.09629)",
        Optimal(),
        "the ridge and the share of the target that do best for the layer on held-out tokens",
        inputs="asymmetric",
        step=1.0,
    ),
    "rilq": Recipe(
        "Lee et al., 2024, arXiv 2412.01129",
        Zero(),
        "the loss is the divergence of the predictions; starts from plain LoRA",
        IdentityWeighting(),
        distillation=Distillation(learning_rate=1e-3),
    ),
    # Compositions that no paper has.
    "shrunk": Recipe("quailora, the optimum with less weight on correlations", Optimal(), weighting=ShrunkWeighting()),
    "first-token": Recipe(
        "quailora, the optimum with more weight on the first token", Optimal(), weighting=FirstTokenWeighting()
    ),
    "asymmetric-half": Recipe("quailora, half the step of asymmetric", Optimal(), inputs="asymmetric"),
    "asymmetric-half-srr": Recipe(
        "quailora, asymmetric-half with a base of its own: srr, rounded as held-out tokens choose",
        Optimal(),
        schedule=HeldOut(SRR()),
        inputs="asymmetric",
    ),
    # Codes stay as the closed form has chosen them. At 2 bits they come from error feedback, in which each makes up for
    # others. One that moves by itself, as its own gradient says, left more error on held-out text at every rate tried.
    "block-trained": Recipe(
        "quailora, asymmetric-half; the corrections of a block are trained before the next block is fitted",
        Optimal(),
        inputs="asymmetric",
        blocks=BlockTraining(parts=("factors",)),
    ),
    "block-trained-joint": Recipe(
        "quailora, asymmetric-half-srr; then the same training of corrections and scales",
        Optimal(),
        schedule=HeldOut(SRR()),
        inputs="asymmetric",
        blocks=BlockTraining(parts=("scales", "factors")),
    ),
    "distilled": Recipe(
        "quailora, asymmetric-half and a short distillation",
        Optimal(),
        inputs="asymmetric",
        distillation=Distillation(),
    ),
    "distilled-joint": Recipe(
        "quailora, asymmetric-half-srr and a short distillation",
        Optimal(),
        schedule=HeldOut(SRR()),
        inputs="asymmetric",
        distillation=Distillation(),
    ),
    "fine-tuned": Recipe(
        "asymmetric-half and plain fine-tuning on the tokens of distilled, to compare",
        Optimal(),
        inputs="asymmetric",
        distillation=Distillation(target="text"),
    ),
}
"""The short names that the command line knows."""


ALIASES: dict[str, str] = {
    "best": "asymmetric-half",
    "best-joint": "asymmetric-half-srr",
    "polished": "distilled",
    "polished-joint": "distilled-joint",
}
"""Other names of recipes: what we recommend today, and names of earlier versions. They are resolved before anything is
written down, so that results say what was done."""


def resolved_name(name: str) -> str:
    """Return the name under which a recipe is written down.

    Raises:
        ConfigurationError: if there is no recipe of this name.
    """
    resolved = ALIASES.get(name, name)
    if resolved not in RECIPES:
        names = (*RECIPES, *ALIASES)
        raise ConfigurationError(
            f"Unknown recipe {name!r}. Expected one of {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return resolved


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name or by one of its `ALIASES`.

    Raises:
        ConfigurationError: if there is none of this name.
    """
    return RECIPES[resolved_name(name)]
