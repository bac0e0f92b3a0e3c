"""Float32 stays float32 while measuring, whatever switch allows TF32, and every switch comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils.import_utils import enable_tf32

from hf_optimizability.model_state import float32_precision
from hf_optimizability.model_state.float32_precision import ieee_float32
from hf_optimizability.model_state.measuring import measuring


BACKENDS: Any = torch.backends
SWITCHES: list[Any] = [
    BACKENDS,
    BACKENDS.cudnn,
    BACKENDS.cuda.matmul,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul,
    BACKENDS.mkldnn.conv,
    BACKENDS.mkldnn.rnn,
]


def readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "the old switch disagrees with the new ones"


def state() -> list[Any]:
    old = [
        readable(lambda: BACKENDS.cudnn.allow_tf32),
        readable(lambda: BACKENDS.cuda.matmul.allow_tf32),
        readable(torch.get_float32_matmul_precision),
    ]
    return [switch.fp32_precision for switch in SWITCHES] + old


@pytest.fixture(autouse=True)
def precision_as_it_was() -> Iterator[None]:
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for switch, value in zip(SWITCHES, before, strict=False):
        switch.fp32_precision = value
    assert state() == before


def mixed() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


ALLOW_TF32: dict[str, Callable[[], Any]] = {
    "by default": lambda: None,
    "by Trainer": lambda: enable_tf32.__wrapped__(True),
    "the old way": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "old switch of convolutions off": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "for matrix products": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16 on CPUs": lambda: torch.set_float32_matmul_precision("medium"),
    "for one backend": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "for convolutions but not for RNNs": mixed,
}


@pytest.mark.parametrize("allowed", ALLOW_TF32)
def test_float32_is_float32_inside_and_what_it_was_after(allowed: str):
    ALLOW_TF32[allowed]()
    before = state()
    with pytest.raises(KeyboardInterrupt), measuring(nn.Linear(1, 1), seed=0):
        assert state() == ["ieee"] * len(SWITCHES) + [False, False, "highest"]
        raise KeyboardInterrupt
    assert state() == before
    BACKENDS.fp32_precision = "ieee"  # what was inherited still is
    after = state()
    ALLOW_TF32[allowed]()
    BACKENDS.fp32_precision = "ieee"
    assert state() == after


@pytest.mark.parametrize("allowed", ALLOW_TF32)
def test_flags_of_cudnn_can_be_set_inside_as_ctc_losses_do(allowed: str):
    ALLOW_TF32[allowed]()
    before = state()
    with ieee_float32():
        with BACKENDS.cudnn.flags(enabled=False):
            assert not BACKENDS.cudnn.enabled
        assert "tf32" not in state()
    assert state() == before


def test_float32_is_float32_in_an_older_torch_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(float32_precision, "is_torch_version", lambda operation, version: False)
    BACKENDS.cuda.matmul.allow_tf32 = True
    parts = BACKENDS.cuda.matmul, BACKENDS.cudnn
    with measuring(nn.Linear(1, 1), seed=0):
        assert [part.allow_tf32 for part in parts] == [False, False]
    assert [part.allow_tf32 for part in parts] == [True, True]
