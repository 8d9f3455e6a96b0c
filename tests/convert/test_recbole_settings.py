"""The documentation for users of RecBole and hopwise is complete and runs; their YAML becomes a recipe."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bert4rec_hf import Bert4RecConfig, convert_config, prepare
from bert4rec_hf.cli import main
from bert4rec_hf.convert.recbole_settings import DEFAULTS, RECIPE

PAGE = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "from-recbole-and-hopwise.md").read_text("utf-8")
# All names of BERT4Rec in hopwise 0.9.1, including inherited names except full_sort_predict_kg, and its loss.
HOPWISE_NAMES = [
    "n_layers", "n_heads", "hidden_size", "inner_size", "hidden_dropout_prob", "attn_dropout_prob", "hidden_act",
    "layer_norm_eps", "mask_ratio", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS", "MASK_INDEX", "loss_type",
    "initializer_range", "mask_token", "mask_item_length", "item_embedding", "position_embedding", "trm_encoder",
    "LayerNorm", "dropout", "output_ffn", "output_gelu", "output_ln", "output_bias", "loss_fct", "USER_ID", "ITEM_ID",
    "ITEM_SEQ", "ITEM_SEQ_LEN", "POS_ITEM_ID", "NEG_ITEM_ID", "max_seq_length", "n_items", "device", "logger", "type",
    "_init_weights", "reconstruct_test_data", "forward", "multi_hot_embed", "calculate_loss", "predict",
    "full_sort_predict", "gather_indexes", "get_attention_mask", "other_parameter", "load_other_parameter", "__str__",
]  # fmt: skip
# RecBole's properties/model/BERT4Rec.yaml, and the settings of training and data in overall.yaml and sample.yaml.
RECBOLE_YAML = r"""
n_layers: 2
n_heads: 2
hidden_size: 64
inner_size: 256
hidden_dropout_prob: 0.2
attn_dropout_prob: 0.2
hidden_act: 'gelu'
layer_norm_eps: 1e-12
initializer_range: 0.02
mask_ratio: 0.2
loss_type: 'CE'
transform: mask_itemseq
ft_ratio: 0.5
gpu_id: '0'
seed: 2020
epochs: 300
train_batch_size: 2048
learner: adam
learning_rate: 0.001
train_neg_sample_args:
  distribution: uniform
  sample_num: 1
stopping_step: 10
clip_grad_norm: ~
weight_decay: 0.0
eval_args:
  split: {'LS': 'valid_and_test'}
  order: TO
  mode: full
