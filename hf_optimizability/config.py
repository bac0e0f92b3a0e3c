# SPDX-License-Identifier: Apache-2.0
"""All options of a measurement and of when to make one, in one dataclass."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints


@dataclass(frozen=True)
class Budget:
    """The size of the probe set, the precision and the cost of a measurement.

    Attributes:
        probe_examples: Examples to measure on.
        max_hvps: Maximum number of Hessian-vector products.
        trace_tolerance: Relative standard error of the trace at which to stop.
        eigen_tolerance: Relative residual of the eigenvalues at which to stop.
        block_eigenvalues: Whether to compute the largest and the smallest eigenvalue of each block too.
        task_eigenvalues: Whether to compute the largest eigenvalue of each task's Hessian too, if there are several.
    """

    probe_examples: int
    max_hvps: int
    trace_tolerance: float
    eigen_tolerance: float
    block_eigenvalues: bool
    task_eigenvalues: bool

    def allocate(
        self, *, sharpness: bool, blocks: bool, tasks: bool, differences: bool, population: bool = False
    ) -> HvpAllocation:
        """Divide the products among the parts of a measurement.

        Args:
            sharpness: Whether the sharpness that the optimizer sees takes products of its own.
            blocks: Whether the eigenvalues of the blocks do.
            tasks: Whether those of the tasks do. One product with each task's Hessian counts as one: each goes over
                that task's batches.
            differences: Whether eigenvalues are checked along their vectors, by one product unless that fails.
            population: Whether the batches are a sample, whose curvature along λ_max, λ_min and the gradient of the
                whole set takes three, along the vector of the sharpness one, and two along those of the blocks.
        """
        each = self.max_hvps // 5
        allocation = HvpAllocation(
            spectrum=0,
            along_gradient=2,
            along_eigenvectors=int(differences),
            of_sample=population * (3 + sharpness + 2 * blocks),
            sharpness=(each - population) * sharpness,
            blocks=(each - 2 * population) * blocks,
            tasks=each * tasks,
        )
        return allocation._replace(spectrum=self.max_hvps - sum(allocation))


class HvpAllocation(NamedTuple):
    """Hessian-vector products for each part of a measurement.

    Attributes:
        spectrum: For extreme eigenvalues, density and trace.
        along_gradient: For the curvature along the gradient.
        along_eigenvectors: For checking eigenvalues along their vectors.
        of_sample: For the curvature of a sample along vectors that a whole set is compared with it along.
        sharpness: For the sharpness that the optimizer sees.
        blocks: For the eigenvalues of the blocks.
        tasks: For the eigenvalues of the tasks.
    """

    spectrum: int
    along_gradient: int
    along_eigenvectors: int
    of_sample: int
    sharpness: int
    blocks: int
    tasks: int


PROFILES = {
    "light": Budget(
        32, 32, trace_tolerance=0.25, eigen_tolerance=0.05, block_eigenvalues=False, task_eigenvalues=False
    ),
    "standard": Budget(
        64, 64, trace_tolerance=0.1, eigen_tolerance=0.01, block_eigenvalues=False, task_eigenvalues=True
    ),
    "full": Budget(
        256, 256, trace_tolerance=0.05, eigen_tolerance=0.001, block_eigenvalues=True, task_eigenvalues=True
    ),
}
"""Presets, each several times the cost of the one before."""


REPORT_FOLDER = "optimizability"
"""Name of the report's folder inside `output_dir`."""

MIN_HVPS = 16
"""Fewest products with which every part of a measurement gives an estimate and an error."""


