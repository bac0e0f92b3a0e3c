# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark, on the CPU with a tiny model: the figures it writes, and what it does where it can't."""

from __future__ import annotations

import json
from itertools import count

import gpu
import pytest
import torch

from hf_optimizability import MeasurementError
from hf_optimizability.objective.objective import Objective


def run(folder, *dtypes: str) -> list[dict]:
    options = ["--device", "cpu", "--sizes", "tiny", "--examples", "2", "--tokens", "8", "--repeats", "1"]
    options += ["--out", str(folder)]
    assert gpu.main([*options, "--dtypes", *dtypes]) == 0
    return json.loads((folder / "gpu.json").read_text())["models"]


def out_of_memory(*arguments) -> None:
    raise MeasurementError("out_of_memory") from torch.OutOfMemoryError()


@pytest.mark.slow
def test_every_part_has_figures(tmp_path) -> None:
    half, full = run(tmp_path, "bfloat16", "float32")
    for model in (half, full):
        for part in ("gradient", "product", "lockstep", "card"):
            assert model[part]["seconds"] > 0
        assert model["card"]["lambda_max"] > 0 > model["card"]["lambda_min"]
    # Products are in float32 whatever the weights; these are the same numbers, rounded.
    assert half["card"]["lambda_max"] == pytest.approx(full["card"]["lambda_max"], rel=0.05)
    rows = (tmp_path / "gpu.md").read_text().splitlines()[-2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| tiny", "bfloat16"], ["| tiny", "float32"]]
    assert all(f"{model['card']['hvps']} HVPs" in row for model, row in zip((half, full), rows, strict=True))


def test_rows_replace_those_of_the_same_model(tmp_path, monkeypatch) -> None:
    seconds = count(1.0)
    monkeypatch.setattr(gpu, "products", lambda *_, **options: {"seconds": next(seconds), "peak_gib": 1.0})
    monkeypatch.setattr(gpu, "measure", out_of_memory)
    [before] = run(tmp_path, "float32")
    half, full = run(tmp_path, "bfloat16")
    assert (half["dtype"], full) == ("bfloat16", before)
    [_, again] = run(tmp_path, "float32")
    assert again["product"] != before["product"]


def test_what_does_not_fit_is_recorded_and_leaves_the_rest(tmp_path, monkeypatch) -> None:
    def too_large(objective, columns, **options):
        if columns > 1:
            raise torch.OutOfMemoryError
        return {"seconds": 1.0, "peak_gib": 2.0}

    monkeypatch.setattr(gpu, "products", too_large)
    monkeypatch.setattr(gpu, "measure", out_of_memory)
    [model] = run(tmp_path, "float32")
    assert model["product"]["seconds"] == 1.0
    assert model["lockstep"] == model["card"] == {"failed": "out of memory"}
    assert (tmp_path / "gpu.md").read_text().count("out of memory") == 2


def test_other_failures_are_not_taken_for_memory(tmp_path, monkeypatch) -> None:
    def broken(*arguments):
        raise MeasurementError("loss_not_finite", loss="nan")

    monkeypatch.setattr(gpu, "measure", broken)
    with pytest.raises(MeasurementError, match="is nan"):
        run(tmp_path, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_products_are_in_float32_and_timed_one_by_one(monkeypatch) -> None:
    cpu = torch.device("cpu")
    built = gpu.build("tiny", torch.bfloat16, device=cpu, examples=2, tokens=8)
    objective = Objective(built["model"], [built["batch"]])

    def timed(action, **options):
        assert action().shape[1] == 4
        assert {parameter.dtype for parameter in objective.parameters} == {torch.float32}
        return {"seconds": 8.0, "peak_gib": None}

    monkeypatch.setattr(gpu, "timed", timed)
    assert gpu.products(objective, 4, device=cpu, repeats=1)["seconds"] == 2.0
    assert {parameter.dtype for parameter in objective.parameters} == {torch.bfloat16}
