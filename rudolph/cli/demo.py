"""Command that serves the demo in the browser."""

from typing import Any

from rudolph.cli.results import RESULTS_FOLDER, folders_here
from rudolph.runs.console import print_line
from rudolph.runs.sampling import DTYPES

PORT = 7860


def add_demo(commands: Any) -> None:
    """Add the parser of ``rudolph demo``."""
    demo = commands.add_parser("demo", help="serve a demo in the browser")
    demo.add_argument(
        "--model",
        nargs="+",
        metavar="SOURCE",
        default=["shipped"],
        help="runs, released names or folders of weights (default: `shipped`)",
    )
    demo.add_argument("--clip", help="a ruCLIP or a run that trained a CLIP, to rank images")
    demo.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    demo.add_argument("--int8", action="store_true", help="store the decoders' layers in int8")
    demo.add_argument(
        "--in-memory", type=int, default=2, metavar="N", help="models in memory at once"
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; another one than 127.0.0.1 opens the demo to your network",
    )
    demo.add_argument("--port", type=int, default=PORT, help="0 takes a free port")
    demo.add_argument("--max-number", type=int, default=16, help="images or texts per request")
    demo.add_argument("--max-seconds", type=float, default=300.0, help="seconds per request")
    demo.set_defaults(command=serve_demo)


def serve_demo(args: Any) -> int:
    """Run ``rudolph demo`` and return the exit code."""
    for name in ("in_memory", "max_number", "max_seconds"):
        if not getattr(args, name) >= 1:
            raise ValueError(
                f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}"
            )
    from rudolph.demo.app import serve
    from rudolph.demo.limits import DemoLimits
    from rudolph.demo.shelf import ShelfSettings
    from rudolph.tracking.tracker import tracking_uri

    folders = folders_here()
    settings = ShelfSettings(
        tuple(args.model),
        folders.runs,
        tracking_uri(folders.checkout),
        dtype=args.dtype,
        int8=args.int8,
        clip=args.clip,
        capacity=args.in_memory,
    )
    limits = DemoLimits(max_number=args.max_number, max_seconds=args.max_seconds)
    serve(
        settings,
        limits,
        results=folders.checkout / RESULTS_FOLDER,
        host=args.host,
        port=args.port,
        on_ready=lambda address: print_line(f"{address} (Ctrl+C ends the demo)"),
    )
    return 0
