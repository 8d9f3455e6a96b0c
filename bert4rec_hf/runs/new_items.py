"""The end of a training run with item features: vectors of new items, and how often they are recommended."""

import logging
import os
from typing import Any

from ..data.item_tables import read_stored_table
from ..data.rows import users_with_targets
from ..evaluation.protocol import Protocol
from ..training.item_feature_training import fit_item_projection
from ..training.new_items import add_new_items, offer_new_items
from ..training.trainer import Bert4RecTrainer
from .model_and_data import read_histories, rows_for

logger = logging.getLogger(__name__)


def make_new_items(trainer: Bert4RecTrainer, data: str | os.PathLike) -> dict[str, Any] | None:
    """Give the items of the item table that nobody has had yet their vectors, and choose their offset on validation.

    The catalogue of model and tokenizer grows by the items of the table that it lacks. The evaluation rows of the
    trainer are then those of the larger catalogue.

    Args:
        trainer: The trainer after training and calibration, which is changed in place.
        data: The prepared folder.

    Returns:
        The record of new_items.json. None: there are no item features.
    """
    tokenizer, args = trainer.processing_class, trainer.args
    if tokenizer.item_features is None or trainer.item_table is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if hasattr(model, "unshard"):
        logger.warning(
            "item features do not train with FSDP; bert4rec update-items %s --data %s fits them to the trained model, "
            "and makes the vectors of new items", args.output_dir, data,
        )  # fmt: skip
        return None
    table = read_stored_table(trainer.item_table).to_pydict()
    # A regression on the vectors serves new items better than the projection that has trained with them.
    record: dict[str, Any] = dict(fit_item_projection(model, tokenizer, table))
    record |= {"num_new_items": add_new_items(model, tokenizer, table), "offset": model.config.new_item_offset}
    histories, _, preparation = read_histories(data, args.streaming, tokenizer)
    if record["num_new_items"] and trainer.protocol is not None:
        evaluated = users_with_targets(histories, "validation", args.max_eval_samples)
        rows = rows_for(model.config, evaluated, tokenizer, "validation")
        record |= offer_new_items(model, tokenizer, rows, batch_size=args.per_device_eval_batch_size)
        trainer.grow_catalogue(
            rows,
            Protocol.of(
                evaluated,
                preparation,
                "validation",
                tokenizer.num_items,
                model.config.filter_seen_items,
                histories.num_targets("validation"),
            ),
        )
    trainer.new_items = record
    return record
