"""Training whose process is killed in the middle of a search."""

import os
import signal
from pathlib import Path

from metalearn.search.population import PopulationTraining


class DiesOnce(PopulationTraining):
    """The first process that trains is killed, and leaves a note of it in ``folder``."""

    def __init__(self, steps: int, folder: str):
        super().__init__(steps)
        self.folder = folder

    def train(self, *arguments, **named):
        note = Path(self.folder) / "killed.txt"
        if not note.exists():
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(*arguments, **named)
