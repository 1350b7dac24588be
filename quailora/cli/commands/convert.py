"""`quailora convert`."""

from __future__ import annotations

from typing import Any

from ...support.choices import StrPath


def convert(
    adapter: StrPath, *, initial: StrPath, out: StrPath, model: StrPath | None = None, overwrite: bool = False
) -> Any:
    """Write what training changed as an adapter for the full-precision model.

    An adapter of `init` makes up for the error of one quantized base. On the full-precision model it would *add* that
    error, so it must not be merged there. What training changed can go there: `s (B A - B0 A0)`, exactly, as an adapter
    of twice the rank, which PEFT loads and merges.

    Args:
        adapter: folder of the trained adapter, as PEFT saved it.
        initial: folder that `init` wrote, from which the training started.
        out: folder for the new adapter.
        model: the full-precision model, as the new adapter shall name it; by default what `init` was given.
        overwrite: replace a result that is in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    from ...adapters.convert import convert as run

    return run(adapter, initial=initial, out=out, model=model, overwrite=overwrite)
