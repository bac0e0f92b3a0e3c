# SPDX-License-Identifier: Apache-2.0
"""Estimators for any symmetric operator; they know no model and no loss."""
