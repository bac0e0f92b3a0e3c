# SPDX-License-Identifier: Apache-2.0
"""One measurement, from the objective to its results."""
