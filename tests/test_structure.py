"""Structure of the repository: import order, owners of heavy libraries, and file sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "rudolph").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py")), ROOT / ".ci" / "bootstrap.py"]

# Packages from the bottom up; each imports only from those before it.
LAYERS = (
    "files",  # whole files and errors that name them
    "sequence",  # layout, vocabulary, masks, tasks, tokenizer
    "models",  # plain nn.Modules, one folder per family
    "checkpoints",  # released weights by name, their store and download, the demo model
    "data",  # datasets, mixture, examples, cache
    "generation",  # filters, decoding loop, likelihood, reranking, inpainting, upscaling
    "training",  # Lightning modules, losses, optimizers, callbacks
    "families",  # the interface of a model family, and one file per family
    "evaluation",  # evaluators, metrics, statistics
    "tracking",  # event log and MLflow
    "reports",  # result folders: tables, claims, figures, pages, check
    "benchmarks",  # speed and memory against references and machine limits
    "config",  # YAML loader, run configuration, experiment file
    "runs",  # one run and many runs: stages, runner, search, resolved sources
    "gpu_check",  # `make gpu-check`
    "demo",  # the demo in the browser
    "cli",  # commands: arguments and messages
    "__main__",
)
OWNERS = {
    "mlflow": r"tracking/(mlflow_store|mlflow_database|artifacts)",
    "matplotlib": r"reports/(figures|image_grids|style)",
    "seaborn": r"reports/(figures|image_grids|style)",
    "pytorch_lightning": r"training/\w+|data/loader|runs/trainer|runs/stages/run",
    "yaml": r"files/settings",
    "scipy": r"evaluation/(statistics|regions)",
    "sklearn": r"evaluation/regions",
    "optuna": r"runs/search",
    "youtokentome": r"sequence/tokenizer",
    "pydantic": r"files/settings",
    "huggingface_hub": r"checkpoints/hub",
    "httpx2": r"checkpoints/hub",
    "gradio": r"demo/(app|tabs/\w+)",
    "torchvision": r"nobody",
}
TOP_LEVEL = (
    "notebooks rudolph experiments results tests environment.yml README.md pyproject.toml "
    "LICENSE Makefile .ci .gitignore .pre-commit-config.yaml"
)
CONDA_NAMES = {"pytorch": "torch"}


def name_in_package(path: Path) -> str:
    return path.relative_to(ROOT / "rudolph").with_suffix("").as_posix()


def imports(path: Path) -> Iterator[str]:
    """Yield the full dotted names that a file imports, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = (
                path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            )
            base = ".".join([*here, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def packages_used(path: Path) -> set[str]:
    """Return the packages of ``rudolph`` that a file imports from, except its own."""
    used = {name.split(".")[1] for name in imports(path) if name.startswith("rudolph.")}
    return used & set(LAYERS) - {name_in_package(path).split("/")[0]}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def owner_of(used: str, modules: dict[str, Path]) -> str | None:
    """Return the module of this repository that defines an imported name, if any."""
    while used and used not in modules:
        used = used.rpartition(".")[0]
    # Importing a package to reach one of its modules runs none of our code.
    return None if used in ("", "rudolph") else used


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines from the first statement after the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def repository_files() -> list[str]:
    """Return tracked and untracked files; without git, all except hidden files and leftovers."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if (ROOT / ".git").exists() and listing.returncode == 0:
        return listing.stdout.splitlines()
    names = [entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")]
    return [name for name in names if not re.search(r"^runs$|^ml|\.egg-info$|\.db$", name)]


def loaded_by(module: str) -> set[str]:
    """Return the top-level modules of a fresh interpreter after importing one of ours."""
    code = f"import {module}, sys; print(*(name for name in sys.modules if '.' not in name))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def requirement(line: str) -> tuple[str, frozenset[str]]:
    """Return the PyPI name and the version bounds of a requirement."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", line).groups()
    name = name.lower().replace("_", "-")
    return CONDA_NAMES.get(name, name), frozenset(bounds.replace(" ", "").split(",")) - {""}


def test_a_package_imports_only_from_the_packages_below_it() -> None:
    packages = {name_in_package(path).split("/")[0] for path in PACKAGE} - {"__init__"}
    assert packages == set(LAYERS), "a package without a layer, or a layer without a package"
    wrong = [
        f"{name_in_package(path)} imports {other}"
        for path in PACKAGE
        for other in packages_used(path)
        if LAYERS.index(other) > LAYERS.index(name_in_package(path).split("/")[0])
    ]
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {module_name(path): path for path in PACKAGE}
    uses = {
        name: {owner for used in imports(path) if (owner := owner_of(used, modules)) != name}
        for name, path in modules.items()
    }
    for name in modules:
        known, waiting = set(), [*uses[name]]
        while waiting:
            used = waiting.pop()
            if used and used not in known:
                known.add(used)
                waiting += uses[used]
        assert name not in known, f"{name} imports itself through {sorted(known)}"


def test_a_heavy_library_is_imported_only_by_its_owner():
    wrong = [
        f"{name_in_package(path)} imports {library}"
        for path in PACKAGE
        for library in {name.split(".")[0] for name in imports(path)} & set(OWNERS)
        if not re.fullmatch(OWNERS[library], name_in_package(path))
    ]
    assert wrong == []


def test_files_and_functions_fit_their_bounds():
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 600:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_length(node) > 40:
                long.append(f"{path.relative_to(ROOT)}: {node.name}, {body_length(node)} lines")
    assert long == []


def test_a_public_name_is_defined_in_one_module() -> None:
    owners: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_"):
                    owners.setdefault(name, []).append(name_in_package(path))
    # A module that runs as a command has a ``main``.
    assert {name: paths for name, paths in owners.items() if len(paths) > 1}.keys() <= {"main"}


def test_a_file_is_named_after_what_it_holds():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [str(path) for path in SOURCES if vague & {path.stem, path.parent.name}] == []


def test_the_top_level_holds_only_what_is_agreed():
    assert {name.strip('"').split("/")[0] for name in repository_files()} <= set(TOP_LEVEL.split())


def test_conda_and_pip_install_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    from_pip = {requirement(line) for line in [*lines, f"python{project['requires-python']}"]}
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    from_conda = {requirement(line) for line in conda if isinstance(line, str) and line != "pip"}
    # Packages that conda-forge may lack are installed by pip.
    [by_pip] = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    from_conda |= {requirement(line) for line in by_pip if line != "-e ."}
    assert from_conda == from_pip


@pytest.mark.parametrize("module", ["rudolph.reports.figures", "rudolph.reports.store"])
def test_results_are_drawn_and_stored_without_torch(module):
    assert not loaded_by(module) & {"torch", "pytorch_lightning", "mlflow"}


def test_the_help_is_printed_without_any_library_of_other_people() -> None:
    """Otherwise ``rudolph --help`` takes seconds."""
    allowed = {"rudolph", "safetensors", *sys.stdlib_module_names}
    before = loaded_by("sys")
    assert loaded_by("rudolph.cli") - before - allowed == set()


@pytest.mark.parametrize(
    "module", ["rudolph.config.experiment_file", "rudolph.runs.runner", "rudolph.training.memory"]
)
def test_an_experiment_is_loaded_without_libraries_of_tables_or_training(module: str) -> None:
    """Otherwise ``run --dry-run``, ``show`` and an error message take seconds longer."""
    later = {"pandas", "pyarrow", "matplotlib", "seaborn", "scipy", "sklearn", "optuna"}
    later |= {"pytorch_lightning", "torchmetrics", "torchvision", "mlflow", "rich", "nltk"}
    assert loaded_by(module) & later == set()


def test_experiments_of_documents_are_loaded_without_the_compiler_of_torch() -> None:
    """The check of their settings builds each model on the meta device."""
    paths = [f"experiments/fusion/{name}.yaml" for name in ("encoders", "late_fusion")]
    code = (
        "import sys; from rudolph.config.experiment_file import load_experiment; "
        f"[*map(load_experiment, {paths})]; print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_a_mask_is_drawn_without_the_training_libraries():
    loaded = loaded_by("rudolph.sequence.masks")
    assert "torch" in loaded
    assert not loaded & {"pytorch_lightning", "mlflow", "matplotlib", "pandas", "youtokentome"}
