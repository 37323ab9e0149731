"""The web page of the demo and its server."""

import importlib.util
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from rudolph.demo.limits import DemoLimits
from rudolph.demo.sessions import Demo
from rudolph.demo.shelf import ModelShelf, ShelfSettings
from rudolph.runs.sampling import GenerateArguments

LOOPBACK = "127.0.0.1"
# Users whose last results are kept in memory.
MAX_USERS = 100
CSS = """
.pixels img { image-rendering: pixelated; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; background: white; }
.figures img { max-width: 100%; }
footer { display: none !important; }
"""
# Fonts of the browser's machine: nothing is downloaded.
PAGE_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def serve(
    settings: ShelfSettings,
    limits: DemoLimits,
    *,
    results: Path,
    host: str,
    port: int,
    on_ready: Any,
) -> None:
    """Serve the demo until it is interrupted.

    Args:
        settings: Sources of the models; the first is loaded before the page opens.
        limits: Largest request of one user.
        results: Folder of results, which may be missing.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        on_ready: Called with the address of the page.

    Raises:
        ValueError: If a model cannot be loaded, Gradio is missing or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            'gradio: expected the package, got none. Install it with pip install "gradio>=6,<7"'
        )
    port = free_port(host, port)
    shelf = ModelShelf(settings)
    shelf.open(GenerateArguments(model=shelf.names[0]))
    with tempfile.TemporaryDirectory(prefix="rudolph-demo-") as folder:
        # Gradio reads these when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        # Gradio first requests its own page, which no proxy can reach.
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join([host, "localhost", os.environ.get(name, "")])
        demo = Demo(shelf, limits, results=results, files=Path(folder))
        page = build_page(demo)
        launch(page, demo, host=host, port=port)
        on_ready(f"http://{host}:{port}")
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def build_page(demo: Demo) -> Any:
    """Return the page as Gradio's ``Blocks``."""
    import gradio as gr

    from rudolph.demo.tabs.compare_tab import add_compare_tab
    from rudolph.demo.tabs.describe_tab import add_describe_tab
    from rudolph.demo.tabs.generate_tab import add_generate_tab
    from rudolph.demo.tabs.inside_tab import add_inside_tab
    from rudolph.demo.tabs.results_tab import add_results_tab

    with gr.Blocks(title="rudolph", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# rudolph\nModels: {', '.join(f'`{name}`' for name in demo.shelf.names)}")
        for add_tab in (
            add_generate_tab,
            add_describe_tab,
            add_inside_tab,
            add_compare_tab,
            add_results_tab,
        ):
            add_tab(demo)

        def forget(request: gr.Request) -> None:
            demo.cancel(str(request.session_hash))

        page.unload(forget)
    return page


def launch(page: Any, demo: Demo, *, host: str, port: int) -> None:
    """Start the server of a page in threads of its own."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A foreign name for the loopback address would let other pages reach the demo.
    names = [LOOPBACK, "localhost"] if host == LOOPBACK else ["*"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names)]
    page.queue(max_size=demo.limits.max_waiting, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        state_session_capacity=MAX_USERS,
        max_file_size=demo.limits.max_upload_bytes,
        enable_monitoring=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": middleware},
        css=CSS,
        theme=gr.themes.Default(**PAGE_FONTS),
    )


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ValueError: If the port is taken or the address is not one of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"{host}:{port}: expected a free port of this machine, got: "
                f"{reason.lower().rstrip('.')}. Give another --port or --host"
            ) from error
        return int(probe.getsockname()[1])
