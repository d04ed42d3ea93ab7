"""From assets to a training set: find assets, prepare them, and look at the result."""

from __future__ import annotations

import argparse

from diff2to3.commands.data_catalogue import add_fetch, add_list
from diff2to3.commands.data_prepare import add_inspect, add_prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-verb each; every one sets ``run_verb``."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (add_list, add_fetch, add_prepare, add_inspect):
        add(verbs)


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb."""
    return int(args.run_verb(args))
