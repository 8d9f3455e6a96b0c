"""The exported graph gives the answers of the model."""

import onnxruntime
import pytest
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction
from bert4rec_hf.cli import main
from bert4rec_hf.serving.onnx_export import Recommender, export_onnx

SWITCHES = [
    {},
    {"normalization": "post", "position_embedding_type": "learned_from_start", "prediction_head": True},
    {"position_embedding_type": "learned_from_end"},
    {"num_transitions": 5},
    {"repeat_weight": 0.8},
    {"num_transitions": 5, "next_item_weight": 2.0, "repeat_weight": 0.8, "recency_weight": 1.5},
    {"causal_attention": True},
    {"causal_attention": True, "filter_share": 0.3},
    {"withdrawn_item_ids": [5, 7, 30]},
]
# (batch, length, excluded, candidates)
SHAPES = [(4, 6, 3, 1), (1, 1, 1, 1), (1, 12, 9, 20), (9, 12, 1, 5)]


def make_model(switches) -> Bert4RecForMaskedItemPrediction:
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=60, max_position_embeddings=12, initializer_range=0.3, **switches)
    model = Bert4RecForMaskedItemPrediction(config).eval()
    torch.nn.init.normal_(model.item_bias.weight)
    if model.history_scores.successor_ids is not None:
        model.history_scores.successor_ids[3:] = torch.stack([torch.randperm(57)[:5] + 3 for _ in range(57)])
        model.history_scores.successor_scores[3:] = torch.rand(57, 5) * 3
        model.history_scores.next_item_scores[3:] = torch.rand(57, 5) * 3
    return model


def inputs(batch: int, length: int, excluded: int, candidates: int) -> dict[str, torch.Tensor]:
    """A batch in which every other row is padded on the left and has no candidates."""
    torch.manual_seed(batch * length)
    input_ids = torch.randint(3, 60, (batch, length))
    input_ids[:, -1] = 1
    input_ids[::2, : length // 3] = 0
    candidate_ids = torch.stack([torch.randperm(57)[:candidates] + 3 for _ in range(batch)])
    candidate_ids[::2] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "history_ids": torch.randint(0, 60, (batch, length + 3)),  # longer than the input
        "exclude_ids": torch.randint(0, 60, (batch, excluded)),
        "candidate_ids": candidate_ids,
    }


def expected(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers of `recommend`, row by row, with None for a row without candidates."""
    answers = []
    for row in range(len(batch["input_ids"])):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        if not one["candidate_ids"].any():
            one["candidate_ids"] = None
        scores, item_ids = model.recommend(**one, top_k=10)
        missing = 10 - scores.shape[1]
        answers.append(
            (
                torch.nn.functional.pad(scores, (0, missing), value=-torch.inf),
                torch.nn.functional.pad(item_ids, (0, missing)),
            )
        )
    return torch.cat([scores for scores, _ in answers]), torch.cat([item_ids for _, item_ids in answers])


def assert_same(found, wanted) -> None:
    (scores, item_ids), (wanted_scores, wanted_ids) = found, wanted
    torch.testing.assert_close(scores, wanted_scores, atol=1e-4, rtol=0)
    shown = wanted_scores > -torch.inf
    assert torch.equal(item_ids[shown], wanted_ids[shown])
    assert shown.any()


@pytest.mark.parametrize(
    "switches",
    SWITCHES,
    ids=["default", "paper", "from_end", "transitions", "repeats", "both", "causal", "filter", "withdrawn"],
)
def test_onnxruntime_answers_like_the_model_at_any_batch_size_and_length(tmp_path, switches):
    model = make_model(switches)
    export_onnx(model, tmp_path / "folder" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx")
    for shape in SHAPES:
        batch = inputs(*shape)
        found = session.run(None, {name: values.numpy() for name, values in batch.items()})
        assert_same([torch.from_numpy(array) for array in found], expected(model, batch))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_model_in_half_precision_is_exported_in_single_and_stays_as_it_is(tmp_path):
    model = make_model({}).bfloat16().train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    model.eval()
    batch = inputs(4, 6, 3, 1)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    scores, _ = session.run(None, {name: values.numpy() for name, values in batch.items()})
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(torch.from_numpy(scores), expected(model.float(), batch)[0], atol=1e-4, rtol=1e-4)


def test_a_model_on_a_gpu_is_exported_from_a_copy_on_the_cpu(tmp_path, monkeypatch):
    moved = []

    def to(model, *arguments):
        moved.append(arguments)
        raise InterruptedError

    model = make_model({})
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(type(model), "to", to)
    with pytest.raises(InterruptedError):
        export_onnx(model, tmp_path / "model.onnx")
    assert moved == [("cpu", torch.float32)]


def test_a_model_that_is_not_exported_goes_on_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ImportError("onnxscript")

    model = make_model({}).train()
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ImportError):
        export_onnx(model, tmp_path / "model.onnx")
    assert model.training


def test_torch_export_answers_like_the_model(tmp_path):
    model = make_model({})
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=12)
    others = tuple({0: batch, 1: torch.export.Dim(name)} for name in ("history", "excluded", "candidates"))
    rows = ({0: batch, 1: length},) * 2 + others
    program = torch.export.export(Recommender(model), tuple(inputs(4, 6, 3, 5).values()), dynamic_shapes=rows)
    for shape in [(2, 12, 2, 7), (3, 5, 4, 9)]:
        found = program.module()(*inputs(*shape).values())
        assert_same(found, expected(model, inputs(*shape)))


def test_more_items_than_the_catalogue_has_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="between 1 and the number of items, 57; got 58"):
        export_onnx(make_model({}), tmp_path / "model.onnx", top_k=58)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("log.csv", r"log\.csv exists and its name does not end in \.onnx; choose another --output"),
        ("folder.onnx", r"folder\.onnx is a folder; name a file, for example .*folder\.onnx.model\.onnx"),
    ],
)
def test_what_is_no_onnx_file_is_not_replaced_and_nothing_is_exported_for_it(tmp_path, monkeypatch, name, message):
    (tmp_path / "log.csv").write_text("user_id,item_id\n")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("the long way to an error"))
    with pytest.raises(ValueError, match=message):
        export_onnx(make_model({}), tmp_path / name)
    assert (tmp_path / "log.csv").read_text() == "user_id,item_id\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder.onnx", "log.csv"]


def test_the_command_writes_the_file(tmp_path, capsys):
    make_model({}).save_pretrained(tmp_path / "model")
    output = tmp_path / "model.onnx"
    output.write_text("of yesterday")
    assert main(["export", str(tmp_path / "model"), "--output", str(output), "--top_k", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {output}")
    session = onnxruntime.InferenceSession(output)
    scores, _ = session.run(None, {name: values.numpy() for name, values in inputs(1, 4, 1, 1).items()})
    assert scores.shape == (1, 3)
