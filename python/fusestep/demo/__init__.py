# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep demo`: fine-tuning on handwritten digits, beside torch.optim.

`story.py` is the part to read. `digits.py` has data, network and training loop; `run.py` runs the phases
and compares; `page.py` makes a page of it.
"""

import argparse
import importlib.util

NEEDED = {"torch": "torch", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "tqdm": "tqdm"}
OPTIMIZERS = ("adamw", "adam", "amsgrad", "sgd", "rmsprop")
PHASES = ("pretrain", "head", "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s")
    parser.add_argument("--out", default="build/demo", metavar="DIR", help="for all it writes, default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--phase", choices=PHASES, help="only this one, after the others have run")


def missing_packages() -> list[str]:
    """What the demo needs and cannot import, by the names pip knows."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
