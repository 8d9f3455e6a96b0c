"""Trains a network with one change at a time, and judges each by itself and by the sum with the counted scores.

    python benchmarks/networks.py LOG --changes residual residual+rdrop=1 … [--set NAME=VALUE …] [--output FOLDER]

LOG has the forms that benchmarks/quality.py accepts. A plus joins changes. The changes, none of which is an option of
the package, are:

- average=.999: the exponential moving average of the weights, if it is better on the validation targets;
- residual: the state of a [MASK] gets w Σ .5^d e(item d places to the left), for the nearest eight, w learnt;
- start=1: the input of a [MASK] gets w e(item before it), w learnt and first this number;
- drop_items=.1: each item of the input is left out with this probability;
- later_items=1: the loss ranks a label above the later items of its row too, which serving may recommend; the package
  leaves out all items of the row where seen items are filtered;
- soft_targets=.1: this share of the label goes to the successors of the item before it, counted on other users;
- contrast=.1: the states of two passes with other dropout must find each other among the states of the batch;
- rdrop=1: the symmetric divergence of the predictions of two such passes is added to the loss (Liang et al. 2021);
- counted=1: the loss is that of the sum: logits get the transitions, counted on other users, times this number;
- bidirectional=.5: this share of the batches masks items in place, and all positions attend to all others;
- peer=FOLDER: the scores of RecTools' SASRec in place of the network. FOLDER is that of a seed of benchmarks/peers.py,
  with --set vectors=true.

Every run has the checkpoint with the best validation NDCG@10 of the sum, under the weights of the defaults. The script
writes a section of results/networks.md with the metrics of the network alone and of the sum, with weights that are
calibrated on the validation targets if that pays. Options of --set are those of `bert4rec train`. Finished
runs stay in FOLDER.
"""

import argparse
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import log_name, named_values, prepared
from tables import machine, write_section
from torch import nn
from transformers import TrainerCallback, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    keep_transitions,
    ranking_rows,
    read_prepared,
    start_from_cooccurrence,
    training_rows,
)
from bert4rec_hf.data.counting import transitions
from bert4rec_hf.data.data_collator import DataCollatorForMaskedItemPrediction
from bert4rec_hf.data.histories import Histories
from bert4rec_hf.defaults import default_architecture, default_num_train_epochs, default_start_with_mean
from bert4rec_hf.evaluation import calibration
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from bert4rec_hf.model.history_scores import WEIGHT_FIELDS
from bert4rec_hf.model.losses import IGNORE_INDEX, mask_seen

