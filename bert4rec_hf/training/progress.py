"""The progress bar of a training run."""

import math
import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback


class BriefProgress(ProgressCallback):
    """Shows a progress bar, and one line per evaluation instead of fifteen metrics.

    If standard error is not a terminal, there are only the lines.
    """

    loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            # disable=None hides the bar if standard error is not a terminal.
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=None)
            config = model.config
            self.training_bar.write(
                f"{config.num_hidden_layers} layers of width {config.hidden_size}, {model.num_parameters():,} weights; "
                f"{state.max_steps:,} steps, {state.num_train_epochs} epochs"
            )

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if not state.is_world_process_zero or self.training_bar is None:
            return
        self.training_bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
        if "eval_NDCG@10" in logs:
            trained = "before the first step" if math.isnan(self.loss) else f"training loss {self.loss:.3f}"
            self.training_bar.write(
                f"epoch {logs['epoch']:6.2f}   {trained}   validation loss {logs['eval_loss']:.3f}   "
                f"HR@10 {logs['eval_HR@10']:.4f}   NDCG@10 {logs['eval_NDCG@10']:.4f}"
            )
