"""The child's side of `processes.py`: a script that builds what it is asked for and answers commands one by one."""

import json
import sys
from collections.abc import Callable, Mapping

Answers = Mapping[str, Callable[[], dict[str, float]]]
"""What each command calls."""


def serve(build: Callable[[str], Answers]) -> None:
    """Answer commands until there are none: each line read is a command, each line written its answer in JSON.

    Args:
        build: Gets the script's one argument, a request in JSON, and returns what the commands call.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not look like an answer
    commands = build(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=answers, flush=True)
