# SPDX-License-Identifier: Apache-2.0
"""How many products a warm start of Lanczos saves over a fine-tuning run, against a cold one at the same weights.

Two real checkpoints are fine-tuned with AdamW. At some steps the Hessian on a fixed probe set of two batches is
measured twice: cold, and from the Ritz vectors of the measurement before, which was warm itself. Counted are all
products, until the residual of λ_max, or of both ends, is 1 %, and until they have converged as in `lanczos`: that
takes enough products to show an eigenvalue that the old vectors know nothing of.

    python benchmarks/warm_start.py [--workload text|vision] [--learning-rate 5e-5] [--steps 10 20 30]
        [--max-hvps 12]

adds each run to `benchmarks/results/warm_start.json`, and writes the table next to it again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from workloads import BATCH_SIZE, PROBE_BATCHES, SEED, Batch, text, vision

from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.linalg.krylov import KrylovDecomposition
from hf_optimizability.linalg.operator import SymmetricOperator
from hf_optimizability.linalg.vectors import as_rows
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective


Name = Literal["text", "vision"]

RESULTS = Path(__file__).parent / "results" / "warm_start.json"
TITLES: dict[Name, str] = {"text": "MiniLM-L6 on movie sentences", "vision": "MobileNetV2 on MNIST"}
TOLERANCE = 0.01


@dataclass(frozen=True)
class Spent:
    """Products until something holds; `None` if it did not within the budget.

    Attributes:
        top: The residual of λ_max is at most 1 % of it.
        ends: And that of λ_min as well.
        top_converged: λ_max has converged, with the check for an eigenvalue that was missed.
        ends_converged: Both ends have.
    """

    top: int | None
    ends: int | None
    top_converged: int | None
    ends_converged: int | None


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        step: Optimizer steps taken so far.
        lambda_max: Largest eigenvalue, by the cold run.
        lambda_min: Smallest.
        overlap: `|q · q'|` of the eigenvector of λ_max with that of the measurement before.
        cold: What the cold run took.
        warm: What the warm run took; there is none at the first measurement.
    """

    step: int
    lambda_max: float
    lambda_min: float
    overlap: float | None
    cold: Spent
    warm: Spent | None


def start_row(operator: SymmetricOperator, warm_start: Tensor | None, seed: int) -> Tensor:
    """Draw a Rademacher vector of norm 1, as a row, and add orthonormal approximate eigenvectors to it.

    Their sum gets the weight n^-¼: enough to save products, and so little that a missed eigenvalue still shows in
    time. It is halfway, on a log scale, between the share 1/√n that it has in the random part and that of the whole.

    Args:
        operator: The matrix, of size n.
        warm_start: Of shape (k, n), from a run at a nearby point; best that of λ_max alone, since others delay it.
        seed: Seed of the Rademacher vector.
    """
    generator = torch.Generator().manual_seed(seed)
    row = operator.rows.rademacher(generator=generator, dtype=operator.dtype, device=operator.device)
    row = row.div_(math.sqrt(operator.size))
    if warm_start is not None:
        row += warm_start.to(row).sum(dim=0) * (operator.size**-0.25 / math.sqrt(len(warm_start)))
    return row[None]


def run_lanczos(
    operator: SymmetricOperator, warm_start: Tensor | None, *, max_hvps: int, seed: int = SEED
) -> tuple[Spent, KrylovDecomposition]:
    """Run Lanczos until everything holds, and count the products that it took."""
    krylov = KrylovDecomposition(start_row(operator, warm_start, seed), operator.rows)
    spent: dict[str, int | None] = dict.fromkeys(field.name for field in fields(Spent))
    for products in range(1, max_hvps + 1):
        krylov.absorb(as_rows(operator.matmat(krylov.extend().T)))
        top, bottom = extreme_eigenvalues(krylov, hvps=products)
        holds = {
            "top": _small(top),
            "ends": _small(top) and _small(bottom),
            "top_converged": top.converged,
            "ends_converged": top.converged and bottom.converged,
        }
        spent |= {name: products for name in spent if spent[name] is None and holds[name]}
        if None not in spent.values() or krylov.exhausted:
            break
    return Spent(**spent), krylov


def extreme_eigenvalues(krylov: KrylovDecomposition, *, hvps: int = 0) -> tuple[Estimate, Estimate]:
    """Return λ_max and λ_min."""
    top, bottom = (krylov.eigenvalues(sign, TOLERANCE, 1, hvps)[0] for sign in (1, -1))
    return top, bottom


