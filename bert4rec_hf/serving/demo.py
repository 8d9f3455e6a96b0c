"""`bert4rec demo`: a page to try a model, by Gradio; and the same page as a Hugging Face Space."""

import importlib.metadata
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import pipeline

from ..files import finished, folder_beside
from ..hub.load import check_model, load_model
from ..hub.model_card import CURVE_FILE, read_evaluations
from ..hub.push import PRIVATE_FILES
from ..version import __version__
from .rules import Rules, read_item_table

# Number of items that a search shows.
FOUND_SHOWN = 20
SPACE_FILES = ("README.md", "app.py", "requirements.txt", "bert4rec_hf", "model")
APP = '''"""A page to try a BERT4Rec model; `bert4rec demo --space` wrote it."""

from bert4rec_hf.serving.demo import build

build("model").launch()
'''
SPACE_CARD = """---
title: {title}
emoji: 🎬
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
---

A page to try a BERT4Rec model: search titles, put a history together, and see recommendations with their reasons.
`bert4rec demo --space` of bert4rec_hf {version} wrote it.
"""


class Demo:
    """What the page does, without the page.

    Args:
        model: A model folder or Hub id.
        items: The item table of the rules. None: items.parquet of the model, if it has one.

    Raises:
        OSError, ValueError: If this is no model folder, or the item table does not fit it.
    """

    def __init__(self, model: str | os.PathLike, items: str | os.PathLike | None = None):
        check_model(model)
        self.pipe: Any = pipeline("sequential-recommendation", model=load_model(model), tokenizer=model)
        self.tokenizer = self.pipe.tokenizer
        self.items = read_item_table(model, items)
        self.texts = [self.label(item).casefold() for item in self.tokenizer.items]
        self.lock = threading.Lock()  # visitors of the page take turns

    def label(self, item: str) -> str:
        """The title of an item and its id, or the id alone."""
        title = self.tokenizer.title(item) if self.tokenizer.titles is not None else None
        return f"{' '.join(title.split())} [{item}]" if title else item

    def search(self, text: str) -> list[tuple[str, str]]:
        """(label, id) of the first items whose title or id has all words of a text, the most frequent items first."""
        words = text.casefold().split()
        if not words:
            return []
        found = [place for place, label in enumerate(self.texts) if all(word in label for word in words)]
        counts = self.tokenizer.counts
        found.sort(key=lambda place: -counts[place] if counts is not None else 0)
        names = [self.tokenizer.items[place] for place in found[:FOUND_SHOWN]]
        return [(self.label(item), item) for item in names]

    def recommend(
        self,
        history: Sequence[str],
        top_k: int = 10,
        keeps_seen: bool = False,
        diversity: float = 0.0,
        where: str | None = None,
        max_per: str | None = None,
    ) -> list[dict[str, Any]]:
        """The answer of the pipeline with reasons.

        Raises:
            ValueError: If a rule is wrong.
        """
        where, max_per = ((text or "").strip() or None for text in (where, max_per))
        rules = None
        if where or max_per or diversity:
            rules = Rules(self.items, where=where, max_per=max_per, diversity=diversity)
        with self.lock:
            return self.pipe(
                list(history), top_k=int(top_k), filter_seen_items=not keeps_seen, rules=rules, explain=True
            )

    def rows(self, answer: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """The rows of the table of recommendations: rank, item, score and reasons."""
        return [
            [
                str(rank),
                self.label(entry["item_id"]),
                f"{entry['score']:.2f}",
                ", ".join(self.label(source["item_id"]) for source in entry.get("because", [])),
            ]
            for rank, entry in enumerate(answer, start=1)
        ]

    def similar(self, item: str | None) -> list[list[str]]:
        """The rows of the table of similar items."""
        if not item:
            return []
        with self.lock:
            answer = self.pipe.similar(item, top_k=10)
        return [[self.label(entry["item_id"]), f"{entry['score']:.2f}"] for entry in answer]


def build(model: str | os.PathLike, items: str | os.PathLike | None = None) -> Any:
    """The page for a model, a `gradio.Blocks`. `build(model).launch()` shows it.

    Args:
        model: A model folder or Hub id.
        items: The item table of the rules. None: items.parquet of the model, if it has one.

    Raises:
        ImportError: If Gradio is not installed: `pip install 'bert4rec_hf[demo]'`.
        OSError, ValueError: If this is no model folder, or the item table does not fit it.
    """
    import gradio as gr

    demo = Demo(model, items)
    name = Path(os.path.abspath(model)).name if os.path.isdir(model) else str(model)

    def search(text: str | None) -> Any:
        found = demo.search(text or "")
        nothing = (text or "").strip() and not found
        return gr.update(choices=found, value=None, label="Nothing found" if nothing else "Found: choose one to add it")

    def shown(history: list[str], *settings: Any) -> tuple[Any, ...]:
        try:
            answer, problem = demo.recommend(history, *settings), ""
        except ValueError as error:
            answer, problem = [], str(error)
        places = [(f"{place}. {demo.label(item)}", str(place - 1)) for place, item in enumerate(history, start=1)]
        choices = [(demo.label(entry["item_id"]), entry["item_id"]) for entry in answer]
        return (
            history,
            gr.update(choices=places, value=[value for _, value in places], visible=bool(places)),
            demo.rows(answer),
            gr.update(choices=choices, value=choices[0][1] if choices else None),
            gr.update(value=problem, visible=bool(problem)),
        )

    def add(item: str | None, history: list[str], *settings: Any) -> tuple[Any, ...]:
        return *shown([*history, item] if item else history, *settings), None  # the choice is cleared

    def keep(places: list[str], history: list[str], *settings: Any) -> tuple[Any, ...]:
        return shown([history[int(place)] for place in sorted(places, key=int)], *settings)

    with gr.Blocks(title=f"{name}: recommendations") as page:
        history = gr.State([])
        gr.Markdown("# Recommendations")
        with gr.Tab("Recommend"), gr.Row():
            with gr.Column(min_width=320):
                text = gr.Textbox(label="Search titles and ids", placeholder="for example a word of a title")
                found = gr.Radio(choices=[], label="Found: choose one to add it")
                had = gr.CheckboxGroup(
                    choices=[], label="History, oldest first: clear a box to remove the item", visible=False
                )
                clear = gr.Button("Clear the history")
                with gr.Accordion("Number of items, diversity and rules", open=False):
                    top_k = gr.Slider(1, 50, 10, step=1, label="Number of items")
                    seen = gr.Checkbox(
                        not demo.pipe.model.config.filter_seen_items, label="Items of the history may be recommended"
                    )
                    diversity = gr.Slider(0, 1, 0, step=0.05, label="Diversity")
                    has_table = demo.items is not None
                    where = gr.Textbox(label="Condition, such as price < 50", visible=has_table)
                    max_per = gr.Textbox(label="Quota, such as category:2", visible=has_table)
            with gr.Column(min_width=320, scale=2):
                problem = gr.Textbox(label="This does not work", visible=False)
                table = gr.Dataframe(
                    headers=["rank", "item", "score", "because of"], datatype="str", label="Recommended", wrap=True,
                    elem_id="recommended",
                    interactive=False,
                )  # fmt: skip
                chosen = gr.Dropdown(choices=[], label="Similar items of")
                similar = gr.Dataframe(
                    headers=["item", "similarity"], datatype="str", label="Similar items", wrap=True, interactive=False
                )
        with gr.Tab("Model"):
            if os.path.isdir(model):
                curve = Path(model) / CURVE_FILE
                if curve.is_file():
                    gr.Image(str(curve), label="Learning curve", interactive=False)
                for record in read_evaluations(model):
                    protocol = record["protocol"]
                    metrics = {"model": record["metrics"], **record.get("baselines", {})}
                    names = [name for name in ("HR@10", "NDCG@10", "recall@10", "MRR") if name in record["metrics"]]
                    gr.Dataframe(
                        [[system, *(f"{values[name]:.4f}" for name in names)] for system, values in metrics.items()],
                        headers=["", *names], datatype="str", interactive=False,
                        label=f"{protocol['split']}, {protocol['part']}, {protocol['num_users']:,} users",
                    )  # fmt: skip
            gr.Textbox(
                f"{len(demo.tokenizer.items):,} items, {demo.pipe.model.num_parameters():,} weights, "
                f"bert4rec_hf {__version__}",
                label="Size",
            )
        settings = [top_k, seen, diversity, where, max_per]
        outputs = [history, had, table, chosen, problem]
        text.change(search, text, found, show_progress="hidden")
        found.input(add, [found, history, *settings], [*outputs, found])
        had.input(keep, [had, history, *settings], outputs)
        clear.click(lambda *settings: shown([], *settings), settings, outputs)
        for setting in settings:
            setting.change(shown, [history, *settings], outputs)
        chosen.change(demo.similar, chosen, similar)
        page.load(shown, [history, *settings], outputs)
    return page


def write_space(model: str | os.PathLike, output: str | os.PathLike, items: str | os.PathLike | None = None) -> None:
    """Write a folder that a Hugging Face Space runs as it is: the model, this package and the page.

    Args:
        model: A model folder.
        output: The folder to write, which is missing, empty, or an earlier Space of this function.
        items: The item table of the rules, which becomes items.parquet of the model. None: that of the model.

    Raises:
        ImportError: If Gradio is not installed, whose version the Space names.
        OSError, ValueError: If this is no model folder, the item table does not fit it, or the output has other files.
    """
    import gradio as gr

    if not os.path.isdir(model):
        raise ValueError(f"expected a model folder, which the Space contains; got {model}: download it first")
    demo = Demo(model, items)  # raises before anything is written
    package = Path(__file__).parent.parent
    names = importlib.metadata.requires("bert4rec_hf") or []
    needed = [name for name in names if "extra ==" not in name]
    with folder_beside(Path(output), last_file="app.py", own_files=_own_files) as folder:
        (folder / "model").mkdir()
        for path in finished(Path(model)):  # folders are checkpoints and logs
            if path.is_file() and path.name not in PRIVATE_FILES and not path.name.startswith((".", "_")):
                shutil.copyfile(path, folder / "model" / path.name)
        if items is not None:
            import pyarrow.parquet as pq

            pq.write_table(demo.items.table, folder / "model" / "items.parquet")  # type: ignore[union-attr]
        shutil.copytree(package, folder / "bert4rec_hf", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "requirements.txt").write_text("\n".join(needed) + "\n", "utf-8")
        title = "".join(character for character in Path(os.path.abspath(model)).name if character.isalnum())
        (folder / "README.md").write_text(
            SPACE_CARD.format(title=title or "BERT4Rec", gradio=gr.__version__, version=__version__), "utf-8"
        )
        (folder / "app.py").write_text(APP, "utf-8")


def _own_files(folder: Path) -> list[str]:
    """The entries of an earlier Space. Raises ValueError if the folder has others."""
    names = [path.name for path in finished(folder)]
    others = [name for name in names if name not in SPACE_FILES and not name.startswith(".git")]
    if others or (folder / "app.py").read_text("utf-8") != APP:
        raise ValueError(f"{folder} holds {(others or ['another app.py'])[0]}, which is no file of a Space that "
                         "bert4rec demo wrote; choose another --space")  # fmt: skip
    return [name for name in names if name in SPACE_FILES]
