"""Tables of the experiment, as Markdown, from its results alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from statistics import fmean

from quailora.support.tables import markdown_table

from .arms import ARMS
from .plan import Results, Row, best_rate
from .statistics import Estimate, bootstrapped, difference, gap_closed
from .tasks import TASKS

_PARTS = ("all", "response", "wikitext2")


Replicate = tuple[str, int]
"""Device and seed of a run. Arms are compared run by run, on the same device with the same seed."""


def chosen(
    results: Results, arm: str, rank: int, rate: float | None, calibration: str = "train"
) -> dict[Replicate, Row]:
    """Return the results of an arm at a rate, by device and seed."""
    wanted = {"arm": arm, "rank": rank, "rate": rate, "calibration": calibration}
    rows = [row for row in results if wanted.items() <= row.items()]
    return {(row["device"], row["seed"]): row for row in sorted(rows, key=lambda row: (row["device"], row["seed"]))}


def at_best(results: Results, arm: str, rank: int, calibration: str = "train") -> dict[Replicate, Row]:
    """Return the results of an arm at its own best rate, by device and seed."""
    return chosen(results, arm, rank, best_rate(results, arm, rank), calibration)


def losses(rows: Mapping[Replicate, Row], replicates: Sequence[Replicate], part: str = "all") -> list[list[float]]:
    """Return losses after training, (replicates, pairs)."""
    return [rows[replicate]["after"][part] for replicate in replicates]


def common(*rows: Mapping[Replicate, Row]) -> list[Replicate]:
    """Return the replicates that all arms have."""
    return sorted(set.intersection(*(set(part) for part in rows)))


def most_run(results: Results, rank: int) -> Replicate:
    """Return the device and seed that most of the results of a rank have."""
    return Counter((row["device"], row["seed"]) for row in results if row["rank"] == rank).most_common(1)[0][0]


def gap_of(
    results: Results, arm: str, rank: int, calibration: str = "train", only: Replicate | None = None
) -> Estimate | None:
    """Return the share of the gap between NF4 and int8 that an arm closes, at its best rate; None if unknown.

    Args:
        results: all results.
        arm: name of the arm.
        rank: rank that is trained.
        calibration: the text that the start of the arm is calibrated on.
        only: the run to look at; all that the three arms have if None.
    """
    rows = at_best(results, "qlora", rank), at_best(results, "int8", rank), at_best(results, arm, rank, calibration)
    both = [one for one in common(*rows) if only in (None, one)]
    return bootstrapped(gap_closed, *(losses(each, both) for each in rows)) if both else None


def gap_before(results: Results, arm: str, rank: int) -> Estimate | None:
    """Return the share of the gap between NF4 and int8 that an arm closes before training; None if unknown."""
    scored = [row for row in results if row["rank"] == rank and row.get("before") and row["calibration"] == "train"]
    by_arm: dict[str, dict[str, Row]] = {"qlora": {}, "int8": {}, arm: {}}
    for row in scored:
        by_arm.get(row["arm"], {})[row["device"]] = row  # the same for all rates and seeds
    devices = sorted(set.intersection(*(set(rows) for rows in by_arm.values())))
    parts = [[by_arm[name][device]["before"]["all"] for device in devices] for name in ("qlora", "int8", arm)]
    return bootstrapped(gap_closed, *parts) if devices else None


def main_table(results: Results, rank: int) -> str:
    """Return the arms, each at its own best rate, less QLoRA at its best rate.

    One column has the shares of a single run, the one that most arms have: other runs may differ from it by more than
    arms differ from each other.
    """
    same = most_run(results, rank)
    plain = at_best(results, "qlora", rank)
    lines = []
    for name, arm in ARMS.items():
        rows = at_best(results, name, rank)
        both = common(rows, plain)
        if not both or name == "qlora":
            continue
        changes = [less(rows, plain, both, part) for part in _PARTS]
        found = [gap_before(results, name, rank), gap_of(results, name, rank, only=same), gap_of(results, name, rank)]
        shares = ["" if name == "int8" else percent(share) for share in found]
        rate = f"{rows[both[0]]['rate']:g}"
        lines.append([arm.title, rate, *shares, str(len(both)), *changes])
    columns = ["gap closed before training", f"after it, {same[0]}", "after it, all runs", "runs"]
    return markdown_table(["arm", "best rate", *columns, "held-out loss", "response", "WikiText-2"], lines)


def short_table(results: Results, rank: int, arms: Sequence[str]) -> str:
    """Return the share of the gap between NF4 and int8 that arms close before training, and after it.

    After training it is there for the run that nearly all arms have, and for all runs of an arm, which differ.
    """
    one, lines = most_run(results, rank), []
    for arm in arms:
        runs = common(*(at_best(results, each, rank) for each in (arm, "qlora", "int8")))
        after = [percent(gap_of(results, arm, rank, only=one)), percent(gap_of(results, arm, rank)), str(len(runs))]
        lines.append([ARMS[arm].title, percent(gap_before(results, arm, rank)), *after])
    return markdown_table(["arm", "before training", "after it, one run", "after it, all runs", "runs"], lines)


def rate_table(results: Results, rank: int) -> str:
    """Return the loss of each arm at each rate less that of QLoRA at the same rate, for the runs that both have."""
    rates = sorted({row["rate"] for row in results if row["rank"] == rank})
    lines = []
    plain = {rate: chosen(results, "qlora", rank, rate) for rate in rates}
    lines.append([
        "NF4, QLoRA: the loss",
        *(f"{mean(plain[rate].values(), 'all'):.4f}" if plain[rate] else "" for rate in rates),
    ])
    for name, arm in ARMS.items():
        if name == "qlora":
            continue
        cells = []
        for rate in rates:
            rows = chosen(results, name, rank, rate)
            both = common(rows, plain[rate])
            cells.append(less(rows, plain[rate], both) if both else "")
        if any(cells):
            lines.append([arm.title, *cells])
    return markdown_table(["arm", *(f"{rate:g}" for rate in rates)], lines)


def rank_table(results: Results, ranks: Sequence[int], arms: Sequence[str]) -> str:
    """Return what arms are worth at each rank, each with QLoRA and int8 of the same rank, at their own best rates."""
    lines = []
    for arm, rank in product(arms, ranks):
        share = gap_of(results, arm, rank)
        rows, plain = at_best(results, arm, rank), at_best(results, "qlora", rank)
        both = common(rows, plain)
        if both and share is not None:
            rate, change = f"{rows[both[0]]['rate']:g}", less(rows, plain, both)
            lines.append([ARMS[arm].title, str(rank), rate, str(len(both)), percent(share), change])
    return markdown_table(["arm", "rank", "best rate", "runs", "gap closed", "loss less QLoRA's"], lines)


def calibration_table(results: Results, rank: int, arms: Sequence[str]) -> str:
    """Return what arms are worth by the text that they are calibrated on, and the difference to the training pairs.

    The share of the gap is over all runs with a text, and the difference over those that the training pairs have, too.
    """
    texts = {"train": "training pairs", "wikitext2": "WikiText-2", "c4": "C4"}
    lines = []
    for arm, text in product(arms, texts):
        share = gap_of(results, arm, rank, calibration=text)
        rows, own = at_best(results, arm, rank, text), at_best(results, arm, rank)
        both = common(rows, own)
        if both and share is not None:
            change = "" if text == "train" else less(rows, own, both)
            lines.append([ARMS[arm].title, texts[text], str(len(rows)), percent(share), change])
    return markdown_table(["arm", "calibrated on", "runs", "gap closed", "loss less that of training pairs"], lines)


def finished_table(results: Results) -> str:
    """Return the change of the losses of trained adapters when they are fitted again, over pairs."""
    lines = []
    for row in results:
        if "of" in row:
            before = next(one for one in results if one["key"] == row["of"] and one["device"] == row["device"])
            parts = [bootstrapped(difference, [row["after"][part]], [before["after"][part]]) for part in _PARTS]
            title = f"{ARMS[before['arm']].title}, rank {row['rank']}, seed {row['seed']}"
            lines.append([title, f"{mean([before], 'all'):.4f}", *map(signed, parts)])
    return markdown_table(["arm", "held-out loss", "its change", "of the response", "of WikiText-2"], lines)


def steps_table(results: Results, rank: int, arms: Sequence[str]) -> str:
    """Return after how many steps arms have the loss that QLoRA ends with, for each run that both have a curve of."""
    plain = with_curve(at_best(results, "qlora", rank))
    lines = []
    for arm in arms:
        rows = with_curve(at_best(results, arm, rank))
        both = common(rows, plain)
        if both:
            found = [steps_to(rows[one], plain[one]["training"]["curve"][-1][1]) for one in both]
            shown = ", ".join("not reached" if steps is None else f"{steps:.0f}" for steps in found)
            lines.append([ARMS[arm].title, shown, str(plain[both[0]]["training"]["curve"][-1][0])])
    return markdown_table(["arm", "steps, for each run", "steps of QLoRA"], lines)


def with_curve(rows: Mapping[Replicate, Row]) -> dict[Replicate, Row]:
    """Return the results that have a curve."""
    return {one: row for one, row in rows.items() if row["training"]["curve"]}


def curve_of(row: Row) -> list[list[float]]:
    """Return `[step, loss]` on the held-out pairs, before training and during it."""
    return [[0, fmean(row["before"]["all"])], *row["training"]["curve"]]


def steps_to(row: Row, loss: float) -> float | None:
    """Return after how many steps a curve first reaches a loss, by linear interpolation; None if it never does."""
    points = curve_of(row)
    if points[0][1] <= loss:
        return 0.0
    for (step, above), (later, below) in pairwise(points):
        if below <= loss:
            return step + (later - step) * (above - loss) / (above - below)
    return None


def mean(rows: Iterable[Row], part: str) -> float:
    """Return the mean loss after training over runs and pairs or windows."""
    return fmean([loss for row in rows for loss in row["after"][part]])


def curvature_table(results: Results, curvatures: Results, rank: int) -> str:
    """Return the largest eigenvalue of the Hessian at the start of each arm, and its best rate."""
    lines = []
    for row in sorted(curvatures, key=lambda row: row["eigenvalue"]):
        if row["rank"] == rank:
            rate = best_rate(results, row["arm"], rank)
            lines.append([ARMS[row["arm"]].title, f"{row['eigenvalue']:.3g}", "" if rate is None else f"{rate:g}"])
    return markdown_table(["arm", "largest eigenvalue", "best rate"], lines)


def tokens_table(results: Results, scores: Results, rank: int) -> str:
    """Return losses before training against the number of tokens that starts are calibrated on."""
    rows = [row for row in scores if row["rank"] == rank]
    lines = [
        [ARMS[row["arm"]].title, f"{row['tokens']:,}", *(f"{fmean(row['before'][part]):.4f}" for part in _PARTS)]
        for row in sorted(rows, key=lambda row: (row["arm"], row["tokens"]))
    ]
    for arm in ("qlora", "int8"):
        scored = [row for row in results if row["arm"] == arm and row["rank"] == rank and row.get("before")]
        if scored:
            lines.append([ARMS[arm].title, "", *(f"{fmean(scored[0]['before'][part]):.4f}" for part in _PARTS)])
    return markdown_table(["arm", "tokens", "held-out loss", "of the response", "WikiText-2 loss"], lines)


def cost_table(costs: Results) -> str:
    """Return seconds and memory of a step of each arm, by device."""
    lines = []
    for row in costs:
        sizes = [f"{row[part] / 1e6:.1f}" for part in ("state", "frozen", "saved")]
        lines.append([ARMS[row["arm"]].title, row["device"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", *sizes])
    memory = ["factors, gradients and averages, MB", "frozen factors, MB", "saved for backward, MB"]
    return markdown_table(["arm", "device", "seconds a step", "of QLoRA's", *memory], lines)


def tasks_table(answers: Results, rank: int) -> str:
    """Return accuracies in per cent before and after training, and the difference to QLoRA after training.

    The difference is over all items of all tasks, with an interval over items.
    """
    rows = sorted((row for row in answers if row["rank"] == rank), key=lambda row: (row["trained"], row["arm"]))
    plain = [right_of(row) for row in rows if row["arm"] == "qlora" and row["trained"]]
    lines = []
    for row in rows:
        change = bootstrapped(difference, [right_of(row)], plain) if plain and right_of(row) != plain[0] else None
        lines.append([
            ARMS[row["arm"]].title,
            "after" if row["trained"] else "before",
            *(f"{fmean(map(int, row['items'][task]['accuracy'])):.1%}" for task in TASKS),
            f"{fmean(right_of(row)):.1%}",
            "" if change is None else f"{change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%})",
        ])
    titles = ["PIQA", "ARC-easy", "BoolQ", "COPA"]
    return markdown_table(["arm", "training", *titles, "all items", "less QLoRA's after training"], lines)


def right_of(row: Row) -> list[int]:
    """Return 1 for each item of all tasks that was answered right, by likelihood, and 0 for the others."""
    return [int(bit) for task in TASKS for bit in row["items"][task]["accuracy"]]


def percent(share: Estimate | None) -> str:
    """Return a share with its interval."""
    return "" if share is None else f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def less(
    rows: Mapping[Replicate, Row], other: Mapping[Replicate, Row], replicates: Sequence[Replicate], part: str = "all"
) -> str:
    """Return the loss of an arm less that of another one, with half the width of its interval."""
    return signed(bootstrapped(difference, losses(rows, replicates, part), losses(other, replicates, part)))


def signed(change: Estimate) -> str:
    """Return a difference with half the width of its interval."""
    return f"{change.value:+.4f} ± {(change.high - change.low) / 2:.4f}"
