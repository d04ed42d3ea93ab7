"""The ``diff2to3`` command. Each subcommand lives in ``diff2to3/commands/`` and is imported only when
called.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence

from diff2to3 import __version__
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.streams import make_usable

#: name -> one line of help. The module is diff2to3.commands.<name>.
COMMANDS = {
    "convert": "write 3D Gaussians in another file format; a model bundle from TRELLIS's files",
    "data": "make a training set from 3D files, and look at it",
    "doctor": "show what is built and found on this machine, and how to add what is missing",
    "generate": "make 3D Gaussian assets from photos or texts",
    "reconstruct": "turn a 3D model into 3D Gaussians through the autoencoder",
    "render": "render a 3D Gaussian file from around it: a sheet, a GIF or a film",
    "serve": "a web app and an API on this machine: photos in, assets out",
    "view": "show a 3D Gaussian file in the browser: a page that is one file",
    "models": "list the public models, their sizes and licences; check a bundle",
}

EXIT_BAD_INPUT = 2


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the one subcommand that ``argv`` names (the others stay
    unimported).
    """
    parser = argparse.ArgumentParser(prog="diff2to3", description="One photo in, a 3DGS asset out.")
    parser.add_argument("--version", action="version", version=f"diff2to3 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, help_line in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=help_line, add_help=False)
            continue
        module = importlib.import_module(f"diff2to3.commands.{name}")
        sub = commands.add_parser(
            name,
            help=help_line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for bad input, with one line on stderr)."""
    started = time.perf_counter()
    make_usable()
    # Threads of OpenMP that wait would otherwise spin: beside other programs that takes several times longer. It is
    # read when torch is imported, which nothing above has done.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(argv).parse_args(argv, argparse.Namespace(started=started))
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except (InputError, MissingDependencyError) as error:
        print(f"diff2to3 {args.command}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"diff2to3 {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
