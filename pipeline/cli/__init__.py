"""The command line: thin verbs over `pipeline.stages`. Nothing here imports torch before a verb runs."""

from .main import main

__all__ = ["main"]
