# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, writes and ends with, and what it says of a user's mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_optimizability import OptimizabilityReport, cli
from hf_optimizability.number_format import format_estimate
from tests.support import tiny_texts
from tests.support.example_report import make_report


ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "run", "measure", "compare", "report", "push", "schema")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HF_DEBUG", raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return tiny_texts.save_checkpoint(tmp_path / "tiny-bert")


@pytest.fixture
def arguments(checkpoint: str, tmp_path: Path) -> str:
    return save_arguments(checkpoint, tmp_path)


def save_arguments(checkpoint: str, folder: Path) -> str:
    """Writes a JSON file of a run that takes a second."""
    data = tiny_texts.save_data(folder / "data.parquet")
    values = {
        "model_name_or_path": checkpoint, "train_file": data, "validation_file": data,
        "text_column_name": ["sentence"], "ignore_mismatched_sizes": True, "cache_dir": str(folder / "cache"),
        "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "profile": "light",
        "probe_examples": 4, "max_hvps": 16, "pool_examples": 0, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    file = folder / "arguments.json"
    file.write_text(json.dumps(values))
    return str(file)


class Ran(NamedTuple):
    """What `run --json` was given, printed, and wrote."""

    arguments: str
    result: Any
    output: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    arguments = save_arguments(tiny_texts.save_checkpoint(folder / "tiny-bert"), folder)
    result = invoke("run", "--json", arguments, "--output_dir", str(folder / "out"))
    return Ran(arguments, result, folder / "out")


def invoke(*args: str, **options: Any) -> Any:
    return CliRunner().invoke(cli.app, args, prog_name="hf-optimizability", **options)


def succeed(*args: str) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: str, code: int) -> str:
    """What stderr ends with, once it is known to be no traceback."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.rpartition("Error: ")[2].split())


def test_help_names_every_command_and_the_exit_codes() -> None:
    printed = succeed("--help")
    assert set(COMMANDS) == set(re.findall(r"^  (\w+)  ", printed.partition("Commands:")[2], flags=re.MULTILINE))
    assert "0 success; 1 the work failed; 2" in " ".join(printed.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    printed = succeed(command, "--help")
    assert printed.startswith(f"Usage: hf-optimizability {command}")
    assert f"hf-optimizability {command}" in printed.partition("Example")[2]


def test_the_examples_use_flags_that_there_are() -> None:
    documents = [(ROOT / f"docs/{name}.md").read_text() for name in ("command", "compare")]
    texts = [*documents, *(succeed(command, "--help") for command in COMMANDS)]
    examples = [line.split() for text in texts for line in command_lines(text)]
    assert {words[0] for words in examples} == set(COMMANDS)
    tasks = ("text-classification", "image-classification")
    passed_on = {name: [succeed(name, "--task", task, "--flags") for task in tasks] for name in ("run", "compare")}
    passed_on |= dict.fromkeys(("demo", "measure"), passed_on["run"])
    for command, *words in examples:
        known = "\n".join([succeed(command, "--help"), *passed_on.get(command, [])])
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), f"{command} {flag}"


def test_the_forecast_in_the_documents() -> None:
    Path("recipes").symlink_to(ROOT / "recipes")
    text = (ROOT / "docs/command.md").read_text()
    (line,) = (line for line in command_lines(text) if line.startswith("measure ") and "recipes/" in line)
    printed = succeed(*line.split())
    assert printed.partition(", ")[0] in text and printed.startswith("at most 32 Hessian-vector products")


def command_lines(text: str) -> list[str]:
    """What stands behind the command's name on the lines that begin with it."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"^\s*(?:Example: )?hf-optimizability ([a-z].*)$", joined, flags=re.MULTILINE)


def test_flags_lists_those_of_data_training_and_measurement() -> None:
    printed = succeed("run", "--task", "image-classification", "--flags")
    for flag in ("--train_dir", "--learning_rate", "--max_hvps", "--batch_norm_momentum"):
        assert f"{flag} " in printed
    assert "--max_seq_length" not in printed


def test_completion_knows_commands_and_options() -> None:
    for words, offered in {
        "hf-optimizability me": {"measure"},
        "hf-optimizability measure --f": {"--forecast"},
    }.items():
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = invoke(env={"_HF_OPTIMIZABILITY_COMPLETE": "complete_bash", **environment})
        assert offered <= set(result.stdout.split())


