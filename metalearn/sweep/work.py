"""One cell of a sweep, as a worker runs it: an idempotent run in a folder of its own, and what became of it."""

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from metalearn.files import locked, write_whole

Main = Callable[[Sequence[str]], int]  # the command line, handed down to the sweep

CONFIG, RESULT, FAILURE, LOG = "cell.yaml", "result.json", "failure.json", "log.txt"
TAIL = 20  # lines of a failed run's log that its report has


class Outcome(NamedTuple):
    """What became of a cell: the content of ``result.json``, or the reason why there is none that counts."""

    result: dict[str, Any] | None
    reason: str | None = None
    final: bool = True  # whether running the cell again would end alike

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of a run that succeeded."""
        return dict(self.result["metrics"]) if self.result and not self.reason else {}


def run_cell(main: Main, config: dict[str, Any], run_dir: str) -> Outcome:
    """Fit ``config`` in ``run_dir``, from its last checkpoint if it has one; at once if it has finished before.

    Output goes to ``run_dir/log.txt``. A process that is still at work there, of a sweep that was killed, is waited for.
    """
    folder = Path(run_dir)
    with locked(folder, "", wait=True):
        if (outcome := recalled(folder)) is not None and outcome.result is not None:
            return outcome
        write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    command = ["fit", "-c", str(folder / CONFIG), "--run_dir", str(folder), "--ckpt_path", "last"]
    command += ["--trainer.enable_progress_bar", "false"]
    with output_to(folder / LOG):
        try:
            code = main(command)
        except BaseException:
            traceback.print_exc()
            code = 1
    if code:
        return failed(folder, "wrong settings" if code == 2 else "crashed")
    return recalled(folder) or failed(folder, "ended without a result")


def recalled(folder: Path) -> Outcome | None:
    """The outcome of a run that has ended, as its folder tells it; None for one that has not.

    A run whose result has a number that is not finite has failed: it diverged, and would again.
    """
    if (result := _read(folder / RESULT)) is not None:
        lost = [name for name, value in result["metrics"].items() if value is None or not math.isfinite(value)]
        if not lost:
            return Outcome(result)
        reason = f"not finite: {', '.join(sorted(lost))}"
        failed(folder, reason)
        return Outcome(result, reason)
    if (record := _read(folder / FAILURE)) is not None:
        return Outcome(None, record["reason"], record["final"])
    return None


def failed(folder: Path, reason: str, final: bool = True) -> Outcome:
    """Write down why a run has no result that counts, with the end of its log."""
    log = folder / LOG
    tail = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    write_whole(folder / FAILURE, json.dumps({"reason": reason, "final": final, "log": tail}, indent=1))
    return Outcome(None, reason, final)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None where there is none, or one that a full disk or a failing machine left unreadable."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Standard output and error of this process, and of what it starts, go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
