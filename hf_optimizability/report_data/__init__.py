# SPDX-License-Identifier: Apache-2.0
"""The data of a report: fields, schema, series, formatted numbers."""
