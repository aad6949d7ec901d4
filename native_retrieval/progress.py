"""The progress bar of a training."""

from transformers import ProgressCallback


class StageProgress(ProgressCallback):
    """transformers' progress bar with the stage's name, the loss and the speed; dev metrics on lines of their own."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)
            self.training_bar.unit = "step"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            return super().on_log(args, state, control, logs, **kwargs)
        self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {logs['queries_per_second']} queries/s")
