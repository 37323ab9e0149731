"""A look inside the decoder: masks, attention, next-token probabilities and a replay.

Shapes: T tokens, N heads, I image tokens, K codes, h and w sides of the token grid, H and W
pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from rudolph.demo.generating import GenerationResult, generate, without_image_prompt
from rudolph.demo.limits import Watch
from rudolph.demo.shelf import ModelShelf
from rudolph.generation.filters import TokenSamplingConfig, next_probabilities
from rudolph.generation.pipeline import Pipeline
from rudolph.generation.png import to_image
from rudolph.models.rudolph.attention_maps import attention_weights
from rudolph.models.rudolph.scoring import segment_labels
from rudolph.runs.resolve import LoadedModel
from rudolph.runs.sampling import GenerateArguments, sampling_of
from rudolph.sequence.layout import BOS, EOS, PAD, TASK_TOKENS

VIEW_SIDE = 320  # pixels
NUM_LIKELIEST = 10
# Smaller probabilities would read 0 %.
MIN_SHOWN = 0.005
MS_PER_FRAME = 80
NAMES_OF_IDS = {PAD: "·", BOS: "<BOS>", EOS: "<EOS>"}
# Colours of 0, 0.5 and 1 in a heat map.
HEAT_COLOURS = ((255, 255, 255), (244, 165, 80), (140, 20, 60))


@dataclass(frozen=True)
class Inspection:
    """One generated image with all data that the views need.

    Attributes:
        arguments: Arguments of the command that generates the image.
        result: The generation.
        tokens: ``(T,)``: left text, image and right text.
        names: Name of each token.
        probabilities: ``(I, K)``, the distribution that each image token was sampled from.
        image: ``(3, H, W)`` in [0, 1].
        image_start: Position of the first image token.
        side: Side of the token grid.
    """

    arguments: GenerateArguments
    result: GenerationResult
    tokens: Tensor
    names: list[str]
    probabilities: Tensor
    image: Tensor
    image_start: int
    side: int

    @property
    def chosen_probabilities(self) -> NDArray[np.float64]:
        """Return the probability of each sampled image token, ``(h, w)``."""
        indices = self.tokens[self.image_start : self.image_start + self.side**2]
        chosen = self.probabilities.gather(1, indices[:, None])[:, 0]
        return chosen.double().view(self.side, self.side).numpy()

    def position_at(self, x: float, y: float) -> int:
        """Return the position of the image token at a pixel of a view.

        Args:
            x: Pixels from the left.
            y: Pixels from the top.
        """
        row, column = (
            min(max(int(value * self.side / VIEW_SIDE), 0), self.side - 1) for value in (y, x)
        )
        return self.image_start + row * self.side + column

    def grid_index(self, position: int) -> int | None:
        """Return the index of an image token, or None for the position of a text token."""
        index = position - self.image_start
        return index if 0 <= index < self.side**2 else None


@dataclass(frozen=True)
class AttentionView:
    """Attention of one token.

    Attributes:
        text: Each text token with its weight, relative to the largest weight.
        image: The image under a heat map of its tokens' weights.
        fractions: Sum of the weights over left text, image and right text.
    """

    text: list[tuple[str, float]]
    image: Image.Image
    fractions: dict[str, float]


def inspect(arguments: GenerateArguments, *, shelf: ModelShelf, watch: Watch) -> Inspection:
    """Generate one image and compute the distribution of each of its tokens.

    Raises:
        ValueError: If an argument does not suit the model.
        StoppedError: If the request was cancelled or took too long.
    """
    arguments = without_image_prompt(arguments, number=1)
    result = generate(arguments, {}, shelf=shelf, watch=watch)
    [candidate] = result.candidates
    source = shelf.open(arguments)
    pipeline = source.pipeline
    layout = pipeline.decoder.layout
    left = pipeline.texts("text_to_image", arguments.text).left
    tokens = torch.cat([left, candidate.indices])
    if layout.right_text_length:
        tokens = torch.cat([tokens, pipeline.texts("image_captioning", arguments.text).right])
    return Inspection(
        arguments=arguments,
        result=result,
        tokens=tokens,
        names=token_names(pipeline, tokens),
        probabilities=image_probabilities(
            pipeline,
            tokens[: layout.right_text_start],
            sampling_of(source.sampling.image, arguments),
        ),
        image=candidate.image,
        image_start=layout.image_start,
        side=layout.image_tokens_per_dim,
    )


@torch.inference_mode()
def image_probabilities(pipeline: Pipeline, tokens: Tensor, config: TokenSamplingConfig) -> Tensor:
    """Return the distributions ``(I, K)`` that image tokens are sampled from.

    Args:
        pipeline: The models.
        tokens: Left text and image.
        config: Sampling settings, with guidance.
    """
    decoder = pipeline.decoder
    rows = [tokens]
    if config.guidance is not None:
        empty = pipeline.texts("text_to_image", "").left
        rows.append(torch.cat([empty, tokens[len(empty) :]]))
    batch = torch.stack(rows).to(pipeline.device)
    start, labels = segment_labels(decoder, batch)["image"]
    hidden = decoder.hidden(batch)[:, start : start + labels.shape[1]]
    logits = decoder.image_logits(hidden)[..., : decoder.vocabulary.codebook_size]
    unconditional = logits[1] if config.guidance is not None else None
    return next_probabilities(logits[0], config, unconditional).cpu()


def token_names(pipeline: Pipeline, tokens: Tensor) -> list[str]:
    """Return a short name of each token of a sequence ``(T,)``."""
    layout, vocabulary = pipeline.decoder.layout, pipeline.decoder.vocabulary
    names = dict(NAMES_OF_IDS)
    for name in TASK_TOKENS[: vocabulary.num_text_specials]:
        names[vocabulary.task_token(name) or PAD] = name
    named = []
    for position, token in enumerate(tokens.tolist()):
        index = position - layout.image_start
        if 0 <= index < layout.num_image_tokens:
            row, column = divmod(index, layout.image_tokens_per_dim)
            named.append(f"row {row + 1}, column {column + 1}")
        else:
            named.append(names.get(token) or pipeline.tokenizer.decode([token]) or f"<{token}>")
    return named


def attention_view(
    inspection: Inspection, source: LoadedModel, *, layer: int, head: int | None, position: int
) -> AttentionView:
    """Return the attention of one token over text and image.

    Args:
        inspection: The generated image.
        source: The model that generated it.
        layer: Number of the layer, from 0.
        head: Number of the head, from 0; None averages over all heads.
        position: Position of the token in the sequence.

    Raises:
        ValueError: If there is no such layer, head or position.
    """
    length = len(inspection.tokens)
    if not 0 <= position < length:
        raise ValueError(f"token: expected 0 to {length - 1}, got {position}")
    decoder = source.pipeline.decoder
    tokens = inspection.tokens[None].to(source.pipeline.device)
    weights = attention_weights(decoder, tokens, layer)[0].cpu()  # (N, T, T)
    if head is not None and not 0 <= head < len(weights):
        raise ValueError(f"head: expected 0 to {len(weights) - 1}, got {head}")
    rows = weights.mean(0) if head is None else weights[head]
    # A leading BOS shifts every token by one position and drops the last one.
    shifted = rows[min(position + decoder.num_leading, length - 1), decoder.num_leading :]
    row = np.zeros(length)
    row[: len(shifted)] = shifted.double().numpy()
    start, end = inspection.image_start, inspection.image_start + inspection.side**2
    is_text = [*range(start), *range(end, length)]
    largest = max(row[is_text].max(), 1e-12)
    shown = [index for index in is_text if inspection.names[index] != NAMES_OF_IDS[PAD]]
    grid = row[start:end].reshape(inspection.side, inspection.side)
    return AttentionView(
        text=[(inspection.names[index], float(row[index] / largest)) for index in shown],
        image=overlay(inspection.image, grid, marked=inspection.grid_index(position)),
        fractions={
            "left text": float(row[:start].sum()),
            "image": float(row[start:end].sum()),
            "right text": float(row[end:].sum()),
        },
    )


def likeliest_codes(inspection: Inspection, position: int) -> dict[str, float]:
    """Return the probabilities of the likeliest codes at an image position.

    Raises:
        ValueError: If the position is that of a text token.
    """
    probabilities = inspection.probabilities[_image_index(inspection, position)]
    best = probabilities.topk(min(NUM_LIKELIEST, len(probabilities)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {f"code {code}": value for code, value in pairs if value >= MIN_SHOWN}


def codebook_map(inspection: Inspection, position: int) -> Image.Image:
    """Return the distribution over the codebook at an image position as a heat map.

    The codes fill the rows of a square in the order of their ids; the colour scale is logarithmic.

    Raises:
        ValueError: If the position is that of a text token.
    """
    probabilities = inspection.probabilities[_image_index(inspection, position)].double().numpy()
    side = int(np.ceil(len(probabilities) ** 0.5))
    grid = np.zeros(side * side)
    # From one in a million to 1, because most probability lies on few codes.
    grid[: len(probabilities)] = 1 + np.log10(np.maximum(probabilities, 1e-6)) / 6
    return heat_map(grid.reshape(side, side))


def _image_index(inspection: Inspection, position: int) -> int:
    index = inspection.grid_index(position)
    if index is None:
        raise ValueError(f"token: expected an image token, got text token {position}")
    return index


def masks_image(source: LoadedModel) -> Image.Image:
    """Return the attention mask of each layer as one image; equal masks are drawn once."""
    from rudolph.reports.image_grids import draw_masks_image

    decoder = source.pipeline.decoder
    masks: dict[str, NDArray[np.bool_]] = {}
    for name in dict.fromkeys(decoder.config.masks):
        layers = [str(i + 1) for i, mask in enumerate(decoder.config.masks) if mask == name]
        table = decoder.layer_tables[int(layers[0]) - 1]
        masks[f"{name}, layer{'s' if len(layers) > 1 else ''} {_listed(layers)}"] = (
            table.cpu().numpy()
        )
    with TemporaryDirectory() as folder:
        path = Path(folder, "masks.png")
        draw_masks_image(masks, path, segments=decoder.layout.segment_lengths)
        with Image.open(path) as image:
            return image.convert("RGB")


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])}, ..."


def replay_frames(inspection: Inspection) -> list[Image.Image]:
    """Return I + 1 frames: a grey image, then the image after each token; the rest is grey."""
    final = to_image(inspection.image).resize((VIEW_SIDE, VIEW_SIDE), Image.Resampling.NEAREST)
    pixels = np.asarray(final)
    side = inspection.side
    borders = np.linspace(0, VIEW_SIDE, side + 1).round().astype(int)
    frame = np.full_like(pixels, 128)
    frames = [Image.fromarray(frame.copy())]
    for index in range(side**2):
        row, column = divmod(index, side)
        cell = (
            slice(borders[row], borders[row + 1]),
            slice(borders[column], borders[column + 1]),
        )
        frame[cell] = pixels[cell]
        frames.append(Image.fromarray(frame.copy()))
    return frames


def replay_file(frames: list[Image.Image], path: Path) -> None:
    """Write frames as an animated GIF."""
    frames[0].save(
        path, "GIF", save_all=True, append_images=frames[1:], duration=MS_PER_FRAME, loop=0
    )


def heat_map(values: NDArray[np.float64]) -> Image.Image:
    """Return values ``(h, w)`` in [0, 1] as colours, enlarged to ``VIEW_SIDE`` pixels."""
    colours = np.array(HEAT_COLOURS, dtype=np.float64)
    places = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, places, colours[:, channel]) for channel in range(3)]
    pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((VIEW_SIDE, VIEW_SIDE), Image.Resampling.NEAREST)


def overlay(
    image: Tensor, values: NDArray[np.float64], *, marked: int | None = None
) -> Image.Image:
    """Return an image under a heat map; values are relative to the largest value.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        values: ``(h, w)``, at least 0.
        marked: Index of the token whose border is drawn.
    """
    size = (VIEW_SIDE, VIEW_SIDE)
    pixels = np.asarray(to_image(image).resize(size, Image.Resampling.NEAREST), dtype=np.float64)
    heat = np.asarray(heat_map(values / max(values.max(), 1e-12)), dtype=np.float64)
    blended = Image.fromarray((0.35 * pixels + 0.65 * heat).round().astype(np.uint8))
    if marked is not None:
        row, column = divmod(marked, values.shape[1])
        step = VIEW_SIDE / len(values)
        box = [column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1]
        ImageDraw.Draw(blended).rectangle(box, outline=(0, 70, 200), width=3)
    return blended
