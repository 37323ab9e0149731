"""The tab that looks inside the decoder: masks, attention, probabilities and a replay."""

from functools import partial
from typing import Any

import gradio as gr

from rudolph.demo.generating import generate_arguments
from rudolph.demo.limits import MAX_SEED, Watch, require_choice, require_integer
from rudolph.demo.looking_inside import (
    Inspection,
    attention_view,
    codebook_map,
    heat_map,
    inspect,
    likeliest_codes,
    masks_image,
    replay_file,
    replay_frames,
)
from rudolph.demo.sessions import Demo
from rudolph.demo.tabs.widgets import (
    connect,
    model_field,
    result_values,
    result_widgets,
    run_buttons,
    sampling_fields,
    show_notes,
)
from rudolph.runs.sampling import GenerateArguments

ALL_HEADS = "mean of all heads"
REPLAY_FILE = "replay.gif"


def add_inside_tab(demo: Demo) -> None:
    """Add the tab."""
    with gr.Tab("Look inside", id="inside"):
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                fields = _fields(demo)
                run, cancel = run_buttons("Generate and look inside")
                shown = result_widgets()
            with gr.Column(scale=3), gr.Tabs():
                token_fields, views = _attention_views()
                replay = _replay_views(state)
                _add_masks(demo, fields["model"])
    outputs = [state, *shown, *replay, *token_fields.values()]
    event = connect(
        demo,
        run.click,
        fields,
        outputs,
        partial(_inspect, demo),
        cancel=cancel,
        show_progress_on=replay[0],
    )

    def position_at(event: gr.SelectData, inspection: Inspection | None) -> Any:
        return gr.skip() if inspection is None else inspection.position_at(*event.index)

    click = views[1].select(
        position_at, state, token_fields["position"], queue=False, api_visibility="private"
    )
    tokens = {"state": state, **token_fields}
    for trigger in (
        event.success,
        click.success,
        *(field.input for field in token_fields.values()),
    ):
        connect(demo, trigger, tokens, views, partial(_views, demo))


def _inspect(demo: Demo, form: dict[str, Any], watch: Watch) -> list[Any]:
    """Generate one image; return its inspection and the values of the replay and token fields."""
    arguments = generate_arguments(form | {"number": 1}, demo.shelf, demo.limits)
    inspection = inspect(arguments, shelf=demo.shelf, watch=watch)
    show_notes(inspection.result.notes)
    frames = replay_frames(inspection)
    folder, values = result_values(demo, inspection.result.command, inspection.result.files)
    replay_file(frames, folder / REPLAY_FILE)
    last = len(frames) - 1
    replay = [str(folder / REPLAY_FILE), gr.Slider(maximum=last, value=last), frames[-1]]
    return [inspection, *values, *replay, *_updated_fields(demo, inspection)]


def _fields(demo: Demo) -> dict[str, gr.Component]:
    fields: dict[str, gr.Component] = {
        "text": gr.Textbox(
            label="Prompt",
            value="олень",
            max_length=demo.limits.max_characters,
            elem_id="inside_prompt",
        ),
        "model": model_field(demo),
        "seed": gr.Number(value=0, precision=0, label="Seed", minimum=0, maximum=MAX_SEED),
    }
    return fields | sampling_fields(has_guidance=True)


def _attention_views() -> tuple[dict[str, gr.Component], list[gr.Component]]:
    """Add attention and probabilities; return the fields that choose a token, and the outputs."""
    with gr.Tab("Attention and probabilities"):
        with gr.Row():
            position = gr.Slider(0, 1, value=0, step=1, label="Token", elem_id="position")
            layer = gr.Slider(1, 2, value=1, step=1, label="Layer")
            head = gr.Dropdown([ALL_HEADS], value=ALL_HEADS, label="Head")
        name = gr.Markdown("Generate an image first.")
        with gr.Row():
            attention = gr.Image(
                label="Attention over the image; click a token",
                format="png",
                buttons=[],
                elem_id="attention",
            )
            chosen = gr.Image(
                label="Probability of each sampled token, white 0 to dark 1",
                format="png",
                buttons=[],
            )
        text = gr.HighlightedText(label="Attention over the text", show_legend=False)
        with gr.Row():
            codebook = gr.Image(
                label="Next token: probability of each code, logarithmic", format="png", buttons=[]
            )
            likeliest = gr.Label(label="Likeliest codes")
    outputs = [name, attention, chosen, text, codebook, likeliest]
    return {"position": position, "layer": layer, "head": head}, outputs


