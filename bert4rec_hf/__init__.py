"""BERT4Rec on the Hugging Face stack: raw interaction log in, `from_pretrained` model folder out."""

import importlib
from typing import Any

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
    "keep_cooccurrence": "cooccurrence",
    "start_from_cooccurrence": "cooccurrence",
    "convert_config": "convert",
    "convert_from_recbole": "convert",
    "convert_to_recbole": "convert",
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
    "training_rows": "splits",
}

__all__ = [
    "Bert4RecConfig",
    "Bert4RecForMaskedItemPrediction",
    "Bert4RecModel",
    "Bert4RecTokenizer",
    "DataCollatorForMaskedItemPrediction",
    "SequentialRecommendationPipeline",
    "__version__",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
