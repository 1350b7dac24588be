"""What `quailora evaluate` and `compare` do: typed values from their options, and the functions of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..comparison.compare import ComparisonOutput, compare
from ..comparison.sizes import ComparedFamilies
from ..comparison.table import Comparison
from ..errors import ConfigurationError
from ..evaluation.evaluate import Evaluation, evaluate
from ..evaluation.tasks import Tasks
from ..evaluation.texts import EvaluationTexts
from ..families import FAMILIES
from ..pipeline.options import Resources
from ..support.files import as_str, write_json
from .initializing import calibration_of


def run_evaluate(options: Mapping[str, Any]) -> Evaluation:
    """Measure perplexities as options say, and write them to a file if there is one.

    Args:
        options: every option of `quailora evaluate` by name, with an object for the quantizer.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    if options["quantizer"] is not None and options["base"] is not None:
        raise ConfigurationError(
            "Expected `quantizer` or `base`, got both. A base that is there already has a quantizer."
        )
    text = as_str(options["text"])
    texts = EvaluationTexts(
        () if text is None else (text,),
        tuple(options["text_fields"]),
        options["windows"],
        options["sequence_length"],
        options["bos"],
    )
    resources = Resources(options["dtype"], options["device"], trust_remote_code=options["trust_remote_code"])
    evaluation = evaluate(
        options["model"],
        options["adapter"],
        base=options["quantizer"] if options["base"] is None else options["base"],
        texts=texts,
        calibration=options["calibration"],
        any_base=options["any_base"],
        resources=resources,
    )
    if options["json"]:
        content = asdict(evaluation)
        length = content.pop("window_length")
        write_json(Path(options["json"]), content | {"text": text, "sequence_length": length, "bos": texts.bos})
    return evaluation


def texts_of(options: Mapping[str, Any]) -> EvaluationTexts:
    """Return the texts that the options of `compare` and `merge` describe."""
    return EvaluationTexts(
        tuple(map(str, options["text"])),
        tuple(options["text_fields"]),
        options["windows"],
        options["window_length"],
        options["bos"],
    )


def run_compare(options: Mapping[str, Any], command: str = "") -> Comparison:
    """Compare methods as options say.

    Args:
        options: every option of `quailora compare` by name, with an object for the quantizer.
        command: what was typed, for the report.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    return compare(
        str(options["model"]),
        tuple(options["recipes"]),
        calibration_of(options),
        out=ComparisonOutput(options["out"], options["fresh"], command),
        ranks=tuple(options["ranks"]),
        families=ComparedFamilies(
            tuple(FAMILIES) if "all" in options["families"] else tuple(options["families"]), options["equal"]
        ),
        quantizer=options["quantizer"],
        against=options["against"],
        baselines=tuple(options["baselines"]),
        texts=texts_of(options),
        tasks=Tasks(tuple(options["tasks"]), options["task_folder"], options["task_limit"]),
        resources=Resources(options["dtype"], options["device"], trust_remote_code=options["trust_remote_code"]),
    )