def _replay_views(state: gr.State) -> list[gr.Component]:
    """Add the replay; return the animation, the number of tokens and the image after them."""
    with gr.Tab("Replay"):
        step = gr.Slider(0, 1, value=0, step=1, label="Tokens generated", elem_id="step")
        with gr.Row():
            frame = gr.Image(label="After these tokens", format="png", buttons=[], elem_id="frame")
            replay = gr.Image(label="Token by token", format="png", buttons=[], elem_id="replay")

    def show_frame(inspection: Inspection | None, number: int) -> Any:
        if inspection is None:
            return None
        frames = replay_frames(inspection)
        return frames[min(max(int(number), 0), len(frames) - 1)]

    step.input(show_frame, [state, step], frame, queue=False, api_visibility="private")
    return [replay, step, frame]


def _updated_fields(demo: Demo, inspection: Inspection) -> list[Any]:
    """Return the ranges of the fields for a model, with a token in the middle of the image."""
    decoder = demo.shelf.open(inspection.arguments).pipeline.decoder
    middle = inspection.image_start + (inspection.side**2 + inspection.side) // 2
    heads = [ALL_HEADS, *(str(head + 1) for head in range(decoder.config.num_heads))]
    return [
        gr.Slider(maximum=len(inspection.tokens) - 1, value=middle),
        gr.Slider(maximum=decoder.config.num_layers, value=decoder.config.num_layers),
        gr.Dropdown(heads, value=ALL_HEADS),
    ]


def _views(demo: Demo, form: dict[str, Any], watch: Watch) -> list[Any]:
    """Return the values of all views of one token."""
    inspection = form["state"]
    if not isinstance(inspection, Inspection):
        raise ValueError("image: expected a generated one, got none. Generate it first")
    source = demo.shelf.open(inspection.arguments)
    config = source.pipeline.decoder.config
    position = require_integer(form["position"], "token", 0, len(inspection.tokens) - 1)
    heads = [ALL_HEADS, *(str(head + 1) for head in range(config.num_heads))]
    head = require_choice(form["head"], "head", heads)
    view = attention_view(
        inspection,
        source,
        layer=require_integer(form["layer"], "layer", 1, config.num_layers) - 1,
        head=None if head == ALL_HEADS else int(head) - 1,
        position=position,
    )
    fractions = ", ".join(f"{name} {value:.0%}" for name, value in view.fractions.items())
    is_image = inspection.grid_index(position) is not None
    return [
        f"**{inspection.names[position]}** attends to: {fractions}",
        view.image,
        heat_map(inspection.chosen_probabilities),
        view.text,
        codebook_map(inspection, position) if is_image else None,
        likeliest_codes(inspection, position) if is_image else {},
    ]


def _add_masks(demo: Demo, model: gr.Component) -> None:
    with gr.Tab("Masks"):
        button = gr.Button("Show the attention mask of each layer", size="sm")
        image = gr.Image(
            label="Attention masks", elem_id="masks", format="png", buttons=["fullscreen"]
        )

    def draw(form: dict[str, Any], watch: Watch) -> list[Any]:
        name = require_choice(form["model"], "model", demo.shelf.names)
        return [masks_image(demo.shelf.open(GenerateArguments(model=name)))]

    connect(demo, button.click, {"model": model}, [image], draw)
