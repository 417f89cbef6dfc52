"""A command line whose runs take moments: counts to ``steps`` with a checkpoint after each, and resumes where it was killed.

Apart from the sweep itself, whose modules would take a worker longer to import than its run.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from metalearn.files import locked, write_whole


def main(arguments):
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    config, folder = yaml.safe_load(Path(options["-c"]).read_text()), Path(options["--run_dir"])
    with locked(folder, "a second process in one folder"):
        with open(folder / "starts.txt", "a") as file:
            file.write(f"{os.getpid()}\n")
        for step in range(_done(folder), config.get("steps", 5)):
            time.sleep(config.get("seconds", 0.02))
            if config.get("die_at") == step and len((folder / "starts.txt").read_text().split()) < config.get(
                "lives", 2
            ):
                os.kill(os.getpid(), signal.SIGKILL)
            write_whole(folder / "last", str(step + 1))
        if config.get("crash"):
            raise RuntimeError("it broke")
        if config.get("refuse"):
            print("metalearn: error: refused", file=sys.stderr)
            return 2
        loss = config.get("loss", config["seed_everything"] + config.get("x", 0))
        result = {"global_step": _done(folder), "seconds": 1.0, "metrics": {"loss": loss}}
        write_whole(folder / "result.json", json.dumps(result))
    return 0


def _done(folder):
    return int((folder / "last").read_text()) if (folder / "last").exists() else 0
