"""The command line: ``metalearn fit|validate|test -c config.yaml --run_dir runs/x --ckpt_path last``, and other commands."""

import os
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException

from metalearn.cli import commands
from metalearn.cli.diagnose import diagnose
from metalearn.cli.run import MetalearnCLI, one_line, run_lightning
from metalearn.cli.sweep import sweep
from metalearn.memory import keep_freed_memory

HELP = """usage: metalearn COMMAND ...

  fit       meta-train, resume or finish a run:  metalearn fit -c configs/in_context/quick.yaml --run_dir runs/x
  --ckpt_path last
  validate  evaluate a run on meta-validation tasks (same arguments); writes validation.csv and validation.png, or
  validation.json, into the run folder
  test      evaluate a run on meta-test tasks (same arguments); writes test.csv and test.png, or test.json
  sweep     many runs of one config over a grid, or by adaptive search; safe to kill and repeat:
  metalearn sweep configs/in_context/phases.sweep.yaml --sweep_dir runs/phases
  diagnose  a dozen estimators of meta-gradients on a config's own problem, at a shortened horizon, and what follows:
  metalearn diagnose -c configs/meta_gradient/data_cleaning.yaml
  compare   paired statistics over runs:  metalearn compare runs/a runs/b --metric NAME
  loss      show: the best losses of a search, table and picture:  metalearn loss show runs/x
            transfer: losses beside standard ones on other data and models, learning rates tuned alike:
  metalearn loss transfer runs/x --data fashion_mnist --model lenet --seeds 5
            landscape: planes around the models that losses lead to, beside the standard loss:
  metalearn loss landscape runs/x --data digits --model mlp

'metalearn COMMAND --help' lists the options of a command, 'metalearn fit -c FILE --print_config' the resolved config.
METALEARN_DEBUG=1 shows the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns: the exit code; what the user got wrong is one line on stderr and code 2."""
    if arguments is None:  # the process is this command's own
        keep_freed_memory()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    try:
        return _dispatch(arguments)
    except (ValueError, ArgumentError, MisconfigurationException, OSError) as error:
        if os.environ.get("METALEARN_DEBUG"):
            raise
        print(f"metalearn: error: {one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP)
    elif command in ("compare", "loss"):
        getattr(commands, command)(arguments[1:])
    elif command == "diagnose":
        diagnose(arguments[1:])
    elif command == "sweep":
        return sweep(arguments[1:], main)
    elif command in MetalearnCLI.subcommands():
        run_lightning(arguments)
    else:
        raise ValueError(f"command is {command!r}; accepted: fit, validate, test, sweep, diagnose, compare, loss")
    return 0
