# SPDX-License-Identifier: Apache-2.0
"""The loss over batches, the probe set it is taken over, and blocks of parameters."""
