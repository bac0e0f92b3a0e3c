# SPDX-License-Identifier: Apache-2.0
"""The cases of `golden.py`: tiny measurements and trainings, through public names alone.

`python golden_cases.py FOLDER JOBS NAME…` runs each case in a process of its own, forked from one that has imported
everything, and writes `FOLDER/NAME.json` and `FOLDER/NAME.log`.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from golden_models import OnceDifferentiable, TwoHeads, batches, build, rows, rows_of_two_tasks, save_checkpoint
from torch import Tensor, nn
from transformers import Adafactor, Trainer, TrainerCallback, TrainingArguments

import hf_optimizability
from hf_optimizability import (
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityReport,
    OptimizabilityTrainer,
    compare,
    forecast,
    measure,
)


RENAMED_OPTIONS: dict[str, str] = {}
"""Options that the working tree calls by another name than the base."""

LONGEST = 300
"""Seconds after which a case is killed."""

QUICK = {"probe_examples": 8, "max_hvps": 24, "probe_batch_size": 4}
STEPS = {"measure_strategy": "steps", "measure_steps": 2}
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",  # the whole one is not put together on the CPU
    },
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adafactor": partial(Adafactor, lr=1e-3, relative_step=False, scale_parameter=False),
}


def config(**options: Any) -> OptimizabilityConfig:
    """Return a configuration; options that are not set are those of a quick measurement."""
    known = {field.name for field in fields(OptimizabilityConfig)}
    renamed = {old: new for old, new in RENAMED_OPTIONS.items() if new in known}
    return OptimizabilityConfig(**{renamed.get(name, name): value for name, value in {**QUICK, **options}.items()})


def measured(
    name: str = "bert",
    *,
    number: int = 10,
    dtype: torch.dtype = torch.float32,
    settings: dict[str, Any] | None = None,
    optimizer: str | None = None,
    lora: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model outside a Trainer, after two optimizer steps if it has an optimizer."""
    model: nn.Module = build(name, dtype=dtype, **settings or {})
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    data = batches(rows(name, number, dtype=dtype))
    stepping = OPTIMIZERS[optimizer](model.parameters()) if optimizer else None
    for batch in data[:2] if stepping else ():
        model(**batch).loss.backward()
        stepping.step()  # type: ignore[union-attr]
        model.zero_grad()
    return as_report(measure(model, data, config(**options), optimizer=stepping))


def as_report(*measurements: Any) -> dict[str, Any]:
    """Return measurements as a report holds them."""
    return {"measurements": [one.to_dict() if hasattr(one, "to_dict") else asdict(one) for one in measurements]}


def regression(*, once: bool = False, **options: Any) -> dict[str, Any]:
    """Measure a mean squared error, from a loss function of the user's own that may be differentiable but once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    data = [{"inputs": piece, "labels": piece.sum(1).sin()} for piece in points.split(4)]

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["inputs"])[:, 0]
        outputs = OnceDifferentiable.apply(outputs) if once else outputs
        return (outputs - batch["labels"]).square().mean()

    return as_report(measure(model, data, config(**options), loss_fn=loss_fn))


def two_tasks(**options: Any) -> dict[str, Any]:
    """Measure two tasks apart."""
    data = batches(rows_of_two_tasks(), 6)
    return as_report(measure(TwoHeads(), data, config(task_column="task", blocks=["trunk.*", "heads.*"], **options)))


def foreseen(**options: Any) -> dict[str, Any]:
    """Forecast a measurement."""
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters())
    return {"forecast": asdict(forecast(model, batches(rows("bert", 10)), config(**options), optimizer=optimizer))}


class StoppedError(Exception):
    """The run was stopped from outside."""


class StopBefore(TrainerCallback):
    """Stops a run before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise at the step."""
        if state.global_step == self.step:
            raise StoppedError


def train(
    name: str = "bert",
    *,
    model: nn.Module | None = None,
    data: list[dict[str, Any]] | None = None,
    evaluates: bool = False,
    cls: type[Trainer] = OptimizabilityTrainer,
    options: dict[str, Any],
    stop_before: int | None = None,
    resume: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train for some steps into the folder `run`, and return the report."""
    settings = {
        "output_dir": "run", "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2,
        "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "seed": 3,
    }  # fmt: skip
    callbacks: list[TrainerCallback] = [] if stop_before is None else [StopBefore(stop_before)]
    own: dict[str, Any] = {"optimizability": config(**options)} if cls is OptimizabilityTrainer else {}
    if not own:
        callbacks.append(OptimizabilityCallback(config(**options)))
    trainer = cls(
        model=model or build(name),
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=data or rows(name, 24),
        eval_dataset=(data or rows(name, 30))[-10:] if evaluates else None,
        callbacks=callbacks,
        **own,
    )
    with suppress(StoppedError):
        trainer.train(resume_from_checkpoint=resume or None)
    return {} if stop_before else saved()


def saved() -> dict[str, Any]:
    """Return the report that was written."""
    return complete(json.loads(Path("run/optimizability/report.json").read_text()))


