"""The command line: ``ifa COMMAND``, or ``python -m ifa_torchrec COMMAND``, for torchrun.

Only the given command is imported: ``ifa --help`` needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys

COMMANDS = {
    "data": "write an event log from your files and a schema, or from a public data set",
    "train": "train a DLRM_IFA on an event log, on one rank or many",
    "tune": "search for the training options with the best metric on the split valid",
    "evaluate": "score a split with a trained run and measure the ranking",
    "compare": "compare several trainings, with their curves in one picture",
    "explain": "show which events weighed most for a request's top candidate",
    "build-states": "sum every user's history into a store of states",
    "states": "list the versions in a store of states, or drop one",
    "serve": "rank over HTTP; take events over HTTP or from Kafka",
    "export": "write the scoring graph for a server without Python",
    "backends": "print which backends of the operators are available here",
}
"""Each is a module in ifa_torchrec.commands with a function ``main``."""

USAGE = "\n".join(
    [
        "usage: ifa COMMAND [options]       ifa COMMAND --help lists a command's options",
        "",
        *(f"  {name:14}{about}" for name, about in COMMANDS.items()),
        "",
        "completion: ifa --tyro-print-completion bash (or zsh, tcsh) prints a script to source",
    ]
)


def main() -> None:
    """The command line."""
    # OpenMP's threads spin while they wait. With this setting they spin briefly, then sleep: as fast on
    # an idle machine, and if another program needs a core too, a step takes 3 times as long instead of
    # 20. libgomp reads it once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    name, *arguments = sys.argv[1:] or ["--help"]
    if arguments[:1] == ["--"]:  # given so that torchrun does not take --run for its own --run-path
        del arguments[0]
    if name in ("-h", "--help"):
        print(USAGE)
    elif name.startswith("--tyro-"):
        _run(list(COMMANDS), sys.argv[1:])
    elif name in COMMANDS:
        _run([name], arguments)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; the commands are {', '.join(COMMANDS)}"
        raise SystemExit(f"error: ifa has no command {name!r}{hint}")


def _run(names: list[str], arguments: list[str]) -> None:
    from ifa_torchrec.errors import require

    require("train", "tyro")
    import tyro

    from ifa_torchrec.commands.command_line import as_command

    with as_command():
        mains = {
            name: importlib.import_module(f"ifa_torchrec.commands.{name.replace('-', '_')}").main
            for name in names
        }
        if len(mains) == 1:
            tyro.cli(mains[names[0]], prog=f"ifa {names[0]}", args=arguments)
        else:
            tyro.extras.subcommand_cli_from_dict(mains, prog="ifa", args=arguments)


if __name__ == "__main__":
    main()
