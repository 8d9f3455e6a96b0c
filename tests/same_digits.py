"""Show that two checkouts give the same weights, scores and metrics, to the bit.

python tests/same_digits.py record CHECKOUT DIGITS.json [--fixtures FOLDER]
python tests/same_digits.py compare BEFORE.json AFTER.json

`record` runs the code of one checkout: it prepares MovieLens 100K, trains the quickstart's recipe, evaluates, writes a
report, recommends for a file of histories, exports ONNX, builds an item index, trains with two processes, and converts
each RecBole checkpoint in the fixtures folder. It takes about four minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# The new names of what has another name in an older checkout.
RENAMED = {
    "floors": "baselines",
    "decoder.history_scores.successor_ids": "history_scores.successor_ids",
    "decoder.history_scores.successor_scores": "history_scores.successor_scores",
    "decoder.bias": "item_bias.weight",
}
# A program that runs with the checkout's code and prints the answers of the model folder.
SCORES = """
import json, sys
import numpy as np, onnxruntime, torch
from transformers import pipeline
from bert4rec_hf import ItemIndex
folder, onnx_file = sys.argv[1:]
pipe = pipeline("sequential-recommendation", model=folder, device="cpu")
for parameter in pipe.model.parameters():
    # The header of a file, with the names of weights, changes their alignment in memory and so the last digit.
    parameter.data = parameter.data.clone()
items = pipe.tokenizer.items
histories = [[], items[:1], items[5:40], items[100:400]]
answers = {"pipeline": pipe(histories), "candidates": pipe({"history": items[:3], "candidates": items[50:90]})}
answers["index"] = pipe(histories, index=ItemIndex.build(pipe.model))
if onnx_file != "none":
    batch = pipe.tokenizer(histories, padding=True, return_tensors="np")
    nothing = np.zeros((len(histories), 1), np.int64)
    session = onnxruntime.InferenceSession(onnx_file)
    given = {**dict(batch), "history_ids": batch["input_ids"], "exclude_ids": nothing, "candidate_ids": nothing}
    found = session.run(None, {part.name: given[part.name] for part in session.get_inputs()})
    answers["onnx"] = [part.tolist() for part in found]
batch = pipe.tokenizer(histories, padding=True, return_tensors="pt")
answers["ranks"] = pipe.model.rank(target_ids=torch.tensor([3, 4, 5, 6]), **batch).tolist()
print(json.dumps(answers))
"""


def record(checkout: Path, fixtures: Path | None) -> dict[str, object]:
    """The digests of the files that a checkout writes, by name."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip

    def run(*words: str | Path) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        return done.stdout

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bert4rec = ("-m", "bert4rec_hf")
        run(*bert4rec, "prepare", "ml-100k", "--output", "data")
        recipe = checkout.resolve() / "recipes/ml-100k.yaml"
        run(*bert4rec, "train", "--config", recipe, "--data", "data", "--output_dir", "model")
        run(*bert4rec, "evaluate", "model", "--data", "data", "--report", "report")
        bulk = ("--histories", "data/histories.parquet", "--output", "bulk.parquet")
        run(*bert4rec, "recommend", "model", *bulk)
        run(*bert4rec, "export", "model", "--output", "model.onnx")
        train = ("train", "--config", recipe, "--data", "data", "--num_train_epochs", "1", "--use_cpu", "true")
        run("-m", "torch.distributed.run", "--nproc_per_node", "2", *bert4rec, *train, "--output_dir", "two")
        digits = {
            "data": digests(folder / "data"),
            "model": digests(folder / "model"),
            "report": digests(folder / "report"),
            "bulk file": digest(rows(folder / "bulk.parquet")),
            "scores": answers(run("-c", SCORES, "model", "model.onnx")),
            "two processes": digests(folder / "two"),
        }
        for checkpoint in sorted(fixtures.glob("*/*.pth")) if fixtures else ():
            expected = json.loads((checkpoint.parent / "expected.json").read_text("utf-8"))
            number = expected["n_items"] - 1  # without [PAD]
            (folder / "items.txt").write_text("".join(f"i{place}\n" for place in range(number)), "utf-8")
            name = checkpoint.parent.name
            run(*bert4rec, "convert", checkpoint, "--items", "items.txt", "--output", name)
            digits[f"converted {name}"] = digests(folder / name) | answers(run("-c", SCORES, name, "none"))
        return digits


def digests(folder: Path) -> dict[str, str]:
    """A digest of each file with numbers. Each weight has its own digest. The order of JSON keys does not matter."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                found[f"{path.name} {RENAMED.get(name, name)}"] = digest(tensor.numpy().tobytes())
        elif path.suffix == ".parquet":
            found[path.name] = digest(rows(path))
        elif path.suffix in (".json", ".yaml") and path.name != "trainer_state.json":
            text = path.read_text("utf-8")
            for old, new in RENAMED.items():
                text = text.replace(f'"{old}"', f'"{new}"')
            if path.suffix == ".json":
                text = json.dumps(json.loads(text), sort_keys=True)
            found[path.name] = digest(text.encode())
    return found


def rows(path: Path) -> bytes:
    import pyarrow.parquet as pq

    return json.dumps(pq.read_table(path).to_pylist(), default=str).encode()


def answers(text: str) -> dict[str, str]:
    return {name: digest(json.dumps(value).encode()) for name, value in json.loads(text).items()}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def flat(digits: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in digits.items():
        found |= {f"{name}: {key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--fixtures", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        digits = record(options.first, options.fixtures.resolve() if options.fixtures else None)
        options.second.write_text(json.dumps(digits, indent=1) + "\n", "utf-8")
        return 0
    before, after = (flat(json.loads(path.read_text("utf-8"))) for path in (options.first, options.second))
    different = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in different:
        print(f"{name}: {before.get(name)} before, {after.get(name)} after")
    print(f"{len(before.keys() & after.keys())} digests compared, {len(different)} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
