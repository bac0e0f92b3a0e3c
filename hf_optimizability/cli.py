# SPDX-License-Identifier: Apache-2.0
"""The command `hf-optimizability`. Imports happen when a command runs, so that `--help` is fast."""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__


if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from .report import OptimizabilityReport
    from .tasks.fine_tuning import Task

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

DEMO = "recipes/demo/vision.json"

EXTRA_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Settings of the commands whose further flags are fields of dataclasses, which `HfArgumentParser` reads."""

EXTRA_FLAGS_METAVAR = "[ARGUMENTS.json] [OPTIONS] [FLAGS]"

TaskName = Annotated[
    Literal["text-classification", "image-classification"] | None,
    typer.Option("--task", help="The checkpoint's task. By default, the one that its architecture has a head for."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and everything else to stderr.")]
AllFlags = Annotated[bool, typer.Option("--flags", help="List all further flags of the task, and exit.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="Folder of a report.")]


def main() -> None:
    """Run the command."""
    app(prog_name="hf-optimizability")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-optimizability {__version__}")
        raise typer.Exit


@app.callback(
    epilog="""Exit codes: 0 success; 1 the work failed; 2 the command line is invalid.

\b
Examples:
  hf-optimizability demo
  hf-optimizability measure --model_name_or_path org/checkpoint --dataset_name org/data --forecast
  hf-optimizability run --help
"""
)
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="HF_DEBUG", help="Show the traceback if a command fails.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """How well does this checkpoint optimize on my task? Measures it, and writes an optimizability report."""


@app.command(
    context_settings=EXTRA_FLAGS,
    options_metavar="[OPTIONS] [FLAGS]",
    epilog="""\b
Examples:
  hf-optimizability demo
  hf-optimizability demo --max_train_samples 640 --output_dir out/short
""",
)
def demo(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Fine-tune MobileNetV2 on MNIST, and report.

    Both come with the package, so that no network is needed. Takes a few minutes. Further flags are those of `run`.
    The report is in out/demo/vision/optimizability, unless --output_dir names another folder.
    """
    with _work(ctx):
        root = _demo_root()
        arguments = root / DEMO
        values = json.loads(arguments.read_text())
        local = [f"--{name}={root / values[name]}" for name in ("model_name_or_path", "dataset_name")]
        _run("image-classification", [str(arguments), *local, *ctx.args], as_json=as_json)


@app.command(
    context_settings=EXTRA_FLAGS,
    options_metavar=EXTRA_FLAGS_METAVAR,
    epilog="""\b
Examples:
  hf-optimizability run --model_name_or_path distilbert/distilbert-base-uncased \\
      --dataset_name nyu-mll/glue --dataset_config_name sst2 --max_train_samples 4000 \\
      --learning_rate 3e-5 --num_train_epochs 1 --logging_steps 10 --output_dir out/sst2
  hf-optimizability run --model_name_or_path ./my-checkpoint --train_dir photos/train \\
      --validation_dir photos/validation --output_dir out/photos --profile light
  hf-optimizability run arguments.json --learning_rate 1e-4
""",
)
def run(ctx: typer.Context, task: TaskName = None, as_json: AsJson = False, flags: AllFlags = False) -> None:
    r"""Fine-tune a checkpoint on a data set, and report.

    Checkpoint and data are names on the Hub, or local folders and files. All further flags go to the task's data,
    Transformers' TrainingArguments and OptimizabilityConfig: --flags lists them. They can be in a JSON file, named
    first; flags after it override it. These matter most:

    \b
      --model_name_or_path   the checkpoint
      --dataset_name         the data set; or --train_file, --train_dir
      --output_dir           where checkpoint, metrics, card and report go
      --learning_rate, --num_train_epochs, --per_device_train_batch_size
      --profile              light, standard or full: how much to measure
    """
    with _work(ctx):
        _run(task, ctx.args, as_json=as_json, flags=flags)


