"""The command line: thin verbs over `pipeline.stages`. Nothing here imports torch before a verb runs."""

import os

# Threads that wait for each other must not do so in a loop: on a machine that is busy with something else, each would
# spin for as long as the other is not scheduled. But where they sleep at once, heads take half as long again: GNU's
# threads look a thousand times first, some 10 microseconds. Read once, when the library of threads is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from .main import main

__all__ = ["main"]
