"""Every recipe of the repository is valid for its program."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from bert4rec_hf import Bert4RecForMaskedItemPrediction, prepare
from bert4rec_hf.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"
FOR_TRAIN = sorted(recipe for recipe in RECIPES.rglob("*.yaml") if recipe.parent.name != "accelerate")


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_gpu", DistributedType.NO, 1),
        ("several_gpus", DistributedType.MULTI_GPU, 4),
        ("several_nodes", DistributedType.MULTI_GPU, 8),
        ("fsdp", DistributedType.FSDP, 4),
    ],
)
def test_accelerate_reads_the_configuration(name, kind, processes):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kind
    assert config.num_processes == processes
    assert config.mixed_precision == "bf16"


def test_the_fsdp_configuration_wraps_layers_that_the_model_has():
    options = load_config_from_file(str(RECIPES / "accelerate" / "fsdp.yaml")).fsdp_config
    layer = options["fsdp_transformer_layer_cls_to_wrap"]
    assert layer in Bert4RecForMaskedItemPrediction._no_split_modules
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=options["fsdp_version"],
        auto_wrap_policy=options["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=[layer],
        reshard_after_forward=options["fsdp_reshard_after_forward"],
        state_dict_type=options["fsdp_state_dict_type"],
    )
    assert plugin.fsdp_version == 2


@pytest.mark.parametrize("recipe", FOR_TRAIN, ids=lambda path: path.stem)
def test_a_training_recipe_trains(recipe, tmp_path):
    lines = [f"{user},{(user * item) % 13},{item}" for user in range(12) for item in range(9)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "data")
    words = ["train", "--config", recipe, "--data", tmp_path / "data", "--output_dir", tmp_path / "model"]
    words += ["--max_steps", 1, "--eval_steps", 1, "--save_steps", 1, "--use_cpu", "true", "--disable_tqdm", "true"]
    assert main([str(word) for word in words]) == 0
    trained = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    wanted = yaml.safe_load(recipe.read_text())
    changed = {"max_steps", "eval_steps", "save_steps"}
    assert {name: trained[name] for name in wanted.keys() - changed} == {
        name: value for name, value in wanted.items() if name not in changed
    }
