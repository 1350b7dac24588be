"""The exceptions and warnings of quailora.

Every exception here is also a builtin (`ValueError`, `OSError`, ...), so code that knows nothing of quailora can
still catch it, and all of them are `QuailoraError`, which is what the command line turns into a one-line message.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST = 200


class QuailoraError(Exception):
    """Something the user can act on: the message says what was expected, what came and what to try."""


class ConfigurationError(QuailoraError, ValueError):
    """A hyper-parameter is out of its range."""


def check_choice(what: str, value: object, choices: Iterable[object]) -> None:
    """Raise a `ConfigurationError` unless a hyper-parameter is one of the values that there are for it.

    Args:
        what: name of the hyper-parameter, such as "a block size".
        value: the value that was given.
        choices: the values that are allowed.
    """
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ConfigurationError(f"Expected {what} of {', '.join(map(str, choices))}, got {value!r}.")


class CalibrationError(QuailoraError, ValueError):
    """Calibration data is missing, empty, too short, or not readable in the way that was asked for."""


class NumericalError(QuailoraError, ArithmeticError):
    """A weight, an input or a statistic is NaN or infinite, or a factorisation failed."""


class TargetError(QuailoraError, ValueError):
    """The requested target modules match nothing, or cannot carry an adapter of the requested rank."""


class ModelError(QuailoraError, OSError):
    """A model, a tokenizer or a saved adapter cannot be found or read."""


class WeightsNotFoundError(ModelError, FileNotFoundError):
    """The files with the weights of a model are not where they were looked for."""


class ArgumentTypeError(QuailoraError, TypeError, ValueError):
    """An argument is an object of another kind than the function works on."""


class OutputExistsError(QuailoraError, FileExistsError):
    """The output folder already holds a result, and overwriting was not asked for."""


class StorageError(QuailoraError, OSError):
    """A file cannot be written."""


class ResumeError(QuailoraError, RuntimeError):
    """A folder holds the state of another run, or of one that is still going on."""


class QualityError(QuailoraError, RuntimeError):
    """A result is worse than was asked for, so that it is not written."""


class DoesNotFitError(QuailoraError, MemoryError):
    """A run needs more memory than it may use."""


class DistributedError(QuailoraError, RuntimeError):
    """Another process of the same run ended."""


class NumericalWarning(UserWarning):
    """The computation went on after a numerical repair; the message says how large the repair was."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened to 200 characters; other packages write pages."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def summary(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, for messages that pass it on."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put a layer's name in front of what goes wrong inside a `with` statement."""
    try:
        yield
    except QuailoraError as error:
        raise type(error)(f"Layer {layer}: {error}") from error
    except RuntimeError as error:
        from torch.linalg import LinAlgError  # type: ignore[attr-defined] # torch's annotations lack it

        if not isinstance(error, LinAlgError):
            raise
        raise NumericalError(
            f"Layer {layer}: a factorisation failed ({first_line(error)}). Its weights or inputs are too large, or too "
            "unlike each other, for products in float32. The checkpoint may be damaged; else try `dtype='float32'`."
        ) from error
