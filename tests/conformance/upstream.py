"""The common tests on our models. run_upstream.py runs them with the package `tests` of Transformers."""

import random
import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecModel

# The mixin recognises encoders, which have no loss, by these names.
MODEL_MAPPING_NAMES["bert4rec"] = "Bert4RecModel"


class Bert4RecModelTester:
    """The sizes, the configuration and the inputs that the mixin needs."""

    batch_size, seq_length = 5, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, parent: unittest.TestCase, **switches):
        self.parent, self.switches = parent, switches

    def get_config(self) -> Bert4RecConfig:
        return Bert4RecConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=64,
            **self.switches,
        )

    def prepare_config_and_inputs_for_common(self):
        inputs = {
            "input_ids": ids_tensor([self.batch_size, self.seq_length], 96) + 3,
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]),
        }
        return self.get_config(), inputs


class Common(ModelTesterMixin):
    all_model_classes = (Bert4RecModel, Bert4RecForMaskedItemPrediction)
    switches: dict = {}

    def setUp(self):
        torch.manual_seed(0)
        random.seed(0)
        self.model_tester = Bert4RecModelTester(self, **self.switches)
        self.config_tester = ConfigTester(self, config_class=Bert4RecConfig, hidden_size=32, num_attention_heads=4)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("tie_word_embeddings=False is an error, since input and output always share the item vectors")
    def test_load_save_without_tied_weights(self):
        pass

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        # The mixin's labels are 0, which is [PAD] and not an item.
        if return_labels and model_class is Bert4RecForMaskedItemPrediction:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


class DefaultArchitectureTest(Common, unittest.TestCase):
    pass


class WithTransitionsTest(Common, unittest.TestCase):
    switches = {"num_transitions": 4, "repeat_weight": 1.0}


class PaperArchitectureTest(Common, unittest.TestCase):
    switches = {"normalization": "post", "position_embedding_type": "learned_from_start", "prediction_head": True}
