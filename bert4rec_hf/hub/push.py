"""Uploads to the Hub: the model folder after training, and checkpoints during training."""

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy

logger = logging.getLogger(__name__)

# Files that are never uploaded: a pickle that holds paths of the training machine.
PRIVATE_FILES = ["training_args.bin"]
# Events of TensorBoard, whose names hold the name of the training machine.
EVENT_FILES = ["runs/*", "*tfevents*"]
# Files of a checkpoint that only the Trainer reads.
RESUMING_FILES = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json"]


def push_folder(folder: str | os.PathLike, repo_id: str, **options: Any) -> Any:
    """Upload a model folder without its checkpoints, hidden files, `PRIVATE_FILES` and `EVENT_FILES`.

    Args:
        folder: The model folder.
        repo_id: The model's repository.
        options: Further arguments of `huggingface_hub.upload_folder`.

    Returns:
        The return value of `huggingface_hub.upload_folder`.
    """
    ignored = ["_*", ".*.new*", "checkpoint-*", *PRIVATE_FILES, *EVENT_FILES]
    return upload_folder(repo_id=repo_id, folder_path=Path(folder), ignore_patterns=ignored, **options)


class PushCheckpoints(TrainerCallback):
    """Uploads each checkpoint, which is a model folder, as the repository's model, in the background.

    With the strategies "checkpoint" and "all_checkpoints", the callback also uploads the whole checkpoint into a folder
    of the repository, so that the run can be resumed from there. The Trainer's own uploads lack the card, the
    evaluations and the recipe. An upload reads a copy of the checkpoint, since the Trainer deletes old checkpoints.

    Args:
        trainer: The trainer; its `hub_model_id` names the repository.
        strategy: The `hub_strategy` of the training arguments.
    """

    def __init__(self, trainer: Any, strategy: HubStrategy | str):
        self.trainer, self.strategy = trainer, HubStrategy(strategy)
        self.uploads: list[Future[Any]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or self.strategy == HubStrategy.END or not checkpoint.is_dir():
            return
        self.finish()
        pushes: list[tuple[str | None, list[str]]] = [(None, [*RESUMING_FILES, *PRIVATE_FILES])]
        if self.strategy == HubStrategy.CHECKPOINT:
            pushes.append(("last-checkpoint", PRIVATE_FILES))
        elif self.strategy == HubStrategy.ALL_CHECKPOINTS:
            pushes.append((checkpoint.name, PRIVATE_FILES))
        for path, ignored in pushes:
            copied = tempfile.mkdtemp()
            shutil.copytree(checkpoint, copied, ignore=shutil.ignore_patterns(*ignored), dirs_exist_ok=True)
            _shorten_paths(Path(copied) / TRAINER_STATE_NAME)
            upload = upload_folder(
                repo_id=self.trainer.hub_model_id,
                folder_path=copied,
                path_in_repo=path,
                commit_message=f"Training in progress, step {state.global_step}",
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
            )
            upload.add_done_callback(partial(_remove, copied))
            self.uploads.append(upload)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Wait for the uploads. A failed upload is only a warning, since the model folder is pushed after the run."""
        for upload in self.uploads:
            error = upload.exception()
            if error is not None:
                logger.warning("a checkpoint could not be pushed: %s", error)
        self.uploads = []


def _remove(folder: str, _: Future[Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _shorten_paths(path: Path) -> None:
    """Leave only the name of the best checkpoint in a trainer_state.json. A resumed run finds it in its own folder."""
    if path.is_file():
        state = TrainerState.load_from_json(str(path))
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = Path(state.best_model_checkpoint).name
            state.save_to_json(str(path))
