"""BERT4Rec on the Hugging Face stack: raw interaction log in, `from_pretrained` model folder out."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .data.data_collator import DataCollatorForMaskedItemPrediction
from .model.configuration_bert4rec import Bert4RecConfig
from .model.item_features import ItemFeatures
from .model.modeling_bert4rec import Bert4RecForMaskedItemPrediction, Bert4RecModel
from .model.pipeline import SequentialRecommendationPipeline
from .model.tokenization_bert4rec import Bert4RecTokenizer
from .version import __version__

AutoConfig.register(Bert4RecConfig.model_type, Bert4RecConfig)
AutoModel.register(Bert4RecConfig, Bert4RecModel)
AutoModelForMaskedLM.register(Bert4RecConfig, Bert4RecForMaskedItemPrediction)
AutoTokenizer.register(Bert4RecConfig, Bert4RecTokenizer)
PIPELINE_REGISTRY.register_pipeline(
    "sequential-recommendation",
    pipeline_class=SequentialRecommendationPipeline,
    pt_model=AutoModelForMaskedLM,
    type="text",
)

# Names that are imported on first use, since their modules load datasets, Ibis or DuckDB.
_LATER = {
    "Bert4RecTrainer": "training.trainer",
    "Bert4RecTrainingArguments": "training.arguments",
    "ItemIndex": "serving.item_index",
    "ItemTable": "serving.item_table",
    "PrepareOptions": "data.prepare_options",
    "Protocol": "evaluation.protocol",
    "Rules": "serving.rules",
    "baseline_ranks": "evaluation.baselines",
    "calibrate_prepared": "runs.calibrate",
    "compare_prepared": "runs.compare",
    "compute_metrics": "evaluation.metrics",
    "convert_config": "convert.recbole_settings",
    "convert_from_recbole": "convert.recbole",
    "convert_to_recbole": "convert.recbole",
    "cooccurrence_vectors": "data.counting",
    "evaluate_prepared": "runs.evaluate",
    "export_onnx": "serving.onnx_export",
    "histories": "data.preparation",
    "keep_transitions": "training.initialization",
    "prepare": "data.preparation",
    "publish_code": "hub.publish_code",
    "ranking_metrics": "evaluation.metrics",
    "ranking_rows": "data.rows",
    "read_log": "data.logs",
    "read_prepared": "data.histories",
    "start_from_cooccurrence": "training.initialization",
    "stream_training_rows": "data.rows",
    "target_ranks": "evaluation.metrics",
    "tokenize_histories": "data.histories",
    "train_prepared": "runs.train",
    "tune_prepared": "runs.tune",
    "training_rows": "data.rows",
    "update_items": "runs.update_items",
    "floors": "evaluation.baselines",
}

__all__ = [
    "Bert4RecConfig",
    "Bert4RecForMaskedItemPrediction",
    "Bert4RecModel",
    "Bert4RecTokenizer",
    "Bert4RecTrainer",
    "Bert4RecTrainingArguments",
    "DataCollatorForMaskedItemPrediction",
    "ItemFeatures",
    "ItemIndex",
    "ItemTable",
    "PrepareOptions",
    "Protocol",
    "Rules",
    "SequentialRecommendationPipeline",
    "__version__",
    "baseline_ranks",
    "calibrate_prepared",
    "compare_prepared",
    "compute_metrics",
    "convert_config",
    "convert_from_recbole",
    "convert_to_recbole",
    "cooccurrence_vectors",
    "evaluate_prepared",
    "export_onnx",
    "floors",
    "histories",
    "keep_transitions",
    "prepare",
    "publish_code",
    "ranking_metrics",
    "ranking_rows",
    "read_log",
    "read_prepared",
    "start_from_cooccurrence",
    "stream_training_rows",
    "target_ranks",
    "tokenize_histories",
    "train_prepared",
    "training_rows",
    "tune_prepared",
    "update_items",
]

if TYPE_CHECKING:
    from .convert.recbole import convert_from_recbole, convert_to_recbole
    from .convert.recbole_settings import convert_config
    from .data.counting import cooccurrence_vectors
    from .data.histories import read_prepared, tokenize_histories
    from .data.logs import read_log
    from .data.preparation import histories, prepare
    from .data.prepare_options import PrepareOptions
    from .data.rows import ranking_rows, stream_training_rows, training_rows
    from .evaluation.baselines import baseline_ranks, floors
    from .evaluation.metrics import compute_metrics, ranking_metrics, target_ranks
    from .evaluation.protocol import Protocol
    from .hub.publish_code import publish_code
    from .runs.calibrate import calibrate_prepared
    from .runs.compare import compare_prepared
    from .runs.evaluate import evaluate_prepared
    from .runs.train import train_prepared
    from .runs.tune import tune_prepared
    from .runs.update_items import update_items
    from .serving.item_index import ItemIndex
    from .serving.item_table import ItemTable
    from .serving.onnx_export import export_onnx
    from .serving.rules import Rules
    from .training.arguments import Bert4RecTrainingArguments
    from .training.initialization import keep_transitions, start_from_cooccurrence
    from .training.trainer import Bert4RecTrainer
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
