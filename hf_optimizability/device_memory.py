# SPDX-License-Identifier: Apache-2.0
"""Free memory of a device."""

from __future__ import annotations

import os

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on a host, the share of each process that a launcher started there."""
    if device.type == "cuda":  # what torch keeps to give out again is free to us
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
