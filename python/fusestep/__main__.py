# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m fusestep info`."""

import argparse
import json
import sys

from .info import info


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m fusestep", description="The optimizer step in one pass.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what this installation is and uses")
    show.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    print(json.dumps(info(), indent=1) if options.json else info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