@app.command(
    context_settings=EXTRA_FLAGS,
    options_metavar=EXTRA_FLAGS_METAVAR,
    epilog="""\b
Examples:
  hf-optimizability measure --model_name_or_path org/checkpoint --dataset_name org/data --forecast
  hf-optimizability measure --model_name_or_path out/sst2 --train_file reviews.csv \\
      --profile full --output_dir out/measured
  hf-optimizability measure arguments.json --json
""",
)
def measure(
    ctx: typer.Context,
    task: TaskName = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Print the maximum cost, and exit.")] = False,
    as_json: AsJson = False,
    flags: AllFlags = False,
) -> None:
    """Measure a checkpoint without training it.

    Takes the flags of `run` (--flags lists them), and measures gradient and curvature on the training set, as
    `run` with the same flags would before its first step. Writes a report if --output_dir or --report_dir is given.
    """
    with _work(ctx):
        _measure(task, ctx.args, forecast_only=forecast, as_json=as_json, flags=flags)


@app.command(
    context_settings=EXTRA_FLAGS,
    options_metavar="[ARGUMENTS.json] CANDIDATE... [OPTIONS] [FLAGS]",
    epilog="""\b
Examples:
  hf-optimizability compare distilbert/distilbert-base-uncased google-bert/bert-base-uncased \\
      --dataset_name nyu-mll/glue --dataset_config_name sst2 --budget_steps 500 --output_dir out/choice
  hf-optimizability compare optim=sgd,learning_rate=0.01 optim=adamw_torch,learning_rate=3e-5 \\
      --model_name_or_path org/checkpoint --train_file reviews.csv --budget_seconds 600
  hf-optimizability compare org/checkpoint org/checkpoint,method=lora,lora_rank=16,learning_rate=1e-3 \\
      org/checkpoint,method=linear_probe --dataset_name org/data --budget_examples 16000 --seeds 5
""",
)
def compare(ctx: typer.Context, task: TaskName = None, as_json: AsJson = False, flags: AllFlags = False) -> None:
    r"""Fine-tune candidates under one equal budget, and rank them.

    A candidate is a checkpoint, flags of its own, or both: CHECKPOINT,flag=value,flag=value. Candidates come first,
    then the flags that all share, which are those of `run` and the budget. Both can be in a JSON file, named before
    them, with the candidates as a list. Killed and started again, a comparison resumes where it was.

    \b
      --budget_steps, --budget_examples, --budget_seconds   the budget of each training; pass one of them
      --seeds            trainings of each candidate, 3 by default
      --halving_rounds   rounds of successive halving, for many candidates
      --screen_to        train only so many, the best by a score before training
      --output_dir       where comparison.html, .md and .json go
    """
    with _work(ctx):
        _compare(task, ctx.args, as_json=as_json, flags=flags)


@app.command(epilog="Example: hf-optimizability report out/sst2/optimizability")
def report(ctx: typer.Context, folder: Folder, as_json: AsJson = False) -> None:
    """Render a report again from its report.json.

    Each file is replaced completely, or not at all.
    """
    with _work(ctx):
        from .report import OptimizabilityReport

        if not (folder / "report.json").is_file():
            raise FileNotFoundError(f"There is no report.json in {str(folder)!r}. Name the folder of a report.")
        report = OptimizabilityReport.load(folder)
        report.save(folder)
        _print_report(report, folder, report.summary(), as_json=as_json)


