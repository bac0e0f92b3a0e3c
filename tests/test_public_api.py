# SPDX-License-Identifier: Apache-2.0
"""The public API against `public_api.txt`: names, signatures, fields, options, log keys and commands.

After a change that is meant, `python -m tests.test_public_api` writes the file again; its diff is what users notice.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import hf_optimizability


SNAPSHOT = Path(__file__).with_name("public_api.txt")


def describe() -> str:
    return "\n".join(
        [
            *(line for name in sorted(hf_optimizability.__all__) for line in describe_object(name)),
            "",
            "log keys",
            *(f"    {key}" for key in log_keys()),
            "",
            "commands",
            *(f"    {line}" for line in commands()),
            "",
        ]
    )


def describe_object(name: str) -> Iterator[str]:
    thing = getattr(hf_optimizability, name)
    yield ""
    if not isinstance(thing, type):
        yield f"{name}({parameters(thing)})"
        return
    bases = [base.__name__ for base in thing.__mro__[1:] if not base.__module__.startswith("hf_optimizability")]
    yield f"class {name}({bases[0]})"
    if dataclasses.is_dataclass(thing):
        # As written: `HfArgumentParser` puts evaluated types into the fields.
        written = {k: v for base in reversed(thing.__mro__) for k, v in vars(base).get("__annotations__", {}).items()}
        for field in dataclasses.fields(thing):
            yield f"    {field.name}: {short(written[field.name])}{default(field)}"
    elif "Trainer" not in name:
        yield f"    __init__({parameters(thing.__init__)})"
    for member in sorted(own_members(thing)):
        value = inspect.getattr_static(thing, member)
        if isinstance(value, (property, cached_property)):
            yield f"    {member} (property)"
        elif inspect.isroutine(value):
            yield f"    {member}({parameters(getattr(thing, member))})"


def own_members(thing: type) -> set[str]:
    """Return what the package defines, not the library that a class comes from."""
    classes = [cls for cls in thing.__mro__ if cls.__module__.startswith("hf_optimizability")]
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    return {name for cls in classes for name in vars(cls) if not name.startswith("_")} - fields


def parameters(function: Any) -> str:
    """Return the parameters with their defaults; a lone `*` starts those by keyword."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))[1:-1]


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default.value if isinstance(field.default, Enum) else field.default
        return f" = {value!r}"
    return "" if field.default_factory is dataclasses.MISSING else f" = {field.default_factory.__name__}()"


def short(annotation: Any) -> str:
    return re.sub(r"\b[\w.]+\.(\w+)", r"\1", str(annotation)).replace('"', "'")


def log_keys() -> list[str]:
    """Return every key of a measurement of two tasks, with their names as `<task>`."""
    import torch
    from torch import nn

    from hf_optimizability import OptimizabilityConfig, measure
    from hf_optimizability.training.callback import log_entry

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    batches = [{"x": torch.randn(2, 3), "task": torch.tensor([number % 2] * 2)} for number in range(16)]
    measurement = measure(
        model,
        batches,
        OptimizabilityConfig(task_column="task"),
        loss_fn=lambda model, batch: (model(batch["x"])[:, 0] - 1).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    keys = (re.sub(r"/[01](?=/|$)", "/<task>", key) for key in log_entry(measurement))
    return list(dict.fromkeys(keys))


def commands() -> Iterator[str]:
    """Yield the subcommands with their options; `run` and others take the fields of dataclasses as well."""
    import typer

    from hf_optimizability.cli import app

    group = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        options = [option for parameter in command.params for option in parameter.opts]
        yield " ".join([name, *sorted(options)])


def test_the_public_api_is_that_of_the_snapshot():
    """A line by line difference names what changed."""
    assert describe().splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    SNAPSHOT.write_text(describe(), encoding="utf-8")
