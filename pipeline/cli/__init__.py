"""The command line: thin verbs over `pipeline.stages`. Nothing here imports torch before a verb runs."""

import os

# Threads that wait for each other must not do so in a loop: on a machine that is busy with something else, each would
# spin for as long as the other is not scheduled. Read once, when the library of threads is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .main import main

__all__ = ["main"]
