"""Checks that RecBole and hopwise load our converted files strictly and compute equal scores.

    python tests/lineage/return_trip.py FOLDER

The script creates an environment for each library in FOLDER (once). It converts one of our models, and real checkpoints
if they are available, and compares scores over the whole catalogue for histories of every length.
"""

import json
import random
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from transformers import set_seed

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.convert.recbole import convert_from_recbole, convert_to_recbole
from bert4rec_hf.convert.recbole_settings import ARCHITECTURE
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID

HERE = Path(__file__).parent
FIXTURES = HERE.parent.parent.parent / "shared" / "fixtures"
# The packages that BERT4Rec of RecBole and hopwise imports. All their requirements would be ten times as much.
NEEDED = [
    "torch==2.13.0", "pandas", "scipy", "scikit-learn", "pyyaml", "colorama", "colorlog", "tqdm", "tabulate",
    "texttable", "tensorboard", "thop", "plotly", "psutil",
]  # fmt: skip
LIBRARIES = {
    "recbole": (["recbole==1.2.1"], [*NEEDED, "numpy<2"]),
    "hopwise": (
        ["hopwise==0.9.1.post1"],
        [*NEEDED, "rich", "cachetools", "numba", "wandb", "joblib", "requests", "transformers"],
    ),
}


def environment(folder: Path, library: str) -> Path:
    python = folder / library / "bin" / "python"
    if not (folder / library / "installed").exists():
        venv.create(folder / library, with_pip=True, clear=True)
        package, needed = LIBRARIES[library]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *needed], check=True)
        subprocess.run([*pip, "--no-deps", *package], check=True)
        (folder / library / "installed").touch()
    return python


def our_model(folder: Path) -> Path:
    set_seed(0)
    tokenizer = Bert4RecTokenizer.from_items([f"film {number}" for number in range(300)], model_max_length=12)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_attention_heads=3, intermediate_size=40, hidden_act="relu",
        max_position_embeddings=12, initializer_range=0.3, item_loss="bpr", **ARCHITECTURE,
    )  # fmt: skip
    Bert4RecForMaskedItemPrediction(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def difference(folder: Path, model_folder: Path, library: str, python: Path) -> float:
    """The largest difference between our scores and theirs, over the catalogue."""
    model = Bert4RecForMaskedItemPrediction.from_pretrained(model_folder).eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(model_folder)
    tokenizer.drop_oldest_item = True  # as RecBole and hopwise do
    chance = random.Random(0)
    longest = 2 * model.config.max_position_embeddings
    histories = [[chance.choice(tokenizer.items) for _ in range(length)] for length in range(1, longest)]
    theirs, asked, answered = folder / "theirs.pth", folder / "histories.json", folder / "scores.pth"
    theirs.unlink(missing_ok=True)
    convert_to_recbole(model_folder, theirs)
    asked.write_text(json.dumps(histories))
    subprocess.run(
        [python, HERE / "peer.py", library, theirs, asked, answered], check=True, stdout=subprocess.DEVNULL, cwd=folder
    )
    batch = tokenizer(histories, padding=True, return_tensors="pt")
    positions = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    with torch.no_grad():
        ours = model(**batch, masked_positions=positions).logits[:, 0, FIRST_ITEM_ID:]
    return (torch.load(answered, weights_only=True)[:, 1:] - ours).abs().max().item()


def main() -> None:
    environments = Path(sys.argv[1]).resolve()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"our model": our_model(folder / "ours")}
        for checkpoint in sorted(FIXTURES.glob("*/*.pth")):
            expected = json.loads((checkpoint.parent / "expected.json").read_text())
            if expected["version"] != "1.1.1":  # we do not write the layout of 1.1.1
                models[checkpoint.parent.name] = folder / checkpoint.parent.name
                convert_from_recbole(checkpoint, expected["item_tokens"], models[checkpoint.parent.name])
        for library, (package, _) in LIBRARIES.items():
            python = environment(environments, library)
            for name, model_folder in models.items():
                largest = difference(folder, model_folder, library, python)
                failed |= not largest < 1e-5
                print(f"{package[0]}: {name}: loaded strictly, scores differ by at most {largest:.1e}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