TABLE = Path(__file__).parent / "results" / "networks.md"
HEADER = """# Changes of the network

Each row is a run of `benchmarks/networks.py` with one change, which the script describes. NDCG@10; "alone" is the
network, "sum" the network and the counted scores. Differences are those from the first row, user by user, ± a standard
error.
"""
GAINS_FILE = "gains.npz"
NUM_FOLDS = 5
# Temperature of the contrast, and number of places of the residual.
TEMPERATURE, PLACES = 0.1, 8
CHANGED_LOSSES = {"later_items", "soft_targets", "counted", "contrast", "rdrop"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--changes", nargs="*", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", default="networks")
    options = parser.parse_args()
    calibration.MAX_CALIBRATED_USERS = 10**9
    settings = named_values(options.set)
    data = prepared(options.log, Path(options.output), None)
    lines = [
        f"`benchmarks/networks.py {log_name(options.log)} --changes {' '.join(options.changes)}"
        f"{' --set ' + ' '.join(options.set) if options.set else ''}`, "
        f"{machine(torch.get_num_threads())}",
        "",
        "| change | validation, alone | sum | difference | test, alone | sum | difference | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple[str, ...], np.ndarray] = {}
    for change in ["none", *options.changes]:
        parts = (part.partition("=") for part in change.split("+"))
        changes = {name: value for name, _, value in parts}
        folder = Path(options.output) / change.replace("/", "-")
        if not (folder / GAINS_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if "peer" in changes:
                found, minutes = of_peer(data, Path(changes["peer"]))
            else:
                numbers = {name: float(value or 1) for name, value in changes.items()}
                found, minutes = run(data, numbers, dict(settings), folder)
            arrays = {f"{part} {what}": values for (part, what), values in found.items()}
            np.savez(folder / GAINS_FILE, minutes=minutes, **arrays)
        kept = dict(np.load(folder / GAINS_FILE))
        minutes = float(kept.pop("minutes"))
        found = {tuple(key.split()): values for key, values in kept.items()}
        first = first or found
        cells = []
        for part in ("validation", "test"):
            cells += [f"{found[part, 'alone'].mean():.4f}", f"{found[part, 'sum'].mean():.4f}"]
            difference = found[part, "sum"] - first[part, "sum"]
            error = difference.std(ddof=1) / len(difference) ** 0.5
            cells.append("" if change == "none" else f"{difference.mean():+.4f} ± {error:.4f}")
        lines.append(f"| {change} | {' | '.join(cells)} | {minutes:.1f} |")
        write_section(TABLE, HEADER, log_name(options.log), lines)


def run(
    data: Path, changes: Mapping[str, float], settings: dict[str, Any], folder: Path
) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """Train with changes. Returns NDCG@10 of each user by part and by alone or sum, and the CPU minutes."""
    started = time.process_time()
    set_seed(settings.get("seed", 42))
    histories, tokenizer, preparation = read_prepared(data)
    num_events, num_items = histories.num_training_events(), tokenizer.num_items
    given = {name: settings.pop(name) for name in [*settings] if name in Bert4RecConfig.__annotations__}
    given |= {"max_position_embeddings": preparation["max_length"]}
    given |= {"filter_seen_items": preparation["filter_seen_items"]}
    config = Bert4RecConfig(vocab_size=len(tokenizer), **default_architecture(num_events, num_items, given))
    model = Bert4RecForMaskedItemPrediction(config)
    if settings.get("item_initialization") != "random":
        start_from_cooccurrence(model, histories, num_items, with_mean=default_start_with_mean(num_events, num_items))
    keep_transitions(model, histories, num_items)
    if "residual" in changes:
        add_residual(model)
    if "start" in changes:
        add_start(model, changes["start"])

    length = config.max_position_embeddings
    rows = {
        part: ranking_rows(histories, tokenizer, part, filter_seen_items=config.filter_seen_items, max_length=length)
        for part in ("validation", "test")
    }
    arguments: dict[str, Any] = {"num_train_epochs": default_num_train_epochs(num_events, num_items), "bf16": True}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_only_model": True} | settings
    trainer = ChangedTrainer(
        model,
        Bert4RecTrainingArguments(str(folder), **arguments),
        train_dataset=training_rows(histories, max_length=length, windows="proportional"),
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
    )
    trainer.changes = changes
    if "soft_targets" in changes or "counted" in changes:
        trainer.tables = tables_of_folds(histories, num_items, config)
    trainer.data_collator, trainer.collates_by_args = ChangedCollator(trainer), False
    average = Average(changes.get("average", 0.0))
    if "average" in changes:
        trainer.add_callback(average)
    trainer.train()
    minutes = (time.process_time() - started) / 60
    compared = calibration.compare_targets(model.eval(), rows["validation"], tokenizer)
    if "average" in changes:
        raw = {name: weights.clone() for name, weights in model.named_parameters()}
        copy_weights(model, average.weights)
        of_average = calibration.compare_targets(model, rows["validation"], tokenizer)
        weights = calibration.weights_of(config)
        if of_average.gains(weights).mean() > compared.gains(weights).mean():
            compared = of_average
        else:
            copy_weights(model, raw)
    of_part = {"validation": compared, "test": calibration.compare_targets(model, rows["test"], tokenizer)}
    return gains(of_part, config), minutes


def gains(of_part: Mapping[str, calibration.Comparisons], config: Bert4RecConfig) -> dict[tuple[str, str], np.ndarray]:
    """NDCG@10 of each user by part, alone and in the sum with weights that are calibrated on validation."""
    chosen = calibration.choose_weights(of_part["validation"], calibration.weights_of(config))["weights"]
    found = {}
    for part, comparisons in of_part.items():
        order = np.argsort(comparisons.user_ids)
        found[part, "alone"] = comparisons.gains(dict.fromkeys(WEIGHT_FIELDS, 0.0))[order]
        found[part, "sum"] = comparisons.gains(chosen)[order]
    return found


def of_peer(data: Path, folder: Path) -> tuple[dict[tuple[str, str], np.ndarray], float]:
    """The same for the vectors of users and items that a peer has kept, and its CPU minutes."""
    histories, tokenizer, preparation = read_prepared(data)
    policy, num_items = preparation["filter_seen_items"], tokenizer.num_items
    of_part = {}
    for part in ("validation", "test"):
        kept = np.load(folder / f"vectors-{part}.npz")
        given = {"filter_seen_items": policy, "hidden_size": kept["item_vectors"].shape[1]}
        given["max_position_embeddings"] = preparation["max_length"]
        architecture = default_architecture(histories.num_training_events(), num_items, given)
        model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **architecture)).eval()
        keep_transitions(model, histories, num_items)
        known = tokenizer.item_ids_to_token_ids(kept["items"].tolist())
        with torch.no_grad():
            model.item_bias.weight.fill_(-1e4)  # an item without training events has no vector
            model.item_bias.weight[known] = 0.0
            model.get_input_embeddings().weight[known] = torch.from_numpy(kept["item_vectors"])
        rows = ranking_rows(histories, tokenizer, part, filter_seen_items=policy, max_length=preparation["max_length"])
        # `compare_targets` takes the rows in this order.
        rows = rows.select(np.argsort(rows["history_length"], kind="stable"))
        place_of = {user_id: place for place, user_id in enumerate(kept["users"].tolist())}
        vectors = torch.from_numpy(kept["user_vectors"])[[place_of[user_id] for user_id in rows["user_id"][:]]]
        batches = iter(vectors.unsqueeze(1).split(64))
        model.mask_states = lambda *_, batches=batches: next(batches)
        of_part[part] = calibration.compare_targets(model, rows, tokenizer, batch_size=64)
    record = json.loads((folder / "peer.json").read_text("utf-8"))
    return gains(of_part, model.config), record["cpu_seconds"] / 60


