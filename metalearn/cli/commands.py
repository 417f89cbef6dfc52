"""Commands that are no training: typed functions of ``metalearn.analysis``, imported when they are asked for."""

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from metalearn.base import require_choice


def compare(arguments: list[str]) -> None:
    """``metalearn compare runs/a runs/b --metric NAME``."""
    from metalearn.analysis.compare import compare

    parser = _parser("compare", "Compare groups of runs, paired by seed, with the first group.")
    parser.add_argument(
        "runs", nargs="+", type=str, help="run folders, or folders of one run per seed; the first is the baseline"
    )
    _run(parser, compare, arguments, "runs")


def loss(arguments: list[str]) -> None:
    """``metalearn loss show runs/x``, ``metalearn loss transfer runs/x --data NAME``, ``metalearn loss landscape runs/x``."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(
            "usage: metalearn loss show RUN | metalearn loss transfer LOSS ... | metalearn loss landscape LOSS ...\n\n"
            "'--help' after each lists its options."
        )
        return
    require_choice("loss command", command, ("show", "transfer", "landscape"))
    if command == "show":
        from metalearn.analysis.losses import show

        parser = _parser("loss show", "The best losses of a run of loss search: table and picture.")
        parser.add_argument("run_dir", type=str, help="folder of the run")
        _run(parser, show, arguments[1:], "run_dir")
    elif command == "transfer":
        from metalearn.analysis.transfer import transfer

        about = "Learned losses beside standard ones on other data and models, rates tuned alike."
        _run(_of_losses("loss transfer", about), transfer, arguments[1:], "loss")
    else:
        from metalearn.analysis.landscape import landscape

        about = "Planes around the models that losses lead to, beside that of the standard loss, rates tuned alike."
        _run(_of_losses("loss landscape", about), landscape, arguments[1:], "loss")


def _of_losses(name: str, description: str) -> ArgumentParser:
    parser = _parser(name, description)
    parser.add_argument("loss", nargs="+", type=str, help="run folders, files of losses, or texts of losses")
    return parser


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"metalearn {name}", description=description, exit_on_error=False)


def _run(parser: ArgumentParser, function: Callable[..., Any], arguments: list[str], positional: str) -> None:
    """Call the function with what was parsed; classes among its arguments are built."""
    parser.add_function_arguments(function, skip={positional}, as_group=False)
    function(**parser.instantiate(parser.parse_args(arguments)).as_dict())
