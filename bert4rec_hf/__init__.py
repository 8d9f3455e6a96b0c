"""BERT4Rec on the Hugging Face stack: raw interaction log in, `from_pretrained` model folder out."""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_bert4rec import Bert4RecConfig
from .data_collator import DataCollatorForMaskedItemPrediction
from .modeling_bert4rec import Bert4RecForMaskedItemPrediction, Bert4RecModel
from .pipeline import SequentialRecommendationPipeline
from .tokenization_bert4rec import Bert4RecTokenizer
from .version import __version__

AutoConfig.register(Bert4RecConfig.model_type, Bert4RecConfig)
AutoModel.register(Bert4RecConfig, Bert4RecModel)
AutoModelForMaskedLM.register(Bert4RecConfig, Bert4RecForMaskedItemPrediction)
AutoTokenizer.register(Bert4RecConfig, Bert4RecTokenizer)
PIPELINE_REGISTRY.register_pipeline(
    "sequential-recommendation",
    pipeline_class=SequentialRecommendationPipeline,
    pt_model=AutoModelForMaskedLM,
    type="multimodal",
)

# Imported when first used: they bring datasets, or Ibis and DuckDB.
_LATER = {
    "Bert4RecTrainer": "trainer",
    "Bert4RecTrainingArguments": "trainer",
    "ItemIndex": "item_index",
    "Protocol": "metrics",
    "compute_metrics": "metrics",
    "cooccurrence_vectors": "cooccurrence",
    "keep_transitions": "cooccurrence",
    "start_from_cooccurrence": "cooccurrence",
    "convert_config": "convert",
    "convert_from_recbole": "convert",
    "convert_to_recbole": "convert",
    "evaluate_prepared": "runs",
    "floors": "metrics",
    "histories": "preparation",
    "export_onnx": "export",
    "prepare": "preparation",
    "preprocess_logits_for_metrics": "metrics",
    "publish_code": "publish",
    "ranking_metrics": "metrics",
    "ranking_rows": "splits",
    "read_log": "logs",
    "read_prepared": "splits",
    "stream_training_rows": "splits",
    "tokenize_histories": "splits",
    "train_prepared": "runs",
    "training_rows": "splits",
}

__all__ = [
    "Bert4RecConfig",
    "Bert4RecForMaskedItemPrediction",
    "Bert4RecModel",
    "Bert4RecTokenizer",
    "Bert4RecTrainer",
    "Bert4RecTrainingArguments",
    "DataCollatorForMaskedItemPrediction",
    "ItemIndex",
    "Protocol",
    "SequentialRecommendationPipeline",
    "__version__",
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
    "preprocess_logits_for_metrics",
    "publish_code",
    "ranking_metrics",
    "ranking_rows",
    "read_log",
    "read_prepared",
    "start_from_cooccurrence",
    "stream_training_rows",
    "tokenize_histories",
    "train_prepared",
    "training_rows",
]

if TYPE_CHECKING:
    from .convert import convert_config, convert_from_recbole, convert_to_recbole
    from .cooccurrence import cooccurrence_vectors, keep_transitions, start_from_cooccurrence
    from .export import export_onnx
    from .item_index import ItemIndex
    from .logs import read_log
    from .metrics import Protocol, compute_metrics, floors, preprocess_logits_for_metrics, ranking_metrics
    from .preparation import histories, prepare
    from .publish import publish_code
    from .runs import evaluate_prepared, train_prepared
    from .splits import ranking_rows, read_prepared, stream_training_rows, tokenize_histories, training_rows
    from .trainer import Bert4RecTrainer, Bert4RecTrainingArguments
else:

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
