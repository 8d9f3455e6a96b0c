"""What is pushed to the Hub during training; at its end the Trainer pushes the whole model folder."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

# Files of a checkpoint that only the Trainer reads.
RESUMING_FILES = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json"]


def push_checkpoint(checkpoint: Path, repo_id: str, args: TrainingArguments, step: int) -> list[Future[Any]]:
    """Upload a checkpoint, which is a model folder, as the repository's model.

    With the strategies "checkpoint" and "all_checkpoints", the whole checkpoint is uploaded into a folder as well, so
    that the run can be resumed from there.

    Args:
        checkpoint: The folder. It must stay until the uploads have ended.
        repo_id: The model's repository.
        args: Their `hub_strategy`, `hub_token` and `hub_revision` are used.
        step: The training step, for the commit message.

    Returns:
        The uploads, which run in the background.
    """
    pushes: list[tuple[str | None, list[str] | None]] = [(None, RESUMING_FILES)]
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        pushes.append(("last-checkpoint", None))
    elif args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        pushes.append((checkpoint.name, None))
    return [
        upload_folder(
            repo_id=repo_id,
            folder_path=checkpoint,
            path_in_repo=path,
            ignore_patterns=ignored,
            commit_message=f"Training in progress, step {step}",
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        for path, ignored in pushes
    ]
