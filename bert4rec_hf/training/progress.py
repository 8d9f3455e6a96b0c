"""The progress bar of a training run."""

import math
from typing import Any

from transformers import ProgressCallback


class BriefProgress(ProgressCallback):
    """A progress bar, and one line an evaluation instead of fifteen metrics."""

    loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            config = model.config
            self.training_bar.write(
                f"{config.num_hidden_layers} layers of width {config.hidden_size}, {model.num_parameters():,} weights; "
                f"{state.max_steps:,} steps, {state.num_train_epochs} epochs"
            )

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
