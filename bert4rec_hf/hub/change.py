"""A changed model folder takes the place of the former one in one step."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import finished, folder_beside
from ..reading import read_json
from .model_card import EVALUATION_FILE, write_model_card
from .publish_code import publish_code


@contextmanager
def changed_model(source: Path, destination: Path) -> Iterator[Path]:
    """Yield a folder with the files of a model folder, for a changed model. It replaces `destination` at the end.

    The folder lacks the weights, which the caller writes, and evaluation.json, whose metrics are those of the former
    model. At the end it gets the published code, if the model folder has it, and a new card. Checkpoints and folders of
    the user's own stay where they are.

    Args:
        source: The model folder.
        destination: The folder to write: `source`, or a folder that is missing or empty.
    """
    names = {path.name for path in finished(source) if path.is_file()}
    has_code = "auto_map" in read_json(source / "config.json", {})
    with folder_beside(destination, last_file="config.json", own_files=lambda folder: names) as folder:
        for name in names:
            if not name.endswith(".safetensors") and name not in (EVALUATION_FILE, "model.safetensors.index.json"):
                shutil.copy2(source / name, folder / name)
        yield folder
        if has_code:
            publish_code(folder)
        write_model_card(folder)
