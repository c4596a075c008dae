"""Devices, shares, seeds, interruption and progress: what every stage runs on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DeviceError
from pipeline.runtime import progress
from pipeline.runtime.cores import usable_cores, worker_count
from pipeline.runtime.device import fast_products, resolve_device, tf32
from pipeline.runtime.distributed import World, from_main, gather, world_from_environment
from pipeline.runtime.interrupt import stop_after_batch
from pipeline.runtime.progress import ProgressBar
from pipeline.runtime.seeds import derive_seed, make_generator


@pytest.mark.parametrize(("chosen", "expected"), [(None, ["PASSIVE", "1000"]), ("ACTIVE", ["ACTIVE", "None"])])
def test_threads_that_wait_soon_sleep_under_the_command_line_unless_told_otherwise(
    chosen: str | None, expected: list[str]
) -> None:
    """The library of threads reads the policy when torch loads it, so it must be there before."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    code = f"import os, sys, pipeline.cli; print(*map(os.environ.get, {names}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*expected, "False"]


class TestDevice:
    def machine(self, monkeypatch: pytest.MonkeyPatch, *, gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    @pytest.mark.parametrize(
        ("gpus", "mps", "device"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda:0"), (1, True, "cuda:0")]
    )
    def test_auto_takes_the_best_there_is(
        self, monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, device: str
    ) -> None:
        self.machine(monkeypatch, gpus=gpus, mps=mps)
        assert resolve_device("auto") == torch.device(device)

    def test_each_local_rank_takes_its_own_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine(monkeypatch, gpus=2)
        worlds = [World(rank=4 + local, size=8, local_rank=local) for local in range(4)]
        assert [resolve_device("cuda", world).index for world in worlds] == [0, 1, 0, 1]
        assert resolve_device("cuda:1", worlds[0]).index == 1

    def test_float32_on_a_gpu_is_not_tf32_unless_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine(monkeypatch, gpus=1)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        flags = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)  # noqa: E731
        resolve_device("cpu")
        assert flags() == (True, True)
        resolve_device("auto")
        assert flags() == (False, False)
        with tf32():
            assert flags() == (True, True)
        assert flags() == (False, False)

    def test_fast_products_on_a_cpu_are_of_float32_and_end_with_their_block(self) -> None:
        before = torch.backends.mkldnn.matmul.fp32_precision
        factor = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
        with fast_products(torch.device("cpu"), rounded=True):
            with fast_products(torch.device("cpu"), rounded=False):
                inside = torch.backends.mkldnn.matmul.fp32_precision
            product = factor @ factor
            assert torch.backends.mkldnn.matmul.fp32_precision == inside
        assert torch.allclose(product.double(), factor.double() @ factor.double(), rtol=0, atol=1e-4)
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_threads_whose_fast_products_overlap_leave_nothing_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.runtime.device._onednn_is_exact", lambda: True)
        before = torch.backends.mkldnn.matmul.fp32_precision
        first, second = (fast_products(torch.device("cpu"), rounded=False) for _ in range(2))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # the second's are not done
        second.__exit__(None, None, None)
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    @pytest.mark.parametrize("exact", [True, False])
    def test_a_cpu_that_would_round_is_left_as_it_is(self, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.runtime.device._onednn_is_exact", lambda: exact)
        before = torch.backends.mkldnn.matmul.fp32_precision
        with fast_products(torch.device("cpu"), rounded=True):
            assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if exact else before)

    @pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
    def test_a_device_that_is_missing_is_named_with_a_way_out(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.machine(monkeypatch, gpus=1 if name == "cuda:1" else 0)
        with pytest.raises(DeviceError, match=f"{name}.* is not on this machine") as caught:
            resolve_device(name)
        assert caught.value.remedy
        assert "auto" in caught.value.remedy

    def test_cores_are_those_this_process_may_use(self) -> None:
        if not hasattr(os, "sched_setaffinity"):
            pytest.skip("this system has no affinity masks")
        cores = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(cores)})
            assert usable_cores() == 1
        finally:
            os.sched_setaffinity(0, cores)
        assert usable_cores() == len(cores)

    def test_a_containers_quota_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("joblib.externals.loky.backend.context._cpu_count_cgroup", lambda _cores: 1)
        assert usable_cores() == 1


class TestWorld:
    def test_workers_share_the_cores_of_one_machine_not_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.runtime.cores.usable_cores", lambda: 16)
        monkeypatch.setenv("RANK", "9")
        monkeypatch.setenv("WORLD_SIZE", "16")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert worker_count("auto", world_from_environment()) == 4
        assert worker_count("auto", World(rank=1, size=8)) == 16, "a shard of a job array has a machine of its own"
        assert worker_count(3, World(rank=1, size=8, local_size=8)) == 3

    def test_whoever_ends_first_waits_for_days(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begun: dict[str, Any] = {}
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
        monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **named: begun.update(named))
        monkeypatch.setattr("torch.distributed.all_gather_object", lambda values, value: values.__setitem__(0, value))
        monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
        assert gather("mine", World(rank=0, size=2)) == ["mine"]
        assert begun["timeout"] >= timedelta(days=7)

    @given(st.sets(st.integers(0, 200)), st.integers(1, 9))
    def test_shares_are_disjoint_and_complete(self, left: set[int], size: int) -> None:
        positions = np.array(sorted(left), np.int64)
        shares = [World(rank=rank, size=size).share(positions).tolist() for rank in range(size)]
        assert sorted(chain.from_iterable(shares)) == positions.tolist()

    def test_what_is_done_already_shifts_no_share(self) -> None:
        world, everything = World(rank=1, size=3), np.arange(100)
        left = everything[everything % 5 > 0]
        assert set(world.share(left)) == set(world.share(everything)) & set(left)
        assert {len(World(rank=rank, size=3).share(everything)) for rank in range(3)} == {33, 34}

    def test_torchrun_names_the_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert world_from_environment() == World(rank=3, size=4, local_rank=1)
        assert not world_from_environment().is_main

    def test_without_torchrun_there_is_one_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert world_from_environment() == World()
        assert World().is_main


class TestSeeds:
    items = st.lists(st.one_of(st.integers(), st.text(max_size=5), st.binary(max_size=5)), max_size=4)

    @settings(max_examples=30)
    @given(items, items)
    def test_different_items_give_different_seeds(self, first: list[int], second: list[int]) -> None:
        same = [(type(item), item) for item in first] == [(type(item), item) for item in second]
        assert (derive_seed(*first) == derive_seed(*second)) is same
        assert 0 <= derive_seed(*first) < 2**63

    def test_seeds_are_the_same_in_every_process_and_version(self) -> None:
        assert derive_seed("epoch", 3, b"\x00\x01") == 2060576689557904611
        assert derive_seed("ab", "c") != derive_seed("a", "bc") != derive_seed("abc")

    def test_generators_start_from_the_seed(self) -> None:
        np.testing.assert_array_equal(make_generator("a", 1).random(5), make_generator("a", 1).random(5))
        assert make_generator("a", 1).random() != make_generator("a", 2).random()


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_asks_and_the_handlers_come_back(self, number: signal.Signals) -> None:
        before = signal.getsignal(number)
        with stop_after_batch() as interruption:
            assert not interruption
            signal.raise_signal(number)
            assert interruption
        assert signal.getsignal(number) == before

    def test_the_second_ctrl_c_interrupts_at_once(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop_after_batch():  # noqa: PT012 - the second signal is the point
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before

    def test_a_second_sigterm_still_only_asks(self) -> None:
        with stop_after_batch() as interruption:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert interruption

    def test_outside_the_main_thread_code_may_ask(self) -> None:
        seen = []

        def work() -> None:
            with stop_after_batch() as interruption:
                interruption.request()
                seen.append(bool(interruption))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [True]


class TestProgress:
    def test_piped_progress_is_plain_lines_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = iter(range(0, 10_000, 4))  # each look at the clock is four seconds after the last
        monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
        with ProgressBar("embedding", 100) as bar:
            for _ in range(10):
                bar.advance(10, note="(decode-bound)")
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert 1 < len(lines) < 10
        assert re.fullmatch(r"embedding \(decode-bound\): \d+/100, \d+\.\d/s, \d+ s left", lines[0]), lines[0]
        assert "\x1b" not in captured.err

    def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        with ProgressBar("embedding", 10) as bar:
            bar.advance(10)
        assert capsys.readouterr() == ("", "")

    def test_quick_or_quiet_steps_print_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with ProgressBar("embedding", 10) as bar:
            bar.advance(10)
        with ProgressBar("embedding", 10, quiet=True) as bar:
            bar.advance(10)
        assert capsys.readouterr() == ("", "")

    def test_a_terminal_gets_a_bar_with_rate_and_time_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
        with ProgressBar("embedding", 10) as bar:
            for _ in range(10):
                time.sleep(0.002)
                bar.advance(1, note="here")
        text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().err)
        assert "embedding here" in text
        assert "10/10" in text
        assert "/s" in text

    @pytest.mark.skipif(shutil.which("script") is None, reason="script(1) gives a terminal")
    def test_lines_stand_above_the_bar_and_libraries_write_nowhere(self) -> None:
        code = (
            "import os; from pipeline.cli.options import Reporter; "
            "from pipeline.runtime.progress import ProgressBar, quiet_libraries\n"
            "with quiet_libraries(), ProgressBar('training', 10) as bar:\n"
            "    os.write(2, b'TIFFFetchNormalTag'); Reporter().say('epoch 1'); bar.advance(10)\n"
            "Reporter().warn('after'); os.write(2, b'then')\n"
        )
        done = subprocess.run(
            ["script", "-qec", f'{sys.executable} -c "$CODE"', "/dev/null"],
            env={**os.environ, "CODE": code, "TERM": "xterm"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "TIFFFetch" not in done.stdout and "then" in done.stdout, done.stdout
        lines = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", done.stdout).replace("\r", "\n").splitlines()
        assert "epoch 1" in lines and "after" in lines


class TestFromMain:
    """What the first process makes is everybody's, and so is what it raises."""

    @pytest.fixture
    def wire(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What was told last; a process that is not the first hears it."""
        told: list[Any] = []

        def broadcast(values: list[Any]) -> None:
            if any(value is not None for value in values):
                told[:] = values
            values[:] = told

        monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
        return told

    def test_it_is_made_once(self, wire: list[Any]) -> None:
        made: list[int] = []
        make = lambda: made.append(1) or "a head"  # noqa: E731
        assert [from_main(make, World(rank=rank, size=2)) for rank in range(2)] == ["a head", "a head"]
        assert made == [1] and from_main(make, World()) == "a head"

    def test_an_error_leaves_nobody_waiting(self, wire: list[Any]) -> None:
        def fail() -> None:
            raise DeviceError("no")

        for rank in range(2):
            with pytest.raises(DeviceError, match="no"):
                from_main(fail, World(rank=rank, size=2))
