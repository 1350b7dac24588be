"""Accuracy on tasks of the language model evaluation harness, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ..errors import ConfigurationError

_METRICS = ("acc_norm", "acc", "exact_match")
"""Metrics of the harness, the first of which that a task has is its score."""


@final
@dataclass(frozen=True)
class Tasks:
    """Tasks to score a model on.

    Attributes:
        names: names of tasks in the harness; without names nothing is scored.
        folder: folder with YAML files that define more tasks.
        limit: largest number of examples of each task.
        batch_size: number of examples that are run at a time.
    """

    names: tuple[str, ...] = ()
    folder: str | None = None
    limit: int | None = None
    batch_size: int = 8

    def check(self) -> None:
        """Raise a `ConfigurationError` if the harness is needed and not installed, or does not know one of them."""
        if not self.names:
            return
        try:
            manager = self._manager()
        except ImportError as error:
            raise ConfigurationError(f"Tasks need lm-eval ({error}): pip install 'quailora[tasks]'.") from error
        meant = {name: manager.match_tasks([name]) for name in self.names}
        unknown = [name for name, found in meant.items() if not found]
        if unknown:
            raise ConfigurationError(f"lm-eval knows no task {unknown[0]!r}. `lm-eval ls tasks` lists what it knows.")
        several = [name for name, found in meant.items() if found != [name]]
        if several:
            found = meant[several[0]]
            raise ConfigurationError(
                f"Expected names of single tasks, got {several[0]!r}, which means {len(found)} of them. Name them one "
                f"by one: {', '.join(found[:8])}."
            )

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return the score of a model on each task: its normalized accuracy, accuracy or exact match.

        Args:
            model: a transformers causal language model in memory.
            tokenizer: its tokenizer.
        """
        if not self.names:
            return {}
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # The harness gets the model as it stands, with the weights of the variant in place; nothing is saved or loaded.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=list(self.names),
            task_manager=self._manager(),
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        results = results["results"] if results else {}
        return {name: score_in(name, results.get(name, {})) for name in self.names}

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.folder)


def score_in(task: str, results: Mapping[str, Any]) -> float:
    """Return the score of a task from what the harness says of it, by metric and filter, such as `acc,none`.

    Raises:
        ConfigurationError: if it has none of the metrics that are known here.
    """
    by_metric: dict[str, Any] = {}
    for key, value in results.items():  # of several filters of a metric, the first one counts
        by_metric.setdefault(key.partition(",")[0], value)
    found = [by_metric[metric] for metric in _METRICS if metric in by_metric]
    if not found:
        raise ConfigurationError(
            f"Expected {', '.join(_METRICS)} as a metric of the task {task!r}, got {', '.join(by_metric) or 'none'}. "
            "Take another task."
        )
    return float(found[0])
