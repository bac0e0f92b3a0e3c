# SPDX-License-Identifier: Apache-2.0
"""Matrices of a loss, as symmetric operators."""
