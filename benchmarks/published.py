# SPDX-License-Identifier: Apache-2.0
r"""Writes `docs/published.md`: the numbers of the reports in `model_cards/`, with their intervals.

    python benchmarks/published.py

Cards and pages of these reports are rendered again, from each `report.json`. What the reports do not know, where
checkpoints and data come from, is in `model_cards/sources.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_optimizability.files import write_atomically
from hf_optimizability.measurement.results import Measurement
from hf_optimizability.number_format import (
    MISSING,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
)
from hf_optimizability.publishing.model_card import with_report
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.markdown import CARD_FOLDER, escape


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "published.md"

INTRODUCTION = """# Published measurements

Trace, largest and smallest eigenvalue of the loss Hessian, and gradient noise scale, of named checkpoints on named
data sets: before the first step, with a new head, new LoRA matrices or random weights, and after the last.
`python benchmarks/published.py` wrote this page from the reports in [model_cards](../model_cards), where each has its
card and its settings. To make one of them again:

```console
$ python recipes/text_classification.py model_cards/minilm-l6-movie-reviews/settings.json
```

The Hessian is that of the mean loss over the probe set, not over the training set, in eval mode, by the trainable
parameters. In parentheses: 95 % intervals, for these examples; of the noise scale, in examples, over batches. "Over
data" is the standard error of the trace as a number of the training set (jackknife over batches). † Not converged:
the interval is wider than asked for. All of it is local, and of one seed: another head starts elsewhere."""


def page(folder: Path) -> str:
    """Return the page, from the reports of the cards in a folder."""
    reports = {
        path.parent.parent.name: OptimizabilityReport.load(path) for path in sorted(folder.glob("*/*/report.json"))
    }
    sources: dict[str, Any] = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    named = {name for report in reports.values() for name in origins(report)}
    lines = [
        INTRODUCTION,
        "## Before and after",
        _table(
            ["Checkpoint", "Data set", "Step", "Loss", "Trace", "Over data", "λ_max", "λ_min", "Noise scale"],
            [row for report in reports.values() for row in _measured(report)],
            words=2,
        ),
        "## How each was measured",
        _table(
            ["Card", "Parameters", "Probe set", "Products", "Training", "Accuracy at the end"],
            [_setting(name, report) for name, report in reports.items()],
            words=1,
        ),
        "## Where checkpoints and data come from",
        _table(
            ["Name", "Origin", "Licence", "File", "SHA-256"],
            [_source(name, source) for name, source in sources.items() if name in named],
            words=5,
        ),
        *(
            f"{escape(name)}: {source['note']}."
            for name, source in sources.items()
            if name in named and "note" in source
        ),
    ]
    return "\n\n".join(lines) + "\n"


def origins(report: OptimizabilityReport) -> list[str]:
    """Return the checkpoint, or both of a dual encoder, and the data set."""
    return [*report.model.id.split(" + "), report.data.dataset or ""]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Return a table whose first columns hold words, and the others numbers."""
    rule = [":--" if column < words else "--:" for column in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def _measured(report: OptimizabilityReport) -> Iterator[list[str]]:
    for measurement in (report.measurements[0], report.measurements[-1]):
        names = [escape(report.model.id), escape(report.data.dataset or "")]
        yield [*names, f"{measurement.step:,}", format_number(measurement.loss), *_estimates(measurement)]


def _estimates(measurement: Measurement) -> list[str]:
    hessian, noise = measurement.hessian, measurement.noise_scale
    over_data = hessian.trace.data_std_error
    return [
        format_estimate(hessian.trace),
        format_number(over_data, digits=2),
        format_estimate(hessian.lambda_max),
        format_estimate(hessian.lambda_min),
        MISSING if noise is None else format_interval(noise.value, noise.low, noise.high, nonnegative=True),
    ]


def _setting(name: str, report: OptimizabilityReport) -> list[str]:
    last, probe, training = report.measurements[-1], report.data.probe, report.training
    accuracy = [entry["eval_accuracy"] for entry in report.log_history if "eval_accuracy" in entry]
    return [
        f"[{escape(name)}](../model_cards/{name}/README.md)",
        f"{report.model.trainable_parameters:,}",
        f"{last.num_items} items in {probe.batches} batches, {escape(probe.fingerprint)}",
        f"{escape(last.engine)}, {last.dtype}",
        f"{training['max_steps']} steps of {training['optimizer']} at {training['learning_rate']:g}, "
        f"{training['examples_per_step']} examples each",
        format_percent(accuracy[-1]) if accuracy else MISSING,
    ]


def _source(name: str, source: dict[str, Any]) -> list[str]:
    return [escape(name), f"[{source['origin'].removeprefix('../').removeprefix('https://')}]({source['origin']})",
            source["licence"], f"`{source['file']}`", f"`{source['sha256']}`"]  # fmt: skip


def render(card: Path) -> None:
    """Write a card's section, and the files that its report links to, as this version renders them."""
    folder = card.parent / CARD_FOLDER
    report = OptimizabilityReport.load(folder)
    report.save(folder)
    for file in folder.glob("*.svg"):
        file.unlink()
    files = [file.name for file in folder.iterdir()]
    text = with_report(card.read_text(encoding="utf-8"), report, name=card.parent.name, files=files)
    write_atomically(card, text.encode())


def main() -> None:
    """Render the cards and write the page."""
    for card in (ROOT / "model_cards").glob("*/README.md"):
        render(card)
    write_atomically(PAGE, page(ROOT / "model_cards").encode())


if __name__ == "__main__":
    main()
