"""benchmarks/gpu.py: a whole run with small sizes on the CPU, refuted claims, the time limit, FLOP and bytes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_claims  # noqa: E402
import step  # noqa: E402

CPU = torch.device("cpu")


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of all tables of a section, without their heads."""
    found = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        rows = []
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, rule, *lines = table.splitlines()
            assert rule == "|---" * (head.count("|") - 1) + "|"
            for line in lines:
                assert line.count("|") == head.count("|"), line
                rows.append([cell.strip() for cell in line.split("|")[1:-1]])
        found[title] = rows
    return found


def run_in_process(monkeypatch, tmp_path: Path, sections: list[str], *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(gpu, "SECTIONS", {title: gpu.SECTIONS[title] for title in sections})
    path = tmp_path / "folder" / "gpu.md"
    status = gpu.main(["--device", "cpu", "--sizes", "small", "--output", str(path), *arguments])
    return status, tables(path.read_text("utf-8"))


@pytest.mark.benchmarks
def test_a_small_run_on_a_cpu_refutes_nothing_and_fills_every_table(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--sizes", "small", "--output"]
    run = subprocess.run([*command, tmp_path / "gpu.md"], capture_output=True, text=True)
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert run.returncode == 0, page + run.stderr
    assert "No GPU has been available" in page
    claims, floors, training, ranking = tables(page).values()
    assert [title for title, _ in claims] == [*gpu.CLAIMS]
    assert {result.partition(":")[0] for _, result in claims} == {"holds", "not applicable on cpu"}
    assert sum(result.startswith("holds") for _, result in claims) == len(claims) - 3
    *operations, total = [row for row in floors if len(row) == 6]
    assert sum(float(row[4]) for row in operations) == pytest.approx(float(total[4]), rel=0.02)
    assert [row[0] for row in floors if len(row) == 4] == [
        "launched eagerly",
        "with `torch.compile`",
        "`BertForMaskedLM` by hand",
    ]
    assert [row[:3] for row in training] == [
        ["100", "32", "2"],
        ["100", "32", "4"],
        ["300", "32", "2"],
        ["300", "32", "4"],
    ]
    cells = (
        [cell for row in training for cell in row[3:6]] + [row[2] for row in ranking] + [row[3] for row in floors[-3:]]
    )
    assert [bool(re.fullmatch(r"[\d,]+ \(\d+\.\d\d GiB\)", cell)) for cell in cells if cell] == [True] * (
        len(cells) - 2
    )


def test_a_refuted_claim_is_shown_and_the_others_are_still_tried(monkeypatch, tmp_path):
    def refuted(device):
        return gpu_claims.expect(False, "a difference of 1")

    def out_of_memory(device):
        raise torch.OutOfMemoryError("no memory | left\non the device")

    def not_applicable(device):
        raise gpu_claims.NotApplicableError("no reason")

    claims = {"a": refuted, "b": out_of_memory, "c": not_applicable, "d": lambda device: "all of it"}
    monkeypatch.setattr(gpu, "CLAIMS", claims)
    status, found = run_in_process(monkeypatch, tmp_path, ["Claims"])
    assert status == 1
    assert found["Claims"] == [
        ["a", "refuted: a difference of 1"],
        ["b", "refuted: OutOfMemoryError: no memory / left on the device"],
        ["c", "not applicable on cpu: no reason"],
        ["d", "holds: all of it"],
    ]
    monkeypatch.setattr(gpu, "CLAIMS", {"d": claims["d"]})
    assert run_in_process(monkeypatch, tmp_path, ["Claims"])[0] == 0


@pytest.mark.benchmarks
def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "ceilings", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu, "make_batch", lambda *_: torch.empty(0) @ torch.empty(1))
    titles = ["A training step against its floors", "Training throughput"]
    status, found = run_in_process(monkeypatch, tmp_path, titles)
    assert status == 1
    assert "failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert all(row[3].startswith("failed: RuntimeError: ") for row in found["Training throughput"])


def test_what_no_time_is_left_for_is_named(monkeypatch, tmp_path):
    status, found = run_in_process(monkeypatch, tmp_path, [*gpu.SECTIONS], "--minutes", "0")
    assert status == 0
    not_run = "not run: 0 minutes were over"
    assert {result for _, result in found["Claims"]} == {not_run}
    assert all(set(row[3:]) <= {not_run, ""} for row in found["Training throughput"])
    assert {row[2] for row in found["Ranking throughput"]} == {not_run}


def test_without_a_gpu_the_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "no GPU is available: run with --device cpu --sizes small to try the script\n"


def test_waiting_for_the_device_is_noticed():
    with gpu_claims.no_waiting(CPU), pytest.raises(gpu_claims.RefutedError, match="waits for the device"):
        torch.ones(1).item()
    with gpu_claims.no_waiting(CPU), pytest.raises(gpu_claims.RefutedError, match="waits for the device"):
        torch.ones(2)[torch.tensor([True, False])]


def test_the_operations_have_the_flop_of_step_and_known_bytes():
    """Two histories of length 5, the last item masked; 7 items, one head of 32, feed-forward width 64."""
    batch = step.make_collator(7, 5, last_item_ratio=1)(list(step.make_rows(2, 5, 7)))
    model = step.make_model(32, 7)
    found = {part.name: part for part in gpu.operations(model, 2, 5, num_labels=2)}
    expected = step.operations(model, batch, torch.float32)
    assert [(part.name, part.times, part.flop) for part in found.values()] == [
        (part.name.replace(" in float32", ""), part.times, part.flop) for part in expected
    ]
    parameters = model.num_parameters()
    assert {
        name: found[name].bytes for name in ("linear 32 to 64, labels", "attention, labels", "layer norm, labels")
    } == {
        # Forward reads 2 x 32 and 32 x 64 numbers, and writes 2 x 64. Backward reads these again, and writes 2 x 32 in
        # 2 bytes and 32 x 64 in 4.
        "linear 32 to 64, labels": 2 * (3 * 2 * 32 + 2 * 2 * 64 + 2 * 32 * 64) + 4 * 32 * 64,
        # Queries, context and their gradients at 2 positions; keys, values and their gradients at 10.
        "attention, labels": 2 * 32 * (2 * 6 + 10 * 6),
        "layer norm, labels": 4 * 5 * 2 * 32,
    }
    assert found["AdamW"].bytes == 28 * parameters


def test_bert_by_hand_has_the_labels_of_the_collator():
    batch = gpu.make_batch(50, [6, 3], CPU)
    positions, labels = batch["masked_positions"], batch["labels"]
    wanted = {
        (row, int(positions[row, place])): int(labels[row, place]) for row, place in (positions >= 0).nonzero().tolist()
    }
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_steps.training_step", lambda model, plain, dtype: seen.append(plain))
        gpu.bert_step(50, 32, batch)
    found = seen[0]["labels"]
    assert {(row, at): int(found[row, at]) for row, at in (found != -100).nonzero().tolist()} == wanted
    assert wanted
