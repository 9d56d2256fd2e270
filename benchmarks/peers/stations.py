"""When a trainer built on transformers' begins, when its first step is done, when it ends, and every step's loss."""

import time

from transformers import TrainerCallback


class Stations(TrainerCallback):
    """A callback that writes down the time at each station."""

    def __init__(self) -> None:
        self.said = {"losses": []}

    def on_step_begin(self, *_, **__) -> None:
        self.said.setdefault("training", time.time())

    def on_step_end(self, *_, **__) -> None:
        self.said.setdefault("first_step", time.time())
        self.said["ended"] = time.time()

    def on_log(self, *_, logs=None, **__) -> None:
        if "loss" in logs:
            self.said["losses"].append(float(logs["loss"]))
