"""From assets to a training set: prepare it, and look at it."""

from __future__ import annotations

import argparse

from diff2to3.commands.data_prepare import add_inspect, add_prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-verb each; every one sets ``run_verb``."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (add_prepare, add_inspect):
        add(verbs)


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb."""
    return int(args.run_verb(args))
