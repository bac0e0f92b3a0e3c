# SPDX-License-Identifier: Apache-2.0
"""Process groups, sharded parameters, and what is not supported."""
