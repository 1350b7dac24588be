"""The commands of the experiment; `python -m experiments --help` lists them."""

from __future__ import annotations

import logging

from jsonargparse import auto_cli

from .commands import Experiment

if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a GPU its layers of 8 bits warn at every pass
    auto_cli(Experiment, as_positional=False)
