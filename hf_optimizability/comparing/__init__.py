# SPDX-License-Identifier: Apache-2.0
"""Which candidate to take: fine-tunes each under one equal budget, and ranks them as far as they can be told apart."""
