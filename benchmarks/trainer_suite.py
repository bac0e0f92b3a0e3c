# SPDX-License-Identifier: Apache-2.0
"""Transformers' own tests of its Trainer, run with a Trainer that measures in its place.

    python benchmarks/trainer_suite.py --checkout path/to/transformers

runs `tests/trainer` of a checkout three times: as it is, with `OptimizabilityTrainer` in place of `Trainer`, and
with `OptimizabilityCallback` added to every Trainer, and says which tests pass as they are and not with measuring. It
works on a copy, without network. Models that the tests download are tiny ones made here, under the same names.
This file is the pytest plugin of the three runs as well. The tests need `parameterized`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


RESULTS = Path(__file__).parent / "results" / "trainer_suite"
RUNS = ("plain", "trainer", "callback")
LEFT_OUT = ("distributed", "test_data_collator.py")  # several processes and GPUs; no Trainer
COUNTS = {
    "test_custom_callback_added_at_init": "compares the list of all callbacks",
    "test_default_callbacks_are_present": "compares the list of all callbacks",
    "test_printer_callback_when_tqdm_disabled": "compares the list of all callbacks",
    "test_event_flow": "compares the list of all events",
    "test_best_model_checkpoint_behavior": "counts what is in the output folder",
    "test_save_best_checkpoint": "counts what is in the output folder",
}
"""Tests that count callbacks, events or files, of which measuring adds one."""

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Lets glibc keep the memory of large tensors: where page faults are slow, passes take half the time."""

_RUN, _OUTCOMES = "TRAINER_SUITE_RUN", "TRAINER_SUITE_OUTCOMES"


# The plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the checkout's own conftest, which is not loaded: torch refuses its way to set TF32."""
    import transformers.testing_utils

    transformers.testing_utils.pytest_addoption_shared(parser)
    if os.environ[_RUN] != "plain":
        measure_everywhere(os.environ[_RUN])


def measure_everywhere(run: str) -> None:
    """Put a measuring Trainer in place of `Trainer`, or the callback into every Trainer."""
    from transformers import Trainer, trainer

    from hf_optimizability import (
        OptimizabilityCallback,
        OptimizabilityConfig,
        OptimizabilityReport,
        OptimizabilityTrainer,
    )

    config = functools.partial(OptimizabilityConfig, profile="light", max_hvps=16)
    OptimizabilityReport.save = OptimizabilityReport.save_json  # type: ignore[method-assign]  # no pictures
    if run == "trainer":

        class Measuring(OptimizabilityTrainer):
            @functools.wraps(OptimizabilityTrainer.__init__)
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, optimizability=config(), **kwargs)

        # What `import transformers` binds may be another object than the lazy module that represents it.
        sys.modules["transformers"].Trainer = trainer.Trainer = Measuring  # type: ignore[attr-defined,misc]
        return
    construct = Trainer.__init__

    @functools.wraps(construct)
    def constructed(self: Trainer, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.add_callback(OptimizabilityCallback(config()))

    Trainer.__init__ = constructed  # type: ignore[method-assign]


class Outcomes:
    """Takes down how each test ended."""

    def __init__(self, path: Path):
        self.path = path
        self.by_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of setup, call and teardown."""
        if report.when == "call" or report.outcome != "passed":
            self.by_test[report.nodeid] = "error" if report.failed and report.when != "call" else report.outcome

    def pytest_sessionfinish(self) -> None:
        """Write all down."""
        self.path.write_text(json.dumps(self.by_test))


def pytest_configure(config: pytest.Config) -> None:
    """Take down the outcomes of this run."""
    config.pluginmanager.register(Outcomes(Path(os.environ[_OUTCOMES])))


# The command


def main() -> None:
    """Run the three and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="Folder of a checkout of Transformers.")
    parser.add_argument("--only", default="", help="Expression for pytest's `-k`, to run some of the tests.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Files to write, without their suffix.")
    parser.add_argument(
        "--seconds", type=int, default=1800, help="Limit of one test; measuring takes minutes on one core."
    )
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        suite, models = Path(folder, "suite"), Path(folder, "models")
        for part in ("tests/trainer", "tests/fixtures"):
            shutil.copytree(options.checkout / part, suite / part)
        for file in ("tests/__init__.py", "pyproject.toml"):
            shutil.copy(options.checkout / file, suite / file)
        make_stand_ins(models)
        for run in RUNS:
            found[run] = outcomes(run, suite, models, only=options.only, seconds=options.seconds)
            print(f"{run}: {counted(found[run])}", flush=True)
    options.results.with_suffix(".json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    page = to_markdown(found)
    options.results.with_suffix(".md").write_text(page)
    print(page)


def outcomes(run: str, suite: Path, models: Path, *, only: str, seconds: int) -> dict[str, str]:
    """Return how each test ended in one run, by its name."""
    path = suite.parent / f"{run}.json"
    here = Path(__file__).resolve().parent
    places = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, _RUN: run, _OUTCOMES: str(path), "PYTHONPATH": os.pathsep.join(places)}
    environment |= {"HF_HOME": str(models), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **MALLOC}
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "--noconftest", "-p", "no:cacheprovider"]
    command += ["-q", f"--timeout={seconds}", "-o", "log_cli=0", "--continue-on-collection-errors", "-k", only]
    command += [option for name in LEFT_OUT for option in ("--ignore", f"tests/trainer/{name}")]
    subprocess.run([*command, "tests/trainer"], cwd=suite, env=environment, stdout=subprocess.DEVNULL, check=False)
    held: dict[str, str] = json.loads(path.read_text())
    return held


