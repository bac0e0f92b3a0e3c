# SPDX-License-Identifier: Apache-2.0
"""Prefix of every key that is logged."""

from __future__ import annotations


PREFIX = "optimizability/"
"""Before every key that is logged, so that none collides with the Trainer's."""
