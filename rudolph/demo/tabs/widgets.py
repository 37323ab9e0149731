"""Widgets and events that the tabs share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from rudolph.demo.limits import Watch
from rudolph.demo.sessions import ARCHIVE, Demo, DemoError

# Computes one value per output of an event, from the values of its fields.
Work = Callable[[dict[str, Any], Watch], list[Any]]
# All events with this name wait in one queue.
QUEUE = "model"
# Gradio finds the argument of the progress by this default.
PROGRESS = gr.Progress()


def model_field(demo: Demo, label: str = "Model") -> gr.Dropdown:
    """Return the choice of a model."""
    names = demo.shelf.names
    return gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1 or "hidden")


def sampling_fields(*, has_guidance: bool) -> dict[str, gr.Textbox]:
    """Return the fields of the sampling settings; an empty field is the model's default."""
    labels = {"temperature": "Temperature", "top_k": "Top-k", "top_p": "Top-p", "min_p": "Min-p"}
    if has_guidance:
        labels["guidance"] = "Guidance"
    with (
        gr.Accordion("Sampling settings (empty: the defaults of the model)", open=False),
        gr.Row(),
    ):
        return {
            name: gr.Textbox(label=label, placeholder="default", min_width=90)
            for name, label in labels.items()
        }


def number_and_seed(demo: Demo, *, number: int, label: str) -> dict[str, gr.Component]:
    """Return the fields of the number of samples and the seed."""
    return {
        "number": gr.Slider(1, demo.limits.max_number, value=number, step=1, label=label),
        "seed": gr.Number(value=0, precision=0, label="Seed", minimum=0, min_width=90),
    }


def run_buttons(text: str) -> tuple[gr.Button, gr.Button]:
    """Return the button that starts a request and the one that cancels it."""
    with gr.Row():
        run = gr.Button(text, variant="primary", scale=3)
        cancel = gr.Button("Cancel", scale=1)
    return run, cancel


def result_widgets() -> list[gr.Component]:
    """Return the widgets of a result's command and of the download of its files."""
    command = gr.Textbox(
        label="This command gives the same result", lines=2, buttons=["copy"], interactive=False
    )
    return [command, gr.DownloadButton("Download the result with its settings", size="sm")]


def result_values(demo: Demo, command: str, files: Mapping[str, bytes]) -> tuple[Path, list[Any]]:
    """Save the files of a result; return their folder and the values of ``result_widgets``."""
    folder = demo.save(files)
    return folder, [command, gr.DownloadButton(value=str(folder / ARCHIVE))]


def show_notes(notes: Sequence[str]) -> None:
    """Show one warning per note."""
    for note in notes:
        gr.Warning(note)


def connect(
    demo: Demo,
    trigger: Callable[..., Any],
    fields: Mapping[str, gr.Component],
    outputs: Sequence[gr.Component],
    work: Work,
    *,
    cancel: gr.Button | None = None,
    show_progress_on: gr.Component | None = None,
) -> Any:
    """Compute ``outputs`` from ``fields`` when an event occurs, in the queue of all requests.

    Args:
        demo: The demo.
        trigger: Registers a listener, such as ``button.click``.
        fields: Fields keyed by name; ``work`` receives their values as the browser sent them.
        outputs: Widgets that receive the result.
        work: Computes the result.
        cancel: Button that ends the request.
        show_progress_on: Widget that shows the progress; None for all outputs.

    Returns:
        Gradio's event.
    """
    names = list(fields)

    def handle(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        def on_progress(stage: str, done: int, total: int) -> None:
            progress((done, total), desc=stage, unit="")

        form = dict(zip(names, given, strict=True))
        try:
            with demo.request(str(request.session_hash), on_progress) as watch:
                values = work(form, watch)
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from error
        # Gradio takes the value of a single output without a list.
        return values[0] if len(outputs) == 1 else values

    event = trigger(
        handle,
        inputs=list(fields.values()),
        outputs=list(outputs),
        # Our own checks apply to every value, and our own decoder to every upload.
        preprocess=False,
        concurrency_id=QUEUE,
        concurrency_limit=1,
        show_progress_on=show_progress_on,
        api_visibility="private",
    )
    if cancel is not None:

        def stop(request: gr.Request) -> None:
            demo.cancel(str(request.session_hash))

        cancel.click(
            stop, cancels=[event], queue=False, show_progress="hidden", api_visibility="private"
        )
    return event