@app.command(
    epilog="""\b
Examples:
  hf-optimizability push out/sst2/optimizability user/my-model
  hf-optimizability push out/sst2/optimizability org/their-model --create-pr
""",
)
def push(
    ctx: typer.Context,
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The model's repository, such as user/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is created.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Push a report to a model's repository on the Hub.

    Pushes its files, and a section of the model card. Uses the token of `hf auth login`, or that in HF_TOKEN.
    """
    with _work(ctx):
        from .publishing.hub import push as push_to_hub

        url = push_to_hub(folder, repo_id, private=private or None, create_pr=create_pr, revision=revision)
        typer.echo(json.dumps({"url": url}) if as_json else url)


@app.command(epilog="Example: hf-optimizability schema > report.schema.json")
def schema() -> None:
    """Print the JSON Schema of report.json."""
    typer.echo((Path(__file__).parent / "report_data/report.schema.json").read_text(encoding="utf-8"))


def _run(task_name: str | None, args: Sequence[str], *, as_json: bool, flags: bool = False) -> None:
    from .errors import MeasurementError
    from .tasks.fine_tuning import fine_tune, load
    from .training.trainer import OptimizabilityTrainer

    task, parser = _task_and_parser(task_name, args)
    parser.set_defaults(do_train=True, do_eval=True)
    model_args, data_args, optimizability, training_args = _parsed(parser, args, flags=flags)
    with _only_json_on_stdout(as_json):
        inputs = load(task, model_args, data_args, training_args)
        trainer = OptimizabilityTrainer(args=training_args, optimizability=optimizability, **inputs.as_kwargs())
        folder = fine_tune(trainer, tasks=task.NAME, dataset=data_args.public_name)
    if not trainer.is_world_process_zero():
        return
    report = trainer.optimizability_report()
    _print_report(report, folder, report.summary(), as_json=as_json)
    if training_args.do_train and not report.measurements:
        raise MeasurementError("nothing_measured", because=report.failures[-1].why)


def _measure(task_name: str | None, args: Sequence[str], *, forecast_only: bool, as_json: bool, flags: bool) -> None:
    from transformers import Trainer

    from .files import back_up, require_writable
    from .tasks.fine_tuning import load
    from .tasks.probe_only import MeasureInputs, report_measurement

    task, parser = _task_and_parser(task_name, args)
    with tempfile.TemporaryDirectory() as scratch:
        parser.set_defaults(output_dir=scratch)  # a Trainer always creates its folder
        model_args, data_args, config, training_args = _parsed(parser, args, flags=flags)
        folder = None
        if not forecast_only and (config.report_dir is not None or training_args.output_dir != scratch):
            folder = config.report_folder(training_args.output_dir)
            require_writable(folder, "report_dir")
        training_args.output_dir = scratch
        with _only_json_on_stdout(as_json):
            trainer = Trainer(args=training_args, **load(task, model_args, data_args, training_args).as_kwargs())
            probe = MeasureInputs.from_trainer(trainer, config)
            if forecast_only:
                price = probe.forecast()
            else:
                probe, measurement = probe.measured(progress=not training_args.disable_tqdm)
    if not trainer.is_world_process_zero():
        return
    if forecast_only:
        typer.echo(json.dumps(asdict(price)) if as_json else str(price))
        return
    report = report_measurement(trainer, probe, measurement)
    if folder is not None:
        back_up(folder / "report.json")
        report.save(folder)
    _print_report(report, folder, _table(report), as_json=as_json)


def _compare(task_name: str | None, args: Sequence[str], *, as_json: bool, flags: bool) -> None:
    from .comparing.candidates import parse_candidates
    from .comparing.flags import ComparisonFlags, list_flags
    from .comparing.runner import ComparisonRunner

    words = list(args)
    with _usage_errors():
        values = (
            json.loads(Path(words.pop(0)).read_text(encoding="utf-8")) if words and words[0].endswith(".json") else {}
        )
        given = [*values.pop("candidates", []), *takewhile(lambda word: not word.startswith("-"), words)]
        if flags:
            typer.echo(list_flags(task_name))
            raise typer.Exit
        shared = list(dropwhile(lambda word: not word.startswith("-"), words))
        candidates = parse_candidates(given)
        runner = ComparisonRunner(ComparisonFlags(candidates, task_name=task_name, values=values, args=shared))
    with _only_json_on_stdout(as_json):
        comparison = runner.run(on_run=lambda text: typer.echo(text, err=True))
    page = runner.folder / "comparison.html"
    if as_json:
        typer.echo(json.dumps({"page": str(page), "comparison": comparison.to_dict()}, allow_nan=False))
    else:
        typer.echo(f"\n{comparison.summary()}\n\nComparison: {page}")
    if not any(entry.runs for entry in comparison.entries):
        raise ValueError("Every candidate failed; the reasons are above and on the page.")


def _task_and_parser(task_name: str | None, args: Sequence[str]) -> tuple[Task, HfArgumentParser]:
    """Return the task, that of the checkpoint if it is not named, and the parser of all its flags."""
    from transformers import TrainingArguments

    from .config import OptimizabilityConfig
    from .tasks.fine_tuning import FlagParser, UndecidedTaskError, checkpoint_arguments, task_named, task_of_checkpoint

    if task_name is None:
        with _usage_errors():
            checkpoint = checkpoint_arguments(args)
        try:
            task = task_of_checkpoint(checkpoint)
        except UndecidedTaskError as error:
            raise typer.BadParameter(str(error)) from error
    else:
        task = task_named(task_name)
    dataclasses = (task.ModelArguments, task.DataArguments, OptimizabilityConfig, TrainingArguments)
    return task, FlagParser(*dataclasses, usage=f"{task.NAME}: all flags", add_help=False)


def _parsed(parser: HfArgumentParser, args: Sequence[str], *, flags: bool) -> tuple[Any, ...]:
    """Return the dataclasses; or print all flags and exit, if that is asked for."""
    from .tasks.fine_tuning import parse_arguments

    if flags:
        typer.echo(parser.format_help())
        raise typer.Exit
    with _usage_errors():
        return parse_arguments(parser, args)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Make errors in reading the command line exit with code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _work(ctx: typer.Context) -> Iterator[None]:
    """Turn any error inside into one message and exit code 1, or a traceback for --debug."""
    try:
        yield
    except (typer.BadParameter, typer.Exit):
        raise
    except Exception as error:
        if ctx.find_root().params["debug"]:
            raise
        typer.echo(f"Error: {_explained(error)}", err=True)
        raise typer.Exit(1) from error


def _explained(error: Exception) -> str:
    from .errors import MeasurementError
    from .publishing.hub import HubError

    if isinstance(error, (ValueError, OSError, ImportError, MeasurementError, HubError)):  # messages with a remedy
        return str(error)
    return f"{type(error).__name__}: {error}\n`hf-optimizability --debug …` shows the traceback."


def _only_json_on_stdout(as_json: bool) -> AbstractContextManager[Any]:
    """Send what a Trainer prints to stderr if stdout is for a machine."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _print_report(report: OptimizabilityReport, folder: Path | None, text: str, *, as_json: bool) -> None:
    if as_json:
        report_folder = None if folder is None else str(folder)
        typer.echo(json.dumps({"report_folder": report_folder, "report": report.to_dict()}, allow_nan=False))
    else:
        typer.echo(f"\n{text}" + ("" if folder is None else f"\n\nReport: {folder / 'report.md'}"))


def _table(report: OptimizabilityReport) -> str:
    """Format the numbers of the only measurement of a report, with their intervals."""
    from .measurement.results import NOT_CONVERGED_NOTE
    from .number_format import format_number
    from .report.tables import card_rows, subject

    [measurement] = report.measurements
    lines = [f"Of {subject(report)}; in parentheses: 95 % intervals.", ""]
    lines += [f"{row.label:<22}{row.cells[0]}" for row in card_rows([measurement])]
    if not measurement.converged:
        lines += ["", NOT_CONVERGED_NOTE]
    cost = f"{measurement.hvps} products in {format_number(measurement.seconds, digits=3)} s ({measurement.engine})"
    return "\n".join([*lines, "", f"{measurement.num_items} items, {cost}"])


def _demo_root() -> Path:
    """Return the folder that holds `recipes`: the checkout, or where an installation put the demo."""
    roots = [Path(__file__).parents[1], Path(sysconfig.get_path("data"), "share", "hf-optimizability")]
    for root in roots:
        if (root / DEMO).is_file():
            return root
    raise FileNotFoundError(
        f"The demo's data is in neither of {' and '.join(map(str, roots))}. Reinstall hf-optimizability, or run "
        "the command in a checkout of it."
    )
