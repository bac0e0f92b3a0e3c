# SPDX-License-Identifier: Apache-2.0
"""Does `compare` rank pretrained checkpoints above random weights, and keep two copies of one apart from neither?

Each case is one call of `hf_optimizability.compare` with three seeds. "Copies" has six, and ranks every choice of
three of a candidate's seeds against its other three, as if they were two candidates: in truth there is no difference,
so that a significant difference is an error. At 0.95 either way, no more than one such error in ten is promised.

    python benchmarks/comparing.py [--only NAME ...] [--text-checkpoint FOLDER] [--fashion-mnist FOLDER]

continues where it was killed, and writes `benchmarks/results/comparing.json` and the page next to it. The second
checkpoint for text is paraphrase-MiniLM-L3-v2; Fashion-MNIST's four idx files are those of the Debian package
dataset-fashion-mnist, a link to whose folder is `out/benchmarks/fashion-mnist`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from workloads import CACHE, TEXT_CHECKPOINT, TEXT_DATA, VISION_CHECKPOINT, VISION_DATA

from hf_optimizability import Comparison, compare
from hf_optimizability.comparing.ranking import CONFIDENCE, paired_bootstrap, rank
from hf_optimizability.files import write_atomically


RESULTS = Path(__file__).parent / "results" / "comparing.json"
RANDOM = {"random_weights": True}
COMMON: dict[str, Any] = {
    "seeds": 3, "max_eval_samples": 500, "warmup_steps": 10, "dataloader_pin_memory": False, "save_seconds": 30,
    "report_to": "none", "max_hvps": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "dataset_name": str(TEXT_DATA), "text_column_name": ["sentence"], "max_seq_length": 24, "budget_steps": 60,
    "max_train_samples": 960, "max_eval_samples": 300, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64, "learning_rate": 1e-4, "warmup_steps": 6, "measured_seeds": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_name_or_path": str(VISION_CHECKPOINT), "config_overrides": "classifier_dropout_prob=0.2",
    "batch_norm_momentum": 0.1, "image_size": 32, "budget_steps": 80, "max_train_samples": 2560,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100, "learning_rate": 1e-3,
    "probe_examples": 32, "probe_batch_size": 16,
}  # fmt: skip


def sentences(args: argparse.Namespace) -> Comparison:
    """MiniLM-L6 and -L3, and both with random weights, on movie sentences."""
    pretrained = {"MiniLM-L6": str(TEXT_CHECKPOINT), "MiniLM-L3": args.text_checkpoint}
    candidates = [
        {"name": f"{name}{ending}", "model_name_or_path": path, **changes}
        for ending, changes in {"": {}, ", random weights": RANDOM}.items()
        for name, path in pretrained.items()
    ]
    return compare(candidates, **{**COMMON, **TEXT}, output_dir=str(CACHE / "comparing" / "sentences"))


def mnist(args: argparse.Namespace) -> Comparison:
    """MobileNetV2, pretrained on ImageNet, a copy of it, and random weights, on MNIST."""
    candidates = [
        {"name": "MobileNetV2"},
        {"name": "MobileNetV2, a copy"},
        {"name": "MobileNetV2, random weights", **RANDOM},
    ]
    data = {"dataset_name": str(VISION_DATA), "output_dir": str(CACHE / "comparing" / "mnist")}
    return compare(candidates, **COMMON, **VISION, **data)


def fashion_mnist(args: argparse.Namespace) -> Comparison:
    """MobileNetV2, pretrained on ImageNet and with random weights, on Fashion-MNIST."""
    folder = CACHE / "comparing" / "fashion_mnist_data"
    if not (folder / "test.parquet").exists():
        to_parquet(Path(args.fashion_mnist), folder)
    candidates = [{"name": "MobileNetV2"}, {"name": "MobileNetV2, random weights", **RANDOM}]
    data = {"dataset_name": str(folder), "output_dir": str(CACHE / "comparing" / "fashion_mnist")}
    options = {**COMMON, **VISION, "measured_seeds": 0, "budget_steps": 60, "max_eval_samples": 300}
    return compare(candidates, **options, **data)


def copies(args: argparse.Namespace) -> Comparison:
    """MobileNetV2 on MNIST with six seeds, three of which are those of above."""
    candidates = [{"name": "MobileNetV2"}, {"name": "MobileNetV2, random weights", **RANDOM}]
    data = {"dataset_name": str(VISION_DATA), "output_dir": str(CACHE / "comparing" / "mnist")}
    return compare(candidates, **{**COMMON, **VISION, "seeds": 6}, **data)


CASES: dict[str, Callable[[argparse.Namespace], Comparison]] = {
    "sentences": sentences,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "copies": copies,
}


def to_parquet(source: Path, folder: Path) -> None:
    """Write Fashion-MNIST's idx files as Parquet files of images."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features(image=Image(), label=ClassLabel(num_classes=10))
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images = np.frombuffer(gzip.decompress((source / f"{prefix}-images-idx3-ubyte.gz").read_bytes()), np.uint8)
        labels = np.frombuffer(gzip.decompress((source / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)
        pixels = images[16:].reshape(-1, 28, 28)[:5000]  # 16 and 8 bytes hold the sizes
        columns = {"image": list(pixels), "label": labels[8:5008].tolist()}
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def splits(comparison: Comparison) -> list[dict[str, Any]]:
    """Each candidate against itself: three of its seeds as one candidate, the others as another."""
    found = []
    for entry in comparison.entries:
        runs = [run for run in entry.runs if run.scores is not None]
        for first in combinations(range(1, len(runs)), len(runs) // 2 - 1):  # with seed 0, so that each split is once
            one = [0, *first]
            halves = [one, [index for index in range(len(runs)) if index not in one]]
            for quality in ("accuracy", "loss"):
                scores = np.array([[runs[index].scores.of(quality) for index in half] for half in halves])
                means = scores.mean(axis=(1, 2)).tolist()
                ranking = rank(["a", "b"], means, paired_bootstrap(scores), greater_is_better=quality == "accuracy")
                found.append({"candidate": entry.name, "quality": quality, "probability": ranking.better[0][1]})
    return found


def described(comparison: Comparison) -> dict[str, Any]:
    """Return the rankings, without the scores and logs they come from."""
    return {
        "setting": comparison.setting.to_dict(),
        "verdict": comparison.summary(),
        **{quality: asdict(comparison.by(quality)) for quality in ("accuracy", "loss")},
        "train_seconds": {entry.name: [run.train_seconds for run in entry.runs] for entry in comparison.entries},
    }


def table(results: dict[str, Any]) -> str:
    """All cases as Markdown."""
    lines = ["# Which candidate to take", "", "What `python benchmarks/comparing.py` found.", ""]
    for name, result in results.items():
        lines += [f"## {CASES[name].__doc__}", "", _setting(result["setting"]), ""]
        lines += ["| rank | candidate | accuracy, % | loss | P(better than the next) |", "|--:|:--|--:|--:|--:|"]
        accuracy, loss = result["accuracy"], result["loss"]
        for at, candidate in enumerate(accuracy["names"]):
            here = loss["names"].index(candidate)
            following = f"{accuracy['better'][at][at + 1]:.4f}" if at + 1 < len(accuracy["names"]) else "–"
            cells = [_interval(accuracy, at, 100, 1), _interval(loss, here, 1, 3), following]
            lines.append(f"| {accuracy['group'][at]} | {candidate} | {' | '.join(cells)} |")
        lines.append("")
        if "splits" in result:
            lines += [_splits(result["splits"]), ""]
    return "\n".join(lines)


def _setting(setting: dict[str, Any]) -> str:
    budget = setting["budget"]
    return (
        f"{budget['amount']:g} {budget['unit']}, seeds {setting['seeds']}, {setting['examples']} evaluation examples."
    )


def _interval(ranking: dict[str, Any], at: int, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * ranking[name][at]:.{digits}f}" for name in ("values", "low", "high"))
    return f"{value} ({low} to {high})"


def _splits(found: list[dict[str, Any]]) -> str:
    """Count the splits of one candidate's seeds that differ significantly."""
    told = sum(max(one["probability"], 1 - one["probability"]) >= CONFIDENCE for one in found)
    return f"Three seeds of a candidate against its other three: {told} of {len(found)} splits were ranked apart."


def main() -> None:
    """Run the requested cases, and write all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--text-checkpoint", default="paraphrase-MiniLM-L3-v2")
    parser.add_argument("--fashion-mnist", default=str(CACHE / "fashion-mnist"))
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.only:
        comparison = CASES[name](args)
        print(comparison.summary(), flush=True)
        results[name] = described(comparison)
        if name == "copies":
            results[name]["splits"] = splits(comparison)
        results = {case: results[case] for case in CASES if case in results}
        write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(RESULTS.with_suffix(".md"), table(results).encode())


if __name__ == "__main__":
    main()
