"""A model folder that the commands made: prepared with an item table, trained for an epoch, evaluated."""

from pathlib import Path

from command_runs import random_rows, succeed, write_log

ITEM_HEADER = ("item_id", "title", "category", "price", "tags", "added")


def write_items(path: Path, num_items: int = 24) -> Path:
    rows = [
        (
            f"i{item}",
            f"Title {item}",
            "ab"[item % 2],
            1.5 * item,
            "x|y" if item % 3 else "z",
            f"2024-01-{item % 28 + 1:02}",
        )
        for item in range(num_items)
    ]
    return write_log(path, rows, ITEM_HEADER)


def make_trained_folder(folder: Path) -> tuple[Path, Path]:
    """A prepared folder and a model folder. Four of the 24 items have no events."""
    rows = random_rows([f"u{user}" for user in range(40)], [f"i{item}" for item in range(20)])
    log, items = write_log(folder / "log.csv", rows), write_items(folder / "items.csv")
    data, model = folder / "data", folder / "model"
    succeed("prepare", log, "--output", data, "--items", items, "--item_features", "category", "price")
    options = {
        "num_train_epochs": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    succeed(
        "train",
        "--data",
        data,
        "--output_dir",
        model,
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    )
    succeed("evaluate", model, "--data", data, "--use_cpu", "true")
    return data, model
