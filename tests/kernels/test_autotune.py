"""Tuning as far as it goes without a GPU: what is tried, what is chosen of it, and what becomes of the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import autotune, tables
from benchmarks.gpu.autotune import TimeIsUpError, best_of, run, sizes_asked, tune
from benchmarks.gpu.candidates import all_candidates, product
from benchmarks.gpu.case import Case, all_cases
from benchmarks.gpu.cases import rms_norm, sample
from tests.kernels import mode  # noqa: F401  the kernels are imported as it chose

from arriero_kernels.tuning import Parameters, Tuning

ROWS: tables.Rows = [(1024, {"num_warps": 1}), (4096, {"num_warps": 4}), (None, {"num_warps": 16})]
TUNING = Tuning("a device", 132, {"rms_norm": ROWS})
CASES = {64: [rms_norm.case(3, 64)], 256: [rms_norm.case(3, 256), rms_norm.case(5, 256)]}


def warps(tuning: Tuning) -> int:
    return tuning.choose("rms_norm", 1)["num_warps"]


# What is tried


def test_candidates_name_parameters_of_their_keys() -> None:
    declared = all_candidates()
    assert declared.keys() <= {case.op for case in all_cases() if case.timed}
    shipped = Tuning.load("h100").ops
    for op, by_key in declared.items():
        for key, tried in by_key.items():
            assert tried, key
            names = {frozenset(parameters) for _, parameters in shipped[key]}
            assert all(any(candidate.keys() <= row for row in names) for candidate in tried), f"{op}: {key}"


def test_every_combination_is_a_candidate() -> None:
    assert product(BLOCK=[1, 2], num_warps=[4]) == [{"BLOCK": 1, "num_warps": 4}, {"BLOCK": 2, "num_warps": 4}]


def test_the_sizes_that_a_launch_asks_with_are_seen(device: torch.device) -> None:
    tuned = Tuning.of(device).using("sample", SPLITS=1, BLOCK=128, num_warps=4)
    assert sizes_asked(rms_norm.case(3, 64), device, tuned) == {"rms_norm": 64}
    assert sizes_asked(sample.case(3, 100, top_k=5), device, tuned) == {"sample": 3, "sample_threshold": 3}


# What is chosen


def test_the_least_time_over_all_cases_is_chosen_with_cases_counted_alike() -> None:
    assert best_of({0: [1.0, 100.0], 1: [0.5, 110.0], 2: [0.9, 99.0]}) == 1
    assert best_of({0: [1.0], 1: [0.999]}) == 0
    assert best_of({0: [1.0], 1: [0.97], 2: [0.97]}) == 1
    assert best_of({3: [2.0], 4: [1.999]}) == 4


def test_each_size_gets_its_best_candidate() -> None:
    asked: list[tuple[str, int]] = []

    def timer(case: Case, tuning: Tuning) -> float:
        asked.append((case.name, warps(tuning)))
        return abs(warps(tuning) - (2 if "H=64 " in case.name else 8)) + 1.0

    candidates = product(num_warps=[1, 2, 8])
    assert tune("rms_norm", candidates, CASES, TUNING, timer, print) == {64: {"num_warps": 2}, 256: {"num_warps": 8}}
    # The present row first, none twice, all cases of a size.
    assert [number for name, number in asked if "H=64 " in name] == [1, 2, 8]
    assert len(asked) == 3 + 2 * 3


def test_a_candidate_keeps_what_it_does_not_name() -> None:
    tuned = Tuning("a device", 1, {"rms_norm": [(None, {"TOKENS": 16, "num_warps": 1})]})
    found = tune("rms_norm", product(num_warps=[4]), {64: CASES[64]}, tuned, lambda case, t: 1.0 / warps(t), print)
    assert found == {64: {"TOKENS": 16, "num_warps": 4}}


def test_what_does_not_launch_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    def timer(case: Case, tuning: Tuning) -> float:
        if warps(tuning) != 2:
            raise RuntimeError("out of resources")
        return 1.0

    assert tune("rms_norm", product(num_warps=[2, 32]), CASES, TUNING, timer, print)[64] == {"num_warps": 2}
    assert "rms_norm at 64: num_warps=32 passed over: RuntimeError: out of resources" in capsys.readouterr().out
    assert tune("rms_norm", product(num_warps=[32]), CASES, TUNING, timer, print) == {}


# What becomes of the table


@pytest.mark.parametrize("path", sorted(tables.DIRECTORY.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_is_written_as_it_is_kept(path: Path) -> None:
    assert tables.text_of(json.loads(path.read_text())) == path.read_text()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, [(1024, 1), (4096, 4), (None, 16)]),
        ({4096: 8}, [(1024, 1), (4096, 8), (None, 16)]),
        ({3072: 2}, [(1024, 1), (3072, 2), (4096, 4), (None, 16)]),
        ({512: 2}, [(512, 2), (1024, 1), (4096, 4), (None, 16)]),
        ({4096: 1}, [(4096, 1), (None, 16)]),
        ({4096: 16}, [(1024, 1), (None, 16)]),
        ({8192: 8}, [(1024, 1), (4096, 4), (None, 8)]),
        ({8192: 8, 16384: 32}, [(1024, 1), (4096, 4), (8192, 8), (None, 32)]),
    ],
    ids=str,
)
def test_what_was_found_takes_its_place_among_the_rows(
    found: dict[int, int], expected: list[tuple[int | None, int]]
) -> None:
    result = tables.merged(ROWS, {size: {"num_warps": number} for size, number in found.items()})
    assert [(bound, parameters["num_warps"]) for bound, parameters in result] == expected


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for path in tables.DIRECTORY.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_device_has_the_table_whose_name_its_own_begins_with(directory: Path) -> None:
    assert tables.path_of("NVIDIA H200 NVL", directory).name == "h200.json"
    path = tables.path_of("NVIDIA L40S", directory)
    assert path.name == "l40s.json"
    content = tables.read(path, "NVIDIA L40S", 142)
    assert (content["device"], content["multiprocessors"]) == ("NVIDIA L40S", 142)
    assert content["ops"].keys() == Tuning.load("h100").ops.keys()
    assert {op["measured"] for op in content["ops"].values()} == {None}


def tuned(directory: Path, name: str, timer: autotune.Timer, only: str = "rms_norm") -> tuple[bool, list[str]]:
    said: list[str] = []
    candidates: dict[str, dict[str, list[Parameters]]] = {
        "rms_norm": {"rms_norm": product(num_warps=[2, 8])},
        "sample": {"sample": product(SPLITS=[2]), "sample_threshold": product(WAYS=[4])},
    }
    cases = [rms_norm.case(3, 64), sample.case(2, 100, top_k=5)]
    cpu = torch.device("cpu")
    return run(only, directory, name, 7, "a run", cpu, timer, cases, candidates, said.append), said


def test_a_run_writes_what_it_found_and_leaves_the_rest(directory: Path) -> None:
    before = json.loads((directory / "h200.json").read_text())
    done, said = tuned(directory, "NVIDIA H200", lambda case, t: 1.0 / warps(t))
    assert done
    assert any("rms_norm at 64: num_warps=8 of 3, 8.00x the present row" in line for line in said)
    after = json.loads((directory / "h200.json").read_text())
    op = after["ops"].pop("rms_norm")
    assert op["measured"] == "a run, at 64"
    assert op["rows"] == [{"up_to": 64, "num_warps": 8}, *before["ops"].pop("rms_norm")["rows"]]
    assert after == before
    assert list(directory.glob("*.unfinished")) == []


def test_a_new_device_gets_a_table_that_can_be_loaded(directory: Path) -> None:
    tuned(directory, "NVIDIA L40S", lambda case, t: 1.0 / warps(t))
    content = json.loads((directory / "l40s.json").read_text())
    assert (content["device"], content["multiprocessors"]) == ("NVIDIA L40S", 7)
    assert content["ops"].keys() == Tuning.load("h100").ops.keys()
    assert content["ops"]["rms_norm"]["measured"] == "a run, at 64"


def test_when_the_time_is_up_what_was_found_is_kept(directory: Path) -> None:
    def timer(case: Case, tuning: Tuning) -> float:
        if case.op == "sample":
            raise TimeIsUpError
        return 1.0 / warps(tuning)

    done, said = tuned(directory, "NVIDIA H200", timer, only="")
    assert not done
    assert said[-1] == "the time is up: sample and what follows it stay as they were"
    ops = json.loads((directory / "h200.json").read_text())["ops"]
    assert ops["rms_norm"]["measured"] == "a run, at 64"
    assert ops["sample"] == json.loads((tables.DIRECTORY / "h200.json").read_text())["ops"]["sample"]


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_lists_and_does_not_tune(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert autotune.main(["--list", "--only", "rms_norm"]) == 0
    assert "rms_norm: rms_norm: 6 candidates" in capsys.readouterr().out
    before = {path: path.read_text() for path in directory.iterdir()}
    assert autotune.main(["--tables", str(directory)]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith("no CUDA device: parameters are tuned on the device they are for")
    assert {path: path.read_text() for path in directory.iterdir()} == before


def test_a_name_that_nothing_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        autotune.main(["--only", "nothing of the kind"])
    assert "no operation's or key's name contains 'nothing of the kind'" in capsys.readouterr().err
