"""The command: `headgate VERB`. Each verb is a module of its own, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {
    "serve": "serve a model with an OpenAI-compatible API",
    "gateway": "serve the API in front of workers that run elsewhere",
    "worker": "run a model for gateways that run elsewhere",
    "keys": "make, list, revoke and rotate API keys",
    "quantize": "make a checkpoint of fewer bits from a model, and tell what that costs",
}
INTERNAL = ("child",)  # the processes that `serve` starts

USAGE = """headgate: an OpenAI-compatible inference gateway that schedules by memory bandwidth

usage: headgate VERB [OPTION …]

{verbs}

`headgate VERB --help` explains a verb."""


def usage() -> str:
    return USAGE.format(verbs="\n".join(f"  {name:<10} {text}" for name, text in VERBS.items()))


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb = arguments[0]
    if verb not in VERBS and verb not in INTERNAL:
        print(f"headgate: there is no verb {verb}\n\n{usage()}", file=sys.stderr)
        return 2
    status: int = import_module(f"headgate.{verb}").main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
