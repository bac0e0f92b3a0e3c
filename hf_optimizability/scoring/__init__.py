# SPDX-License-Identifier: Apache-2.0
"""What can be told of a checkpoint for a task before any training: cheap scores, each with its error and its cost."""
