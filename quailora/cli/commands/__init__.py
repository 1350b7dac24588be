"""The commands: functions whose parameters are the options, and which call the library when they run.

Nothing that needs PyTorch is imported before a command runs, so that help appears at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .check import check
from .compare import compare
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .init import init
from .list import list_components
from .merge import merge
from .plan import plan
from .rebase import rebase

COMMANDS: dict[str, Callable[..., Any]] = {
    "init": init,
    "evaluate": evaluate,
    "compare": compare,
    "plan": plan,
    "check": check,
    "convert": convert,
    "merge": merge,
    "rebase": rebase,
    "demo": demo,
    "list": list_components,
}
"""By name, in the order that the help shows them. A command returns something with a method `show`."""
