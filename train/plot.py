"""Draw the curves of training runs from their logs.

python train/plot.py runs/vae-mini -o curves.png
python train/plot.py runs/a runs/b -o compare.png --names loss validate/psnr
"""

import argparse
import sys
from pathlib import Path

from diff2to3.errors import InputError
from diff2to3.training.curve import plot


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or their log.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--names", nargs="+", default=[], help="values to draw; all losses if none is given")
    args = parser.parse_args()
    try:
        print(f"{args.output}: {', '.join(plot(args.runs, args.output, args.names))}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
