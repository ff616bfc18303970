"""Log-probabilities and ranks of chosen tokens, and the highest of a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.kernels.tensors import DTYPES, drawn
from tests.kernels.tolerance import assert_as_good

from arriero_kernels.log_softmax_top import log_softmax_top
from arriero_kernels.tuning import Tuning
from arriero_worker.runner.logprobs import logprobs


def small(device: torch.device) -> Tuning:
    """Blocks that make several chunks of a vocabulary that the interpreter can do."""
    return Tuning.of(device).using("log_softmax_top", BLOCK=256, num_warps=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "top"), [(1, 1), (7, 7), (1000, 0), (1024, 20), (999, 3)])
def test_it_is_pytorchs_log_softmax(device: torch.device, vocab: int, top: int, dtype: torch.dtype) -> None:
    """Narrow logits have many ties: ordered by id."""
    logits = (2 * drawn(3, vocab, dtype=torch.float32, device=device)).to(dtype)
    tokens = torch.tensor([0, vocab // 2, vocab - 1], device=device)
    ids, values = log_softmax_top(logits, tokens, top, tuning=small(device))
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    assert torch.equal(ids[:, 0], tokens)
    assert torch.equal(ids[:, 1], 1 + (order == tokens[:, None]).int().argmax(-1))
    assert torch.equal(ids[:, 2:], order[:, :top])
    asked = torch.cat([tokens[:, None], order[:, :top]], 1)
    assert values.dtype == torch.float32
    assert_as_good(
        values,
        torch.log_softmax(logits.double(), -1).gather(1, asked),
        torch.log_softmax(logits.float(), -1).gather(1, asked),
    )


def test_it_is_what_the_cpu_backend_finds(device: torch.device) -> None:
    logits = (3 * drawn(4, 900, dtype=torch.float32, device=device)).round()
    tokens = torch.tensor([5, 899, 17, 300], device=device)
    ids, values = log_softmax_top(logits, tokens.int(), 20, tuning=small(device))
    expected = logprobs(logits.cpu(), tokens.cpu().numpy(), 20)
    assert torch.equal(ids.cpu(), expected.ids)
    assert torch.allclose(values.cpu(), expected.values, rtol=0, atol=2e-5)


def test_infinite_logits(device: torch.device) -> None:
    logits = torch.zeros(4, 600, device=device)
    logits[0, 300:] = -math.inf
    logits[1, 7] = math.inf
    logits[2] = -math.inf
    logits[2, 599] = 3.0
    logits[3] = -3e38
    tokens = torch.tensor([599, 7, 599, 0], device=device)
    with np.errstate(invalid="ignore"):  # infinity - infinity, in the interpreter
        ids, values = log_softmax_top(logits, tokens, 2, tuning=small(device))
    assert ids.tolist() == [[599, 600, 0, 1], [7, 1, 7, 0], [599, 1, 599, 0], [0, 1, 0, 1]]
    assert values[0].tolist() == pytest.approx([-math.inf, -math.log(300), -math.log(300)])
    assert values[1, 2].item() == -math.inf
    assert values[2].tolist() == [0.0, 0.0, -math.inf]
    assert values[3].isfinite().all()


def test_zeros_of_both_signs_are_equal(device: torch.device) -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0]], device=device)
    ids, _ = log_softmax_top(logits, torch.tensor([2], device=device), 3, tuning=small(device))
    assert ids.tolist() == [[2, 3, 0, 1, 2]]


def test_no_rows(device: torch.device) -> None:
    ids, values = log_softmax_top(torch.zeros(0, 9, device=device), torch.zeros(0, dtype=torch.int64, device=device), 2)
    assert (ids.shape, values.shape) == ((0, 4), (0, 3))


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    logits, tokens = torch.zeros(2, 50, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="top is 21, expected 0 to 20: of 50 tokens, at most 20"):
        log_softmax_top(logits, tokens, 21)
    with pytest.raises(ValueError, match="top is 9, expected 0 to 8"):
        log_softmax_top(logits[:, :8].contiguous(), tokens, 9)
    with pytest.raises(ValueError, match="top is -1"):
        log_softmax_top(logits, tokens, -1)
    with pytest.raises(ValueError, match=r"tokens_N has shape \[1\], expected \[2\]"):
        log_softmax_top(logits, tokens[:1], 1)
    with pytest.raises(ValueError, match="no columns"):
        log_softmax_top(logits[:, :0].contiguous(), tokens, 0)
