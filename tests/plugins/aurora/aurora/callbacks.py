"""A callback that leaves a trace."""

from pathlib import Path

import lightning as L


class Diary(L.Callback):
    """Writes a line for every epoch."""

    def __init__(self, file: str = "diary.txt"):
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        with (Path(trainer.default_root_dir) / self.file).open("a") as diary:
            diary.write(f"epoch {trainer.current_epoch}\n")
