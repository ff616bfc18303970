"""The shipped tables of launch parameters, and how one is chosen."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

from arriero_kernels import tuning
from arriero_kernels.tuning import Tuning


@pytest.mark.parametrize("table", tuning.tables())
def test_every_table_knows_every_operation(table: str) -> None:
    loaded = Tuning.load(table)
    assert loaded.ops.keys() == Tuning.load(tuning.DEFAULT).ops.keys()
    assert loaded.multiprocessors > 0
    content = json.loads((files("arriero_kernels") / "tables" / f"{table}.json").read_text())
    assert all({"measured", "rows"} == op.keys() for op in content["ops"].values())


def test_tables_of_h100_and_h200_are_shipped() -> None:
    assert {Tuning.load(table).device for table in tuning.tables()} >= {"NVIDIA H100", "NVIDIA H200"}


def test_the_first_row_that_is_large_enough_is_taken() -> None:
    rows = [(16, {"num_warps": 1}), (64, {"num_warps": 2}), (None, {"num_warps": 4})]
    tuned = Tuning("a device", 132, {"op": rows})
    chosen = [tuned.choose("op", size)["num_warps"] for size in (0, 16, 17, 64, 65, 1 << 40)]
    assert chosen == [1, 1, 2, 2, 4, 4]
    assert tuned.using("op", num_warps=8).choose("op", 3)["num_warps"] == 8


def test_a_device_without_a_table_gets_the_default_one() -> None:
    assert Tuning.of(torch.device("cpu")) == Tuning.load(tuning.DEFAULT)


def test_a_device_is_found_by_how_its_name_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "NVIDIA H200 NVL"
        multi_processor_count = 99

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = Tuning.of(torch.device("cuda", 5))
    assert (found.device, found.multiprocessors) == ("NVIDIA H200", 99)
    Properties.name = "NVIDIA L40S"
    assert Tuning.of(torch.device("cuda", 6)).device == Tuning.load(tuning.DEFAULT).device


@pytest.mark.parametrize("bounds", [[], [5], [None, None], [64, 16, None], [16, 16, None]], ids=str)
def test_a_table_whose_rows_leave_a_gap_is_refused(bounds: list[int | None]) -> None:
    with pytest.raises(ValueError, match="up_to must rise, and be null in the last row"):
        tuning._rows("h100", "op", [{"up_to": bound, "num_warps": 4} for bound in bounds])


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no tuning table 'v100', only h100, h200"):
        Tuning.load("v100")
