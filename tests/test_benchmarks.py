"""The computations of benchmarks/: ranks in lists of peers, paired bootstrap, ratios of times, FLOP, plan of GPUs."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    Protocol,
)
from bert4rec_hf.data.histories import tokenize_histories

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import explanations  # noqa: E402
import networks  # noqa: E402
import quality  # noqa: E402
import scaling  # noqa: E402
import shop  # noqa: E402
import similar_items  # noqa: E402
import speed  # noqa: E402
import step  # noqa: E402
import updates  # noqa: E402
from compare import gains  # noqa: E402
from peers import judge  # noqa: E402
from quality import prepared, write_ranks  # noqa: E402
from small_models import VOCAB, make_model, mask_scores  # noqa: E402
from speed_worker import ndcg  # noqa: E402

USERS = [f"u{number}" for number in range(50)]


def ranks(folder: Path, values: list[int], users: list[str] = USERS) -> str:
    folder.mkdir()
    write_ranks(folder, users, values)
    return str(folder)


def test_a_ranking_does_not_differ_from_itself(tmp_path):
    users, of_a, folders = gains(ranks(tmp_path / "a", [1, 2, 11, 0, 10] * 10))
    assert (users, folders) == (sorted(USERS), 1)
    np.testing.assert_allclose(of_a[:, users.index("u1")], [1 / np.log2(3), 1])
    np.testing.assert_allclose(of_a[1].mean(), 3 / 5)


def test_seeds_are_averaged_user_by_user_whatever_the_order_of_rows(tmp_path):
    ranks(tmp_path / "a-42", [1] * 50)
    ranks(tmp_path / "a-43", [0] * 49 + [1], USERS[::-1])
    users, values, folders = gains(str(tmp_path / "a-*"))
    assert folders == 2
    assert values[1].tolist() == [1.0 if user == "u0" else 0.5 for user in users]


def test_other_users_are_refused_in_one_line(tmp_path):
    a, b = ranks(tmp_path / "a", [1] * 50), ranks(tmp_path / "b", [1] * 49, USERS[1:])
    run = subprocess.run([sys.executable, BENCHMARKS / "compare.py", a, b], capture_output=True, text=True)
    assert run.returncode == 2
    assert "A and B do not have the same test users (50 and 49, of which 49 are in both)" in run.stderr
    run = subprocess.run([sys.executable, BENCHMARKS / "compare.py", a, a], capture_output=True, text=True, check=True)
    assert "| HR@10 | 1.0000 | 1.0000 | +0.0000 | +0.0000 to +0.0000 | 1.0000 |" in run.stdout
    ranks(tmp_path / "c-1", [1] * 50), ranks(tmp_path / "c-2", [1] * 49, USERS[1:])
    with pytest.raises(ValueError, match="do not have the same test users"):
        gains(str(tmp_path / "c-*"))


def test_seeds_of_two_recipes_are_not_averaged(tmp_path):
    for name in ("ml-1m-42", "ml-1m-long-42"):
        ranks(tmp_path / name, [1] * 50)
    with pytest.raises(ValueError, match="runs of different recipes, ml-1m, ml-1m-long"):
        gains(str(tmp_path / "ml-1m-*"))


def test_a_run_that_is_there_is_not_another_recipes_and_a_row_stands_once(tmp_path, monkeypatch):
    rows = [(user, item, time) for user in "abcd" for time, item in enumerate("wxyz")]
    pandas.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_parquet(tmp_path / "log.parquet")
    data = prepared(str(tmp_path / "log.parquet"), tmp_path / "runs", None)
    recipe = {"num_train_epochs": 1, "hidden_size": 32, "disable_tqdm": True, "use_cpu": True}
    record = quality.run(data, tmp_path / "runs" / "x-42", recipe, 42)
    assert quality.run(data, tmp_path / "runs" / "x-42", recipe, 42) == record
    with pytest.raises(SystemExit, match="is of another recipe or log"):
        quality.run(data, tmp_path / "runs" / "x-42", recipe | {"hidden_size": 64}, 42)
    with pytest.raises(SystemExit, match="was prepared with validation targets"):
        prepared(str(data), tmp_path / "runs", None, validation=False)
    monkeypatch.setattr(quality, "TABLE", tmp_path / "quality.md")
    for minutes, threads in (("1", "`x`, 1 thread"), ("2", "`x`, 2 threads"), ("3", "`x`, 1 thread")):
        cells = ["x, seed 42", minutes, threads]
        quality.add_row("log", data, Protocol(**record["protocol"]), record["baselines"], cells)
    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert [line.split(" | ", 1)[1] for line in lines if "| x, seed 42 |" in line] == [
        "x, seed 42 | 3 | `x`, 1 thread |", "x, seed 42 | 2 | `x`, 2 threads |",
    ]  # fmt: skip


def lists(**served: list[str]) -> pa.Table:
    rows = [
        {"user_id": user, "item_id": item, "rank": rank}
        for user, items in served.items()
        for rank, item in enumerate(items, 1)
    ]
    return pa.Table.from_pylist(rows)


def test_a_targets_rank_is_its_place_in_the_list_and_a_list_with_seen_items_is_refused():
    tokenizer = Bert4RecTokenizer.from_items(list("abcdefg"))
    table = pa.table(
        {
            "user_id": ["trains", "first", "third", "absent", "unserved"],
            "item_id": [["a", "b"], ["a", "b", "c"], ["a", "b", "d"], ["b", "c", "e"], ["c", "d", "a"]],
            "train_end": [2, 1, 1, 1, 1],
            "validation_position": [None, 1, 1, 1, 1],
            "test_position": [None, 2, 2, 2, 2],
        }
    )
    histories = tokenize_histories(table, tokenizer)
    served = lists(third=["e", "c", "d"], first=["c", "d"], absent=["a", "g"])
    users, found = judge(served, histories, tokenizer)
    assert users == ["first", "third", "absent", "unserved"]
    assert found.tolist() == [1, 3, 0, 0]
    for wrong in ({"first": ["c", "a"]}, {"first": ["c", "c"]}):
        with pytest.raises(ValueError, match="an item twice, or one that its user has had"):
            judge(lists(**wrong), histories, tokenizer)
    for rank in (0, 2):
        table = pa.table({"user_id": ["first"], "item_id": ["c"], "rank": [rank]})
        with pytest.raises(ValueError, match="not 1, 2, 3"):
            judge(table, histories, tokenizer)


def test_times_are_compared_within_a_round_an_epoch_by_its_own_number_of_steps():
    def run(rows: int, seconds: float) -> dict:
        known = {"rows": rows, "seconds_a_step": seconds, "seconds_a_user": 2 * seconds, "peak": 1.0}
        return known | {"versions": {"torch": "2"}}

    ours = speed.OURS[0]
    rounds = [{ours: run(90, slow), "rectools": run(100, 3 * slow)} for slow in (1, 2, 10)]
    cells = [cell.strip() for cell in speed.table(rounds, num_users=5, batch=10)[-1].split("|")]
    epoch, ratio, rate, times_a_history = "60 (30 to 300)", "3.33 (3.33 to 3.33)", "1.67 (0.333 to 3.33)", "3 (3 to 3)"
    assert cells[3:7] == [epoch, ratio, rate, times_a_history]
    assert cells[8:10] == ["60 (30 to 300)", "3 (3 to 3)"]


def test_a_section_takes_the_place_of_the_one_of_its_title(tmp_path):
    for title, line in (("a", "old"), ("a, longer", "kept"), ("a", "new")):
        speed.write_section(tmp_path / "table.md", "# Table\n", title, [line])
    assert (tmp_path / "table.md").read_text("utf-8") == "# Table\n\n## a\n\nnew\n\n## a, longer\n\nkept\n"


@pytest.mark.benchmarks
def test_systems_are_followed_to_their_quality_epoch_by_epoch(tmp_path):
    """Tests our model and BertForMaskedLM on a log in which each item has one successor. Chance reaches .15."""
    rows = [(user, (7 * user + place) % 30, place) for user in range(500) for place in range(8)]
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"{user},{item},{at}\n" for user, item, at in rows))
    data = prepared(str(log), tmp_path, 10)
    recipe = {"num_train_epochs": 20, "eval_strategy": "epoch", "save_strategy": "epoch"}
    given = {"peer_minutes": 5, "length": 10, "epochs": 20, "recipe": recipe}
    for system, reached in (("bert", 0.25), ("ours-recipe", 0.8)):
        curve = speed.run(system, data, tmp_path, 1, given)["curve"]
        assert [point["epoch"] for point in curve] == list(range(1, 21))
        assert all(first["seconds"] < second["seconds"] for first, second in itertools.pairwise(curve))
        assert max(point["NDCG@10"] for point in curve) > reached


def test_ties_stand_before_the_target():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0] * 3])
    expected = (1 + 1 / math.log2(3) + 1 / math.log2(4)) / 3
    assert ndcg(scores, torch.tensor([0, 1, 1])) == pytest.approx(expected)


def small_step() -> tuple:
    """A step on two histories of length 5, whose last item is masked; 7 items, width 32, feed-forward width 64."""
    batch = step.make_collator(7, 5, last_item_ratio=1)(list(step.make_rows(2, 5, 7)))
    return step.make_model(32, 7), batch, torch.float32


def test_the_operations_of_a_step_multiply_as_much_as_pytorch_counts_in_it():
    model, batch, dtype = small_step()
    flop = {part.name: part.times * part.flop for part in step.operations(model, batch, dtype) if part.flop}
    # The factor 6 is a multiplication and an addition, in the forward pass and in each of two gradients.
    assert flop == {
        "linear 32 to 32, all positions": 6 * (6 * 10 * 32 * 32),
        "linear 32 to 64, all positions": 2 * (6 * 10 * 32 * 64),
        "linear 64 to 32, all positions": 6 * 10 * 64 * 32,
        "attention in float32, all positions": 2 * (6 * 10 * 5 * 32),
        "linear 32 to 32, labels": 2 * (6 * 2 * 32 * 32),
        "linear 32 to 64, labels": 2 * (6 * 2 * 32 * 64),
        "linear 64 to 32, labels": 6 * 2 * 64 * 32,
        "attention in float32, labels": 2 * (6 * 2 * 5 * 32),
        "item softmax": 6 * 2 * 7 * 32,
    }
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        step.training_step(model, batch, dtype)()
    assert counter.get_total_flops() == sum(flop.values())


def test_a_step_is_reported_beside_its_operations_and_the_rest(monkeypatch):
    for name, value in (("ROUNDS", 2), ("CALLS", 1), ("SQUARE", 8)):
        monkeypatch.setattr(step, name, value)
    lines = step.step_section(*small_step())
    table, rest = lines.index("|---|---|---|---|---|"), lines.index("|---|---|---|---|")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[table + 1 : table + 24]]
    assert [row[:2] for row in rows[:3]] == [
        ["item look-up", "1"],
        ["dropout of the embeddings", "1"],
        ["linear 32 to 32, all positions", "6"],
    ]
    assert lines[table + 24] == ""
    ratio, total = re.search(r"([\d.]+) times the ([\d.]+) ms of its operations", lines[2]).groups()
    assert float(ratio) > 0
    assert float(total) == pytest.approx(sum(float(row[3]) for row in rows), abs=0.2)
    assert "computes 2 positions for 2 labels" in lines[2]
    assert 0 < len(lines[rest + 1 :]) <= step.OPERATORS_SHOWN


def test_all_rows_are_collated():
    assert min(step.collation_rates(step.make_rows(8, 5, 7), step.make_collator(7, 5), 4)) > 0


def test_every_series_of_scaling_is_measured_written_and_drawn(tmp_path):
    def run(measure: str, **options) -> dict[str, float]:
        return scaling.MEASURES[measure](**options)

    series = scaling.measured(run, lengths=(5, 10), catalogues=(100, 200), users=(40, 80), indexed=(100, 300))
    assert [[next(iter(point.values())) for point in points] for points in series.values()] == [
        [5, 10],
        [100, 200],
        [100, 300],
        [40, 80],
    ]
    for points in series.values():
        assert all(0 < value < math.inf for point in points for value in point.values())
    scaling.draw(series, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    lines = scaling.text(series, "scaling.png").splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## By history length",
        "## By catalogue",
        "## By catalogue, by an index",
        "## By users",
        "## A plan for 100,000,000 users and 10,000,000 items",
    ]
    assert any(line.startswith("| 200 | ") for line in lines)


def test_a_plan_adds_up_bytes_and_seconds():
    def of(flops: float = math.inf, memory: float = math.inf, link: float = math.inf, **options) -> dict[str, float]:
        gpu = scaling.Gpu(bf16_flops=flops, memory_bandwidth=memory, link_bandwidth=link, share=0.5)
        return scaling.plan(10, 100, 2, hidden_size=8, length=10, batch_size=4, gpu=gpu, **options)

    # A GPU has 2 histories with 2 labels each. The table has 800 numbers, and a layer 4 x 72 + 288 + 264 + 32 = 872.
    found = of()
    assert found["owned"] == 800 * (4 + 4 + 8) / 2
    assert found["passing"] == 800 * 8
    assert found["together"] == sum(list(found.values())[:3])
    products = 2 * 10 * 2 * 872 + 4 * 2 * 10**2 * 8
    assert of(flops=1)["seconds a step"] == 2 * 3 * (2 * products + 2 * 4 * 1000 * 8)
    assert of(link=1)["seconds a step"] == 2 * 800 * 6 / 2
    assert of(link=1)["seconds an epoch"] == 3 * of(link=1)["seconds a step"]
    at_once = {"item_loss": "softmax", "memory": 1, "logits_at_once": 400}
    two_parts = at_once | {"logits_at_once": 200}
    assert of(**two_parts)["seconds a step"] - of(**at_once)["seconds a step"] == 2 * 16 * 800
    assert of(**at_once)["together"] - of(**two_parts)["together"] == 6 * 200


def test_more_gpus_are_taken_until_the_weights_fit():
    # A number takes 16 bytes, which GPUs share, and 8 bytes on each GPU. 64 GiB may be filled.
    assert scaling.fewest_gpus(1, 2 * 2**20, hidden_size=1024, batch_size=1) == 1
    assert scaling.fewest_gpus(1, 3 * 2**20, hidden_size=1024, batch_size=1) == 2
    assert scaling.fewest_gpus(1, 6 * 2**20, hidden_size=1024, batch_size=1) == 8


def test_a_series_is_carried_on_in_proportion_or_by_its_power():
    points = [{"users": 1, "GiB": 7.0, "seconds": 3.0}, {"users": 10, "GiB": 9, "seconds": 9}]
    points += [{"users": 100, "GiB": 18, "seconds": 27}]
    assert scaling.proportional(points, "GiB", 1000) == pytest.approx(108)
    assert scaling.by_power(points, "seconds", 1000) == pytest.approx(81)


@pytest.mark.parametrize("optim", [name for name in scaling.OPTIMIZER_STATE if " " not in name])
def test_the_plan_counts_what_an_optimizer_keeps_of_the_item_table(tmp_path, optim):
    tokenizer = Bert4RecTokenizer.from_items(range(30), model_max_length=5)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=8))
    arguments = Bert4RecTrainingArguments(
        str(tmp_path),
        optim=optim,
        max_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 4})
    trainer = Bert4RecTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    state = trainer.optimizer.optimizer.state[model.get_input_embeddings().weight]
    kept = sum(value.numel() for value in state.values() if getattr(value, "ndim", 0))
    assert kept == scaling.OPTIMIZER_STATE[optim](len(tokenizer), 8)


def test_a_shop_of_weeks_has_times_in_all_of_them_and_items_that_come_later(tmp_path):
    outputs = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for output in outputs:
        subprocess.run([sys.executable, BENCHMARKS / "shop.py", output, "--weeks", "5"], check=True)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    log = pandas.read_csv(outputs[0])
    week = (log.timestamp - shop.START) // shop.WEEK
    # A visit that begins in the last second of a week ends in the next one.
    assert sorted(week.unique())[:5] == [0, 1, 2, 3, 4]
    late = log.groupby("item_id").timestamp.min() > shop.START + 2 * shop.WEEK
    assert 100 < late.sum() < 0.3 * shop.NUM_ITEMS
    assert log.groupby("user_id").timestamp.apply(lambda times: times.is_monotonic_increasing).mean() > 0.9


def test_an_update_is_compared_with_a_new_model_target_by_target():
    gains = {}
    for way, first in (("counts", [1.0, 0.0]), ("new model", [1.0, 0.5])):
        for week in updates.RETRAINED:
            gains[way, week] = pandas.DataFrame({"first": first, "all": [0.2, 0.2]})
    gains["counts", 1] = pandas.DataFrame({"first": [1.0, 1.0], "all": [0.4, 0.4]})
    # Differences: 0, -.5, 0, -.5, with a standard deviation of .2887, and half of that as standard error.
    row = "| counts | 0.6667 ± 0.2108 | 0.2667 | 0.5000 ± 0.2887 (67%) | 0.2000 (100%) | -0.2500 ± 0.1443 | 4.0 |"
    assert updates.row("counts", gains, [3.0, 5.0]) == row
    assert (
        updates.row("new model", gains, [8.0])
        == "| new model |  |  | 0.7500 ± 0.1443 (100%) | 0.2000 (100%) |  | 8.0 |"
    )


def test_a_residual_adds_the_items_to_the_left_in_training_as_in_serving():
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=12, hidden_size=8, num_attention_heads=2, causal_attention=True)
    model = Bert4RecForMaskedItemPrediction(config).eval()
    row, mask = [5, 6, 7, 8], 1
    before = model.mask_states(torch.tensor([[*row[:3], mask]]))
    networks.add_residual(model)
    vectors = model.get_input_embeddings().weight
    added = 0.5 * (0.5 * vectors[7] + 0.25 * vectors[6] + 0.125 * vectors[5])
    torch.testing.assert_close(model.mask_states(torch.tensor([[*row[:3], mask]])), before + added)
    # The [MASK] of a training row that predicts the last item comes after all items.
    inputs = {"input_ids": [[*row, mask]], "position_ids": [[0, 1, 2, 3, 3]], "masked_positions": [[4]]}
    states = model.model(**{name: torch.tensor(values) for name, values in inputs.items()}).last_hidden_state
    torch.testing.assert_close(states, before + added)


def test_items_are_left_out_only_where_two_stay():
    random = np.random.default_rng(0)
    kept = [len(networks.some_of(range(100), 0.3, random)) for _ in range(200)]
    assert np.mean(kept) == pytest.approx(70, abs=1)
    assert {len(networks.some_of([3, 4], 0.9, random)) for _ in range(50)} == {2}


def test_similar_items_are_ranked_after_the_last_item_and_seen_ones_are_left_out():
    tokenizer = Bert4RecTokenizer.from_items([*"abcd"])
    table = pa.table(
        {
            "user_id": ["first", "third", "absent"],
            "item_id": [list("abc"), list("ad"), ["a", "b", "new"]],
            "timestamp": [[1, 2, 3], [1, 2], [1, 2, 3]],
            "train_end": [2, 1, 2],
            "validation_position": pa.array([2, 1, 2], pa.int32()),
            "test_position": pa.array([None] * 3, pa.int32()),
        }
    )
    histories = tokenize_histories(table, tokenizer)
    # After b, c comes after a, which is seen; after a, d comes third, since it ties with c.
    scores = torch.tensor([[0.0] * 7] * 3 + [[9, 9, 9, 9, 3, 2, 2], [9, 9, 9, 5, 9, 4, 1], [0] * 7, [0] * 7]).float()
    hits, gains_of = similar_items.gains(lambda items: scores[items].clone(), histories, "validation", True)
    assert hits.tolist() == [1, 1, 0]
    np.testing.assert_allclose(gains_of, [1, 1 / 2, 0])
    hits, gains_of = similar_items.gains(lambda items: scores[items].clone(), histories, "validation", False)
    np.testing.assert_allclose(gains_of, [1 / np.log2(3), 1 / 2, 0])


def test_the_way_in_bold_is_that_of_the_model(monkeypatch):
    model, items = make_model(num_transitions=5), torch.arange(3, VOCAB)
    expected = model.similar_items(items, top_k=similar_items.TOP_K)
    for batch in (similar_items.BATCH_SIZE, 7):
        monkeypatch.setattr(similar_items, "BATCH_SIZE", batch)
        found = similar_items.lists(similar_items.ways(model)[similar_items.OURS], VOCAB)
        torch.testing.assert_close(found, expected)
    counted, both = model.history_scores, similar_items.ways(model)["successors both ways"](items)
    for first, second in ((5, 9), (9, 5), (20, 31)):
        expected = sum(
            float(counted.successor_scores[one][counted.successor_ids[one] == other].sum())
            for one, other in ((first, second), (second, first))
        )
        assert both[first - 3, second].item() == pytest.approx(expected)


def test_a_recommendation_loses_what_its_score_loses_without_the_named_items():
    model = make_model(num_transitions=5)
    tokenizer = Bert4RecTokenizer.from_items(map(str, range(VOCAB - 3)))
    history = [5, 9, 17, 5, 30, 4, 22, 8]
    row = {"history_ids": history, "input_ids": [*history, 1], "exclude_ids": [5, 9]}
    found = explanations.deletions(model, tokenizer, row, [1, 2])
    assert list(found) == ["named", "random, seed 1", "random, seed 2", "newest", "most similar"]
    allowed = [item for item in range(3, VOCAB) if item not in (5, 9)]

    def centred(items: list[int]) -> torch.Tensor:
        scores = mask_scores(model, torch.tensor([[*items, 1]]))[0][allowed]
        return scores - scores.mean()

    best = int(centred(history).argmax())
    sources, contributions = model.explain(
        tokenizer, torch.tensor([history]), torch.tensor([[allowed[best]]]), exclude_ids=torch.tensor([[5, 9]])
    )
    strongest = sorted(zip(contributions[0, 0].tolist(), sources[0].tolist(), strict=True), reverse=True)[:3]
    named = [item for contribution, item in strongest if contribution > 0]
    for name, deleted in (("named", named), ("newest", [8, 22, 4][: len(named)])):
        without = centred([item for item in history if item not in deleted])
        drop, is_another_first = found[name]
        assert drop == pytest.approx(float(centred(history)[best] - without[best]), abs=1e-5)
        assert is_another_first == (int(without.argmax()) != best)
    assert found["named"][0] > 0.1
    # An only item has no others to compare it with.
    row |= {"history_ids": [5], "input_ids": [5, 1]}
    assert explanations.deletions(model, tokenizer, row, [1, 2]) is None