def _small(end: Estimate) -> bool:
    return end.error <= TOLERANCE * abs(end.value)


def fine_tune_and_measure(workload: Name, learning_rate: float, steps: list[int], max_hvps: int) -> Iterator[Measured]:
    """Measures after each of these numbers of steps; the warm run starts from the Ritz vectors of the one before."""
    torch.manual_seed(SEED)
    model, batches = {"text": text, "vision": vision}[workload](PROBE_BATCHES + max(steps))
    objective = Objective(model, batches[:PROBE_BATCHES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    old: Tensor | None = None
    done = 0
    for step in steps:
        _train(model, optimizer, batches[PROBE_BATCHES + done : PROBE_BATCHES + step])
        done = step
        with _hessian(objective) as hessian:
            cold, krylov = run_lanczos(hessian, None, max_hvps=max_hvps)
            warm: Spent | None = None
            overlap: float | None = None
            top, bottom = extreme_eigenvalues(krylov)
            if old is not None:
                overlap = abs(float(_leading_vector(krylov)[0] @ old[0]))
                warm, krylov = run_lanczos(hessian, old, max_hvps=max_hvps)
            old = _leading_vector(krylov)
        yield Measured(step, top.value, bottom.value, overlap, cold, warm)


def _leading_vector(krylov: KrylovDecomposition) -> Tensor:
    """Return the Ritz vector of λ_max, as a row."""
    return krylov.combine(krylov.vectors[:, -1:].T)


@contextmanager
def _hessian(objective: Objective) -> Iterator[SymmetricOperator]:
    with (
        measuring(objective.model, seed=SEED),
        math_attention(),
        drop_unused_embedding_rows(objective),
        CheapSecondDerivatives(),
    ):
        yield HessianOperator(objective)


def _train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def table(studies: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# What warm starts of Lanczos save",
        "",
        f"AdamW, one batch of {BATCH_SIZE} a step; the Hessian on {PROBE_BATCHES} batches of {BATCH_SIZE}. Products "
        "with a cold start → with a warm one at the same weights, until:",
        "",
        "- residual: `‖Hq − λq‖` is at most 1 % of λ_max, or of each end;",
        "- converged: and enough products were made to show an eigenvalue that the old vectors know nothing of.",
        "",
        "A dash: not within the most products. Overlap: `|q · q'|` of λ_max's eigenvector with the one before.",
        "",
    ]
    for study in studies:
        rate, most = study["learning_rate"], study["max_hvps"]
        lines += [
            f"## {TITLES[study['workload']]}, learning rate {rate:g}, at most {most} products",
            "",
            "| step | λ_max | λ_min | overlap | λ_max, residual | converged | both, residual | converged |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in study["measured"]:
            cells = [_cell(row, key) for key in ("top", "top_converged", "ends", "ends_converged")]
            overlap = "" if row["overlap"] is None else f"{row['overlap']:.2f}"
            lowest = "–" if row["cold"]["ends"] is None else f"{row['lambda_min']:.3g}"
            numbers = f"{row['step']} | {row['lambda_max']:.3g} | {lowest} | {overlap}"
            lines.append(f"| {numbers} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str) -> str:
    kinds = [row["cold"]] if row["warm"] is None else [row["cold"], row["warm"]]
    return " → ".join("–" if kind[key] is None else str(kind[key]) for kind in kinds)


def main() -> None:
    """Run one study, and write all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=get_args(Name), default="vision")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--max-hvps", type=int, default=30, help="most products of a run; λ_max alone takes 12")
    arguments = parser.parse_args()
    key = {"workload": arguments.workload, "learning_rate": arguments.learning_rate}
    studies = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    measured: list[dict[str, Any]] = []
    studies = [other for other in studies if {name: other[name] for name in key} != key]
    studies.append({**key, "max_hvps": arguments.max_hvps, "measured": measured})
    studies.sort(key=lambda one: tuple(one[name] for name in key))
    for row in fine_tune_and_measure(**key, steps=arguments.steps, max_hvps=arguments.max_hvps):
        print(row, flush=True)
        measured.append(asdict(row))
        RESULTS.write_text(json.dumps(studies, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(studies))


if __name__ == "__main__":
    main()