def test_run_trains_and_reports(arguments: str) -> None:
    printed = succeed("run", arguments, "--output_dir", "out", "--max_hvps", "17")
    assert "Hessian trace" in printed
    assert printed.endswith("Report: out/optimizability/report.md\n")
    report = OptimizabilityReport.load("out/optimizability")
    assert [measurement.step for measurement in report.measurements] == [0, 1]
    assert report.training["learning_rate"] == 1e-3
    assert report.config["max_hvps"] == 17  # the flag, not the file
    assert json.loads(Path("out/all_results.json").read_text()).keys() >= {"train_loss", "eval_accuracy"}
    assert Path("out/model.safetensors").exists() and Path("out/optimizability/report.md").exists()


def test_run_prints_json_and_nothing_else(ran: Ran) -> None:
    printed = json.loads(ran.result.stdout)
    assert printed["report_folder"] == str(ran.output / "optimizability")
    assert printed["report"] == json.loads((ran.output / "optimizability/report.json").read_text())
    assert "train metrics" in ran.result.stderr


def test_measure_finds_what_run_finds_before_its_first_step(ran: Ran) -> None:
    measured = json.loads(succeed("measure", "--json", ran.arguments))
    assert measured["report_folder"] is None
    assert list(Path().iterdir()) == []
    first = json.loads((ran.output / "optimizability/report.json").read_text())
    assert measured["report"]["data"] == first["data"]
    (alone,) = measured["report"]["measurements"]
    start = first["measurements"][0]
    for name in ("loss", "grad_norm", "num_items"):
        assert alone[name] == pytest.approx(start[name], rel=1e-6)


def test_measure_prints_a_table_and_keeps_earlier_reports(arguments: str) -> None:
    for _ in range(2):
        printed = succeed("measure", arguments, "--pool_examples", "16", "--output_dir", "out")
    report = OptimizabilityReport.load("out/optimizability")
    trace = format_estimate(report.measurements[0].hessian.trace)
    assert f"\nHessian trace         {trace}\n" in printed
    assert f"\nOf the training loss over all {report.data.train_examples} examples; " in printed
    assert printed.endswith("Report: out/optimizability/report.md\n")
    assert Path("out/optimizability/report-1.json").exists()


def test_forecast_says_the_price_and_measures_nothing(arguments: str) -> None:
    assert succeed("measure", arguments, "--forecast").startswith("at most 16 Hessian-vector products with ")
    price = json.loads(succeed("measure", arguments, "--forecast", "--json", "--output_dir", "out"))
    assert price["hvps"] == 16 and price["seconds"] > 0
    assert not Path("out").exists()


