# SPDX-License-Identifier: Apache-2.0
"""Connectionist temporal classification (CTC) in operations that can be differentiated twice; torch's kernel can't."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


UNREACHABLE = -1e30
"""Log-probability of what can't be reached: finite, since the derivative of a sum of infinite ones is not a number."""


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor | None:
    """Return `torch.nn.functional.ctc_loss`, with its names; `None` for inputs without a batch, left to torch.

    The forward algorithm in log space (Graves et al. 2006, section 4.1), one frame after the other: the sum over all
    ways to stay at a symbol, to move to the next, or to skip a blank between two different labels.

    Example:
        >>> log_probs = torch.randn(5, 1, 4, dtype=torch.float64).log_softmax(-1)
        >>> arguments = log_probs, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
        >>> bool(torch.isclose(ctc_loss(*arguments), F.ctc_loss(*arguments)))
        True
    """
    if log_probs.dim() != 3:
        return None
    device = log_probs.device
    frames, labels = (torch.as_tensor(lengths, device=device).long() for lengths in (input_lengths, target_lengths))
    symbols = _between_blanks(_one_row_each(targets.to(device).long(), labels), blank)
    may_skip = F.pad((symbols[:, 2:] != blank) & (symbols[:, 2:] != symbols[:, :-2]), (2, 0))
    emitted = log_probs.gather(2, symbols.expand(len(log_probs), -1, -1))
    start = torch.arange(symbols.shape[1], device=device) < 2
    alpha = torch.where(start, emitted[0], UNREACHABLE)
    for time in range(1, len(emitted)):
        stay, step, skip = alpha, _shifted(alpha, 1), torch.where(may_skip, _shifted(alpha, 2), UNREACHABLE)
        reached = torch.stack([stay, step, skip]).logsumexp(0) + emitted[time]
        alpha = torch.where((time < frames)[:, None], reached, alpha)
    last = alpha.gather(1, torch.stack([2 * labels, (2 * labels - 1).clamp_min(0)], dim=1))
    ends = torch.stack([last[:, 0], torch.where(labels > 0, last[:, 1], UNREACHABLE)]).logsumexp(0)
    impossible = ends < UNREACHABLE / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else torch.inf, -ends)
    if reduction == "mean":
        return (losses / labels.clamp_min(1)).mean()
    return losses.sum() if reduction == "sum" else losses


def _one_row_each(targets: Tensor, lengths: Tensor) -> Tensor:
    """Return the labels of each example in a row of its own, where they come one after the other."""
    if targets.dim() == 2:
        return targets
    rows = targets.split(lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _between_blanks(labels: Tensor, blank: int) -> Tensor:
    """Return the labels with a blank before, between and after them."""
    symbols = labels.new_full((len(labels), 2 * labels.shape[1] + 1), blank)
    symbols[:, 1::2] = labels
    return symbols


def _shifted(alpha: Tensor, places: int) -> Tensor:
    """Return what is so many symbols before each."""
    return F.pad(alpha, (places, 0), value=UNREACHABLE)[:, : alpha.shape[1]]
