"""BERT4Rec on the Hugging Face stack: raw interaction log in, `from_pretrained` model folder out."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from .configuration_bert4rec import Bert4RecConfig
from .modeling_bert4rec import Bert4RecForMaskedItemPrediction, Bert4RecModel
from .tokenization_bert4rec import Bert4RecTokenizer

from .version import __version__

AutoConfig.register(Bert4RecConfig.model_type, Bert4RecConfig, exist_ok=True)
AutoModel.register(Bert4RecConfig, Bert4RecModel, exist_ok=True)
AutoModelForMaskedLM.register(Bert4RecConfig, Bert4RecForMaskedItemPrediction, exist_ok=True)
AutoTokenizer.register(Bert4RecConfig, Bert4RecTokenizer, exist_ok=True)