def test_a_trained_checkpoint_keeps_its_order_of_the_classes(ran: Ran) -> None:
    shutil.copytree(ran.output, "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["label2id"] == {"bad": 0, "good": 1}
    weights = load_file("out/model.safetensors")

    def loss() -> float:
        measured = json.loads(succeed("measure", "--json", ran.arguments, "--model_name_or_path", "out"))
        return measured["report"]["measurements"][0]["loss"]

    as_trained = loss()
    exchanged = {name: weights[name].flip(0).contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file({**weights, **exchanged}, "out/model.safetensors", metadata={"format": "pt"})
    assert loss() != pytest.approx(as_trained, rel=1e-4)
    names = {"label2id": {"GOOD": 0, "BAD": 1}, "id2label": {"0": "GOOD", "1": "BAD"}}
    Path("out/config.json").write_text(json.dumps({**config, **names}))  # says what the outputs are now
    assert loss() == pytest.approx(as_trained, rel=1e-5)


def test_report_renders_again(tmp_path: Path) -> None:
    make_report(2).save("folder")
    text, numbers = (Path("folder", name).read_text() for name in ("report.md", "report.json"))
    for name in ("report.md", "loss.png"):
        Path("folder", name).unlink()
    assert succeed("report", "folder").endswith("Report: folder/report.md\n")
    assert Path("folder/report.md").read_text() == text
    assert Path("folder/loss.png").exists()
    assert Path("folder/report.json").read_text() == numbers
    assert json.loads(succeed("report", "folder", "--json"))["report"] == json.loads(numbers)


def test_a_damaged_report_is_told_and_left_alone() -> None:
    make_report(1).save("folder")
    text = Path("folder/report.md").read_text()
    damaged = Path("folder/report.json").read_text()[:-100]
    Path("folder/report.json").write_text(damaged)
    assert "can't be read as a report" in fail("report", "folder", code=1)
    assert (Path("folder/report.md").read_text(), Path("folder/report.json").read_text()) == (text, damaged)


@pytest.mark.slow  # the recipes that it runs have tests of their own
def test_demo_runs_on_what_comes_along(tmp_path: Path) -> None:
    flags = f"""--image_size 32 --max_steps 1 --max_train_samples 8 --max_eval_samples 4 --probe_examples 2
        --max_hvps 16 --cache_dir {tmp_path} --disable_tqdm true --random_weights true
        --config_overrides depth_multiplier=0.1,min_depth=4"""
    report = json.loads(succeed("demo", "--json", *flags.split()))["report"]
    assert report["model"]["id"] == "mobilenet_v2_1.0" and report["data"]["dataset"] == "mnist_5k"
    assert len(report["measurements"]) == 2
    assert Path("out/demo/vision/optimizability/report.md").exists()


def test_what_the_demo_runs_on_is_installed_with_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    needed = [
        value for value in json.loads((ROOT / cli.DEMO).read_text()).values() if str(value).startswith("recipes/")
    ]
    assert len(needed) == 2
    for folder in [*needed, str(Path(cli.DEMO).parent)]:
        assert f'"share/hf-optimizability/{folder}" = ["{folder}/' in project


def test_a_demo_without_its_data_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEMO", "nowhere.json")
    assert "Reinstall hf-optimizability" in fail("demo", code=1)


def test_schema_is_json() -> None:
    assert json.loads(succeed("schema"))["title"] == "Optimizability report"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tune", "No such command 'tune'"),
        ("run", "required: --model_name_or_path"),
        ("run --task audio", "'audio' is not one of 'text-classification'"),
        ("run ARGUMENTS --learning_rat 1", "There is no argument --learning_rat. Did you mean --learning_rate?"),
        ("run ARGUMENTS --learning_rate fast", "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        (
            "run ARGUMENTS --dataset_name org/data",
            "exactly one of --dataset_name, --train_file; got dataset_name, train",
        ),
        ("run ARGUMENTS --profile heavy", "invalid choice: 'heavy'"),
        ("measure ARGUMENTS --probe_examples 1", "`probe_examples` is 1; it must be at least 2"),
        ("measure nowhere.json", "No such file or directory: 'nowhere.json'"),
        ("measure CHECKPOINT/config.json --task text-classification", "required: --model_name_or_path"),
        ("report nowhere", "'nowhere' does not exist"),
        ("push", "Missing argument 'FOLDER'"),
    ],
)
def test_a_command_line_that_cant_be_understood_ends_with_2(
    line: str, message: str, arguments: str, checkpoint: str
) -> None:
    words = line.replace("ARGUMENTS", arguments).replace("CHECKPOINT", checkpoint).split()
    assert message in fail(*words, code=2)


@pytest.mark.parametrize(
    ("flags", "message", "remedy"),
    [
        ("--model_name_or_path org/nowhere", "The configuration of 'org/nowhere' can't be loaded", "hf auth login"),
        ("--model_name_or_path ./nowhere/at/all", "'./nowhere/at/all' can't be loaded", "Check --model_name_or_path"),
        ("--model_name_or_path .", "Unrecognized model in .", "a local folder made by `save_pretrained`"),
        ("--task image-classification --train_file DATA", "The model of ", "Check --model_name_or_path"),
        (
            "--train_file nowhere.csv --validation_file nowhere.csv",
            "The data set 'nowhere.csv' can't be loaded: Unable to find",
            "Check the path",
        ),
        ("--train_file empty.csv --validation_file empty.csv", "No columns to parse from file", "Check the path"),
        ("--label_column_name stars", "There is no column 'stars', only sentence, label", "pass --label_column_name"),
        ("--label_column_name score", "holds float64 values, not classes", "pass another --label_column_name"),
        ("--text_column_name review", "Can't read the text from ['review']", "as --text_column_name"),
        ("--train_split_name training", "no split 'training', only train", "pass --train_split_name"),
        ("--probe_examples 99", "has only 16 examples, but `probe_examples` is 99", "lower `probe_examples`"),
        ("--blocks nothing.*", "nothing.*", "blocks"),
        ("--output_dir empty.csv", "can't be written there", "Pass a folder"),
    ],
)
def test_work_that_fails_ends_with_1_and_what_to_do(
    flags: str, message: str, remedy: str, arguments: str, tmp_path: Path
) -> None:
    Path("empty.csv").touch()
    if "score" in flags:
        Dataset.from_dict({"sentence": ["a"] * 4, "score": [0.5] * 4}).to_parquet(tmp_path / "data.parquet")
    if "image" in flags:
        values = json.loads(Path(arguments).read_text())
        del values["text_column_name"]
        Path(arguments).write_text(json.dumps(values))
    told = fail("measure", arguments, *flags.replace("DATA", str(tmp_path / "data.parquet")).split(), code=1)
    assert message in told and remedy in told


