# SPDX-License-Identifier: Apache-2.0
"""Estimators for any symmetric operator. No model, no loss."""
