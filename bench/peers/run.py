"""Answer JSON lines with a function or a decoder in a process of its own: `python run.py MODULE:NAME`.

Each line of the input is a question, and each line of the output its answer: {"result": ...}, or {"error": a line,
"type": the exception's name}. A function answers every question. A class is a decoder: the first question is the case
(the model to load, numbers of rows and tokens) and makes its object, and the result is {"version", "variants"}. The
further questions are {"variant": NAME, "prompts": lists of equal length}, and the result is {"stamps", "tokens",
"prompt_tokens", "prompt_seconds"}. A stamp is [seconds, tokens of each row that the pass committed]; at the first stamp
the prompts are read and the first tokens are decoded.

A peer's environment needs this folder and the peer's packages alone: only with_headstart imports headstart.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from functools import partial
from typing import Any


def serve(target: str) -> None:
    """Answer questions until the input ends."""
    # Libraries print: the answers have the real stdout to themselves.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        answering = None
        for line in sys.stdin:
            try:
                if answering is None:
                    module, name = target.split(":")
                    answering = getattr(importlib.import_module(module), name)
                result = answering(json.loads(line))
                if isinstance(answering, type):
                    answering = partial(_decode, result)
                    result = {"version": result.version, "variants": list(result.variants)}
                answer = {"result": result}
            except Exception as error:
                traceback.print_exc()
                message = (str(error) or repr(error)).splitlines()[0]
                answer = {"error": message, "type": type(error).__name__}
            out.write(json.dumps(answer) + "\n")
            out.flush()


def _decode(peer: Any, question: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    found: dict[str, Any] = peer.variants[question["variant"]](question["prompts"])
    return {
        "prompt_tokens": sum(map(len, question["prompts"])),
        "prompt_seconds": found["stamps"][0][0] - began,
        **found,
    }


if __name__ == "__main__":
    serve(sys.argv[1])