def test_a_data_set_that_is_out_of_reach_is_told(checkpoint: str) -> None:
    told = fail("measure", "--model_name_or_path", checkpoint, "--dataset_name", "org/data", code=1)
    assert "'org/data' can't be loaded: Couldn't reach" in told and "needs network" in told


def test_weights_that_cant_be_measured(arguments: str, checkpoint: str) -> None:
    file = f"{checkpoint}/model.safetensors"
    weights = {name: torch.full_like(weight, torch.nan) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert "not finite" in fail("measure", arguments, code=1)


def test_a_run_without_any_measurement_ends_with_1(arguments: str, checkpoint: str) -> None:
    test_weights_that_cant_be_measured(arguments, checkpoint)
    assert "nothing could be measured" in fail("run", arguments, "--output_dir", "out", code=1)
    assert Path("out/model.safetensors").exists()


def test_a_bug_is_no_traceback_either_but_for_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Path:
        raise KeyError("lost")

    monkeypatch.setattr(cli, "_demo_root", broken)
    assert invoke("demo").stderr == "Error: KeyError: 'lost'\n`hf-optimizability --debug …` shows the traceback.\n"
    for result in (invoke("--debug", "demo"), invoke("demo", env={"HF_DEBUG": "1"})):
        assert isinstance(result.exception, KeyError) and result.exit_code == 1


@pytest.fixture
def comparison(arguments: str) -> str:
    """A JSON file of a comparison that takes a second."""
    values = json.loads(Path(arguments).read_text())
    for name in ("max_steps", "profile", "disable_tqdm"):
        del values[name]
    Path(arguments).write_text(json.dumps({**values, "budget_steps": 2, "seeds": 1, "measured_seeds": 0}))
    return arguments


def test_compare_ranks_and_goes_on(comparison: str) -> None:
    candidates = ["learning_rate=1e-3", "learning_rate=1e-2,method=linear_probe"]
    printed = succeed("compare", comparison, *candidates, "--output_dir", "out")
    assert re.search(r"^rank +candidate +accuracy +loss", printed, flags=re.MULTILINE)
    assert printed.endswith("Comparison: out/comparison.html\n")
    assert {path.name for path in Path("out").iterdir()} == {
        "comparison.html", "comparison.json", "comparison.md", "runs",
    }  # fmt: skip
    made = {path: path.stat().st_mtime_ns for path in Path("out").rglob("run.json")}
    told = json.loads(succeed("compare", comparison, *candidates, "--output_dir=out", "--seeds=2", "--json"))
    assert told["page"] == "out/comparison.html"
    assert [len(entry["runs"]) for entry in told["comparison"]["entries"]] == [2, 2]
    assert told["comparison"]["setting"]["settings"]["per_device_train_batch_size"] == 4
    assert len(made) == 2 and all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_a_comparison_of_which_nothing_is_left_ends_with_1(comparison: str) -> None:
    told = fail("compare", comparison, "nowhere/a", "nowhere/b", "--task", "text-classification", code=1)
    assert told.startswith("Every candidate failed")
    assert "can't be loaded" in Path("comparison/comparison.md").read_text()


def test_candidates_can_stand_in_the_file(comparison: str) -> None:
    values = json.loads(Path(comparison).read_text())
    candidates = [{"name": "slow", "learning_rate": 1e-4}, "learning_rate=1e-3"]
    Path(comparison).write_text(json.dumps({**values, "candidates": candidates, "output_dir": "out"}))
    assert re.search(r"^1 +slow ", succeed("compare", comparison), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to compare: 0 candidates"),
        ("optim=sgd", "Name at least two"),
        ("optim=sgd optim=adafactor --max_steps 3", "--max_steps is set by the comparison"),
        ("optim=sgd optim=adafactor --sedes 3", "There is no argument --sedes. Did you mean --seeds?"),
        ("optim=sgd optim=adafactor --budget_examples 3", "exactly one of --budget_steps"),
    ],
)
def test_a_comparison_that_cant_be_understood(comparison: str, words: str, message: str) -> None:
    assert message in fail("compare", comparison, *words.split(), code=2)


def test_python_m_is_the_command() -> None:
    command = [sys.executable, "-m", "hf_optimizability"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    version = subprocess.run([*command, "--version"], env=environment, capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, "hf-optimizability 0.1.0\n")
    done = subprocess.run([*command, "report", "."], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: There is no report.json in '.'. Name the folder of a report.\n"
