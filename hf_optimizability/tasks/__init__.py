# SPDX-License-Identifier: Apache-2.0
"""From the names of a checkpoint and a data set to what a Trainer takes, by task: for the command and the recipes.

Importing a module of this package imports `datasets` and `evaluate`.
"""