class ChangedTrainer(Bert4RecTrainer):
    """The trainer with another loss: `changes` names what is changed, and has its numbers."""

    changes: Mapping[str, float]
    tables: tuple[torch.Tensor, torch.Tensor]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        folds = inputs.pop("folds", None)
        is_bidirectional = inputs.pop("is_bidirectional", False)
        changes = self.changes
        if model.training and "bidirectional" in changes:
            model.config.causal_attention = not is_bidirectional
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            model.config.causal_attention = True
            return loss
        if not model.training or not changes.keys() & CHANGED_LOSSES:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = 2 if changes.keys() & {"contrast", "rdrop"} else 1
        labels = inputs.pop("labels")
        states = model.model(**{name: torch.cat([values] * passes) for name, values in inputs.items()})
        rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        labels = labels[rows, columns]
        # (labels, passes, hidden size)
        states = model.head(states.last_hidden_state.unflatten(0, (passes, -1))[:, rows, columns]).transpose(0, 1)
        vectors, biases = model._item_rows(range(model.config.vocab_size))
        logits = nn.functional.linear(states, vectors, biases).float()
        # (labels,) the place of each label in its history
        places = inputs["position_ids"].gather(1, inputs["masked_positions"].clamp(min=0))[rows, columns]
        if folds is not None:
            # (labels, places) the items before the label, newest first, and the successors of each.
            before = places.unsqueeze(1) - torch.arange(1, PLACES + 1)
            newest_ids = inputs["input_ids"][rows.unsqueeze(1), before.clamp(min=0)] * (before >= 0)
            item_ids, scores = (table[folds[rows].unsqueeze(1), newest_ids] for table in self.tables)
        if "counted" in changes:
            shares = 0.5 ** torch.arange(PLACES) * (newest_ids > 0)
            shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1)
            scores = scores * shares.unsqueeze(2) * changes["counted"] * model.config.transition_weight
            of_items = torch.zeros_like(logits[:, 0]).scatter_add_(1, item_ids.long().flatten(1), scores.flatten(1))
            logits = logits + of_items.unsqueeze(1)
        logits[..., :FIRST_ITEM_ID] = -torch.inf
        of_passes = labels.unsqueeze(1).expand(-1, passes)
        if model.config.filter_seen_items:
            seen_ids = inputs["input_ids"][rows]
            if "later_items" in changes:
                seen_ids = seen_ids.where(inputs["position_ids"][rows] < places.unsqueeze(1), PAD_TOKEN_ID)
            logits = mask_seen(logits, seen_ids, of_passes)
        logs = logits.log_softmax(dim=-1)
        loss = -logs.gather(-1, of_passes.unsqueeze(-1)).mean()
        if "soft_targets" in changes:
            shares = scores[:, 0] / scores[:, 0].sum(dim=1, keepdim=True).clamp(min=1e-6)
            of_successors = logs[:, 0].clamp(min=-30).gather(1, item_ids[:, 0].long())
            soft = -(shares * of_successors * (item_ids[:, 0] > 0)).sum(dim=1)
            loss = (1 - changes["soft_targets"]) * loss + changes["soft_targets"] * soft.mean()
        if "rdrop" in changes:
            one, two = logs.clamp(min=-1e4).unbind(1)
            divergence = ((one.exp() - two.exp()) * (one - two)).sum(dim=-1).mean()
            loss = loss + changes["rdrop"] * divergence / 2
        if "contrast" in changes:
            one, two = nn.functional.normalize(states.float(), dim=-1).unbind(1)
            loss = loss + changes["contrast"] * nn.functional.cross_entropy(
                one @ two.T / TEMPERATURE, torch.arange(len(labels))
            )
        return (loss, None) if return_outputs else loss


