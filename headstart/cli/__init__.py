"""The commands: one function each, which only calls its room. What is around them is in `entry.py`.

torch is imported inside the commands: `headstart --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

from headstart.cli.adapting import adapt
from headstart.cli.adapting_data import distill_data
from headstart.cli.checkout import bench, study
from headstart.cli.decoding import generate
from headstart.cli.exchange import convert, push
from headstart.cli.measuring import doctor, evaluate, inspect, tune
from headstart.cli.serving import serve
from headstart.cli.training import compare, demo, prepare, train

# These parse their own arguments: what they take depends on the first one.
RAW = (train, adapt, evaluate, tune, bench, study)
COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        demo,
        prepare,
        train,
        adapt,
        compare,
        distill_data,
        generate,
        serve,
        evaluate,
        tune,
        inspect,
        convert,
        push,
        doctor,
        bench,
        study,
    )
}
