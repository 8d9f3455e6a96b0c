"""Collects the answers of a model folder. As a program, it works without this package; see test_publish_code.py."""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["bert4rec_hf"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("bert4rec_hf.model.configuration_bert4rec")
    except ImportError:
        pass
    else:
        raise AssertionError("bert4rec_hf can be imported")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

HISTORIES = [[], ["007", " a b ", "[MASK]"], ["\\[PAD]", "unknown", "ünï", *map(str, range(100, 110))]]
CHOICE = {"history": ["007"], "candidates": ["ünï", "", "100", "\\[PAD]", "119"], "exclude": ["100"]}


def answers(folder, task, **trust):
    """All answers of a model folder, with unrounded numbers."""
    config = AutoConfig.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    encoder = AutoModel.from_pretrained(folder, **trust).eval()
    model = AutoModelForMaskedLM.from_pretrained(folder, **trust).eval()
    recommend = pipeline(task, model=folder, device="cpu", top_k=7, **trust)
    batch = tokenizer(HISTORIES, padding=True, return_tensors="pt")
    labels = batch["input_ids"].where(batch["input_ids"] > 2, -100)
    scores, item_ids = model.recommend(**batch, top_k=5)
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
        output = model(**batch, labels=labels)
        training_loss = model.train()(**batch, labels=labels).loss
    parts = (config, tokenizer, encoder, model, recommend)
    return {
        "policy": config.filter_seen_items,
        "items": tokenizer.items,
        "titles": tokenizer.titles,
        "counts": tokenizer.counts,
        "batch": {name: values.tolist() for name, values in batch.items()},
        "states": states.tolist(),
        "logits": output.logits.tolist(),
        "losses": [output.loss.item(), training_loss.item()],
        "scores": scores.tolist(),
        "item_ids": item_ids.tolist(),
        "recommended": recommend(HISTORIES),
        "batched": recommend(HISTORIES, batch_size=2),
        "one": recommend(HISTORIES[-1]),
        "chosen": recommend(CHOICE),
        "explained": recommend(HISTORIES, explain=True, batch_size=2),
        "similar": recommend.similar(["007", "[MASK]"]),
        "classes": [type(part).__name__ for part in parts],
        "modules": [type(part).__module__ for part in parts],
    }


def refusal(load, *arguments, **options):
    """The message of the ValueError that `load` raises, or None."""
    try:
        load(*arguments, **options)
    except ValueError as error:
        return str(error)
    return None


def main(task, output, package, *folders):
    torch.set_num_threads(1)
    trust = {"trust_remote_code": True}
    copy = str(Path(output).with_name("saved by a stranger"))
    found = {
        "refusals": {
            "config": refusal(AutoConfig.from_pretrained, folders[0]),
            "model": refusal(AutoModelForMaskedLM.from_pretrained, folders[0]),
            "tokenizer": refusal(AutoTokenizer.from_pretrained, folders[0]),
            "pipeline": refusal(pipeline, task, model=folders[0]),
        },
        "answers": [answers(folder, task, **trust) for folder in folders],
    }
    recommend = pipeline(model=folders[0], device="cpu", top_k=7, **trust)
    recommend.save_pretrained(copy)
    found |= {
        "task": recommend.task,
        "recommended": recommend(HISTORIES),
        "copy": answers(copy, task, **trust),
        "ours": [
            name for name, module in sys.modules.items() if str(getattr(module, "__file__", None)).startswith(package)
        ],
    }
    Path(output).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
