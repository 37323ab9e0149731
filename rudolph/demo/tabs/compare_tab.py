"""The tab that generates with two models from the same prompt and seed."""

from dataclasses import replace
from typing import Any

import gradio as gr

from rudolph.demo.generating import generate, generate_arguments
from rudolph.demo.limits import Watch, require_choice
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

MODEL_FIELDS = ("model", "other_model")


def add_compare_tab(demo: Demo) -> None:
    """Add the tab."""
    with gr.Tab("Compare", id="compare"):
        if len(demo.shelf.names) < 2:
            gr.Markdown("Two models are needed: `rudolph demo --model FIRST SECOND`.")
            return
        fields = _fields(demo)
        run, cancel = run_buttons("Generate with both")
        outputs: list[gr.Component] = []
        with gr.Row():
            for label in ("First model", "Second model"):
                with gr.Column():
                    gallery = gr.Gallery(
                        label=label,
                        columns=2,
                        fit_columns=False,
                        elem_classes="pixels",
                        height="auto",
                    )
                    outputs += [gallery, *result_widgets()]

    def work(form: dict[str, Any], watch: Watch) -> list[Any]:
        arguments = generate_arguments(form, demo.shelf, demo.limits)
        values: list[Any] = []
        for side in MODEL_FIELDS:
            model = require_choice(form[side], "model", demo.shelf.names)
            own = replace(arguments, model=model)
            result = generate(own, {}, shelf=demo.shelf, watch=watch)
            show_notes(result.notes)
            folder, shown = result_values(demo, result.command, result.files)
            names = [name for name in result.files if name.startswith("generated/")]
            values += [[str(folder / name) for name in names], *shown]
        return values

    connect(demo, run.click, fields, outputs, work, cancel=cancel, show_progress_on=outputs[0])


def _fields(demo: Demo) -> dict[str, gr.Component]:
    fields: dict[str, gr.Component] = {
        "text": gr.Textbox(
            label="Prompt",
            placeholder="олень",
            max_length=demo.limits.max_characters,
            elem_id="compare_prompt",
        )
    }
    names = demo.shelf.names
    with gr.Row():
        fields["model"] = model_field(demo, "First model")
        fields["other_model"] = gr.Dropdown(names, value=names[1], label="Second model")
        fields |= number_and_seed(demo, number=4, label="Number of images")
    return fields | sampling_fields(has_guidance=True)
