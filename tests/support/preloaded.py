# SPDX-License-Identifier: Apache-2.0
"""What the processes of tests find imported, with the files of tests that they would import to find a function."""

from __future__ import annotations

import gc
from importlib import import_module


for name in (
    "hf_optimizability.tasks.fine_tuning",
    "hf_optimizability.training.trainer",
    "tests.distributed.test_ddp_training",
    "tests.distributed.test_fsdp",
    "tests.integration.test_docs",
):
    import_module(name)

# Each Trainer collects garbage, which takes longer than its steps where all of this is looked through.
gc.collect()
gc.freeze()
