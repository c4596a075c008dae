"""What is wrong is said before anything is imported that takes time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, "sklearn" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["extract", "-s", "head.kind=svmm"], 2, ["-s head.kind", "svm"]),
        (["train-head", "-s", "data.root=pictures"], 1, ["pictures", "'picture'", "demo-data"]),
        (["finetune", "-s", "backbone.weights=no.pth", "-s", "head.prompts=no.txt"], 2, ["no.pth", "no.txt"]),
        (["predict", "foo", "x.jpg"], 1, ["There is no run foo"]),
    ],
)
def test_mistakes_are_told_without_torch(tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    (tmp_path / "picture").mkdir()
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and done.stdout == "False False\n", done.stderr
    assert all(word in done.stderr for word in words), done.stderr


TALK = """
from pipeline.cli.options import Reporter
for number in range(3):
    Reporter().say(f"line {number}")
print("worked to the end")
"""


def test_a_reader_that_has_gone_does_not_end_the_work(tmp_path: Path) -> None:
    code = f"import sys; sys.stdin.read()\n{TALK}\nopen('done', 'w').close()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert process.wait(30) == 0 and not process.stderr.read()
    assert (tmp_path / "done").exists()


def test_a_table_whose_reader_has_gone_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m pipeline demo-data --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "0\n" and not done.stderr
