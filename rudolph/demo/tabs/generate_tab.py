"""The tab that generates images, from a text or from a text and an image."""

from typing import Any

import gradio as gr
from PIL import Image

from rudolph.demo.generating import REGION_LABELS, generate, generate_arguments
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

BRUSH_COLOUR = "#000000"
RANK_LABELS = {"none": "no", "self": "by likelihood", "clip": "by CLIP"}
GALLERY_COLUMNS = 4


def add_generate_tab(demo: Demo) -> None:
    """Add the tab."""
    with gr.Tab("Generate", id="generate"), gr.Row():
        with gr.Column(scale=2):
            fields = _fields(demo)
            run, cancel = run_buttons("Generate")
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                label="Images",
                columns=GALLERY_COLUMNS,
                fit_columns=False,
                elem_classes="pixels",
                height="auto",
            )
            again = gr.Button("Use the selected image as image prompt", size="sm")
            shown = result_widgets()
        paths, selected = gr.State([]), gr.State(0)

    def work(form: dict[str, Any], watch: Watch) -> list[Any]:
        arguments = generate_arguments(form, demo.shelf, demo.limits)
        images = _images(demo, form)
        result = generate(arguments, images, shelf=demo.shelf, watch=watch)
        show_notes(result.notes)
        folder, values = result_values(demo, result.command, result.files)
        files = [str(folder / name) for name in result.files if name.startswith("generated/")]
        return [list(zip(files, result.captions, strict=True)), *values, files, 0]

    connect(
        demo,
        run.click,
        fields,
        [gallery, *shown, paths, selected],
        work,
        cancel=cancel,
        show_progress_on=gallery,
    )
    _connect_selection(gallery, again, fields, paths, selected)


def _fields(demo: Demo) -> dict[str, gr.Component]:
    fields: dict[str, gr.Component] = {
        "text": gr.Textbox(
            label="Prompt",
            placeholder="олень",
            max_length=demo.limits.max_characters,
            elem_id="prompt",
        ),
        "model": model_field(demo),
    }
    with gr.Row():
        fields |= number_and_seed(demo, number=8, label="Number of images")
    with gr.Row():
        has_clip = demo.shelf.settings.clip is not None
        ranks = {name: label for name, label in RANK_LABELS.items() if name != "clip" or has_clip}
        choices = [(label, name) for name, label in ranks.items()]
        fields["rank"] = gr.Radio(choices, value="none", label="Rank")
        fields["keep"] = gr.Textbox(label="Keep the best", placeholder="all", min_width=90)
    return fields | sampling_fields(has_guidance=True) | _image_prompt_fields()


def _image_prompt_fields() -> dict[str, gr.Component]:
    fields: dict[str, gr.Component] = {}
    with gr.Accordion("Image prompt", open=False):
        fields["region"] = gr.Radio(
            [(label, name) for name, label in REGION_LABELS.items()],
            value="none",
            show_label=False,
        )
        fields["editor"] = gr.ImageEditor(
            label="Image; paint over what to regenerate",
            sources=["upload", "clipboard"],
            type="pil",
            format="png",
            image_mode="RGBA",
            layers=False,
            transforms=(),
            brush=gr.Brush(colors=[BRUSH_COLOUR], color_mode="fixed"),
            canvas_size=(256, 256),
            height=360,
            elem_id="editor",
        )
        with gr.Row():
            fields["borders"] = gr.Textbox(
                label="Borders to keep, in tokens", placeholder="up=4,left=2"
            )
            fields["vary"] = gr.Slider(
                0.05, 1, value=0.5, step=0.05, label="Fraction of tokens to vary"
            )
    return fields


def _images(demo: Demo, form: dict[str, Any]) -> dict[str, Image.Image]:
    """Return the image prompt and the mask, each only if the form needs it."""
    if form["region"] == "none":
        return {}
    editor = form["editor"] if isinstance(form["editor"], dict) else {}
    images = {"image_prompt": demo.uploads.image(editor.get("background"), "image prompt")}
    if form["region"] == "mask":
        layers = editor.get("layers") or [None]
        images["mask"] = demo.uploads.mask(layers[0], images["image_prompt"].size)
    return images


def _connect_selection(
    gallery: gr.Gallery,
    again: gr.Button,
    fields: dict[str, gr.Component],
    paths: gr.State,
    selected: gr.State,
) -> None:
    """Copy the selected image of the gallery into the editor when the button is clicked."""

    def select(event: gr.SelectData) -> int:
        return int(event.index)

    def use(files: list[str], index: int) -> tuple[Any, str]:
        if not files:
            raise gr.Error("image: expected a generated one, got none", print_exception=False)
        path = files[min(max(index, 0), len(files) - 1)]
        image = {"background": path, "layers": [], "composite": path}
        return image, "vary"

    gallery.select(
        select, outputs=selected, show_progress="hidden", api_visibility="private", queue=False
    )
    again.click(
        use,
        [paths, selected],
        [fields["editor"], fields["region"]],
        api_visibility="private",
        queue=False,
    )
