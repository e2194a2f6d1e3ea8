"""Make the directory of a bundled model from a finished run: `python models/box.py RUN PROMPTS.jsonl OUT`.

OUT gets the model directory of the run, its config.yaml, the prompts, and of its metrics.jsonl every tenth step and
every validation. A README.md in OUT stays.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Run the command."""
    run, prompts, out = map(Path, sys.argv[1:])
    shutil.copytree(run / "model", out, dirs_exist_ok=True)
    shutil.copy(run / "config.yaml", out / "config.yaml")
    shutil.copy(prompts, out / "prompts.jsonl")
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as kept:
        for line in (run / "metrics.jsonl").open(encoding="utf-8"):
            record = json.loads(line)
            if record["step"] % 10 == 0 or "validation/loss/head1" in record:
                kept.write(line)


if __name__ == "__main__":
    main()
