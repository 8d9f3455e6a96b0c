"""Pushing to and loading from a local Hub over HTTP. Every program runs in its own process."""

import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard

from bert4rec_hf import prepare

REPO = f"{USER}/chain"
MODEL_FILES = {
    ".gitattributes", "README.md", "calibration.json", "config.json", "evaluation.json", "items.json",
    "learning_curve.png", "model.safetensors", "preparation.json", "recipe.yaml", "tokenizer.json",
    "tokenizer_config.json", "training.json",
}  # fmt: skip
USER_NAME, TEMPORARY = "somebody-here", "temporary-of-this-machine"
LOADED_ALONE = {".gitattributes", "README.md", "config.json", "model.safetensors"}
HISTORIES = [[], ["item 3"], ["item 3", "item 7", "item 1"]]
TRAIN = {
    "num_train_epochs": 1, "eval_steps": 0.5, "save_steps": 0.5, "hidden_size": 16, "intermediate_size": 32,
    "num_attention_heads": 2, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def data(folder) -> Path:
    """A prepared log of 40 users with titles and its own column names. Two of its 12 items occur in targets only."""
    chance = random.Random(0)
    lines = ["user_id,sku,timestamp"]
    for user in range(40):
        lines += [f"{user},item {chance.randrange(10)},{time}" for time in range(6)]
        lines.append(f"{user},item {10 + user % 2},{6}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    titles = [f'item {number},"The ""{number}th"", a film"' for number in range(12)]
    (folder / "titles.csv").write_text("\n".join(["sku,title", *titles]) + "\n")
    prepare(folder / "log.csv", folder / "data", item_column="sku", item_titles=folder / "titles.csv")
    return folder / "data"


def environment(hub: HubServer, folder: Path, token: str = TOKEN) -> dict[str, str]:
    # huggingface_hub reads the endpoint at import, so this process itself never uses it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    package, programs = Path(__file__).parent.parent.parent, Path(sys.executable).parent
    temporary = folder / TEMPORARY
    temporary.mkdir(exist_ok=True)
    return inherited | {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost",
        "USER": USER_NAME, "LOGNAME": USER_NAME, "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


def run(command: list, hub: HubServer, folder: Path, token: str = TOKEN) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=environment(hub, folder, token), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def python(code: str, hub: HubServer, folder: Path, *arguments) -> dict:
    """Run a program in another process. Returns the last line that it printed, parsed as JSON."""
    outcome = run([sys.executable, "-c", PREAMBLE + code, *arguments], hub, folder)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout.splitlines()[-1])


PREAMBLE = f"""
import json, sys
import torch
from transformers import pipeline
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
torch.set_num_threads(1)

def answers(model, **options):
    recommend = pipeline("sequential-recommendation", model=model, top_k=5, **options)
    return [recommend(history) for history in {HISTORIES!r}]

def change(model):
    with torch.no_grad():
        model.item_bias.weight += torch.arange(len(model.item_bias.weight)) * 0.1
"""


@pytest.fixture(scope="module")
def pushed(hub, folder, data):
    """Train, evaluate and push a model; change and push it again. Returns commit and answers for both pushes."""
    code = f"""
from bert4rec_hf import Bert4RecTrainingArguments
from bert4rec_hf import evaluate_prepared, train_prepared
options = {TRAIN!r}
sizes = {{name: options.pop(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}}
model, data = sys.argv[1:]
# The token is an argument, so that a test notices if the arguments are pushed.
args = Bert4RecTrainingArguments(model, hub_model_id="{REPO}", hub_token="{TOKEN}", **options)
trainer = train_prepared(data, args, **sizes)
evaluate_prepared(model, data, use_cpu=True)
first = {{"answers": answers(model), "commit": trainer.push_to_hub(license="mit", tags="films").oid}}
change(trainer.model)
trainer.evaluate()
trainer.save_model()
second = {{"answers": answers(model), "commit": trainer.push_to_hub().oid}}
print(json.dumps({{"first": first, "second": second}}))
"""
    return python(code, hub, folder, folder / "model", data)


def files(hub: HubServer, pushed: dict, which: str = "first") -> dict[str, bytes]:
    return hub.repositories[REPO].files(pushed[which]["commit"])


def test_the_trainer_pushes_the_whole_model_folder(hub, pushed, folder):
    assert files(hub, pushed).keys() == MODEL_FILES
    items = json.loads(files(hub, pushed)["items.json"])
    assert len(items["titles"]) == len(items["counts"]) == 12
    assert '"The \\"3th\\", a film"' in json.dumps(items["titles"])
    local = {path.name: path.read_bytes() for path in (folder / "model").iterdir() if path.is_file()}
    del local["training_args.bin"]  # not pushed, since it has paths of this machine
    assert local == {name: content for name, content in files(hub, pushed, "second").items() if name in local}
    assert hub.repositories[REPO].messages() == ["initial commit", "End of training", "End of training"]


def test_nothing_of_this_machine_and_no_token_is_pushed(hub, pushed, folder):
    for _, snapshot in hub.repositories[REPO].commits.values():
        for name, content in snapshot.items():
            secrets = [str(folder), str(Path.home()), os.getcwd(), TOKEN, hub.endpoint, socket.gethostname()]
            for secret in (*secrets, USER_NAME, TEMPORARY):
                assert len(secret) < 4 or secret.encode() not in content, (name, secret)


def test_test_numbers_come_along_until_the_weights_are_others(hub, pushed):
    parts = [
        [record["protocol"]["part"] for record in json.loads(files(hub, pushed, which)["evaluation.json"])]
        for which in ("first", "second")
    ]
    assert parts == [["validation", "test"], ["validation"]]


def test_a_second_process_answers_by_repo_id_and_revision_what_the_folder_answered(hub, pushed, folder):
    code = f"""
print(json.dumps([answers("{REPO}", revision=revision) for revision in [*sys.argv[1:], "main", None]]))
"""
    first, second = pushed["first"], pushed["second"]
    loaded = python(code, hub, folder, first["commit"], second["commit"])
    assert loaded == [first["answers"], second["answers"], second["answers"], second["answers"]]
    assert first["answers"] != second["answers"]
    assert first["answers"][1][0]["title"].endswith("a film")


def test_the_card_has_every_stored_metric_under_its_protocol(hub, pushed):
    snapshot = files(hub, pushed)
    card = ModelCard(snapshot["README.md"].decode())
    assert card.data.library_name == "bert4rec-hf"
    assert card.data.pipeline_tag == "other"
    assert card.data.license == "mit"
    assert {"sequential-recommendation", "bert4rec", "films"} <= set(card.data.tags)
    assert card.data.get("datasets") is None  # the log is not a public dataset
    assert card.data.model_name == "chain"
    records = json.loads(snapshot["evaluation.json"])
    expected = {
        (record["protocol"]["part"], name): round(value, 6)
        for record in records
        for name, value in record["metrics"].items()
    }
    assert len(expected) == 30
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == expected
    assert {result.dataset_config for result in card.data.eval_results} == {
        f"leave-one-out, {part}; all 12 items ranked, seen items kept; 40 users" for part in ("validation", "test")
    }
    assert "| last-item co-occurrence |" in card.text
    assert "2 of 12 items are cold: they have no training event" in card.text
    # The second push keeps the license that was given to the first.
    assert ModelCard(files(hub, pushed, "second")["README.md"].decode()).data.license == "mit"


def block(hub, pushed, language: str) -> str:
    card = files(hub, pushed)["README.md"].decode()
    return re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)[1]


def test_the_cards_snippet_runs_when_it_is_pasted(hub, pushed, folder):
    code = block(hub, pushed, "python")
    assert REPO in code
    outcome = run([sys.executable, "-c", code], hub, folder)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert len(re.findall(r"'item_id': 'item \d+', 'title': '", outcome.stdout)) == 5
    assert "left out" not in outcome.stderr  # the catalogue has the items of the snippet


def test_the_cards_commands_train_the_same_weights(hub, pushed, folder, tmp_path):
    commands = [shlex.split(line) for line in block(hub, pushed, "bash").splitlines()]
    assert [words[0] for words in commands] == ["hf", "bert4rec", "bert4rec", "bert4rec"]
    for name in ("log.csv", "titles.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for words in commands:
        words = ["titles.csv" if word == "TITLES" else word for word in words]
        command = [sys.executable, "-m", "bert4rec_hf", *words[1:]] if words[0] == "bert4rec" else words
        outcome = run(command, hub, tmp_path)
        assert outcome.returncode == 0, outcome.stderr[-3000:]
    snapshot = files(hub, pushed)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == snapshot["model.safetensors"]
    assert json.loads((tmp_path / "model" / "evaluation.json").read_text()) == json.loads(snapshot["evaluation.json"])


def test_a_model_alone_pushes_config_and_weights_and_leaves_other_files_as_they_are(hub, pushed, folder):
    code = f"""
model = Bert4RecForMaskedItemPrediction.from_pretrained(sys.argv[1])
model.push_to_hub("{USER}/alone", tags=["a-tag"])
model.save_pretrained("saved", push_to_hub=True, repo_id="{USER}/saved")
tokenizer = Bert4RecTokenizer.from_items(["1", "2", "3"])
tokenizer.push_to_hub("{USER}/both")
Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=6, hidden_size=8)).push_to_hub("{USER}/both")
print(json.dumps([Bert4RecTokenizer.from_pretrained("{USER}/both").items]))
"""
    assert python(code, hub, folder, folder / "model") == [["1", "2", "3"]]
    names = {name: set(repo.files()) for name, repo in hub.repositories.items()}
    assert names[f"{USER}/alone"] == names[f"{USER}/saved"] == LOADED_ALONE
    assert names[f"{USER}/both"] == LOADED_ALONE | {"tokenizer.json", "tokenizer_config.json", "items.json"}
    card = hub.repositories[f"{USER}/alone"].files()["README.md"].decode()
    assert "NDCG" not in card
    assert ModelCard(card).data.tags[-1] == "a-tag"


def test_a_push_that_breaks_off_leaves_nothing_half_and_can_be_repeated(pushed, folder):
    code = f"""
from huggingface_hub import HfApi
load = Bert4RecForMaskedItemPrediction.from_pretrained
model = load(sys.argv[1])
try:
    model.push_to_hub("{REPO}")
except Exception as error:
    errors = repr(error), repr(error.__cause__)
files_between = HfApi().list_repo_files("{REPO}")
model.push_to_hub("{REPO}")
weights = [load("{REPO}").state_dict(), model.state_dict()]
are_equal = all(weights[0][name].equal(weights[1][name]) for name in weights[1])
print(json.dumps([errors, files_between, are_equal]))
"""
    with HubServer() as hub:
        # The client repeats the broken upload by itself, and the Hub refuses it as expired.
        hub.uploads_to_break = hub.uploads_to_refuse = 1
        errors, files_between, are_equal = python(code, hub, folder, folder / "model")
        assert "model.safetensors" in errors[0]
        assert "expired" in errors[1]
        assert files_between == [".gitattributes"]
        assert are_equal
        assert hub.repositories[REPO].messages() == ["initial commit", "Upload Bert4RecForMaskedItemPrediction"]
        assert hub.repositories[REPO].files().keys() == LOADED_ALONE
        assert len([request for request in hub.requests if request.startswith("PUT")]) == 3
        assert len(hub.objects) == 1


def test_the_command_trains_pushes_every_checkpoint_and_recommends_by_repo_id(hub, data, tmp_path):
    repo = f"{USER}/by-command"
    options = [word for name, value in TRAIN.items() for word in (f"--{name}", str(value).lower())]
    command = [sys.executable, "-m", "bert4rec_hf"]
    hub.uploads_to_break = 1  # the client repeats a broken upload by itself
    outcome = run(
        [*command, "train", "--data", data, "--output_dir", "model", *options, "--push_to_hub", "true",
         "--hub_model_id", repo, "--hub_strategy", "checkpoint", "--save_total_limit", "1"],
        hub, tmp_path,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert hub.uploads_to_break == 0
    repository = hub.repositories[repo]
    messages = repository.messages()
    assert messages[0] == "initial commit"
    assert sorted(messages[1:-1]) == [f"Training in progress, step {step}" for step in (1, 1, 2, 2)]
    assert messages[-1] == "Model save"
    # Each of these commits has a complete model folder or none.
    for _, snapshot in list(repository.commits.values())[1:]:
        # Only the final model is calibrated.
        expected = (MODEL_FILES, MODEL_FILES - {"calibration.json"}, {".gitattributes"})
        assert {name for name in snapshot if "/" not in name} in expected
    resumable = {name.removeprefix("last-checkpoint/") for name in repository.files() if "/" in name}
    saved = {"optimizer.pt", "scheduler.pt", "trainer_state.json", *MODEL_FILES}
    assert saved - {".gitattributes", "calibration.json"} <= resumable
    assert "training_args.bin" not in resumable
    state = json.loads(repository.files()["last-checkpoint/trainer_state.json"])
    assert re.fullmatch(r"checkpoint-\d+", state["best_model_checkpoint"])  # no path of this machine
    recipe = yaml.safe_load(repository.files()["recipe.yaml"])
    assert not [name for name in recipe if name.startswith(("hub", "push", "output"))]

    local = run([*command, "recommend", "model", "item 3", "item 4"], hub, tmp_path)
    remote = run([*command, "recommend", repo, "item 3", "item 4"], hub, tmp_path)
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout == local.stdout
    assert "a film" in remote.stdout


def test_a_wrong_token_is_refused_in_one_line_before_anything_is_trained(hub, data, tmp_path):
    command = ["train", "--data", data, "--output_dir", "model", "--push_to_hub", "true", "--use_cpu", "true"]
    command += ["--hub_model_id", f"{USER}/never"]
    outcome = run([sys.executable, "-m", "bert4rec_hf", *command], hub, tmp_path, token="hf_wrong")
    assert outcome.returncode == 2
    *_, line = outcome.stderr.strip().splitlines()
    assert line.startswith("bert4rec train: Client error '401 Unauthorized'")
    assert line.endswith("Invalid credentials in Authorization header")
    assert "hf_wrong" not in outcome.stderr
    assert f"{USER}/never" not in hub.repositories
    assert not list((tmp_path / "model").glob("*.safetensors"))


STRATEGIES = [
    ("ours", "end"),
    ("ours", "every_save"),
    ("ours", "all_checkpoints"),
    ("plain", "every_save"),
    ("plain", "checkpoint"),
]
# A plain Trainer pushes its own card and its pickled arguments, but no recipe, preparation or evaluation.
PLAIN_FILES = {*LOADED_ALONE, "items.json", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
# Our trainer lacks these files here, since it gets neither a protocol nor a preparation, and is not calibrated.
OURS_FILES = MODEL_FILES - {
    "calibration.json", "evaluation.json", "learning_curve.png", "preparation.json", "training.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def strategies(hub, folder, data) -> None:
    """Train two epochs with each of STRATEGIES, save a checkpoint after each, and call trainer.push_to_hub()."""
    code = f"""
sys.path += [f"{{sys.argv[1]}}/training", f"{{sys.argv[1]}}/helpers"]
from test_trainer_features import make_trainer
for which, strategy in {STRATEGIES!r}:
    name = f"{{which}}-{{strategy}}"
    trainer = make_trainer(
        which, sys.argv[2], name, num_train_epochs=2, save_total_limit=None, load_best_model_at_end=False,
        push_to_hub=True, hub_model_id=f"{USER}/{{name}}", hub_strategy=strategy,
    )
    trainer.train()
    trainer.push_to_hub()
print("null")
"""
    python(code, hub, folder, Path(__file__).parent.parent, data)


@pytest.fixture(scope="module")
def answers_of_strategies(hub, folder, strategies) -> list[list]:
    """The answers of another process, from each repository and from the folder that was pushed there."""
    code = f"""
names = [f"{{which}}-{{strategy}}" for which, strategy in {STRATEGIES!r}]
print(json.dumps([[answers(f"{USER}/{{name}}"), answers(name)] for name in names]))
"""
    return python(code, hub, folder)


@pytest.mark.parametrize(("which", "strategy"), STRATEGIES)
def test_each_trainer_pushes_by_each_strategy_what_recommends_elsewhere(hub, answers_of_strategies, which, strategy):
    remote, local = answers_of_strategies[STRATEGIES.index((which, strategy))]
    assert remote == local
    assert all(re.fullmatch(r"item \d+", item["item_id"]) for answer in remote for item in answer)
    assert all(item["title"] == f'The "{item["item_id"][5:]}th", a film' for answer in remote for item in answer)

    repository = hub.repositories[f"{USER}/{which}-{strategy}"]
    messages = repository.messages()
    # A plain Trainer does not push a checkpoint while it still uploads the previous one.
    saves = {"ours": ["step 2", "step 4"], "plain": ["epoch 1"]}[which] if strategy != "end" else []
    assert messages[0] == "initial commit"
    assert messages[-1] == "End of training"
    assert {f"Training in progress, {save}" for save in saves} <= set(messages)
    assert len(messages) > 2 or not saves
    model_files = OURS_FILES if which == "ours" else PLAIN_FILES
    assert {name for name in repository.files() if "/" not in name} == model_files
    for _, snapshot in list(repository.commits.values())[1:]:
        assert {name for name in snapshot if "/" not in name} >= model_files - {"README.md"}

    kept = {name.split("/")[0] for name in repository.files() if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert kept == expected.get(strategy, set())
    for checkpoint in kept:
        resumable = {name.removeprefix(f"{checkpoint}/") for name in repository.files() if name.startswith(checkpoint)}
        assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "items.json", "model.safetensors"} <= resumable


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """The Python blocks of the documentation about prepared histories."""
    text = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "publishing.md").read_text("utf-8")
    section = text.split("## Prepared histories\n")[1].split("\n## ")[0]
    return [block.replace("you/", f"{USER}/") for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]


@pytest.fixture(scope="module")
def pushed_histories(hub, folder, data, blocks) -> str:
    python(f"{blocks[0]}\nprint('null')", hub, folder)
    return f"{USER}/histories"


def test_pushed_histories_keep_their_columns_and_rows(hub, data, pushed_histories):
    repository = hub.repositories[f"datasets/{pushed_histories}"]
    shards = sorted(name for name in repository.files() if name.endswith(".parquet"))
    assert shards == [f"data/train-0000{shard}-of-00002.parquet" for shard in range(2)]
    parts = [pq.read_table(pa.BufferReader(repository.files()[name])) for name in shards]
    local = pq.read_table(data / "histories.parquet")
    pushed = pa.concat_tables(parts)
    # Names and types are compared alone, since pushing loses that user_id is never null.
    assert [(field.name, field.type) for field in pushed.schema] == [(field.name, field.type) for field in local.schema]
    assert pushed.to_pylist() == local.to_pylist()
    assert pushed["item_id"].type == pa.list_(pa.string())
    assert {"timestamp", "train_end", "validation_position", "test_position"} <= set(pushed.column_names)
    # The model repository of the same name is another repository.
    catalogue = hub.repositories[pushed_histories].files().keys()
    assert {"tokenizer.json", "tokenizer_config.json", "items.json"} <= catalogue
    assert not [name for name in catalogue if name.endswith(".parquet")]


def test_another_process_trains_on_pushed_histories_as_on_local_ones(hub, folder, data, pushed_histories, blocks):
    code = f"""
{blocks[1]}
from bert4rec_hf import Bert4RecTrainer, Bert4RecTrainingArguments, read_prepared
local = stream_training_rows(sys.argv[1], tokenizer)
streamed = [list(rows) for rows in (streamed_rows, local)]
whole = [[row["input_ids"] for row in some] for some in (rows, training_rows(read_prepared("data")[0]))]

def losses(rows):
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, intermediate_size=32)
    args = Bert4RecTrainingArguments(
        "streamed", max_steps=3, logging_steps=1, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True,
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
    )
    model = Bert4RecForMaskedItemPrediction(config)
    trainer = Bert4RecTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

print(json.dumps([streamed, whole, [losses(streamed_rows), losses(local)]]))
"""
    before = len(hub.requests)
    streamed, whole, losses = python(code, hub, folder, data / "histories.parquet")
    assert streamed[0] == streamed[1]
    assert whole[0] == whole[1]
    assert len(streamed[0]) == len(whole[0]) == 40
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert [request for request in hub.requests[before:] if f"datasets/{USER}/histories/resolve" in request]
