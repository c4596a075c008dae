"""A format whose decoder crashes, hangs or eats memory, put into every Python process that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PLUGIN = '''
import os, time
from PIL import Image, ImageFile

class Deadly(ImageFile.ImageFile):
    """What follows the signature says what opening the file does to the process."""
    format = "DEADLY"

    def _open(self):
        deed = self.fp.read().split()[1]
        if deed == b"crash":
            os.abort()
        if deed == b"exit":
            os._exit(7)
        if deed == b"gorge":
            bytes(1 << 40)
        while deed == b"hang":
            pass
        raise OSError("unknown deed")

Image.register_open("DEADLY", Deadly, lambda prefix: prefix.startswith(b"DEADLY"))
'''


def install_deadly_decoders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes started from now on have the decoder; this one does not."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(PLUGIN)
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