def complete(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report if all of it could be measured; a case shows nothing otherwise."""
    if report["failures"] or not report["measurements"]:
        raise RuntimeError(f"Not everything was measured: {report['failures']}")
    return report


def resumed() -> dict[str, Any]:
    """Stop a training, and continue from its checkpoint."""
    run = partial(train, options=STEPS, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    run(stop_before=5)
    return run(resume=True)


def on_two_ranks(**arguments: Any) -> dict[str, Any]:
    """Train on two processes over gloo."""
    processes = [mp.get_context("fork").Process(target=_rank, args=(rank, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("A rank failed; its log says why.")
    return saved()


def _rank(rank: int, arguments: dict[str, Any]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, but not used: the store is a file
    dist.init_process_group("gloo", f"file://{Path.cwd()}/store", rank=rank, world_size=2)
    init = AcceleratorState.__init__

    def allowed(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # which Accelerate leaves to accelerators
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = allowed
    train(options=STEPS, per_device_train_batch_size=2, **arguments)
    dist.destroy_process_group()


def command(*words: str, **flags: Any) -> dict[str, Any]:
    """Run the command on a tiny checkpoint, and return the report that it wrote."""
    Path("arguments.json").write_text(json.dumps({**save_checkpoint(), **flags}))
    sys.argv[1:] = [*words, "arguments.json"]
    try:
        runpy.run_module("hf_optimizability", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"The command ended with {ended.code}; its log says why.") from ended
    return saved()


def compared() -> dict[str, Any]:
    """Compare two learning rates on a tiny checkpoint."""
    flags = {**save_checkpoint(), "budget_steps": 4, "seeds": 2, "measured_seeds": 1}
    found: dict[str, Any] = compare(["learning_rate=1e-3", "learning_rate=1e-2"], **flags).to_dict()
    for entry in found["entries"]:
        complete(entry["runs"][0]["report"])
    return found


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fsdp2": partial(on_two_ranks, **FSDP),
    "ddp": partial(on_two_ranks, optim="sgd"),
    "run": partial(command, "run", max_steps=2),
    "measure": partial(command, "measure", trace_method="xtrace"),
    "compare": compared,
    "full": partial(measured, profile="full", max_hvps=120),
    "standard": partial(measured, profile="standard", max_hvps=None),
    "light": partial(measured, profile="light", max_hvps=None),
    "resume": resumed,
    "steps": partial(
        train, options=STEPS, evaluates=True, gradient_accumulation_steps=2, label_smoothing_factor=0.1,
        eval_strategy="steps", eval_steps=2,
    ),
    "epochs": partial(
        train, "resnet", cls=Trainer, options={"measure_strategy": "epoch", "landscape": True}, max_steps=-1,
        num_train_epochs=2, optim="sgd", evaluates=True, eval_strategy="epoch",
    ),
    "trainer_tasks": lambda: train(
        model=TwoHeads(), data=rows_of_two_tasks(), evaluates=True, eval_strategy="steps", eval_steps=2,
        options={**STEPS, "task_column": "task", "probe_examples": 16}, remove_unused_columns=False,
    ),
    "causal_lm": partial(train, "llama", options=STEPS, evaluates=True),
    "two_tasks": partial(two_tasks, max_hvps=60),
    "regression": regression,
    "exact_trace": partial(regression, trace_method="exact"),
    "fallback": partial(regression, once=True),
    "forecast": partial(foreseen, profile="full", landscape=True),
    "double_backward": partial(measured, engine="double_backward", num_eigenvalues=2),
    "forward_over_reverse": partial(measured, engine="forward_over_reverse"),
    "central_difference": partial(measured, engine="central_difference"),
    "gauss_newton": partial(measured, "llama", curvature="gauss_newton"),
    "empirical_fisher": partial(measured, curvature="empirical_fisher"),
    "power_iteration": partial(measured, eigen_method="power_iteration"),
    "hutch++": partial(measured, trace_method="hutch++", max_hvps=60),
    "xtrace": partial(measured, trace_method="xtrace", max_hvps=60),
    "blocks": partial(measured, blocks=["*embeddings*", "*layer.0*", "*layer.1*", "*"], block_eigenvalues=True),
    **{name: partial(measured, optimizer=name, landscape=name == "adamw") for name in OPTIMIZERS},
    "unused_rows": partial(measured, "gpt2", settings={"vocab_size": 40}, optimizer="adamw"),
    "batch_norm": partial(measured, "resnet", optimizer="momentum"),
    "lora": partial(measured, "llama", lora=True),
    "float64": partial(measured, dtype=torch.float64),
    "bf16": partial(measured, dtype=torch.bfloat16),
}  # fmt: skip
"""By name, the longest first."""


def run_case(name: str, folder: Path) -> None:
    """Run a case in a folder of its own, and write what it found, or its error."""
    signal.alarm(LONGEST)
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as here:
        os.chdir(here)
        try:
            found = {"report": CASES[name]()}
        except BaseException as error:
            traceback.print_exc()
            found = {"error": {"message": f"{type(error).__name__}: {error}"}}
        os.chdir(folder)
    found["took"] = {"seconds": time.perf_counter() - started}
    part = folder / f"{name}.part"
    part.write_text(json.dumps(found, default=lambda value: value.tolist()))  # of NumPy or torch
    part.replace(folder / f"{name}.json")


def main(folder: str, jobs: str, *names: str) -> None:
    """Run the cases, some at a time."""
    imported = Path(hf_optimizability.__file__).parents[1]
    if imported != Path(os.environ["PYTHONPATH"]):
        raise RuntimeError(f"The package was imported from {imported}, not from {os.environ['PYTHONPATH']}.")
    torch.set_num_threads(1)
    OptimizabilityReport.save = OptimizabilityReport.save_json  # type: ignore[method-assign]  # plots take seconds
    running = 0
    for name in names:
        if running == int(jobs):
            os.wait()
            running -= 1
        if not os.fork():
            run_case(name, Path(folder))
            sys.stdout.flush()
            os._exit(0)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
