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
    """``metalearn loss show runs/x`` and ``metalearn loss transfer runs/x --data NAME``."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(
            "usage: metalearn loss show RUN ... | metalearn loss transfer LOSS ...\n\n'--help' after either lists its options."
        )
        return
    require_choice("loss command", command, ("show", "transfer"))
    if command == "show":
        from metalearn.analysis.losses import show

        parser = _parser("loss show", "The best losses of a run of loss search: table and picture.")
        parser.add_argument("run_dir", type=str, help="folder of the run")
        _run(parser, show, arguments[1:], "run_dir")
        return
    from metalearn.analysis.transfer import transfer

    parser = _parser(
        "loss transfer", "Learned losses beside standard ones on other data and models, rates tuned alike."
    )
    parser.add_argument("loss", nargs="+", type=str, help="run folders, files of losses, or texts of losses")
    _run(parser, transfer, arguments[1:], "loss")


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"metalearn {name}", description=description, exit_on_error=False)


def _run(parser: ArgumentParser, function: Callable[..., Any], arguments: list[str], positional: str) -> None:
    """Call the function with what was parsed; classes among its arguments are built."""
    parser.add_function_arguments(function, skip={positional}, as_group=False)
    function(**parser.instantiate(parser.parse_args(arguments)).as_dict())
