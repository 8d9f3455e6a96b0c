"""The recipes of the repository are ones that the programs they are for take."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from bert4rec_hf import Bert4RecForMaskedItemPrediction

RECIPES = Path(__file__).parent.parent / "recipes"


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
