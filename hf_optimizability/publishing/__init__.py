# SPDX-License-Identifier: Apache-2.0
"""A report on the Hub, with its section in the model card."""
