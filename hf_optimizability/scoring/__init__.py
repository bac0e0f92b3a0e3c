# SPDX-License-Identifier: Apache-2.0
"""Transferability scores, before any training."""
