"""`quailora check`."""

from __future__ import annotations

from typing import Any

from ...support.choices import DeviceName, DtypeName, StrPath


def check(
    adapter: StrPath,
    *,
    base: StrPath,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Say whether an adapter belongs on a base, by the codes and scales of every layer.

    Args:
        adapter: folder that `init` wrote, or that training wrote from there.
        base: a quantized checkpoint, or one that `--save-base` has written in dequantized form; or the full-precision
            model, if the base is quantized while it loads.
        dtype: dtype that the full-precision model is loaded in; "auto" keeps that of the checkpoint.
        device: "auto" is the GPU where there is one.
        trust_remote_code: run the Python code that a full-precision model brings along, for models that transformers
            does not know.

    Raises:
        ModelError: if it does not belong there; the message says in how many layers, and in which first.
    """
    from ...evaluation.check import check as run

    return run(adapter, base=base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
