"""A model of each architecture, and models with history scores."""

import pytest
from small_models import ARCHITECTURES, WITH_HISTORY, make_model

from bert4rec_hf import Bert4RecForMaskedItemPrediction


@pytest.fixture(params=[*ARCHITECTURES.values(), *WITH_HISTORY.values()], ids=[*ARCHITECTURES, *WITH_HISTORY])
def model(request) -> Bert4RecForMaskedItemPrediction:
    return make_model(**request.param)
