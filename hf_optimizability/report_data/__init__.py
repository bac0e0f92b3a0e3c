# SPDX-License-Identifier: Apache-2.0
"""What a report holds: fields, schema, series, formatted numbers."""
