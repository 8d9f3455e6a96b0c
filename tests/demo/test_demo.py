"""`bert4rec demo` in headless Chromium: a path by mouse, and one by keyboard alone. `make test-demo` runs it."""

import os
import random
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from chain_runs import free_port

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainingArguments,
    prepare,
    train_prepared,
)

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

PICTURES = Path(__file__).parent.parent.parent / "docs" / "assets"
# Titles that a careless page would run or misread.
TITLES = {
    "0": "Alpha <b id='injected'>bold</b>",
    "1": "Beta *stars* | [link](javascript:alert(1))",
    "2": "Gamma <img src=x onerror='document.title=1'>",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of a small log in which each item has one successor, with titles and an item table."""
    folder, chance = tmp_path_factory.mktemp("demo"), random.Random(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(100):
        item = chance.randrange(30)
        for time_ in range(15):
            lines.append(f"{user},{item},{time_}")
            item = (item + 1) % 30 if chance.random() < 0.9 else chance.randrange(30)
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    titles = {str(item): TITLES.get(str(item), f"Film number {item}") for item in range(30)}
    prepare(folder / "log.csv", folder / "data", item_titles=titles)
    arguments = Bert4RecTrainingArguments(
        str(folder / "model"), num_train_epochs=5, use_cpu=True, disable_tqdm=True, report_to="none"
    )
    train_prepared(folder / "data", arguments, hidden_size=32)
    (folder / "items.csv").write_text("item_id,price\n" + "".join(f"{item},{item}\n" for item in range(30)))
    return folder


@pytest.fixture(scope="module")
def url(model):
    port = free_port()
    words = ["demo", model / "model", "--port", str(port), "--items", model / "items.csv"]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "-m", "bert4rec_hf", *words], env=environment)
    yield waited_for(process, f"http://127.0.0.1:{port}")
    process.terminate()
    process.wait()


def waited_for(process, url):
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url).read()
            return url
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, url, width=1280, height=900):
    page = browser.new_page(viewport={"width": width, "height": height})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.get_by_label("Search titles and ids").wait_for()
    return page, problems


def recommended(page):
    """The text of the table of recommendations, a line for each cell."""
    return page.locator("#recommended").inner_text()


def wait_for_first(page, item, reason):
    """Wait until the first recommendation is an item, and its reason another one."""
    start = " ".join(f"1 {item}".split())
    page.wait_for_function(
        """([start, reason]) => {
            const cells = document.querySelector("#recommended").innerText.split("because of")[1] || ""
            const first = cells.split(/\\s+/).join(" ").trim().split(" 2 Film")[0]
            return first.startsWith(start) && first.includes(reason)
        }""",
        arg=[start, reason],
        timeout=20_000,
    )


def test_a_person_finds_a_title_and_gets_recommendations_with_reasons(browser, url):
    page, problems = open_page(browser, url)
    page.get_by_label("Search titles and ids").fill("film 10")
    page.get_by_text("Film number 10 [10]").first.click()
    wait_for_first(page, "Film number 11 [11]", "Film number 10 [10]")
    page.get_by_label("Search titles and ids").fill("number 20")
    page.get_by_text("Film number 20 [20]").first.click()
    wait_for_first(page, "Film number 21 [21]", "Film number 20 [20]")
    assert page.get_by_text("1. Film number 10 [10]").count() == 1
    assert page.get_by_text("2. Film number 20 [20]").count() == 1
    if os.environ.get("UPDATE_PICTURES"):
        page.screenshot(path=PICTURES / "demo.png")
    page.get_by_text("2. Film number 20 [20]").click()  # take it away again
    page.get_by_text("2. Film number 20 [20]").wait_for(state="detached", timeout=20_000)
    assert "Film number 11 [11]" in recommended(page)
    page.get_by_text("Number of items, diversity and rules").click()
    page.get_by_label("Condition, such as price < 50").fill("price < 5")
    gone = "!document.querySelector('#recommended').innerText.includes('Film number 11 [11]')"
    page.wait_for_function(gone, timeout=20_000)
    page.get_by_label("Condition, such as price < 50").fill("prize < 5")
    page.get_by_label("This does not work").wait_for(timeout=20_000)
    assert "price" in page.get_by_label("This does not work").input_value()
    page.get_by_role("tab", name="Model").click()
    page.get_by_label("Size").wait_for()
    assert problems == []


def test_the_path_by_keyboard_alone(browser, url):
    page, problems = open_page(browser, url)
    for _ in range(15):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") in ("TEXTAREA", "INPUT"):
            break
    page.keyboard.type("film 12")
    page.get_by_text("Film number 12 [12]").first.wait_for(timeout=20_000)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("Space")
    wait_for_first(page, "Film number 13 [13]", "Film number 12 [12]")
    assert problems == []


def test_on_a_narrow_screen_nothing_is_wider_than_the_screen(browser, url):
    page, problems = open_page(browser, url, width=390, height=800)
    page.get_by_label("Search titles and ids").fill("film 10")
    page.get_by_text("Film number 10 [10]").first.click()
    wait_for_first(page, "Film number 11 [11]", "Film number 10 [10]")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    if os.environ.get("UPDATE_PICTURES"):
        page.screenshot(path=PICTURES / "demo-narrow.png", full_page=True)
    assert problems == []


def test_titles_are_text_and_nothing_else(browser, url):
    page, problems = open_page(browser, url)
    for number, word in enumerate(("alpha", "beta", "gamma")):
        page.get_by_label("Search titles and ids").fill(word)
        page.locator("label").filter(has_text=word.capitalize()).locator("input[type=radio]").first.click()
        page.get_by_text(f"{number + 1}. {word.capitalize()}").first.wait_for(timeout=20_000)
    page.wait_for_timeout(500)
    assert page.locator("#injected").count() == 0
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    assert page.title() != "1"
    assert "Alpha <b id='injected'>bold</b> [0]" in page.inner_text("body")
    assert problems == []


def test_a_space_runs_as_it_is(browser, model, tmp_path):
    words = ["demo", model / "model", "--items", model / "items.csv", "--space", tmp_path / "space"]
    subprocess.run([sys.executable, "-m", "bert4rec_hf", *words], check=True)
    assert {path.name for path in (tmp_path / "space").iterdir()} == {
        "README.md", "app.py", "requirements.txt", "bert4rec_hf", "model"
    }  # fmt: skip
    assert not list((tmp_path / "space").rglob("training_args.bin"))
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=environment)
    try:
        page, problems = open_page(browser, waited_for(process, f"http://127.0.0.1:{port}"))
        page.get_by_label("Search titles and ids").fill("film 10")
        page.get_by_text("Film number 10 [10]").first.click()
        wait_for_first(page, "Film number 11 [11]", "Film number 10 [10]")
        assert problems == []
    finally:
        process.terminate()
        process.wait()
    subprocess.run([sys.executable, "-m", "bert4rec_hf", *words], check=True)  # it replaces its own
    (tmp_path / "space" / "notes.txt").write_text("mine")
    again = subprocess.run([sys.executable, "-m", "bert4rec_hf", *words], capture_output=True, text=True)
    assert again.returncode == 2
    assert "holds notes.txt, which is no file of a Space" in again.stderr


def test_a_model_without_titles_and_evaluations_has_a_page_too(browser, tmp_path):
    tokenizer = Bert4RecTokenizer.from_items([f"sku {number}" for number in range(20)])
    torch.manual_seed(0)
    Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=23, hidden_size=32)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "bert4rec_hf", "demo", tmp_path / "m", "--port", str(port)])
    try:
        page, problems = open_page(browser, waited_for(process, f"http://127.0.0.1:{port}"))
        page.get_by_label("Search titles and ids").fill("sku 7")
        page.get_by_text("sku 7").last.click()
        page.get_by_text("1. sku 7").wait_for(timeout=20_000)
        assert problems == []
    finally:
        process.terminate()
        process.wait()
