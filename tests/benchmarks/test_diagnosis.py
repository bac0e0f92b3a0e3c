# SPDX-License-Identifier: Apache-2.0
"""The page on runs that differ in one thing says what was measured; noise in labels is as much as it says."""

from __future__ import annotations

import json

import diagnosis
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value


def test_the_page_has_the_table():
    results = json.loads(diagnosis.RESULTS.read_text())
    assert list(results) == list(diagnosis.CASES)
    page = (diagnosis.PICTURE.parents[1] / "diagnosis.md").read_text(encoding="utf-8")
    assert diagnosis.table(results) in page
    assert all(f"{100 * held['accuracy']:.1f}" in page for held in results.values())


def test_noise_replaces_a_share_of_the_labels_and_nothing_else():
    features = Features(at=Value("int64"), digit=ClassLabel(num_classes=10))
    columns = {"at": list(range(5000)), "digit": [at % 10 for at in range(5000)]}
    clean = Dataset.from_dict(columns, features=features).with_transform(lambda rows: {"doubled": rows["at"]})
    noisy = diagnosis.with_noise(clean, "digit")
    assert noisy[3:5] == {"doubled": [3, 4]}
    plain = noisy.with_format(None)
    changed = np.array(plain["digit"]) != np.array(columns["digit"])
    assert abs(changed.mean() - diagnosis.NOISE * 0.9) < 4 * np.sqrt(0.36 * 0.64 / 5000)
    assert plain["at"][:] == columns["at"] and plain.features == features
