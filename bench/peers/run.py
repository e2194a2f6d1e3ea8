"""One peer in a process of its own: `python run.py with_NAME`.

It speaks JSON lines. In: the case, what to load and for how much; then {"variant": NAME, "prompts": lists of as many
tokens} again and again. Out: {"version", "variants"}; then for each question {"stamps", "tokens"}, or {"error": a
line}. A stamp is [seconds, tokens that the pass committed, of each row]; at the first one the prompts are read and the
first tokens are there.

This folder is all that a peer's environment needs beside its own packages: nothing here but with_headstart imports
headstart.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def serve(name: str) -> None:
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
