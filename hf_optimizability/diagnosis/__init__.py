# SPDX-License-Identifier: Apache-2.0
"""What the numbers and the log mean."""
