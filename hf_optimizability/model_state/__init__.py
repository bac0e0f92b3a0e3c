# SPDX-License-Identifier: Apache-2.0
"""Borrow a live model and leave no trace."""
