# SPDX-License-Identifier: Apache-2.0
"""Everything that knows the Trainer of Transformers."""
