"""`pipeline cache` as typed: exit codes, one JSON object, tables that survive a pipe, questions before removal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.features.store import USED_FILE

from ..features.examples import SPEC, fill, make_digests, make_store

Run = Callable[..., "Done"]


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one key, unused for forty days."""
    store = make_store(tmp_path / "cache")
    fill(store, make_digests(3))
    moment = time.time() - 40 * 86_400
    os.utime(store.folder / USED_FILE, (moment, moment))
    return store.folder


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    file = tmp_path / "params.yaml"
    file.write_text("data: {root: images}\nbackbone: {name: squeezenet1_1, weights: random}\n")

    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as stop:
            main(["cache", *arguments, "-p", str(file)])
        captured = capsys.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_ls_prints_a_line_a_key(run: Run, cache: Path) -> None:
    done = run("ls")
    lines = done.out.splitlines()
    assert done.code == 0 and done.err == ""
    assert lines[0].split()[:4] == ["backbone", "key", "weights", "precision"]
    assert lines[1].split()[:7] == ["resnet18", SPEC.key, "abababab", "float32", "float16", "plain", "3"]
    assert str(cache.parent) in lines[-1]


def test_ls_folds_nothing_in_a_narrow_terminal(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert any(SPEC.key in line and "float16" in line for line in run("ls").out.splitlines())


def test_ls_shows_damage_and_leftovers(run: Run, cache: Path) -> None:
    (cache / "damaged-part-ff.h5").write_bytes(b"1")
    (cache / ".tmp-1-aa-part-00.h5").write_bytes(b"12")
    done = run("ls")
    assert "damaged-part-ff.h5 was set aside" in done.out and ".tmp-1-aa-part-00.h5 (2 B)" in done.out


def test_ls_of_no_cache_is_empty(run: Run) -> None:
    assert run("ls").code == 0
    assert run("ls", "--json").json["keys"] == []


def test_ls_as_json_is_one_object(run: Run, cache: Path) -> None:
    done = run("ls", "--json")
    (key,) = done.json["keys"]
    assert (key["key"], key["rows"], key["damaged"]) == (SPEC.key, 3, [])


def test_quiet_prints_nothing(run: Run, cache: Path) -> None:
    assert run("ls", "-q").out == ""


def test_verify_of_whole_bytes_exits_0(run: Run, cache: Path) -> None:
    done = run("verify", "--sample", "0")
    assert done.code == 0 and "nothing is wrong" in done.out


def test_verify_of_damage_exits_1_and_names_it(run: Run, cache: Path) -> None:
    (part,) = cache.glob("part-*")
    part.write_bytes(b"broken")
    done = run("verify", "--sample", "0")
    assert done.code == 1 and part.name in done.err and "Traceback" not in done.err
    again = run("verify", "--sample", "0", "--json")
    assert again.code == 0, "the damaged part was set aside by the first"


def test_verify_of_damage_as_json_is_one_error_with_the_report(run: Run, cache: Path) -> None:
    (cache / "spec.json").unlink()
    done = run("verify", "--sample", "0", "--json")
    assert done.code == 1
    error = done.json["error"]
    assert error["type"] == "VerifyError" and error["report"]["keys"][0]["rows"] == 3


def test_verify_with_params_of_no_key_says_that_only_bytes_were_read(run: Run, cache: Path) -> None:
    done = run("verify")
    assert done.code == 0 and "only their bytes" in done.out


def test_gc_asks_and_no_is_the_default(run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def confirm(question: str, **options: object) -> bool:
        asked.append(question)
        return bool(options["default"])

    monkeypatch.setattr("click.confirm", confirm)
    done = run("gc")
    assert done.code == 0 and "40 days" in done.out and len(asked) == 1 and cache.exists()


def test_gc_with_yes_removes_without_asking(run: Run, cache: Path) -> None:
    done = run("gc", "--yes", "--json")
    assert done.json["removed"] == [str(cache)] and not cache.exists()


def test_gc_with_json_alone_only_proposes(run: Run, cache: Path) -> None:
    done = run("gc", "--json")
    assert [item["path"] for item in done.json["proposed"]] == [str(cache)]
    assert done.json["removed"] == [] and cache.exists()


def test_gc_takes_the_days_it_is_given(run: Run, cache: Path) -> None:
    assert run("gc", "--json", "--older-than", "41").json["proposed"] == []
    assert run("gc", "--json", "--older-than", "-1").code == 2


def test_gc_beside_a_writer_exits_1(run: Run, cache: Path) -> None:
    with make_store(cache.parent, precision="bfloat16").writing():
        done = run("gc", "--yes")
    assert done.code == 1 and "someone is writing" in done.err and cache.exists()


def test_export_without_features_says_how_to_get_them(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a" / "0.png")
    done = run("export", str(tmp_path / "features.h5"))
    assert done.code == 1 and "pipeline extract" in done.err and not (tmp_path / "features.h5").exists()


def test_why_names_the_nearest_key(run: Run, tmp_path: Path, cache: Path) -> None:
    from PIL import Image

    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a" / "0.png")
    done = run("why")
    assert done.code == 0 and "0 of 1 images" in done.out and "backbone resnet18 -> squeezenet1_1" in done.out


@pytest.mark.parametrize("verb", ["ls", "verify", "why", "gc", "export"])
def test_every_verb_takes_the_common_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache", verb, "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--params", "--set", "--json", "--verbose", "--quiet"))


def test_listing_and_cleaning_import_no_torch(tmp_path: Path, cache: Path) -> None:
    script = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    (tmp_path / "params.yaml").write_text("")
    for verb in ("ls", "gc"):
        command = [sys.executable, "-c", script, "cache", verb, "--json", "-p", str(tmp_path / "params.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert SPEC.key in done.stdout


def test_import_without_its_extra_names_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = run("import", str(tmp_path / "rows.parquet"), "--json")
    assert done.code == 1 and "[parquet]" in done.json["error"]["remedy"]
    assert run("import", str(tmp_path / "nothing.parquet")).code == 2
