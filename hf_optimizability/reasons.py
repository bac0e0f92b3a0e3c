# SPDX-License-Identifier: Apache-2.0
"""The reasons why something could not be measured, or not as usual: by code, in words, with what to do about it.

Reports are made to be shared. They hold the code of a reason, the type of the error behind it, numbers and names; the
words are those below. The text of an error may hold anything (paths, tokens, rows of data): it is part of the
exception and goes to the log, but not into a report.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias


Value: TypeAlias = str | int | float | tuple[str | float, ...]
"""What a sentence is completed with: numbers, and names of parameters, operations, classes and options."""


class Words(NamedTuple):
    """The words of a reason.

    Attributes:
        text: What went wrong, with `{slots}` for values, for the error behind it (`{error}`) and for the reason behind
            it (`{because}`).
        remedy: What the user can do; empty where there is nothing to do.
        more: Sentences that follow where there are values for their slots.
    """

    text: str
    remedy: str = ""
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reason:
    """Why something could not be measured, or not as usual.

    Attributes:
        code: Its name in `WORDS`.
        error: Type of the error behind it, for example `"KeyError"`; `None` if there is none.
        values: Numbers and names that its sentences are completed with.
        because: The reason behind it; `None` if there is none.

    Example:
        >>> str(Reason("rows_unreadable", error="KeyError"))
        "The training set's rows can't be read (KeyError)."
    """

    code: str
    error: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    because: Reason | None = None

    def __str__(self) -> str:
        return self.sentence("" if self.error is None else f" ({self.error})")

    @classmethod
    def of_earlier_version(cls, text: str) -> Reason:
        """Return what is left of a reason that was stored as a text, which may hold anything: its type of error.

        Example:
            >>> str(Reason.of_earlier_version("OSError: /home/ada"))
            'An earlier version could not measure (OSError); its words may be private, and are not shown.'
        """
        error = re.match(r"(\w+(?:Error|Exception)): ", text)
        return cls("earlier_version", error=error[1] if error else None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reason:
        """Rebuild from the dict of `dataclasses.asdict`, with lists for tuples as JSON has them.

        Values that none of its sentences uses are dropped.

        Raises:
            ValueError: If this version has no words for it, or they need other values.
        """
        words = WORDS[data["code"]] if data["code"] in WORDS else Words("")
        used = {name for text in (words.text, *words.more) for name in slots(text)}
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data["values"].items()
            if name in used
        }
        because = None if data["because"] is None else cls.from_dict(data["because"])
        if not isinstance(data["error"], (str, type(None))):
            raise ValueError(f"The type of an error is {data['error']!r}.")
        reason = cls(data["code"], error=data["error"], values=values, because=because)
        try:
            str(reason)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"There are no words for the reason {data['code']!r} with these values.") from error
        return reason

    @property
    def remedy(self) -> str:
        """What the user can do."""
        return WORDS[self.code].remedy

    def sentence(self, error: str) -> str:
        """Return it in words, with these on the error behind it."""
        values: dict[str, Any] = {name: _shown(value) for name, value in self.values.items() if value not in ("", ())}
        if self.because is not None:
            values["because"] = str(self.because)
        words = WORDS[self.code]
        more = [text for text in words.more if slots(text) <= values.keys()]
        return " ".join(text.format(error=error, **values) for text in (words.text, *more))


def slots(text: str) -> set[str]:
    """Return the names of the values that a sentence needs.

    Example:
        >>> slots("{which} is {value:.4g}.") == {"which", "value"}
        True
    """
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def listed(names: tuple[str | float, ...], *, most: int = 4) -> str:
    """Return names in backticks, and numbers, for a sentence.

    Example:
        >>> listed(("a", "b")), listed((1.25, 10.0)), listed(("a", "b", "c"), most=2)
        ('`a`, `b`', '1.25, 10', '`a`, `b` and others')
    """
    shown = ", ".join(f"`{name}`" if isinstance(name, str) else f"{name:.4g}" for name in names[:most])
    return f"{shown} and others" if len(names) > most else shown


def _shown(value: Value) -> Any:
    return listed(value) if isinstance(value, tuple) else value


_EXACT = (
    "Set `engine='central_difference'`, which needs first derivatives alone. Or take out what has no right second "
    "derivative: weight normalization (`remove_weight_norm`, `remove_parametrizations`), custom autograd functions "
    "(straight-through estimators, gradient reversal, approximate attention) whose backward pass is not made of "
    "differentiable operations; where weights have diverged, rounding does this as well."
)
_DIFFERENCES = (
    "Leave `engine` at 'auto', which makes exact products wherever it can; where it can't, replace the operation that "
    "has no second derivative, and custom autograd functions that are not differentiable."
)
_NO_CUSTOM_FUNCTIONS = (
    "`attn_implementation='eager'`, and replace custom autograd functions by differentiable operations."
)
_REENTRANT = (
    "The model checkpoints activations in its own forward pass with `use_reentrant=True`, which can be differentiated "
    "by `.backward()` alone. Set `use_reentrant=False`."
)

_DETACHED = (
    "The loss is detached from them: a `detach`, a `no_grad`, weights merged in eval mode, or a loss that runs a "
    "backward pass of its own (GradCache, as in the `Cached…` losses of sentence-transformers). Measure a loss that "
    "autograd can follow, for instance the one without the cache."
)

WORDS: Mapping[str, Words] = {
    # The training set and its probe set
    "rows_unreadable": Words(
        "The training set's rows can't be read{error}.",
        "Check `train_dataset[0]`, or whether its rows can only be indexed by lists.",
    ),
    "no_batches": Words(
        "The training set gave no batches{error}.", "Check its items, its collator and its batch sampler."
    ),
    "stream_unreadable": Words("The training set can't be read{error}.", "Check its first rows."),
    "stream_read_once": Words(
        "The training set is a stream that can be read once only: measuring would take its first examples away from "
        "training.",
        "Pass one whose `__iter__` starts from the beginning, as `datasets.IterableDataset` does.",
    ),
    "rows_taken_away": Words(
        "Reading the probe set would take rows away from training: the position of {place} ({kind}) can't be "
        "restored.",
        "Pass a data set that opens its source in `__iter__`, as `datasets.IterableDataset` does with files, or one "
        "with `state_dict` and `load_state_dict`.",
    ),
    "rows_refused": Words(
        "The collator refused rows drawn at random{error}.",
        "If only some rows may share a batch, pass a batch sampler that says which to the data loader.",
    ),
    "pool_no_rows": Words(
        "The training set is a stream, or has no rows that can be drawn by index.",
        "Pass a `DataLoader` over a data set with a length, or a few batches of the stream as `batches`.",
    ),
    "pool_empty": Words("The training set is empty.", "Pass a `DataLoader` over a data set with rows."),
    "pool_sampler": Words(
        "The sampler `{sampler}` decides which examples training sees, how often, or together.",
        "Pass a `DataLoader` without it to measure the plain mean over all rows, or `batches`.",
    ),
    "pool_processes": Words("Several processes train together: each would have to look at its part of the pool."),
    "losses_not_apart": Words(
        "The losses of single examples are not known: the loss is not made of torch's `cross_entropy`, `mse_loss`, "
        "`binary_cross_entropy_with_logits`, `huber_loss` or `smooth_l1_loss` without class weights, has another term "
        "(a penalty on the weights), or depends on more than one example.",
        "Pass `batches` in place of `dataset`.",
    ),
    "products_not_apart": Words(
        "Products of single batches are not known: the loss has no second derivative, so they are central "
        "differences.",
        "Pass `batches` in place of `dataset`.",
    ),
    "too_few_examples": Words(
        "The data set to measure on has only {number} examples, but a probe set needs at least {least}.",
        "Pass a larger training set.",
    ),
    "data_not_restored": Words(
        "Collator or data set could not be restored after the probe set was drawn{error}.",
        "Train without measuring.",
    ),
    # The loss
    "no_tensors": Words(
        "The collator's batches hold no tensors, so no loss can be computed on them{error}: its inputs are generated "
        "during training (completions, in GRPO and other online methods).",
        "Measure with `hf_optimizability.measure`, on batches as the loss takes them.",
    ),
    "completions_generated": Words(
        "{trainer} generates the completions that its loss is over while it trains, so there is no loss over the "
        "training set to measure.",
        "Measure the model with `hf_optimizability.measure` on completions of your own, or train without measuring.",
    ),
    "labels_ignored": Words(
        "All labels of the probe set are {label}, which the loss ignores.",
        "Check the labels and the data collator, or raise `probe_examples`.",
    ),
    "nothing_trainable": Words(
        "`model` has no trainable parameter, so there is no gradient to measure.",
        "Set `requires_grad` on the parameters to train.",
    ),
    "no_model_loss": Words(
        "The model gives no loss that can be measured{error}.",
        "If the loss is the Trainer's (`compute_loss`, `compute_loss_func`), pass "
        "`OptimizabilityCallback(config, trainer=trainer)`, call its `set_trainer`, or put "
        "`OptimizabilityTrainerMixin` before the Trainer's class.",
        ("{because}",),
    ),
    "no_trainer_loss": Words(
        "The Trainer's loss can't be computed on the probe set{error}.",
        "Check that `trainer.compute_loss(model, batch)` gives a scalar with a gradient in eval mode.",
        ("{because}",),
    ),
    "loss_not_connected": Words(
        "The loss is not connected to the model: its backward pass is a hook that recomputes the model's outputs in "
        "smaller batches (GradCache, as in the `Cached…` losses of sentence-transformers).",
        "Pass the loss without a gradient cache, for instance `GISTEmbedLoss` for `CachedGISTEmbedLoss`: it gives the "
        "same number.",
    ),
    "not_finite": Words(
        "A loss or a product is not finite{error}.",
        "Check the loss for overflow (logarithms, divisions); measure in float32 or better.",
    ),
    "loss_not_finite": Words(
        "The loss on the probe set is {loss}.",
        "Look for a learning rate that is too high, or for inputs and labels that are not finite.",
    ),
    "gradient_not_finite": Words(
        "The gradient on the probe set is not finite.", "Look for operations whose derivative is infinite."
    ),
    "loss_not_repeatable": Words(
        "The loss of the same batch differs by {difference:.1e} between two passes in eval mode, although random "
        "numbers, buffers and attributes were put back before each.",
        "Look for state or random numbers outside of the model (a global counter, a generator that the loss holds); "
        "keep them in the model, or make the loss deterministic.",
    ),
    "weights_changed": Words(
        "The model changes its own weights in eval mode.",
        "Switch that off; for RWKV by `model.config.rescale_every = 0`.",
    ),
    "gradient_not_slope": Words(
        "The gradient of the loss is not its slope: they differ by {difference:.0%} of the gradient's norm.",
        "Measure a loss whose backward pass is its derivative: look for parts that are detached, gradient reversal, "
        "straight-through estimators, losses that run a backward pass of their own (GradCache), and hooks that change "
        "gradients.",
        ("Off are the derivatives by {parameters}.",),
    ),
    "gradient_zero": Words(
        "The gradient is exactly 0 everywhere, but the loss depends on the weights.",
        _DETACHED,
    ),
    "gradient_zero_in_part": Words(
        "The gradient is exactly 0 by {parameters}, but the loss depends on the weights there.", _DETACHED
    ),
    "loss_near_zero": Words(
        "The loss on the probe set is {loss:.0e}, so near 0 that rounding in {dtype} leaves nothing of its curvature.",
        "If all examples are learnt by heart, there is nothing left to learn from them: measure on others. If the "
        "loss is multiplied by a small number, measure it without.",
    ),
    # The model
    "fp8_layer": Words(
        "`{layer}` is a layer of {library}, which multiplies in 8-bit floating point: its loss is a step function, "
        "whose gradient is not its slope.",
        "Train in FP8 with torchao (accelerate's `fp8_backend: AO`), whose layers are measured in full precision, or "
        "measure a copy of the model with `nn.Linear` layers.",
    ),
    "tensors_overwritten": Words(
        "Passes of the model have written to {tensors}, which are too large to copy, without torch operations in a "
        "forward pass that could be intercepted. Their values can't be restored.",
        "Write to them by torch operations, or only in training mode.",
    ),
    "needs_autocast": Words(
        "The model needs the `torch.autocast` in its own forward pass, which is disabled while measuring, in full "
        "precision{error}.",
        "Cast half-precision values to the dtype of the weights, not to a fixed dtype.",
    ),
    "model_fails": Words(
        "The model can't be measured{error}.",
        "Check that it gives a loss and a gradient in eval mode: `model.eval(); model(**batch).loss.backward()`.",
    ),
    # Derivatives
    "backward_fails_later": Words(
        "A backward pass failed in the course of the measurement{error}.",
        "Call `loss.backward()` on the same batch several times in eval mode, and fix what it raises. If it fails "
        "from some call on, look for a counter or a cache in custom autograd functions and hooks.",
    ),
    "backward_fails": Words(
        "The loss can't be differentiated: a single backward pass fails{error}.",
        "Call `loss.backward()` on the same batch several times in eval mode, and fix what it raises.",
    ),
    "no_second_derivative": Words(
        "The loss can't be differentiated twice{error}.",
        "Leave `engine` at 'auto' or set it to 'central_difference', which need no second derivative where there is "
        f"none; or use {_NO_CUSTOM_FUNCTIONS}",
        ("It is `{operation}` that has none.",),
    ),
    "no_second_derivative_of_outputs": Words(
        "The loss can't be differentiated twice{error}.",
        f"Set `curvature='hessian'`, which can be measured without second derivatives; or use {_NO_CUSTOM_FUNCTIONS}",
        ("It is `{operation}` that has none.",),
    ),
    "operation_without_derivative": Words(
        "An operation has no second derivative{error}.", more=("It is `{operation}`.",)
    ),
    "function_without_derivative": Words(
        "The backward pass of {functions} has no derivative: it computes outside of autograd, as fused kernels do.",
        _EXACT,
    ),
    "once_differentiable": Words(
        "The loss can't be differentiated twice: a custom autograd function is marked `once_differentiable`.", _EXACT
    ),
    "quantized": Words(
        "The weights are quantized ({method}), and the backward passes of quantized kernels can't be relied on to be "
        "differentiated again (bitsandbytes issue 1070).",
        "Set `engine='central_difference'`, or leave it at 'auto'.",
    ),
    "checkpointing_recomputes": Words(
        "The model checkpoints activations in its own forward pass (`torch.utils.checkpoint`) and recomputes others "
        "in the backward pass."
    ),
    "checkpointing_reentrant": Words(_REENTRANT),
    "differences_inaccurate": Words(
        "The loss can't be differentiated twice, and central differences of its gradient are off by {off:.0%}, as "
        "kinks (ReLU), routing and low precision make them.",
        "Replace the operation that has no second derivative.",
        ("{because}",),
    ),
    "differences_not_symmetric": Words(
        "Central differences of the gradient are not symmetric (by {asymmetry:.0e}): kinks (ReLU) or routing lie "
        "within their steps, or a backward pass is not that of its loss.",
        _DIFFERENCES,
        ("There is no exact product: {because}",),
    ),
    "not_symmetric": Words(
        "The second derivatives are not symmetric (by {asymmetry:.0e}): a backward pass of the model is not the "
        "derivative of its forward pass.",
        _EXACT,
        ("Off are the derivatives by {parameters}.", "In its graph are {operations}."),
    ),
    "no_eigenvalue": Words(
        "Central differences give {which} as {value:.4g}, and along its own vector with half the step as {there}, a "
        "change of {change:.0%}: that is not an eigenvalue: kinks (ReLU) and routing (mixtures of experts) can fake "
        "one.",
        _DIFFERENCES,
        ("There is no exact product: {because}",),
    ),
    "wrong_eigenvalue": Words(
        "{which} is {value:.4g} by second derivatives, and {there} by differences of the gradient along its own "
        "vector: a backward pass is differentiated wrongly.",
        _EXACT,
        ("In its graph are {operations}.",),
    ),
    "wrong_product": Words(
        "A product of second derivatives and the same by differences of the gradient are {off:.0%} of it apart, by "
        "the same vector at two steps: a backward pass is differentiated wrongly.",
        _EXACT,
        ("In its graph are {operations}.",),
    ),
    # Why differences don't decide whether an eigenvalue is right
    "kinks_settle": Words(
        "The loss has kinks (ReLU), so many that differences settle on a value that includes their jumps."
    ),
    "kinks_within_steps": Words("Kinks (ReLU), routing or rounding lie within the steps."),
    "rounding_of_gradient": Words(
        "The steps are so small that rounding of the gradient may be all that differences show."
    ),
    "rounding_of_small_end": Words(
        "It is so small, compared with the other end, that rounding may be all that a difference shows."
    ),
    "padding_rows": Words(
        "Along rows of padding tokens (`padding_idx`) the gradient is not the slope; along the others it agrees."
    ),
    # Memory, shards and processes
    "out_of_memory": Words(
        "The device ran out of memory while measuring, with a single example at a time.",
        "Free memory on the device, or shorten the examples.",
    ),
    "out_of_memory_uncut": Words(
        "The device ran out of memory while measuring, and the batches can't be cut{error}.",
        "Lower `probe_batch_size`, or free memory on the device.",
    ),
    "out_of_memory_unknown_mean": Words(
        "The device ran out of memory in a forward pass of a batch of {size} examples, and smaller batches are not "
        "known to have the same mean loss.",
        "Collate fewer examples at a time (`probe_batch_size`), or free memory on the device.",
    ),
    "sharded": Words(
        "The whole parameters and the vectors of a measurement do not fit into memory, and FSDP gives only first "
        "derivatives with respect to the shards.",
        "Set `engine='central_difference'`, or leave it at 'auto'.",
    ),
    "sharded_matrix": Words(
        "The whole parameters and the vectors do not fit into memory, and on shards only the Hessian can be computed, "
        "by central differences; requested are {curvature!r} and {engine!r}.",
        "Leave `curvature` and `engine` at their defaults, lower `max_hvps`, or free memory.",
    ),
    "sharded_half": Words(
        "The whole parameters do not fit into memory, and the shards are in {dtype}, in which the step of a central "
        "difference rounds away.",
        "Train float32 weights in mixed precision (as FSDP2 does through Accelerate), or free memory.",
    ),
    "sharded_otherwise": Words(
        "The whole parameters do not fit into memory, and not all of them are sharded over all processes along their "
        "first dimension alone.",
        "Free memory, or shard by `fully_shard` over all processes, with neither replicas nor `ignored_params` nor "
        "`shard_placement_fn`.",
    ),
    "sharded_by_another_torch": Words(
        "The whole parameters do not fit into memory, and measuring on their shards relies on internals of FSDP2 that "
        "torch {version} does not have: {names}.",
        "Free memory, or use torch 2.13, which is tested.",
    ),
    "parameters_offloaded": Words(
        "The parameters are offloaded to the CPU, where they can't be gathered.",
        "Train without `cpu_offload`, or do not measure.",
    ),
    "tensor_parallel": Words(
        "The parameters are split by tensor parallelism, which is not supported.",
        "Shard by data parallelism alone (FSDP2, also with replicas), or do not measure.",
    ),
    # Training
    "interrupted": Words(
        "The measurement was interrupted, because training is stopping.",
        "Resume from the checkpoint; the next measurement is made there.",
    ),
    "nothing_measured": Words(
        "The checkpoint is trained, but nothing could be measured.", "The log has the whole reason.", ("{because}",)
    ),
    "not_loaded": Words(
        "Checkpoint or data can't be loaded{error}.",
        "Check --model_name_or_path and the flags of the data; the log has the whole reason.",
    ),
    "training_diverged": Words(
        "The loss of the trained model is not finite: the training diverged.",
        "Lower the learning rate, or use a wider precision.",
    ),
    "training_failed": Words("The training failed{error}.", "The log has the whole reason."),
    "training_out_of_memory": Words(
        "Out of memory{error}.",
        "Lower --per_device_train_batch_size, and raise --gradient_accumulation_steps by as much.",
    ),
    "score_failed": Words("The score can't be computed{error}.", "The log has the whole reason."),
    # Batch sharpness
    "batches_given": Words(
        "How training draws its batches is not known from `batches`.",
        "Pass `dataset`, a loader with the batch size of training, in their place.",
    ),
    "batches_of_another_kind": Words(
        "The training set is a stream, or a batch sampler decides what may share a batch: rows drawn at random would "
        "not be batches of training.",
        "Train on a data set with a length, by torch's own `BatchSampler`.",
    ),
    "sampler_unknown": Words(
        "How `{sampler}` draws rows is not known.",
        "Take one of torch's samplers (random, weighted, of a subset, or in order).",
    ),
    "too_few_batches": Words(
        "It takes {least} batches of {examples} examples; an epoch has {number}.",
        "Lower the batch size or gradient accumulation, or leave `batch_sharpness` off.",
    ),
    "several_processes": Words(
        "It is not measured where several processes train together.", "Measure the checkpoint by one process."
    ),
    "batch_sharpness_failed": Words(
        "The curvature of the batches of a step could not be computed{error}.", "The log has the whole reason."
    ),
    "no_best_step": Words("Along −g the loss curves downward (gᵀHg ≤ 0): there is no best step."),
    "unexpected": Words(
        "The measurement failed{error}.",
        "Try `hf_optimizability.measure` on the same model and batches to see the whole traceback.",
    ),
    "earlier_version": Words(
        "An earlier version could not measure{error}; its words may be private, and are not shown.",
        "Measure again for the reason.",
    ),
}
"""The words of each reason, by its code."""
