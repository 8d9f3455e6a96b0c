"""What `Bert4RecTrainer` writes: checkpoints and model folders, whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, rotate_checkpoints

from ..data.histories import PREPARATION_FILE
from ..data.item_tables import ITEM_TABLE_FILE
from ..evaluation.protocol import Protocol
from ..files import files_beside, replace_folder, unfinished_folder, write_file
from ..hub.model_card import (
    CALIBRATION_FILE,
    FILES_OF_WEIGHTS,
    RECIPE_FILE,
    add_evaluation,
    read_evaluations,
    write_model_card,
)
from ..hub.publish_code import publish_code as publish_code_into
from ..hub.push import PushCheckpoints, push_folder
from ..model.configuration_bert4rec import DERIVED_FIELDS, Bert4RecConfig
from .learning_curve import training_record, write_training
from .new_items import write_new_items
from .resume import FSDP_OPTIMIZER, FSDP_WEIGHTS

# Arguments left out of recipes: specific to a machine or a run, or implied by others.
ARGUMENTS_LEFT_OUT_OF_RECIPES = {
    "output_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "logging_dir", "local_rank", "deepspeed",
    "use_cpu", "dataloader_pin_memory", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project",
    "greater_is_better", "eval_on_start",
}  # fmt: skip
WEIGHT_FILES = "*model*.safetensors"
# Arguments that only `train_prepared` reads.
ARGUMENTS_OF_TRAIN_PREPARED = {
    "item_initialization", "train_windows", "window_step", "update_rows", "streaming", "max_eval_samples", "calibrate",
}  # fmt: skip


# For the type checker: a class beside the Trainer, whose methods it extends.
Beside: Any = object


class ModelFolderMixin(Beside):
    """Lets a Trainer write model folders: weights, catalogue, recipe, evaluations, learning curve and card.

    Attributes:
        protocol: The protocol of the evaluation rows. None: no metrics are stored in the folder.
        curve_protocol: The protocol of the learning curve, if new items have joined the catalogue since.
        baselines: Metrics of the baselines, by name.
        preparation: The content of preparation.json. None: the user created the rows.
        item_table: The item table, which goes into every folder. None: the log has none.
        publish_code: Whether the model's code is copied into every folder.
        evaluation: Metrics with their protocol, of the weights of `evaluated_step`.
        evaluated_step: The step of these weights. None: the weights have changed since.
        calibration: The record of `Bert4RecTrainer.calibrate`.
        new_items: The record of `make_new_items`.
        checkpoint_pushes: Pushes the checkpoints while the run goes on.
    """

    protocol: Protocol | None = None
    curve_protocol: Protocol | None = None
    baselines: Mapping[str, Mapping[str, float]] = {}
    preparation: Mapping[str, Any] | None = None
    item_table: Path | None = None
    publish_code: bool = False
    evaluation: dict[str, Any] | None = None
    evaluated_step: int | None = None
    calibration: dict[str, Any] | None = None
    new_items: dict[str, Any] | None = None
    checkpoint_pushes: PushCheckpoints
    # Where a checkpoint is made. None: none is made at present.
    unfinished: Path | None = None

    # These private methods are overridden, since the Trainer refuses a checkpoint of FSDP in a run without it.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = Path(resume_from_checkpoint) / FSDP_WEIGHTS
        if self.is_fsdp_enabled or not weights.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        whole = torch.load(weights, map_location="cpu", weights_only=True)
        (self.model if model is None else model).load_state_dict(whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or not (Path(checkpoint) / FSDP_OPTIMIZER).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        by_name = torch.load(Path(checkpoint) / FSDP_OPTIMIZER, map_location="cpu", weights_only=True)
        model, optimizer = self.accelerator.unwrap_model(self.model), self.optimizer.optimizer
        set_optimizer_state_dict(model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a model folder: weights, configuration, catalogue, recipe, evaluations, learning curve and card.

        The Trainer also writes training_args.bin, a pickle of the arguments with paths of this machine. It has no
        tokens here, and is never pushed.

        Args:
            output_dir: The folder. None: that of the training arguments.
        """
        folder = Path(output_dir or self.args.output_dir)
        stale: set[str] = set()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_tokens(self.args))
            stack.enter_context(_writing(folder))
            new, old_weights = folder, _weights_digest(folder) if self.args.should_save else None
            # Without DeepSpeed, one process writes. With it, all do, into the same folder.
            if self.args.should_save and not self.is_deepspeed_enabled:
                new = stack.enter_context(files_beside(folder, last_file="config.json", own_files=stale))
            super().save_model(str(new), _internal_call=True)
            if self.args.should_save:
                if any(new.glob(WEIGHT_FILES)) and _weights_digest(new) != old_weights:
                    stale |= {*FILES_OF_WEIGHTS, *(path.name for path in folder.glob(WEIGHT_FILES))}
                for name in ("README.md", *FILES_OF_WEIGHTS):
                    if name in stale:
                        (new / name).unlink(missing_ok=True)
                    elif new != folder and (folder / name).is_file():
                        shutil.copy2(folder / name, new / name)
                self._complete_folder(new)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Make a checkpoint beside its place and move it there, so that a checkpoint is complete or not there."""
        place = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.unfinished = unfinished_folder(place)
        try:
            if self.args.should_save and self.unfinished.exists():
                shutil.rmtree(self.unfinished)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            with _writing(place):
                super()._save_checkpoint(model, trial)
            made = self.unfinished / place.name
            if self.state.best_model_checkpoint == str(made):
                self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(made / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
            if self.args.should_save:
                if place.exists():
                    replace_folder(made, place, self.unfinished / "old", {path.name for path in place.iterdir()})
                else:
                    os.rename(made, place)
        finally:
            if self.args.should_save:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(place.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.unfinished is None else str(self.unfinished)

    def _complete_folder(self, folder: Path) -> None:
        """Write the files of a model folder that the Trainer itself does not write."""
        write_file(folder / RECIPE_FILE, yaml.safe_dump(self.recipe(), sort_keys=True, allow_unicode=True))
        if self.preparation is not None:
            preparation = dict(self.preparation) | {"source": os.path.basename(self.preparation["source"])}
            write_file(folder / PREPARATION_FILE, json.dumps(preparation, indent=2, ensure_ascii=False) + "\n")
        if self.item_table is not None and self.item_table.resolve() != (folder / ITEM_TABLE_FILE).resolve():
            write_file(folder / ITEM_TABLE_FILE, self.item_table.read_bytes())
        if self.calibration is not None:
            write_file(folder / CALIBRATION_FILE, json.dumps(self.calibration, indent=2) + "\n")
        if self.new_items is not None:
            write_new_items(folder, self.new_items)
        protocols = [record["protocol"] for record in read_evaluations(folder)]
        is_of_these_weights = self.evaluated_step == self.state.global_step
        if self.evaluation is not None and is_of_these_weights and self.evaluation["protocol"] not in protocols:
            add_evaluation(folder, self.evaluation)
        training = self.training_record()
        if training is not None:
            write_training(folder, training)
        if self.publish_code:
            publish_code_into(folder)
        write_model_card(folder, self.hub_model_id, self.processing_class)

    def training_record(self) -> dict[str, Any] | None:
        """The record of the run so far; see `learning_curve.training_record`. None without evaluations or protocol."""
        if self.protocol is None:
            return None
        step = self.state.global_step
        if self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step is not None:
            step = self.state.best_global_step
        protocol = self.curve_protocol or self.protocol
        if self.args.eval_strategy != IntervalStrategy.NO:
            protocol = replace(protocol, calibrated=False)  # the curve was measured before `calibrate`
        return training_record(self.state, self.args, protocol, self.baselines, step, self.calibration)

    def recipe(self) -> dict[str, Any]:
        """All training arguments and the architecture, in the form that `bert4rec train --config` reads.

        Without a preparation, the user created model and rows, so arguments that only `train_prepared` reads are left
        out.
        """
        left_out = (
            ARGUMENTS_LEFT_OUT_OF_RECIPES
            if self.preparation is not None
            else ARGUMENTS_LEFT_OUT_OF_RECIPES | ARGUMENTS_OF_TRAIN_PREPARED
        )
        arguments = {
            name: value
            for name, value in self.args.to_dict().items()
            if value is not None
            and name not in left_out
            and not name.startswith(("hub_", "_"))
            and self.args.__dataclass_fields__.get(name) is not None
            and self.args.__dataclass_fields__[name].init
        }
        config = self.model.config
        architecture = {
            name: getattr(config, name)
            for name in Bert4RecConfig.__annotations__
            if name not in DERIVED_FIELDS and hasattr(config, name)
        }
        precision = self.accelerator.mixed_precision  # an Accelerate configuration may have set it
        arguments |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
        # TrainingArguments turn this option into "all" or "no", but the command line only accepts true or false.
        arguments["include_num_input_tokens_seen"] = arguments["include_num_input_tokens_seen"] != "no"
        # The Hub id of the model that was trained further. A local path would be another folder on another machine.
        origin = config._name_or_path
        if origin and not os.path.exists(origin):
            arguments["model_name_or_path"] = origin
        return json.loads(json.dumps(arguments | architecture, default=str))

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md of the output folder from the files of the folder.

        `push_to_hub` passes its further arguments to this function, as in `push_to_hub(license="mit")`.

        Args:
            model_name: Title of the card.
            license: License of the model, for example "mit".
            language: Language codes, for the metadata.
            tags: Tags in addition to those of the package.
        """
        if self.is_world_process_zero():
            metadata = {"model_name": model_name, "license": license, "language": language, "tags": tags}
            write_model_card(self.args.output_dir, self.hub_model_id, self.processing_class, **metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model folder, without checkpoints and training_args.bin.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the upload.
            token: Access token. None: `hub_token` of the training arguments.
            revision: Branch to push to. None: `hub_revision` of the training arguments.
            private: Whether a repository that is created is private.
            kwargs: Arguments of `create_model_card`.

        Returns:
            The return value of `huggingface_hub.upload_folder`; None on processes other than the main one.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        model_tags = [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        name = (self.args.hub_model_id or os.path.abspath(self.args.output_dir)).rsplit("/", 1)[-1]
        self.create_model_card(**{"model_name": name} | kwargs, tags=[*tags, *model_tags] or None)
        self.checkpoint_pushes.finish()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )


@contextlib.contextmanager
def _without_tokens(args: TrainingArguments) -> Iterator[None]:
    """Remove tokens from the arguments while they are written to a file."""
    tokens = {name: value for name, value in vars(args).items() if name.endswith("_token")}
    try:
        for name in tokens:
            setattr(args, name, None)
        yield
    finally:
        for name, value in tokens.items():
            setattr(args, name, value)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise OSError where torch.save could not write, which says so by RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in ("PytorchStreamWriter", "inline_container", "iostream error")):
            raise OSError(f"cannot write {folder}, maybe since the disk is full: {error}") from error
        raise


def _weights_digest(folder: Path) -> str:
    """A digest of the weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHT_FILES)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
