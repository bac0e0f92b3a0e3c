# SPDX-License-Identifier: Apache-2.0
"""Curvature numerics: products, operators and estimators. Nothing in here knows of a Trainer or a report."""