class ChangedCollator:
    """The collator of a trainer, which leaves out items, masks in place, or adds the fold of each user."""

    def __init__(self, trainer: ChangedTrainer):
        self.trainer, config = trainer, trainer.model.config
        self.collators = [
            DataCollatorForMaskedItemPrediction(
                trainer.processing_class,
                mask_ratio=ratio,
                max_length=config.max_position_embeddings,
                causal=is_causal,
            )
            for ratio, is_causal in ((trainer.args.mask_ratio, True), (0.4, False))
        ]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        changes = self.trainer.changes
        if "labels" in features[0]:
            return self.collators[0](features)
        random = np.random.default_rng(int(torch.randint(2**62, (1,))))
        if "drop_items" in changes:
            share = changes["drop_items"]
            features = [feature | {"input_ids": some_of(feature["input_ids"], share, random)} for feature in features]
        is_bidirectional = random.random() < changes.get("bidirectional", 0.0)
        batch: dict[str, Any] = self.collators[is_bidirectional](features)
        if "soft_targets" in changes or "counted" in changes:
            batch["folds"] = torch.tensor([fold_of(feature["user_id"]) for feature in features])
        if is_bidirectional:
            batch["is_bidirectional"] = True
        return batch


class Average(TrainerCallback):
    """Keeps the exponential moving average of the weights."""

    def __init__(self, decay: float):
        self.decay = decay
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        decay = min(self.decay, state.global_step / (state.global_step + 10))
        for name, weights in model.named_parameters():
            kept = self.weights.setdefault(name, weights.detach().clone())
            kept.lerp_(weights, 1 - decay)


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    for name, values in model.named_parameters():
        values.copy_(weights[name])


def add_residual(model: Bert4RecForMaskedItemPrediction) -> None:
    """Let the state of a position get the vectors of the items to the left of it."""
    model.residual = nn.Parameter(torch.full((model.config.hidden_size,), 0.5))
    forward = model.model.forward

    def with_residual(
        input_ids: torch.Tensor, masked_positions: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        outputs = forward(input_ids=input_ids, masked_positions=masked_positions, position_ids=position_ids, **kwargs)
        vectors = model.get_input_embeddings()(input_ids) * (input_ids >= FIRST_ITEM_ID).unsqueeze(-1)
        left = sum(
            0.5**places * nn.functional.pad(vectors, (0, 0, places, 0))[:, : vectors.shape[1]]
            for places in range(1, PLACES + 1)
        )
        # The [MASK]s of a causal batch follow the items, and their position says which item each predicts.
        at = torch.arange(input_ids.shape[1]).expand_as(input_ids) if position_ids is None else position_ids
        at = at if masked_positions is None else at.gather(1, masked_positions.clamp(min=0))
        outputs.last_hidden_state = outputs.last_hidden_state + model.residual * left.gather(
            1, at.unsqueeze(-1).expand(*at.shape, vectors.shape[2])
        )
        return outputs

    model.model.forward = with_residual


def add_start(model: Bert4RecForMaskedItemPrediction, weight: float) -> None:
    """Let the input of a [MASK] have the vector of the item before it."""
    model.start = nn.Parameter(torch.full((model.config.hidden_size,), weight))
    embeddings = model.model.embeddings

    def with_start(input_ids: torch.Tensor, _: Any, position_ids: torch.Tensor, *types: Any) -> torch.Tensor:
        vectors = embeddings.item_embeddings(input_ids)
        items = vectors * (input_ids >= FIRST_ITEM_ID).unsqueeze(-1)
        before = items.gather(1, (position_ids - 1).clamp(min=0).unsqueeze(-1).expand_as(vectors))
        has_start = (position_ids > 0) & (input_ids == MASK_TOKEN_ID)
        return embeddings.dropout(embeddings.norm(vectors + model.start * before * has_start.unsqueeze(-1)))

    embeddings.forward = with_start


def some_of(row: Sequence[int], share: float, random: np.random.Generator) -> np.ndarray:
    """The row without this share of its items; the whole row if fewer than two would be left."""
    values = np.asarray(row)
    kept = values[random.random(len(values)) >= share]
    return kept if len(kept) > 1 else values


def fold_of(user_id: str) -> int:
    return zlib.crc32(user_id.encode()) % NUM_FOLDS


def tables_of_folds(histories: Histories, num_items: int, config: Bert4RecConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(folds, ids, successors) successors and their scores, each counted without the users of the fold."""
    folds = np.array([fold_of(user_id) for user_id in histories.user_id.to_pylist()])
    counted = [
        transitions(histories.select(folds != fold), num_items, config.num_transitions, with_self_pairs=False)
        for fold in range(NUM_FOLDS)
    ]
    return torch.stack([ids for ids, _, _ in counted]), torch.stack([scores for _, scores, _ in counted])


if __name__ == "__main__":
    main()
