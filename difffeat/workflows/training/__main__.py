"""Command line of the training scripts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    """Train one of the three small models (a run that was stopped goes on where it stopped), or bundle what was trained."""
    parser = argparse.ArgumentParser(prog="python -m difffeat.workflows.training", description=main.__doc__)
    parser.add_argument("model", choices=("vae", "dit", "plaid", "bundle"))
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder of checkpoints and logs")
    parser.add_argument("--samples", type=int, default=0, help="how many scenes or captions to train on, in all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if arguments.model == "vae":
        from difffeat.workflows.training.vae import train as train_vae

        train_vae(arguments.out, steps=arguments.samples // 64)
    elif arguments.model == "dit":
        from difffeat.workflows.training.dit import train as train_dit

        train_dit(arguments.out, arguments.samples, compiled=not arguments.no_compile)
    elif arguments.model == "bundle":
        from difffeat.workflows.training.bundle import bundle

        bundle(arguments.out)
    else:
        from difffeat.workflows.training.plaid import train as train_plaid

        train_plaid(arguments.out, arguments.samples, compiled=not arguments.no_compile)


if __name__ == "__main__":
    main()