@dataclass
class OptimizabilityConfig:
    """What to measure, how precisely, and when.

    Works with `HfArgumentParser`: every field is a command-line flag of the same name.

    Args:
        profile: Preset for the options left unset: probe_examples, max_hvps, trace_tolerance, eigen_tolerance,
            block_eigenvalues, task_eigenvalues.
        measure_strategy: When to measure between the start and the end of training, where it is always measured: as
            often as `overhead_budget` allows, never, every `measure_steps` optimizer steps, or after each epoch.
        overhead_budget: Share of the training time that measurements may take if measure_strategy='auto'.
        measure_steps: Optimizer steps between two measurements if measure_strategy='steps'.
        probe_examples: Examples of the training set to measure on, drawn once. Set by the profile.
        pool_examples: Examples of the training set to look at by forward passes at each measurement, from which those
            to measure on are drawn by their curvature, so that intervals are about the training loss. By default as
            many as take about the time of the products; with 0, those to measure on are drawn once, at random.
        probe_batch_size: Probe examples per forward pass. Lower it if a measurement runs out of memory.
        engine: How Hessian-vector products are computed. 'auto' is double_backward, or central_difference if the loss
            has no second derivative or the weights are quantized.
        curvature: Which matrix to measure: the Hessian; gauss_newton, without the curvature of the network itself;
            empirical_fisher, the second moment of the gradients of single examples.
        eigen_method: Lanczos gives the largest and the smallest eigenvalue; power iteration the largest only.
        eigen_tolerance: Stop when the residual is below this share of the eigenvalue. Set by the profile.
        num_eigenvalues: How many of the largest, and of the smallest, eigenvalues to compute; Lanczos only.
        block_eigenvalues: Compute the largest and the smallest eigenvalue of each block as well; a product for all
            blocks costs up to as much as one for each. Set by the profile.
        trace_method: Hutchinson averages over random probes; hutch++ and xtrace treat a random subspace exactly; exact
            spends one product per parameter, not max_hvps.
        trace_tolerance: Stop when the standard error is below this share of the trace. Set by the profile.
        max_hvps: Maximum number of Hessian-vector products of one measurement. Set by the profile.
        landscape: Evaluate the loss along the optimizer's update and over the plane of the top two eigenvectors as
            well: 144 forward passes over the probe set, a gradient, and a product on top of max_hvps.
        batch_sharpness: Measure the curvature of 30 batches of one optimizer step along their own gradients as well: a
            gradient and a product of each, with Adam two, on top of max_hvps.
        blocks: Glob patterns of parameter names; each makes one block of the report, the others go to 'other'. By
            default: embeddings, each layer, head.
        task_column: Column, or key in a batch, with the task of each example, a string or a whole number. Gradient and
            curvature are then reported by task as well, and how far the tasks conflict.
        task_eigenvalues: With task_column, compute the largest eigenvalue of each task's Hessian. Set by the profile.
        probe_seed: Seed of the probe set and of the probe vectors.
        report_dir: Folder of the report. By default the folder 'optimizability' inside output_dir.

    Raises:
        ValueError: If an option has a value that can't work; the message names the option and what it takes.

    Example:
        >>> OptimizabilityConfig(profile="light", max_hvps=20, trace_tolerance=0.2).budget.trace_tolerance
        0.2
    """

    profile: Literal["light", "standard", "full"] = field(
        default="standard",
        metadata={
            "help": "Preset for the options left unset: probe_examples, max_hvps, trace_tolerance, eigen_tolerance, "
            "block_eigenvalues, task_eigenvalues."
        },
    )
    measure_strategy: Literal["auto", "no", "steps", "epoch"] = field(
        default="auto",
        metadata={
            "help": "When to measure between the start and the end of training, where it is always measured: as often "
            "as `overhead_budget` allows, never, every `measure_steps` optimizer steps, or after each epoch."
        },
    )
    overhead_budget: float = field(
        default=0.05,
        metadata={"help": "Share of the training time that measurements may take if measure_strategy='auto'."},
    )
    measure_steps: int = field(
        default=500,
        metadata={"help": "Optimizer steps between two measurements if measure_strategy='steps'."},
    )
    probe_examples: int | None = field(
        default=None,
        metadata={"help": "Examples of the training set to measure on, drawn once. Set by the profile."},
    )
    pool_examples: int | None = field(
        default=None,
        metadata={
            "help": "Examples of the training set to look at by forward passes at each measurement, from which those "
            "to measure on are drawn by their curvature, so that intervals are about the training loss. By default as "
            "many as take about the time of the products; with 0, those to measure on are drawn once, at random."
        },
    )
    probe_batch_size: int = field(
        default=16,
        metadata={"help": "Probe examples per forward pass. Lower it if a measurement runs out of memory."},
    )
    engine: Literal["auto", "double_backward", "forward_over_reverse", "central_difference"] = field(
        default="auto",
        metadata={
            "help": "How Hessian-vector products are computed. 'auto' is double_backward, or central_difference if "
            "the loss has no second derivative or the weights are quantized."
        },
    )
    curvature: Literal["hessian", "gauss_newton", "empirical_fisher"] = field(
        default="hessian",
        metadata={
            "help": "Which matrix to measure: the Hessian; gauss_newton, without the curvature of the network itself; "
            "empirical_fisher, the second moment of the gradients of single examples."
        },
    )
    eigen_method: Literal["lanczos", "power_iteration"] = field(
        default="lanczos",
        metadata={"help": "Lanczos gives the largest and the smallest eigenvalue; power iteration the largest only."},
    )
    eigen_tolerance: float | None = field(
        default=None,
        metadata={"help": "Stop when the residual is below this share of the eigenvalue. Set by the profile."},
    )
    num_eigenvalues: int = field(
        default=1,
        metadata={"help": "How many of the largest, and of the smallest, eigenvalues to compute; Lanczos only."},
    )
    block_eigenvalues: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the largest and the smallest eigenvalue of each block as well; a product for all blocks "
            "costs up to as much as one for each. Set by the profile."
        },
    )
    trace_method: Literal["hutchinson", "hutch++", "xtrace", "exact"] = field(
        default="hutchinson",
        metadata={
            "help": "Hutchinson averages over random probes; hutch++ and xtrace treat a random subspace exactly; "
            "exact spends one product per parameter, not max_hvps."
        },
    )
    trace_tolerance: float | None = field(
        default=None,
        metadata={"help": "Stop when the standard error is below this share of the trace. Set by the profile."},
    )
    max_hvps: int | None = field(
        default=None,
        metadata={"help": "Maximum number of Hessian-vector products of one measurement. Set by the profile."},
    )
    landscape: bool = field(
        default=False,
        metadata={
            "help": "Evaluate the loss along the optimizer's update and over the plane of the top two eigenvectors as "
            "well: 144 forward passes over the probe set, a gradient, and a product on top of max_hvps."
        },
    )
    batch_sharpness: bool = field(
        default=False,
        metadata={
            "help": "Measure the curvature of 30 batches of one optimizer step along their own gradients as well: a "
            "gradient and a product of each, with Adam two, on top of max_hvps."
        },
    )
    blocks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Glob patterns of parameter names; each makes one block of the report, the others go to 'other'. "
            "By default: embeddings, each layer, head."
        },
    )
    task_column: str | None = field(
        default=None,
        metadata={
            "help": "Column, or key in a batch, with the task of each example, a string or a whole number. Gradient "
            "and curvature are then reported by task as well, and how far the tasks conflict."
        },
    )
    task_eigenvalues: bool | None = field(
        default=None,
        metadata={
            "help": "With task_column, compute the largest eigenvalue of each task's Hessian. Set by the profile."
        },
    )
    probe_seed: int = field(default=0, metadata={"help": "Seed of the probe set and of the probe vectors."})
    report_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the report. By default the folder 'optimizability' inside output_dir."},
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            if choices and isinstance(choices[0], str) and getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}."
                )
        for name, minimum in {
            "measure_steps": 1,
            "probe_examples": 2,
            "pool_examples": 0,
            "probe_batch_size": 1,
            "num_eigenvalues": 1,
            "max_hvps": MIN_HVPS,
        }.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` is {value}; it must be at least {minimum}.")
        for name in ("eigen_tolerance", "trace_tolerance", "overhead_budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"`{name}` is {value}; it must lie between 0 and 1, for example 0.05 for 5 %.")
        self._require_options_that_fit()
        self._require_pool_that_fits()
        if self.report_dir is not None:
            self.report_dir = os.path.expanduser(self.report_dir)  # as `TrainingArguments` does with `output_dir`
        if self.blocks is not None and not self.blocks:
            raise ValueError("`blocks` is empty; pass at least one pattern, or leave it unset for automatic blocks.")

    @property
    def pool_size(self) -> int:
        """Examples of the training set to look at, if it has so many; 0 to draw at random."""
        if self.task_column is not None or not self._takes_pool:
            return 0
        if self.pool_examples is not None:
            return self.pool_examples
        budget = self.budget  # a product takes two gradients, a look at an example about eight
        return max(budget.probe_examples, budget.probe_examples * budget.max_hvps // 4)

    @property
    def _takes_pool(self) -> bool:
        """Whether the matrix can be that of a whole data set, from examples drawn with unequal chances."""
        return self.engine != "central_difference" and self.curvature != "empirical_fisher"

    def _require_pool_that_fits(self) -> None:
        if not self.pool_examples:
            return
        if self.pool_examples < self.budget.probe_examples:
            raise ValueError(
                f"`pool_examples` is {self.pool_examples}, but {self.budget.probe_examples} examples are to be "
                "measured on (`probe_examples`). Raise it, or lower that."
            )
        if self.task_column is not None:
            raise ValueError("`pool_examples` is for one loss; with `task_column`, leave it unset.")
        if not self._takes_pool:
            raise ValueError(
                "`pool_examples` needs products by batch, weighted by example: not engine='central_difference', nor "
                "curvature='empirical_fisher'. Leave one of them unset."
            )

    def _require_options_that_fit(self) -> None:
        """Raise for combinations of options that would have no effect."""
        if self.curvature != "hessian" and self.engine in ("forward_over_reverse", "central_difference"):
            raise ValueError(
                f"`engine` is {self.engine!r}, which multiplies with the Hessian only, but `curvature` is "
                f"{self.curvature!r}. Leave `engine` at 'auto'."
            )
        if self.block_eigenvalues and self.curvature != "hessian":
            raise ValueError(
                f"`block_eigenvalues` are those of the Hessian, but `curvature` is {self.curvature!r}. Leave it unset."
            )
        if self.block_eigenvalues and self.engine in ("forward_over_reverse", "central_difference"):
            raise ValueError(
                f"`block_eigenvalues` need double_backward, but `engine` is {self.engine!r}. Leave one of them unset."
            )
        if self.batch_sharpness and (self.curvature != "hessian" or self.task_column is not None):
            raise ValueError(
                "`batch_sharpness` is that of the Hessian of one loss. With another `curvature`, or with "
                "`task_column`, leave it unset."
            )
        if self.eigen_method == "power_iteration" and self.num_eigenvalues > 1:
            raise ValueError(
                f"`num_eigenvalues` is {self.num_eigenvalues}, but power iteration computes one. Set `eigen_method` "
                "to 'lanczos'."
            )
        self._require_tasks_that_fit()
        if self.eigen_method == "power_iteration" and self.landscape:
            raise ValueError(
                "`landscape` needs the top two eigenvectors, but power iteration computes one. Set `eigen_method` "
                "to 'lanczos'."
            )

    def _require_tasks_that_fit(self) -> None:
        if self.task_column is None and self.task_eigenvalues:
            raise ValueError("`task_eigenvalues` needs `task_column`: set it, or leave both unset.")
        if self.task_column is not None and self.trace_method in ("hutch++", "xtrace"):
            raise ValueError(
                f"`trace_method` is {self.trace_method!r}, which has no traces by task, but "
                f"`task_column` is {self.task_column!r}. Choose 'hutchinson' or 'exact'."
            )
        if self.task_column is not None and self.curvature == "empirical_fisher":
            raise ValueError(
                "`curvature` is 'empirical_fisher', which is not available by task, but `task_column` is "
                f"{self.task_column!r}. Choose 'hessian' or 'gauss_newton'."
            )
        if self.task_column is not None and self.engine == "central_difference":
            raise ValueError(
                "`engine` is 'central_difference', whose products are not available by task, but `task_column` is "
                f"{self.task_column!r}. Leave `engine` at 'auto'."
            )

    def report_folder(self, output_dir: str | None) -> Path:
        """Return the folder of the report of a run whose checkpoints go to `output_dir`."""
        return Path(self.report_dir or f"{output_dir}/{REPORT_FOLDER}")

    @property
    def budget(self) -> Budget:
        """The profile's budget, overridden by the options that are set."""
        preset = PROFILES[self.profile]
        options = {name: getattr(self, name) for name in asdict(preset)}
        return replace(preset, **{name: value for name, value in options.items() if value is not None})
