"""`quailora convert`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...support.choices import DtypeName, StrPath


def convert(
    adapter: StrPath,
    *,
    out: StrPath,
    initial: StrPath | None = None,
    model: StrPath | None = None,
    merge: bool = False,
    add: Sequence[str] = (),
    factors: Sequence[str] = (),
    trained_on: StrPath | None = None,
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Any:
    """Write what training changed as an adapter for the full-precision model, or that model with it.

    An adapter of `init` makes up for the error of one quantized base. On the full-precision model it would *add* that
    error, so it must not be merged there. What training changed can go there: `s (B A - B0 A0)`, exactly, as an adapter
    of twice the rank, which PEFT loads and merges. With `--merge` the merged full-precision model itself is written,
    one shard at a time, whatever family the adapter is of.

    Args:
        adapter: folder of the trained adapter, as PEFT saved it.
        out: folder for the new adapter, or for the model.
        initial: folder of the adapter that the training started from. By default it is read from the frozen directions
            of the trained adapter, or looked for in the folders around it. "zero" says that it added nothing before its
            training, as plain LoRA does.
        model: the full-precision model; by default what the adapter notes.
        merge: write the full-precision model with the change, and no adapter.
        add: further trained adapters of the same start, to be added to the first one. The correction of the quantized
            base that all of them hold is subtracted from each.
        factors: how much each adapter counts, the first one and those of `--add`; 1 for each by default.
        trained_on: the quantized base that the adapter was trained on, for families whose change depends on it, such as
            DoRA: a checkpoint or the name of a quantizer such as nf4; by default what the adapter notes.
        dtype: dtype of a merged model; "auto" is that of the full-precision checkpoint.
        trust_remote_code: run the Python code that a model brings along, for models that transformers does not know.
        overwrite: replace a result that is in the folder.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    options = dict(locals())
    from ..merging import run_convert

    return run_convert(options)
