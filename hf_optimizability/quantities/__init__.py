# SPDX-License-Identifier: Apache-2.0
"""Numbers about a loss beyond its Hessian's spectrum."""
