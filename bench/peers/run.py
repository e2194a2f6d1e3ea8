"""Decode with one peer in a process of its own: `python run.py with_NAME`.

The process speaks JSON lines. Its input is the case (the model to load, numbers of rows and tokens), and then any
number of questions {"variant": NAME, "prompts": lists of equal length}. Its output is {"version", "variants"}, and then
for each question {"stamps", "tokens"} or {"error": a line}. A stamp is [seconds, tokens of each row that the pass
committed]; at the first stamp the prompts are read and the first tokens are decoded.

A peer's environment needs this folder and the peer's packages alone: only with_headstart imports headstart.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def serve(name: str) -> None:
    """Answer questions with the class `Peer` of the file `name` until the input ends."""
    # Libraries print: the answers have the real stdout to themselves.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def say(answer: dict[str, Any]) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        def failed(error: Exception) -> dict[str, Any]:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}

        try:
            peer = importlib.import_module(name).Peer(json.loads(sys.stdin.readline()))
        except Exception as error:
            say(failed(error))
            return
        say({"version": peer.version, "variants": list(peer.variants)})
        for line in sys.stdin:
            try:
                question = json.loads(line)
                answer = peer.variants[question["variant"]](question["prompts"])
            except Exception as error:
                answer = failed(error)
            say(answer)


if __name__ == "__main__":
    serve(sys.argv[1])
