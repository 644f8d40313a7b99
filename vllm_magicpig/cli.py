"""The console script `vllm-magicpig`: one subcommand per question, each loaded only when asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "tune": (
        "vllm_magicpig.tune",
        "measure K, L and dense layers for a model on your prompts, and write its calibration file",
    ),
    "stats": (
        "vllm_magicpig.server_stats",
        "show what a running server samples, keeps in memory and spends its time on",
    ),
}
"""Name -> (module with `add_arguments` and `run`, what a user gets)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 after one sentence on stderr about input that cannot be used, or 130 after an
    interrupt."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="vllm-magicpig",
        description="Tools around vLLM's magicpig attention backend.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {
        name: commands.add_parser(
            name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."
        )
        for name, (_, help_text) in COMMANDS.items()
    }
    # Only the command that is named is imported: `stats` needs no torch.
    for name in given[:1]:
        if name in COMMANDS:
            import_module(COMMANDS[name][0]).add_arguments(parsers[name])
    parsed = parser.parse_args(given)
    run: Callable[[argparse.Namespace], None] = import_module(COMMANDS[parsed.command][0]).run
    try:
        run(parsed)
    except ValueError as error:
        print(f"vllm-magicpig {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvllm-magicpig {parsed.command}: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
