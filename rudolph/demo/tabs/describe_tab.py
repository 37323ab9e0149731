"""The tab that describes an image, answers a question about it or classifies it."""

from typing import Any

import gradio as gr

from rudolph.demo.describing import REQUEST_LABELS, caption_arguments, describe
from rudolph.demo.limits import Watch
from rudolph.demo.sessions import Demo
from rudolph.demo.tabs.widgets import (
    connect,
    model_field,
    number_and_seed,
    result_values,
    result_widgets,
    run_buttons,
    sampling_fields,
    show_notes,
)

SOURCES = {"upload": "Upload", "drawing": "Draw"}


def add_describe_tab(demo: Demo) -> None:
    """Add the tab."""
    with gr.Tab("Describe and ask", id="describe"), gr.Row():
        with gr.Column(scale=2):
            fields = _fields(demo)
        with gr.Column(scale=2):
            fields |= _request_fields(demo)
            run, cancel = run_buttons("Run")
            answers = gr.Label(label="Texts, with their fraction or probability")
            shown = result_widgets()

    def work(form: dict[str, Any], watch: Watch) -> list[Any]:
        arguments = caption_arguments(form, demo.shelf, demo.limits)
        image = demo.uploads.image(_file(form), "image")
        result = describe(arguments, image, shelf=demo.shelf, watch=watch)
        show_notes(result.notes)
        _, values = result_values(demo, result.command, result.files)
        return [result.values, *values]

    connect(
        demo, run.click, fields, [answers, *shown], work, cancel=cancel, show_progress_on=answers
    )


def _file(form: dict[str, Any]) -> Any:
    if form["source"] == "drawing":
        return form["drawing"].get("composite") if isinstance(form["drawing"], dict) else None
    return form["upload"]


def _fields(demo: Demo) -> dict[str, gr.Component]:
    source = gr.Radio(
        [(label, name) for name, label in SOURCES.items()],
        value="upload",
        show_label=False,
        elem_id="source",
    )
    upload = gr.Image(
        label="Image",
        sources=["upload", "clipboard"],
        type="filepath",
        height=320,
        elem_id="upload",
    )
    drawing = gr.ImageEditor(
        label="Drawing",
        sources=(),
        type="pil",
        format="png",
        layers=False,
        transforms=(),
        brush=gr.Brush(default_size=12, default_color="#d02020"),
        canvas_size=(256, 256),
        fixed_canvas=True,
        height=360,
        visible="hidden",
        elem_id="drawing",
    )
    source.change(
        _visible_source, source, [upload, drawing], queue=False, api_visibility="private"
    )
    return {"source": source, "upload": upload, "drawing": drawing, "model": model_field(demo)}


def _visible_source(chosen: str) -> tuple[gr.Image, gr.ImageEditor]:
    is_upload = chosen == "upload"
    return (
        gr.Image(visible=True if is_upload else "hidden"),
        gr.ImageEditor(visible="hidden" if is_upload else True),
    )


def _request_fields(demo: Demo) -> dict[str, gr.Component]:
    fields: dict[str, gr.Component] = {
        "request": gr.Radio(
            [(label, name) for name, label in REQUEST_LABELS.items()],
            value="caption",
            show_label=False,
            elem_id="request",
        ),
        "question": gr.Textbox(
            label="Question",
            placeholder="какой тон кожи?",
            visible="hidden",
            max_length=demo.limits.max_characters,
            elem_id="question",
        ),
        "classes": gr.Textbox(
            label="Classes, separated by commas",
            placeholder="олень, кот, флаг",
            visible="hidden",
            elem_id="classes",
        ),
    }
    fields["request"].change(
        _visible_text,
        fields["request"],
        [fields["question"], fields["classes"]],
        queue=False,
        api_visibility="private",
    )
    with gr.Row():
        fields |= number_and_seed(demo, number=4, label="Number of texts")
    return fields | sampling_fields(has_guidance=False)


def _visible_text(request: str) -> list[gr.Textbox]:
    names = ("question", "classes")
    return [gr.Textbox(visible=True if request == name else "hidden") for name in names]
