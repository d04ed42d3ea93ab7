"""One of two processes that do several runs together. Arguments: a JSON list of argument lists."""

import json
import os
import sys

import tiny

if __name__ == "__main__":
    for port, arguments in zip(os.environ["PORTS"].split(","), json.loads(sys.argv[1]), strict=True):
        os.environ["MASTER_PORT"] = port
        code = tiny.main(tiny.TinyTask, tiny.TinyConfig, arguments)
        if code:
            sys.exit(code)