repeatable: True
metrics: ["Recall","MRR","NDCG","Hit","Precision"]
valid_metric: MRR@10
eval_batch_size: 4096
field_separator: "\t"
USER_ID_FIELD: user_id
ITEM_ID_FIELD: item_id
TIME_FIELD: timestamp
MAX_ITEM_LIST_LENGTH: 50
user_inter_num_interval: "[0,inf)"
"""
RECBOLE_RECIPE = {
    "position_embedding_type": "learned_from_start", "normalization": "post", "gated_feed_forward": False,
    "causal_attention": False, "filter_share": 0.0, "prediction_head": True, "num_transitions": 0, "repeat_weight": 0.0,
    "item_initialization": "random",
    "calibrate": False,
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256,
    "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "initializer_range": 0.02, "mask_ratio": 0.2, "max_predictions": 10, "last_item_ratio": 0.5,
    "item_loss": "softmax", "max_position_embeddings": 50, "filter_seen_items": False, "seed": 2020,
    "num_train_epochs": 300, "early_stopping_patience": 10, "per_device_train_batch_size": 2048,
    "per_device_eval_batch_size": 4096,
    "optim": "adamw_torch", "learning_rate": 0.001, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_grad_norm": 0.0, "weight_decay": 0.0, "metric_for_best_model": "MRR",
}  # fmt: skip


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


LINES = {name.strip("`"): line.strip("`") for name, line in table("Name by name")}


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def write(folder: Path, text: str) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(text)
    return path


def converted(path: Path, capsys) -> tuple[dict[str, Any], str]:
    """Convert a file. Returns the recipe on standard output and its comments."""
    assert main(["convert-config", str(path)]) == 0
    text = capsys.readouterr().out
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("\n".join(comments))
    return yaml.safe_load(text), "\n".join(comments)


def test_the_table_has_every_name_of_hopwise_once():
    assert sorted(LINES) == sorted(HOPWISE_NAMES)
    assert len(table("Name by name")) == len(LINES)


@pytest.mark.parametrize("name", LINES)
def test_every_line_of_the_table_runs(namespace, name):
    value = eval(LINES[name], namespace)
    assert (value is None) == (name == "_init_weights")  # returns nothing


def test_the_lines_give_what_hopwise_calls_so(namespace):
    def value(name):
        return eval(LINES[name], namespace)

    model, batch, inputs, last = (namespace[name] for name in ("model", "batch", "inputs", "last"))
    with torch.no_grad():
        # hopwise counts [PAD] and five items. Our token ids are 1 for [MASK] and 3 to 7 for the items.
        assert value("n_items") == 6
        assert value("mask_token") == 1
        assert value("max_seq_length") == 6
        assert value("mask_item_length") == int(value("mask_ratio") * value("max_seq_length"))
        assert value("ITEM_SEQ").tolist() == [[5, 3, 4, 1], [7, 6, 1, 0]]
        assert value("ITEM_SEQ_LEN").tolist() == [4, 3]
        assert value("ITEM_ID").tolist() == [[4], [6]]
        assert value("POS_ITEM_ID") == [6]
        assert value("reconstruct_test_data") == [5, 3, 4, 1]
        assert value("get_attention_mask").tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        places = value("MASK_INDEX")
        assert value("MASK_ITEM_SEQ").gather(1, places).tolist() == [[1], [1]]
        originals = torch.tensor([[5, 3, 4], [7, 6, 0]])
        assert value("POS_ITEMS").tolist() == originals.gather(1, places).tolist()
        assert value("NEG_ITEMS").shape == (1,)
        scores, states = model(**inputs).logits[torch.arange(2), last[:, 0]], value("forward")
        torch.testing.assert_close(value("full_sort_predict"), scores)
        torch.testing.assert_close(value("predict"), scores[[0, 1], [5, 3]])
        torch.testing.assert_close(
            states[:, :2] @ model.get_input_embeddings().weight[3:].T + value("output_bias")[3:],
            model(**inputs).logits[:, :2, 3:],
        )
        at_masks = model(input_ids=batch["input_ids"]).prediction_states.gather(1, places[..., None].expand(-1, -1, 64))
        torch.testing.assert_close(value("multi_hot_embed"), at_masks)
        before_head = model.model(**inputs).last_hidden_state[torch.arange(2), last[:, 0]]
        torch.testing.assert_close(value("gather_indexes"), before_head)
        # The table has eight rows: [PAD], [MASK], [UNK] and the items. Input and output share it.
        assert value("item_embedding").weight.shape == (8, 64)
        assert value("item_embedding").weight is model.get_input_embeddings().weight
        assert value("position_embedding").weight.shape == (6, 64)
        assert len(value("trm_encoder")) == value("n_layers") == 2
    model.zero_grad()
    value("calculate_loss")
    assert value("output_bias").grad.count_nonzero() > 0
    assert not model.training


def test_the_keys_on_the_page_are_those_that_are_known():
    cells = table("Key by key")
    keys = [key for theirs, _ in cells for key in re.findall(r"`(\w+)`", theirs)]
    assert sorted(keys) == sorted(RECIPE)
    assert DEFAULTS.keys() <= RECIPE.keys()


def test_recboles_defaults_become_its_architecture_and_training(tmp_path, capsys):
    path = write(tmp_path, RECBOLE_YAML)
    assert convert_config(path) == RECBOLE_RECIPE
    recipe, comments = converted(path, capsys)
    assert recipe == RECBOLE_RECIPE
    assert (
        "bert4rec prepare LOG.inter --output DATA --user_column user_id --item_column item_id "
        "--time_column timestamp --split leave-one-out\n"
    ) in comments
    assert "train_batch_size: a row is a user" in comments
    assert "MRR is of the whole ranking" in comments
    for key in ("gpu_id", "metrics", "transform", "train_neg_sample_args"):
        assert re.search(rf"#   [\w, ]*\b{key}\b[\w, ]*: \w", comments), key
    assert "unknown" not in comments
    assert "not in the file" not in comments


def test_of_a_partial_file_the_model_is_recboles_and_the_training_loop_ours(tmp_path, capsys):
    recipe, comments = converted(write(tmp_path, "hidden_size: 32\nn_heads: ~\n"), capsys)
    others = ("item_initialization", "calibrate", "mask_ratio", "max_predictions", "last_item_ratio")
    architecture = (*Bert4RecConfig.__annotations__, *others)
    expected = {name: value for name, value in RECBOLE_RECIPE.items() if name in architecture}
    assert recipe == expected | {"hidden_size": 32}
    assert "these settings are not in the file and have RecBole's defaults: n_layers, n_heads, inner_size" in comments
    assert converted(write(tmp_path, ""), capsys)[0] == expected


def test_a_recipe_with_bpr_trains_from_the_log_that_its_comment_prepares(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "tiny").mkdir(parents=True)
    lines = ["who:token\twhat:token\twhen:float\trating:float"]
    lines += [f"u{user}\ti{(user + time) % 6}\t{time}\t{time % 5 + 1}" for user in range(8) for time in range(10)]
    (tmp_path / "logs" / "tiny" / "tiny.inter").write_text("\n".join([*lines, "alone\ti1\t0\t5"]) + "\n")
    write(
        tmp_path,
        "model: BERT4Rec\ndataset: tiny\ndata_path: logs/\nUSER_ID_FIELD: who\nITEM_ID_FIELD: what\nTIME_FIELD: when\n"
        "user_inter_num_interval: '(1,inf)'\nval_interval: {rating: '[2,inf)'}\nrm_dup_inter: first\n"
        "n_layers: 1\nhidden_size: 8\ninner_size: 8\nMAX_ITEM_LIST_LENGTH: 6\nloss_type: BPR\nlearning_rate: 1e-2\n"
        "layer_norm_eps: 1e-6\nhidden_act: swish\nlearner: Adam\nweight_decay: 1e-4\nclip_grad_norm: {max_norm: 5}\n"
        "valid_metric: Recall@10\nepochs: 1\ntrain_batch_size: 4\neval_batch_size: 8\nuse_gpu: False\n"
        "show_progress: False\nmask_ratio: 0.4\nft_ratio: 0\nworker: 0\nenable_amp: False\nshuffle: False\n",
    )
    assert main(["convert-config", "theirs.yaml", "--output", "recipe.yaml"]) == 0
    assert "wrote recipe.yaml" in capsys.readouterr().out
    text = (tmp_path / "recipe.yaml").read_text()
    (command,) = re.findall(r"# First prepare the log: bert4rec (.*)", text)
    assert command == (
        "prepare logs/tiny/tiny.inter --output DATA --user_column who --item_column what --time_column "
        "when --min_user_events 2 --rating_column rating --min_rating 2 --duplicates drop"
    )
    assert main(command.split()) == 0
    assert "8 users, 6 items" in capsys.readouterr().out
    arguments = [
        "--data",
        "DATA",
        "--output_dir",
        "model",
        "--max_steps",
        "1",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
    ]
    assert main(["train", "--config", "recipe.yaml", *arguments]) == 0
    config = Bert4RecConfig.from_pretrained("model")
    recipe = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    wanted = yaml.safe_load(text)
    assert wanted.pop("use_cpu") is True  # a recipe in a model folder names no settings of the machine
    assert {name: recipe[name] for name in wanted if name != "max_steps"} == wanted
    assert (config.item_loss, config.normalization, config.hidden_act) == ("bpr", "post", "swish")
    assert wanted["num_negatives"] == 1
    assert wanted["max_predictions"] == 2
    assert wanted["metric_for_best_model"] == "HR@10"
    assert wanted["max_grad_norm"] == 5
    assert "all labels of a batch share its negatives" in text
    assert "weight_decay: AdamW decays the weights directly" in text
    assert load_file("model/model.safetensors")["head.dense.weight"].shape == (8, 8)


def test_a_recipe_of_recboles_defaults_is_taken_as_it_is(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{user},{time},{time}\n" for user in range(4) for time in range(6))
    )
    prepare(tmp_path / "log.csv", tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    assert main(["convert-config", str(write(tmp_path, RECBOLE_YAML)), "--output", str(recipe)]) == 0
    options = {"data": tmp_path / "data", "output_dir": tmp_path / "model", "max_steps": 1, "use_cpu": True}
    options |= {"eval_steps": 1, "save_steps": 1}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["train", "--config", str(recipe), *words]) == 0
    assert Bert4RecConfig.from_pretrained(tmp_path / "model").max_position_embeddings == 50


@pytest.mark.parametrize(
    ("line", "option", "comment"),
    [
        ("hidden_sise: 3", {}, "hidden_sise: unknown settings"),
        ('"odd\\nkey": 3', {}, "odd key: unknown settings"),
        ("ui_relation: '[UI-Relation]'", {}, "ui_relation: settings of knowledge graphs"),
        ("learner: sparse_adam", {}, "learner: no --optim corresponds to sparse_adam"),
        ("learner: sgd", {"optim": "sgd"}, ""),
        ("valid_metric: NDCG@10", {"metric_for_best_model": "NDCG@10"}, ""),
        ("valid_metric: hit@5", {"metric_for_best_model": "HR@5"}, ""),
        ("valid_metric: NDCG@7", {}, "valid_metric: no metric corresponds to NDCG@7"),
        ("valid_metric: AUC", {}, "valid_metric: no metric corresponds to AUC"),
        ("clip_grad_norm: {max_norm: 2, norm_type: 1}", {"max_grad_norm": 2}, "the norm is always the 2-norm"),
        ("repeatable: False", {"filter_seen_items": True}, "repeatable: RecBole's BERT4Rec only runs with True"),
        ("enable_amp: True", {"bf16": True}, ""),
        ("log_wandb: True", {"report_to": "wandb"}, ""),
        ("item_inter_num_interval: '[5,100]'", {}, "--min_item_events 5\n"),
        ("item_inter_num_interval: '[5,100]'", {}, "prepare has no upper limit of 100"),
        ("user_inter_num_interval: '[5,100)'", {}, "--min_user_events 5 --max_user_events 99\n"),
        ("user_inter_num_interval: '[5,inf)'", {}, "--min_user_events 5\n"),
        ("min_user_inter_num: 5\nmin_item_inter_num: 3", {}, "--min_user_events 5 --min_item_events 3\n"),
        ("max_user_inter_num: 50\nmin_user_inter_num: ~", {}, "--max_user_events 50\n"),
        ("max_item_inter_num: 50", {}, "prepare has no upper limit of 50"),
        ("field_separator: '::'", {}, "--delimiter ::\n"),
        ("field_separator: ' '", {}, "--delimiter ' '\n"),
        ("field_separator: '<---->'", {}, "prepare takes delimiters of one to four bytes, not '<---->'"),
        ("item_inter_num_interval: '[1,2];[4,inf)'", {}, "is no interval with a lower limit"),
        ("val_interval: {rating: '(3,inf)'}", {}, "val_interval: prepare filters one column by a lower limit"),
        ("val_interval: {category: [a, b]}", {}, "val_interval: prepare filters one column by a lower limit"),
        ("rm_dup_inter: last", {}, "rm_dup_inter: --duplicates drop keeps the first"),
        ("eval_args: {split: {RS: [0.8, 0.1, 0.1]}}", {}, "eval_args: prepare has the splits leave-one-out and"),
        ("eval_args: {split: {LS: test_only}}", {}, "--split leave-one-out --validation false\n"),
        ("eval_args: {split: {LS: valid_only}}", {}, "both validation and test targets are held out, not valid_only"),
        ("eval_args: {mode: {valid: full, test: uni100}}", {}, "all items are ranked, not"),
        ("mask_ratio: 0.01", {"mask_ratio": 0.01, "max_predictions": None}, ""),
    ],
)  # fmt: skip
def test_a_key_is_taken_over_or_named_with_the_reason(tmp_path, capsys, line, option, comment):
    without, _ = converted(write(tmp_path, ""), capsys)
    recipe, comments = converted(write(tmp_path, line), capsys)
    assert recipe == {name: value for name, value in (without | option).items() if value is not None}
    assert comment in comments + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layers: [1,", "is no YAML that can be read"),
        ("a: !!python/object/apply:os.getcwd []", "is no YAML that can be read"),
        ("only a text", "must be a mapping of names to values; got 'only a text'"),
        ("model: SASRec", "model in .* must be BERT4Rec; got 'SASRec'"),
        ("loss_type: XE", "loss_type in .* must be one of CE, BPR; got 'XE'"),
        ("loss_type: [CE]", "loss_type in .* must be one of CE, BPR"),
        ("clip_grad_norm: 5", "clip_grad_norm in .* must be a mapping with max_norm; got 5"),
        ("eval_args: full", "eval_args in .* must be a mapping; got 'full'"),
        ("val_interval: 3", "val_interval in .* must be a mapping of fields to intervals; got 3"),
        ("hidden_size: 63", "hidden_size must be a multiple of num_attention_heads"),
        ("n_layers: two", "num_hidden_layers"),
        ("mask_ratio: much", "the settings in .* make no BERT4Rec"),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_is_written(tmp_path, capsys, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        convert_config(path)
    assert main(["convert-config", str(path), "--output", str(tmp_path / "recipe.yaml")]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("bert4rec convert-config: ")
    assert not output.out
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_missing_file_and_an_output_that_is_there_are_one_line(tmp_path, capsys):
    assert main(["convert-config", str(tmp_path / "nowhere.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["convert-config", str(write(tmp_path, "")), "--output", str(tmp_path / "recipe.yaml")])
    assert ended.value.code == 2
    assert "recipe.yaml exists; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
