"""The demo in headless Chromium: every tab, broken uploads, cancelling and two users.

They need Gradio, Playwright (``pip install gradio playwright``) and a Chromium.
"""

import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
PAGE_TIMEOUT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the shipped model and a copy of it, with the results of this checkout."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "results").symlink_to(ROOT / "results" / "masks")
    (folder / "copy").symlink_to(ROOT / "rudolph" / "checkpoints" / "demo")
    # A proxy must not stand between the server and itself.
    environment = {"PYTHONPATH": str(ROOT), "HTTP_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "rudolph", "demo", "--port", "0", "--model", "shipped"]
    with subprocess.Popen(
        [*command, "copy", "--max-number", "200"],
        cwd=folder,
        env=os.environ | environment | {"TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        match = re.match(r"http://127\.0\.0\.1:\d+", server.stderr.readline())
        assert match is not None
        yield match[0]
        server.send_signal(signal.SIGINT)
        # The browser shows errors in one line each, and the terminal none of them.
        assert "rudolph/demo/" not in server.stderr.read()
        assert server.wait() == 0
    assert list(folder.glob("rudolph-demo-*")) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Open the demo; no request may leave this machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    requested: list[str] = []
    context.on("request", lambda request: requested.append(request.url))
    yield opened(context, address)
    context.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []


def opened(context: Any, address: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(PAGE_TIMEOUT)
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def wait_for_text(page: Any, text: str) -> None:
    page.get_by_text(text).locator("visible=true").first.wait_for()


def wait_for_command(page: Any, text: str) -> None:
    """Wait until a visible field with the command contains the text."""
    shown = "[...document.querySelectorAll('textarea')].filter(area => area.offsetParent)"
    page.wait_for_function(f"text => {shown}.some(area => area.value.includes(text))", arg=text)


def generated(page: Any, text: str, number: int) -> None:
    page.fill("#prompt textarea", text)
    page.get_by_label("number input for Number of images").locator("visible=true").fill(
        str(number)
    )
    click(page, "Generate")


def image_file(tmp_path: Path) -> str:
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_generate_downloads_what_the_shown_command_writes(page: Any, tmp_path: Path) -> None:
    generated(page, "фея", 2)
    wait_for_command(page, "rudolph generate")
    assert page.locator(".thumbnail-item img").count() == 2
    with page.expect_download() as download:
        click(page, "Download the result with its settings")
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    command = files["command.txt"].decode()
    assert command == "rudolph generate 'фея' --number 2\n"
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for path in sorted((tmp_path / "generated").iterdir()):
        assert files[f"generated/{path.name}"] == path.read_bytes()


def test_a_painted_region_is_generated_again(page: Any, tmp_path: Path) -> None:
    click(page, "Image prompt ▼")
    page.get_by_label("regenerate the painted region").check()
    page.set_input_files("#editor input[type=file]", image_file(tmp_path))
    page.wait_for_timeout(2000)
    generated(page, "фея", 1)
    wait_for_text(page, "Paint over the image")
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)
    click(page, "Generate")
    wait_for_command(page, "--mask mask.png")
    click(page, "Use the selected image as image prompt")
    page.wait_for_timeout(1000)
    assert page.get_by_label("vary the whole image").is_checked()
    click(page, "Generate")
    wait_for_command(page, "--vary 0.5")


def test_mistakes_of_a_user_are_one_line(page: Any, tmp_path: Path) -> None:
    click(page, "Generate")
    wait_for_text(page, "prompt: expected a text, got none")
    page.fill("#prompt textarea", "фея")
    page.get_by_label("Seed").locator("visible=true").fill("99999999999999")
    click(page, "Generate")
    wait_for_text(page, "seed: expected a whole number from 0")
    open_tab(page, "Describe and ask")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    page.set_input_files("#upload input[type=file]", str(tmp_path / "broken.png"))
    page.wait_for_timeout(1000)
    click(page, "Run")
    wait_for_text(page, "image: expected an image, got a file with: corrupt image")


def test_describe_answers_and_classifies_an_upload_and_a_drawing(
    page: Any, tmp_path: Path
) -> None:
    open_tab(page, "Describe and ask")
    page.set_input_files("#upload input[type=file]", image_file(tmp_path))
    page.wait_for_timeout(1000)
    click(page, "Run")
    wait_for_command(page, "rudolph caption image.png")
    page.get_by_label("Answer a question").check()
    page.fill("#question textarea", "что это?")
    click(page, "Run")
    wait_for_command(page, "--question 'что это?'")
    page.get_by_label("Draw").check()
    page.wait_for_selector("#drawing canvas")
    page.wait_for_timeout(1000)
    page.locator("#drawing button[aria-label=Brush]").click()
    box = page.locator("#drawing canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.get_by_label("Choose between classes").check()
    page.fill("#classes textarea", "олень, кот")
    click(page, "Run")
    wait_for_command(page, "--classes 'олень' 'кот'")


def test_look_inside_shows_attention_probabilities_replay_and_masks(page: Any) -> None:
    open_tab(page, "Look inside")
    click(page, "Generate and look inside")
    wait_for_text(page, "attends to: left text")
    wait_for_text(page, "row 5, column 5")
    page.locator("#attention img").click(position={"x": 20, "y": 60})
    wait_for_text(page, "row 2, column 1")
    open_tab(page, "Replay")
    assert page.locator("#replay img").get_attribute("src").endswith("replay.gif")
    before = page.locator("#frame img").get_attribute("src")
    page.locator("#step input[type=number]").fill("7")
    page.wait_for_function(
        "before => document.querySelector('#frame img').getAttribute('src') != before", arg=before
    )
    open_tab(page, "Masks")
    click(page, "Show the attention mask of each layer")
    page.locator("#masks img").wait_for()


def test_compare_shows_two_models_side_by_side(page: Any) -> None:
    open_tab(page, "Compare")
    page.fill("#compare_prompt textarea", "олень")
    click(page, "Generate with both")
    wait_for_command(page, "rudolph generate 'олень' --model copy --number 4")
    assert page.locator(".thumbnail-item img").locator("visible=true").count() == 8


def test_results_show_verdicts_findings_and_figures(page: Any) -> None:
    open_tab(page, "Results")
    wait_for_text(page, "reproduced")
    wait_for_text(page, "Finding")
    assert page.locator(".figures img").count() >= 2


def test_only_this_machine_under_its_own_name_is_served(address: str) -> None:
    answers = {}
    for name in ("127.0.0.1", "localhost", "another.example"):
        request = urllib.request.Request(f"{address}/config", headers={"Host": name})
        try:
            with urllib.request.urlopen(request) as answer:
                answers[name] = answer.status
        except urllib.error.HTTPError as error:
            answers[name] = error.code
    assert answers == {"127.0.0.1": 200, "localhost": 200, "another.example": 400}


def test_a_second_user_waits_until_the_first_cancels(
    browser: Any, address: str, page: Any
) -> None:
    other = opened(browser.new_context(), address)
    generated(page, "фея", 200)
    progress = page.get_by_text(re.compile(r"sample - ")).locator("visible=true").first
    progress.wait_for()
    generated(other, "олень", 1)
    other.get_by_text(re.compile(r"queue: \d")).locator("visible=true").first.wait_for()
    click(page, "Cancel")
    progress.wait_for(state="hidden")
    wait_for_command(other, "rudolph generate 'олень' --number 1")
    assert page.locator(".thumbnail-item img").count() == 0
    other.context.close()
