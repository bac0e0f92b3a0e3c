# SPDX-License-Identifier: Apache-2.0
"""A report on the Hub, beside the model's card."""
