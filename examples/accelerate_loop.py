"""Trains BERT4Rec in a custom loop with Accelerate. The script runs unchanged on several processes.

bert4rec prepare ml-100k --output data
accelerate launch examples/accelerate_loop.py data model
"""

import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    DataCollatorForMaskedItemPrediction,
    ranking_metrics,
    ranking_rows,
    read_prepared,
    training_rows,
)

data, output_dir = sys.argv[1:3]
accelerator = Accelerator()
set_seed(42, device_specific=False)
histories, tokenizer, preparation = read_prepared(data)
filter_seen_items = preparation["filter_seen_items"]
model = Bert4RecForMaskedItemPrediction(
    Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50, filter_seen_items=filter_seen_items)
)
set_seed(42, device_specific=True)  # every process masks differently
collator = DataCollatorForMaskedItemPrediction(tokenizer, max_length=50)
rows = training_rows(histories).select_columns("input_ids")
targets = ranking_rows(histories, tokenizer, "validation", filter_seen_items=filter_seen_items, max_length=50)
model, optimizer, train_loader, target_loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0),
    DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collator),
    DataLoader(targets, batch_size=256, collate_fn=collator),
)
for epoch in range(5):
    model.train()
    for batch in train_loader:
        # Rows differ in their number of masks, so the labels of all processes are counted. The count is divided by the
        # number of processes, since Accelerate averages the gradients over them.
        num_labels = accelerator.reduce((batch["labels"] != -100).sum()) / accelerator.num_processes
        accelerator.backward(model(**batch, num_items_in_batch=num_labels).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    ranks = []
    for batch in target_loader:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "history_ids", "exclude_ids")}
        found = accelerator.unwrap_model(model).rank(target_ids=batch["labels"].amax(dim=1), **inputs)
        ranks.append(accelerator.gather_for_metrics(found).cpu())
    metrics = ranking_metrics(np.concatenate(ranks))
    accelerator.print(f"epoch {epoch + 1}: validation NDCG@10 {metrics['NDCG@10']:.4f} of {len(targets)} users")
accelerator.wait_for_everyone()
accelerator.unwrap_model(model).save_pretrained(output_dir, is_main_process=accelerator.is_main_process)
if accelerator.is_main_process:
    tokenizer.save_pretrained(output_dir)
accelerator.end_training()
