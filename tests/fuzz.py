"""Mutated inputs of every kind that quailora reads: none may end in a traceback, or in a wrong result without a word.

    python tests/fuzz.py                             # 600 inputs over all groups, some ten minutes
    python tests/fuzz.py --inputs 50 --groups base   # one group
    python tests/fuzz.py --seed 3 --keep failures    # other inputs; those that fail are kept in a folder

Each input is a valid one with a random change, drawn from the seed, its group and its number. It is given to
the command line in this process. An ending is one of

- refused: an exit status other than 0, and a message;
- right: exit status 0, and the group's judge finds nothing wrong with the result;
- wrong: exit status 0, and the judge proves that the result is wrong;
- traceback: an exception that the command line does not turn into a message.

The exit status is 1 if an input ended wrong or in a traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SECONDS = 120  # for one input

ENDINGS = ("refused", "right", "wrong", "traceback", "slow")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; None after an exception.
        output: what it printed.
        error: the traceback, if there is one.
    """

    status: int | None
    output: str
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of one input.

    Attributes:
        group: its group.
        number: its number in the group.
        ending: one of `ENDINGS`.
        told: what was done, and what is wrong.
    """

    group: str
    number: int
    ending: str
    told: str


class Slow(Exception):  # noqa: N818 # not an error of the program under test
    """An input took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Slow` in the body of a `with` statement that takes longer."""

    def stop(*_: object) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(arguments: Sequence[object]) -> Ended:
    """Run the command line in this process."""
    from quailora.cli.main import main

    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), limited(_SECONDS):
            status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return Ended(int(stop.code or 0), printed.getvalue())
    except Slow:
        raise
    except BaseException:  # noqa: BLE001 # whatever comes is the result
        return Ended(None, printed.getvalue(), traceback.format_exc())
    return Ended(status, printed.getvalue())


def run(group: str, number: int, seed: int, shop: object, keep: Path | None) -> Verdict:
    """Make one input of a group, run its command and judge the result."""
    from fuzz_groups import GROUPS

    random, home, places = Random(f"{seed} {group} {number}"), Path.cwd(), [*sys.path]
    folder = Path(tempfile.mkdtemp(prefix=f"{group}-", dir=shop.folder))  # type: ignore[attr-defined]
    try:
        trial = GROUPS[group](shop, folder, random)
        ended = call(trial.arguments)
        ending, reason = "refused", ended.output.strip()[-200:]
        if ended.status is None:
            ending, reason = "traceback", ended.error.strip().splitlines()[-1]
        elif ended.status == 0:
            reason = judged(trial.judge)
            ending = "wrong" if reason else "right"
        if trial.forbidden.exists():
            ending, reason = "wrong", "code of the input ran"
    except Slow:
        ending, reason = "slow", f"over {_SECONDS} s"
        ended = Ended(None, "")
    finally:
        os.chdir(home)
        sys.path[:] = places
        sys.modules.pop("canary", None)
    told = f"{trial.change}: {reason}" if reason else trial.change
    if ending in {"wrong", "traceback"} and keep is not None:
        kept = keep / f"{group}-{number}"
        shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
        lines = [told, " ".join(map(str, trial.arguments)), ended.output, ended.error]
        (kept / "ending.txt").write_text("\n".join(lines), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    return Verdict(group, number, ending, told)


def judged(judge: Callable[[], str]) -> str:
    """Return what a judge says; that it cannot read what the command has read is a reason, too."""
    try:
        return judge()
    except Slow:
        raise
    except Exception as error:  # noqa: BLE001 # the judges read with stock packages
        return f"accepted what cannot be read ({type(error).__name__}: {str(error)[:100]})"


def draw(groups: Sequence[str], inputs: int, seed: int, shop: object, keep: Path | None) -> Iterator[Verdict]:
    """Yield the verdicts of inputs that are spread evenly over groups."""
    for index in range(inputs):
        yield run(groups[index % len(groups)], index // len(groups), seed, shop, keep)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return how often each group had each ending, as a Markdown table."""
    counts = Counter((verdict.group, verdict.ending) for verdict in verdicts)
    lines = ["| group | inputs | " + " | ".join(ENDINGS) + " |", "|---|" + "---:|" * (1 + len(ENDINGS))]
    for group in [*dict.fromkeys(verdict.group for verdict in verdicts), None]:
        numbers = [
            sum(n for (name, e), n in counts.items() if e == ending and group in {name, None}) for ending in ENDINGS
        ]
        lines.append(f"| {group or '**all**'} | {sum(numbers)} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run what the arguments ask for."""
    import torch
    from fuzz_groups import GROUPS
    from fuzz_shop import Shop

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=600, help="how many (default: 600)")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="which groups")
    parser.add_argument("--seed", type=int, default=0, help="of all random changes")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parser.add_argument("--json", type=Path, help="file for all verdicts")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop.furnish(Path(folder))
        for verdict in draw(asked.groups, asked.inputs, asked.seed, shop, asked.keep):
            verdicts.append(verdict)
            if verdict.ending in {"wrong", "traceback", "slow"}:
                print(f"{verdict.group} {verdict.number}: {verdict.ending}: {verdict.told}", flush=True)
    print(table(verdicts))
    if asked.json:
        asked.json.write_text(json.dumps([vars(verdict) for verdict in verdicts], indent=1), encoding="utf-8")
    return int(any(verdict.ending in {"wrong", "traceback"} for verdict in verdicts))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
