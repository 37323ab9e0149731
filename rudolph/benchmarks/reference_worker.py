"""Worker process of the reference: the published packages with their own loops.

Usage: ``python -P reference_worker.py FOLDER``. FOLDER holds ``rudolph`` 0.0.1rc10, ``rudalle``
1.1.3 and ``taming-transformers`` 0.0.1. In this process, ``rudolph`` is the published package.
Therefore only ``serving.py`` of this project is imported, by its path.

Stubs replace the packages that the reference imports but a benchmark does not need, which also
saves memory. ``top_k_top_p_filtering`` is a copy of the one in transformers 4: the reference calls
it, and transformers 5 has removed it.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NOT_NEEDED = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "transformers",
    "more_itertools",
    "matplotlib",
    "matplotlib.pyplot",
    "tqdm",
    "tqdm.auto",
    "huggingface_hub",
    "omegaconf",
    "pywt",
    "einops",
)
MODULES = (
    "rudolph.api",
    "rudolph.utils",
    "rudolph.model.model",
    "rudalle.vae.model",
    "rudalle.tokenizer",
    "rudalle.realesrgan.rrdbnet_arch",
)
# Tokens of a repetition that only warms up.
SHORT = 16


class Stub(types.ModuleType):
    """A callable module in which every attribute is another stub."""

    def __getattr__(self, name: str) -> Any:
        """Return a stub for any public name.

        Raises:
            AttributeError: For names that start with two underscores.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(f"{self.__name__}.{name}")

    def __call__(self, *arguments: object, **named: object) -> "Stub":
        """Return the stub itself."""
        return self


def install_stubs() -> None:
    """Put stubs into ``sys.modules``, with the few functions that the packages call."""
    for name in NOT_NEEDED:
        stub: Any = Stub(name)
        stub.__path__ = []
        sys.modules[name] = stub
    modules: Any = sys.modules
    modules["einops"].rearrange = rearrange
    modules["transformers"].top_k_top_p_filtering = top_k_top_p_filtering
    modules["more_itertools"].chunked = chunked
    functional = modules["torchvision.transforms.functional"]
    functional.to_pil_image = to_pil_image
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    modules["torchvision.transforms"].functional = functional


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Rearrange a tensor by one of the patterns that the packages use.

    Raises:
        ValueError: For any other pattern.
    """
    if pattern == "b n c -> b c n":
        return x.permute(0, 2, 1)
    if pattern == "b h w -> b (h w)":
        return x.flatten(1)
    if pattern == "b (h w) c -> b c h w":
        return x.view(len(x), sizes["h"], -1, x.shape[-1]).permute(0, 3, 1, 2)
    raise ValueError(f"rearrange has no pattern {pattern!r}")


def top_k_top_p_filtering(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits outside the top k or the top-p nucleus to minus infinity.

    Source: transformers 4.30, ``generation_utils.top_k_top_p_filtering``.
    """
    if top_k > 0:
        last = torch.topk(logits, min(top_k, logits.shape[-1]))[0][..., -1, None]
        logits = logits.masked_fill(logits < last, -float("inf"))
    if top_p < 1.0:
        values, order = torch.sort(logits, descending=False)
        is_dropped = values.softmax(-1).cumsum(-1) <= 1 - top_p
        is_dropped[..., -1:] = False
        logits = logits.masked_fill(is_dropped.scatter(1, order, is_dropped), -float("inf"))
    return logits


def chunked(values: Any, size: int) -> list[list[Any]]:
    """Split values into lists of at most ``size``."""
    values = list(values)
    return [values[first : first + size] for first in range(0, len(values), size)]


def to_pil_image(image: Tensor) -> Any:
    """Convert a ``(3, H, W)`` image in [0, 1] to a PIL image."""
    from PIL import Image

    return Image.fromarray(image.mul(255).byte().permute(1, 2, 0).numpy())


class Namespace(dict[str, Any]):
    """A nested mapping whose keys are also attributes, as in OmegaConf."""

    def __getattr__(self, name: str) -> Any:
        """Return the value of a key; a mapping becomes a ``Namespace``."""
        value = self[name]
        return Namespace(value) if isinstance(value, dict) else value


class FixedPromptTokenizer:
    """A tokenizer that returns one fixed prompt for any text."""

    eos_id, bos_id, unk_id, pad_id = 3, 2, 1, 0

    def __init__(self, prompt: Tensor) -> None:
        self.prompt, self.tokenizer = prompt, self

    def encode(self, texts: list[str], **named: object) -> list[list[int]]:
        """Return an empty list of ids for each text."""
        return [[] for _ in texts]

    def prepare_tokens(self, tokens: object, length: int) -> Tensor:
        """Return a copy of the fixed prompt."""
        return self.prompt.clone()


