# SPDX-License-Identifier: Apache-2.0
"""Processes for tests, forked from one that has imported what takes seconds.

There is one such process in all: whoever needs it first decides what it imports, so that all take it from here.
"""

from __future__ import annotations

import multiprocessing


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.preloaded"])
