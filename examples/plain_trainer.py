"""Trains BERT4Rec with the plain Transformers Trainer and with the model, collator and metrics of this package.

The plain Trainer ranks all items by the scores of the network alone. `Bert4RecTrainer` ranks as serving does.

bert4rec prepare ml-100k --output data
python examples/plain_trainer.py data model
"""

import sys

from transformers import Trainer, TrainingArguments, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    ranking_rows,
    read_prepared,
    target_ranks,
    training_rows,
)

data, output_dir = sys.argv[1:3]
histories, tokenizer, preparation = read_prepared(data)
set_seed(42)
config = Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50)
trainer = Trainer(
    Bert4RecForMaskedItemPrediction(config),
    TrainingArguments(
        output_dir,
        num_train_epochs=5,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        eval_strategy="epoch",
    ),
    data_collator=DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.2, max_length=50),
    train_dataset=training_rows(histories),
    eval_dataset=ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=50),
    processing_class=tokenizer,
    compute_metrics=compute_metrics,
    preprocess_logits_for_metrics=target_ranks,
)
trainer.train()
trainer.save_model()
print({name: value for name, value in trainer.evaluate().items() if "@10" in name})