def counted(found: dict[str, str]) -> str:
    """Return how many tests ended in which way."""
    ends = list(found.values())
    return ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))


def differences(found: dict[str, dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield the tests that pass as they are and not with measuring: how measured, the test, and how it ended."""
    for run in RUNS[1:]:
        for test, end in sorted(found["plain"].items()):
            measured = found[run].get(test, "missing")
            if end == "passed" and measured != "passed":
                yield run, test, measured


def to_markdown(found: dict[str, dict[str, str]]) -> str:
    """Return the page: how many tests pass, and each that does not with measuring."""
    passed = {run: list(held.values()).count("passed") for run, held in found.items()}
    lines = [
        "# Transformers' tests of its Trainer, with measuring",
        "",
        f"{passed['plain']} of {len(found['plain'])} tests pass as they are, without network; "
        f"{passed['trainer']} with `OptimizabilityTrainer` in the place of `Trainer`, {passed['callback']} with "
        "`OptimizabilityCallback` in every Trainer (profile `light`, 16 products, no pictures).",
        "",
        "| with | test that does not pass | why |",
        "|:--|:--|:--|",
    ]
    for run, test, _ in differences(found):
        name = test.rpartition("::")[2]
        lines.append(f"| {run} | `{name}` | {COUNTS.get(name, 'not known')} |")
    return "\n".join([*lines, "", "Made by `benchmarks/trainer_suite.py`.", ""])


# Tiny models under the names of those that the tests download


def make_stand_ins(home: Path) -> None:
    """Write tiny models and tokenizers into a cache of the Hub's, under the names that the tests ask for."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertTokenizer,
        CLIPImageProcessor,
        CLIPProcessor,
        LlamaConfig,
        LlamaForCausalLM,
        Wav2Vec2FeatureExtractor,
    )

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "vocab_size": 128}
    bert = BertForSequenceClassification(BertConfig(**size))
    llama = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2))
    for name in ("bert-base-cased", "google-bert/bert-base-uncased", "prajjwal1/bert-tiny"):
        _cached(home, name, bert, tokenizer)
    for name in ("hf-internal-testing/tiny-random-LlamaForCausalLM", "nickypro/tinyllama-15M"):
        _cached(home, name, llama, tokenizer)
    images = CLIPImageProcessor()
    _cached(home, "openai/clip-vit-base-patch32", images, tokenizer, CLIPProcessor(images, tokenizer))
    _cached(home, "facebook/wav2vec2-base-960h", Wav2Vec2FeatureExtractor())


def _cached(home: Path, name: str, *parts: Any) -> None:
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    for part in parts:
        part.save_pretrained(folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)


if __name__ == "__main__":
    main()
