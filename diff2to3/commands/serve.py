"""Serve a web app (drop a photo, correct its cut-out, turn the result, download it) and a JSON API.

diff2to3 serve                                        http://127.0.0.1:8081, from this machine only
diff2to3 serve --host 0.0.0.0 --token-file secret     from elsewhere; every request needs the token

The API follows Hunyuan3D's server (POST /generate and /send, GET /status/<uid>), so its clients work: Blender's add-on
finds it at its default address. Nothing that arrives is written to the disk. The connection is not encrypted: beyond a
network you trust, put a proxy with TLS before it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from diff2to3.commands.generate import DEFAULT_MODEL, DTYPES, load
from diff2to3.errors import InputError
from diff2to3.machine import choose_device, limit_threads
from diff2to3.web.guard import MIN_TOKEN, Guard, is_loopback
from diff2to3.web.server import Server
from diff2to3.web.service import Limits, Service

DEFAULT_PORT = 8081  # where Hunyuan3D's clients look


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="0 for any free one (default: %(default)s)"
    )
    parser.add_argument("--token", help="asked of every request; needed where --host is not the loopback")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the same, from a file's first line")
    parser.add_argument(
        "--queue", type=int, default=8, metavar="N", help="jobs that may wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-upload", type=float, default=32.0, metavar="MB", help="of one request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=float, default=50.0, metavar="MP",
        help="megapixels of one photo (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print a line for every request")
    model = parser.add_argument_group("model and machine")
    model.add_argument("--model", default=DEFAULT_MODEL, help="as for generate (default: %(default)s)")
    model.add_argument("--image-encoder", metavar="FOLDER", help="folder of the condition encoder's weights")
    model.add_argument("--offline", action="store_true", help="open no connection; use what is here")
    model.add_argument("--device", help="cuda, cpu or mps (default: the best there is)")
    model.add_argument("--dtype", choices=tuple(DTYPES), help="of the large layers")
    model.add_argument("--low-vram", action="store_true", help="keep networks on the CPU between stages")


def run(args: argparse.Namespace) -> int:
    guard = guard_of(args)
    if args.queue < 1 or not 0 < args.max_upload <= 1000 or not 0 < args.max_pixels <= 1000:
        raise InputError(
            "--queue, --max-upload, --max-pixels: expected positive numbers, the latter two to 1000"
        )
    if not 0 <= args.port < 65536:
        raise InputError(f"--port: expected a number from 0 to 65535, got {args.port}")
    limits = Limits(
        upload_bytes=int(1e6 * args.max_upload), pixels=int(1e6 * args.max_pixels), waiting=args.queue
    )
    limit_threads()
    model = load(args, choose_device(args.device))
    if model.kind != "image":
        raise InputError(f"--model: {args.model} takes texts; the web app needs a model that takes photos")
    service = Service(model, args.model, limits)
    try:
        server = Server((args.host, args.port), service, guard, verbose=args.verbose)
    except InputError:
        service.close()
        raise
    serve(server)
    return 0


def guard_of(args: argparse.Namespace) -> Guard:
    """InputError where strangers could reach the server without a token."""
    token = args.token
    if args.token_file is not None:
        try:
            token = args.token_file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.token_file}: cannot be read: {error}") from error
    if token is not None and len(token) < MIN_TOKEN:
        raise InputError(f"--token: expected at least {MIN_TOKEN} characters")
    if token is None and not is_loopback(args.host):
        raise InputError(
            f"--host {args.host}: others could reach the server; give it a --token (or --token-file) that they need"
        )
    return Guard(token)


def serve(server: Server) -> None:
    """Until interrupted or terminated."""

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    host, port = server.server_address[:2]
    name = f"[{host!s}]" if ":" in str(host) else str(host)
    print(f"diff2to3 serve: http://{name}:{port}/ (end with Ctrl-C)", flush=True)
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.close()
        print("diff2to3 serve: ended", file=sys.stderr)