class Reference:
    """The reference's implementation of all workloads.

    It loads only the models whose files exist in the folder.
    """

    def __init__(self, setup: Mapping[str, Any], versions: dict[str, str]) -> None:
        self.case, self.versions = setup["case"], versions
        self.folder, self.caption = Path(setup["folder"]), setup["caption"]
        self.seed = setup["seed"] % 2**31
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.size, self._cache_bytes = self.case["speed"]["batch_size"], 0
        self.decoder: Any = self.load_decoder() if self.path("decoder").is_file() else None
        self.vqgan: Any = self.load_vqgan() if self.path("vqgan").is_file() else None
        self.upscaler: Any = self.load_upscaler() if self.path("upscaler").is_file() else None
        models = [self.decoder, self.vqgan, self.upscaler]
        self.weights_bytes = sum(
            tensor.numel() * tensor.element_size()
            for model in models
            if model is not None
            for tensor in (*model.parameters(), *model.buffers())
        )
        self.optimizer: Any = None
        if self.decoder is not None:
            self.prepare_api()

    def path(self, name: str) -> Path:
        """Return the file that holds the weights of a model."""
        return self.folder / f"reference_{name}.safetensors"

    def arguments(self, name: str) -> Any:
        """Return the constructor arguments of a model."""
        return json.loads(self.path(name).with_suffix(".json").read_text("utf-8"))

    def load_decoder(self) -> Any:
        """Load the decoder for inference."""
        package = importlib.import_module("rudolph.model.model")
        model = package.ruDolphModel(device="cpu", **self.arguments("decoder"))
        model.load_state_dict(load_file(self.path("decoder")))
        return model.eval()

    def load_vqgan(self) -> Any:
        """Load the VQ-GAN for inference."""
        config = Namespace(self.arguments("vqgan"))
        model = importlib.import_module("rudalle.vae.model").VQGanGumbelVAE(config, dwt=config.dwt)
        model.load_state_dict(load_file(self.path("vqgan")))
        return model.eval()

    def load_upscaler(self) -> Any:
        """Load the upscaler for inference."""
        package = importlib.import_module("rudalle.realesrgan.rrdbnet_arch")
        model = package.RRDBNet(**self.arguments("upscaler"))
        model.load_state_dict(load_file(self.path("upscaler")))
        return model.eval()

    def prepare_api(self) -> None:
        """Create the reference's own decoding loop, for the fixed prompt or the caption."""
        package = importlib.import_module("rudolph.api")
        tokenizer: Any = FixedPromptTokenizer(self.inputs["left"])
        vocabulary, sampling = self.case["vocabulary"], self.case["sampling"]
        if self.case["speed"]["workload"] == "pipeline":
            yttm: Any = importlib.import_module("youtokentome")
            wrapper: Any = importlib.import_module("rudalle.tokenizer").YTTMTokenizerWrapper
            tokenizer = wrapper(yttm.BPE(model=str(self.folder / "bpe.model")))
        specials = {
            name: vocabulary["bpe_size"] + k for k, name in enumerate(REFERENCE_TASK_TOKENS)
        }
        self.api = package.ruDolphApi(
            self.decoder,
            tokenizer,
            self.vqgan,
            specials,
            quite=True,
            bs=self.size,
            # 0 and 1 disable these filters.
            img_top_k=sampling["top_k"] or 0,
            img_top_p=sampling["top_p"] or 1.0,
            img_temperature=sampling["temperature"],
        )
        self.decoder.register_forward_hook(self.watch_cache)

    def watch_cache(self, model: object, inputs: object, output: Any) -> None:
        """Record the cache size after each forward pass of the decoder."""
        layers = output[1].values() if isinstance(output[1], dict) else ()
        tensors = [t for layer in layers if isinstance(layer, tuple) for t in layer]
        self._cache_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def cache_bytes(self) -> int:
        """Return the bytes of the key/value cache after the last forward pass."""
        return self._cache_bytes

    def run(self, part: str, *, is_short: bool) -> Any:
        """Run one part of the workload."""
        return WORKS[self.case["speed"]["workload"], part](self, is_short)

    def sample_tokens(self, is_short: bool) -> Any:
        """Sample image tokens."""
        self.sample(self.num_tokens(is_short))
        return serving.WorkResult(self.size * self.num_tokens(is_short))

    def num_tokens(self, is_short: bool) -> int:
        """Return the number of tokens to sample per image."""
        num_image_tokens = self.case["layout"]["image_tokens_per_dim"] ** 2
        max_tokens = min(self.case["speed"]["num_tokens"] or num_image_tokens, num_image_tokens)
        return min(SHORT, max_tokens) if is_short else max_tokens

    def sample(self, num_tokens: int) -> Tensor:
        """Sample ``num_tokens`` tokens for each image of a batch."""
        # The loop samples as many tokens as this setting of the API says.
        self.api.image_seq_length = num_tokens
        indices: Tensor = self.api.generate_codebooks(
            self.caption, images_num=self.size, bs=self.size, seed=self.seed
        )
        return indices

    def make_images(self, is_short: bool) -> Any:
        """Generate images from text to PNG files; a short repetition decodes indices of zero."""
        utilities = importlib.import_module("rudolph.utils")
        indices = self.sample(self.num_tokens(is_short))
        if is_short:
            indices = torch.zeros(self.size, self.num_tokens(False), dtype=torch.long)
        with torch.no_grad():
            images = utilities.torch_tensors_to_pil_list(self.vqgan.decode(indices))
        for number, image in enumerate(images):
            image.save(self.folder / f"reference-{number}.png")
        return serving.WorkResult(self.size)

    def train_decoder(self, is_short: bool) -> Any:
        """Run one training step of the decoder."""
        model, tokens = self.decoder, self.inputs["tokens"]
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        mask = torch.tril(torch.ones(len(tokens), 1, tokens.shape[1], tokens.shape[1]))
        model.train()
        loss, _ = model(tokens, mask, return_loss=True)
        self.step(loss)
        return serving.WorkResult(tokens.numel())

    def step(self, loss: Any) -> None:
        """Backpropagate a loss and update the weights."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def encode(self, is_short: bool) -> Any:
        """Encode images to indices."""
        self.vqgan.eval().get_codebook_indices(self.inputs["images"], disable_gumbel_softmax=True)
        return serving.WorkResult(self.size)

    def decode(self, is_short: bool) -> Any:
        """Decode indices to images."""
        with torch.no_grad():
            self.vqgan.eval().decode(self.inputs["indices"])
        return serving.WorkResult(self.size)

    def train_vqgan(self, is_short: bool) -> Any:
        """Run one training step of the VQ-GAN."""
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(self.vqgan.parameters(), lr=4.5e-6, betas=(0.5, 0.9))
        self.vqgan.train()
        images = 2 * self.inputs["images"] - 1
        quantized, quantizer_loss, _ = self.vqgan.model.encode(images)
        decoded = self.vqgan.model.decode(quantized)
        self.step((decoded - images).abs().mean() + quantizer_loss)
        return serving.WorkResult(self.size)

    def upscale(self, is_short: bool) -> Any:
        """Upscale images."""
        with torch.no_grad():
            self.upscaler(self.inputs["images"])
        return serving.WorkResult(self.size)

    def check(self, path: Path) -> None:
        """Write the outputs of the models on the fixed inputs to ``path``."""
        outputs = {}
        with torch.no_grad():
            if self.decoder is not None:
                tokens, length = self.inputs["checked"], self.decoder.total_seq_length
                mask = torch.tril(torch.ones(1, 1, length, length))
                outputs["logits"] = self.decoder.eval()(tokens, mask, return_loss=False)[0]
            if self.vqgan is not None:
                outputs["images"] = self.vqgan.eval().decode(self.inputs["indices"][:1])
            if self.upscaler is not None:
                outputs["images"] = self.upscaler(self.inputs["images"][:1])
        save_file({name: value.contiguous() for name, value in outputs.items()}, path)


# Workload and part -> method.
WORKS = {
    ("decode", "decode"): Reference.sample_tokens,
    ("memory", "decode"): Reference.sample_tokens,
    ("pipeline", "pipeline"): Reference.make_images,
    ("train", "train"): Reference.train_decoder,
    ("vqgan", "encode"): Reference.encode,
    ("vqgan", "decode"): Reference.decode,
    ("vqgan", "train"): Reference.train_vqgan,
    ("upscaler", "upscale"): Reference.upscale,
}
REFERENCE_TASK_TOKENS = ("<LT_UNK>", "<RT_UNK>", "<LT_T2I>", "<LT_I2T>", "<LT_T2T>", "<RT_I2T>")


def load_by_path(name: str) -> Any:
    """Import a file next to this one as a module outside any package.

    Raises:
        ValueError: If the file is missing.
    """
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ValueError(f"{name}.py: expected it next to {__file__}, got no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_packages(folder: Path) -> dict[str, str]:
    """Make the packages in ``folder`` importable, with stubs for their dependencies.

    Returns:
        The versions of the packages, keyed by name.

    Raises:
        ValueError: If ``rudolph`` is imported from elsewhere.
    """
    sys.path.insert(0, str(folder))
    install_stubs()
    # The packages' own ``__init__`` would import all their models and the downloaders.
    for name in ("rudalle", "rudalle.realesrgan"):
        package: Any = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    package_file = importlib.import_module("rudolph").__file__
    for name in MODULES:
        importlib.import_module(name)
    for name in NOT_NEEDED:
        # torch checks whether some of these are installed.
        del sys.modules[name]
    if package_file is None or not Path(package_file).is_relative_to(folder):
        raise ValueError(f"rudolph: expected the reference in {folder}, got {package_file}")
    installed = importlib.metadata.distributions(path=[str(folder)])
    return {distribution.metadata["Name"]: distribution.version for distribution in installed}


serving = load_by_path("serving")

if __name__ == "__main__":
    packages = import_packages(Path(sys.argv[1]).resolve())
    serving.serve_implementation(lambda setup: Reference(setup, packages))
