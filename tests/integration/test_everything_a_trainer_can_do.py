# SPDX-License-Identifier: Apache-2.0
"""Training with measurements is bit for bit the training without them, over what people do with a Trainer.

Each case makes a Trainer from scratch, with and without the callback, or the Trainer subclass in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_optimizability import (
    MeasurementError,
    OptimizabilityCallback,
    OptimizabilityConfig,
    OptimizabilityTrainerMixin,
)
from tests.support import tiny_models, tiny_training
from tests.support.tiny_training import CONFIG, FEW_STEPS, sentences
from tests.support.training_outcome import assert_equal, left_behind, run


TWO_EPOCHS = {"max_steps": 5, "per_device_train_batch_size": 4}


class Case(NamedTuple):
    """A training: its model and data, and what is special about it.

    Attributes:
        make: The model, in its state before training.
        rows: The training set.
        options: For `TrainingArguments` and the Trainer.
        cls: The Trainer.
    """

    make: Callable[[], nn.Module]
    rows: Callable[[], Any]
    options: dict[str, Any] = {}  # noqa: RUF012 -- never changed
    cls: type[Trainer] = Trainer


def bert(kind: type[PreTrainedModel] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_models.bert(**options)
    return model if kind is None else kind(model.config)


def lines(name: str) -> list[dict[str, Any]]:
    return tiny_training.dataset(name, 16)


def of_uneven_length() -> list[dict[str, Any]]:
    return [{**row, "input_ids": row["input_ids"][: 2 + index % 5]} for index, row in enumerate(sentences())]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(sentences())


def shuffled_stream() -> Any:
    """As `load_dataset(streaming=True).shuffle()` gives it."""
    from datasets import Dataset

    rows = [{**row, "input_ids": row["input_ids"].tolist()} for row in sentences()]
    return Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=8).with_format("torch")


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).logits.square().mean()


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return outputs.logits.square().sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def frozen() -> nn.Module:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    return model


def lora() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]))


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=2))


CASES: dict[str, Case] = {
    "accumulation": Case(bert, sentences, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "label smoothing": Case(bert, sentences, {"label_smoothing_factor": 0.2}),
    "compute_loss_func": Case(bert, sentences, {"compute_loss_func": squared}),
    "compute_loss": Case(bert, sentences, cls=OwnLoss),
    "bf16 autocast": Case(bert, sentences, {"bf16": True}),
    "pure bf16": Case(lambda: bert().bfloat16(), sentences),
    "checkpointing": Case(bert, sentences, {"gradient_checkpointing": True}),
    "reentrant checkpointing": Case(
        bert, sentences,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "torch_compile": Case(bert, sentences, {"torch_compile": True, "torch_compile_backend": "eager"}),
    "stream": Case(bert, Stream),
    "dispatched stream": Case(
        bert, Stream, {"accelerator_config": {"dispatch_batches": True}}
    ),
    "shuffled stream": Case(bert, shuffled_stream, {"dataloader_num_workers": 1}),
    "length grouping": Case(
        bert, of_uneven_length, {"train_sampling_strategy": "group_by_length", "data_collator": padded}
    ),
    "workers": Case(bert, sentences, {"dataloader_num_workers": 1, **TWO_EPOCHS}),
    "persistent workers": Case(
        bert, sentences, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, **TWO_EPOCHS}
    ),
    "sgd": Case(bert, sentences, {"optim": "sgd"}),
    "adafactor": Case(bert, sentences, {"optim": "adafactor"}),
    "8-bit": Case(lambda: bert(intermediate_size=1024), sentences, {"optim": "adamw_bnb_8bit"}),  # from 4096 entries
    "rmsprop": Case(bert, sentences, {"optim": "rmsprop"}),  # its state can't be read
    "warm-up": Case(bert, sentences, {"warmup_steps": 2, "lr_scheduler_type": "cosine"}),
    "lora": Case(lora, sentences),
    "frozen": Case(frozen, sentences),
    "tied": Case(lambda: tiny_training.model("gpt2"), lambda: lines("gpt2")),
    "llama": Case(lambda: tiny_training.model("llama"), lambda: lines("llama")),
    "BatchNorm": Case(lambda: tiny_training.model("resnet"), lambda: lines("resnet")),
    "depthwise": Case(lambda: tiny_training.model("mobilenet"), lambda: lines("mobilenet")),
    "regression": Case(lambda: bert(num_labels=1), lambda: sentences(float)),
    "multi-label": Case(
        lambda: bert(problem_type="multi_label_classification"),
        lambda: sentences(lambda index: [float(index % 2), 1.0, 0.0]),
    ),
    "tokens": Case(
        lambda: bert(BertForTokenClassification), lambda: sentences(lambda index: [-100, 0, 1, 2, index % 3, -100])
    ),
    "question answering": Case(
        lambda: bert(BertForQuestionAnswering, num_labels=2),
        lambda: [
            {"input_ids": row["input_ids"], "start_positions": 1, "end_positions": index % 6}
            for index, row in enumerate(sentences())
        ],
    ),
    "seq2seq": Case(
        t5, lambda: sentences(lambda index: [3 + index % 5, 4, 1]),
        {"predict_with_generate": True}, Seq2SeqTrainer,
    ),
    "early stopping": Case(
        bert, sentences,
        {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
         "load_best_model_at_end": True, "eval_dataset": sentences()[:4], "max_steps": 6, "learning_rate": 0.3,
         "metric_for_best_model": "eval_loss", "callbacks": [EarlyStoppingCallback(2)]},
    ),
    "epochs": Case(bert, sentences, {"max_steps": -1, "num_train_epochs": 1}),
}  # fmt: skip


def make_trainer(folder: Path, case: Case, cls: type[Trainer] | None = None, **more: Any) -> Trainer:
    """A Trainer for the case, with further callbacks or arguments of its own class."""
    options = {**FEW_STEPS, **case.options}
    own = ("callbacks", "compute_loss_func", "data_collator", "eval_dataset")
    settings = {name: options.pop(name) for name in own if name in options}
    settings["callbacks"] = [*settings.get("callbacks", []), *more.pop("callbacks", [])]
    kind = Seq2SeqTrainingArguments if case.cls is Seq2SeqTrainer else TrainingArguments
    args = tiny_training.arguments(folder, kind, **options)
    return (cls or case.cls)(model=case.make(), args=args, train_dataset=case.rows(), **settings, **more)


@cache
def unmeasured(name: str) -> dict[str, Any]:
    """What a case leaves behind without measurements, for tests that share it."""
    with TemporaryDirectory() as folder:
        return run(make_trainer(Path(folder), CASES[name]))


def subclass(case: Case) -> type[Trainer]:
    """The case's Trainer, measuring."""
    return type(f"Measuring{case.cls.__name__}", (OptimizabilityTrainerMixin, case.cls), {})


LIKE_OTHERS = {
    "persistent workers", "workers", "sgd", "adafactor", "regression", "multi-label", "llama", "epochs", "pure bf16",
    "label smoothing", "reentrant checkpointing", "rmsprop", "length grouping", "tied", "compute_loss",
    "BatchNorm", "depthwise", "shuffled stream", "warm-up", "frozen", "accumulation", "early stopping",
    "compute_loss_func", "question answering", "tokens", "dispatched stream", "checkpointing", "8-bit", "seq2seq",
    "torch_compile",
}  # fmt: skip
"""Cases near enough to others, here or in `test_hands_off`, to be left to `make test-slow`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in CASES]
)
def test_training_is_the_same(tmp_path: Path, name: str):
    case = CASES[name]
    if name == "8-bit":
        pytest.importorskip("bitsandbytes", reason="8-bit optimizers are those of bitsandbytes")
    plain = run(make_trainer(tmp_path / "plain", case))
    several = 2 if name == "stream" else 1
    callbacks = [OptimizabilityCallback(OptimizabilityConfig(**CONFIG)) for _ in range(several)]
    assert_equal(run(make_trainer(tmp_path / "callback", case, callbacks=callbacks)), plain)
    for callback in callbacks:
        assert not callback.report.failures, callback.report.failures[0]
        assert [measurement.step for measurement in callback.report.measurements][:3] == [0, 2, 4]
    if name == "8-bit":
        states = [state["__bnb_optimizer_quant_state__"] for state in plain["optimizer"]["state"].values()]
        assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    own = make_trainer(tmp_path / "own", case, subclass(case), optimizability=OptimizabilityConfig(**CONFIG))
    assert_equal(run(own), plain)
    assert not own.optimizability_report().failures


@pytest.mark.slow  # test_hands_off.py has a quick one
@pytest.mark.parametrize("name", [name for name in CASES if name != "8-bit"])
def test_training_is_the_same_with_a_pool(tmp_path: Path, name: str):
    callback = OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, **AT_BOTH_ENDS, "pool_examples": None}))
    assert_equal(run(make_trainer(tmp_path, CASES[name], callbacks=[callback])), unmeasured(name))
    assert callback.report.measurements and not callback.report.failures
    drawn = [measurement.population is not None for measurement in callback.report.measurements]
    assert set(drawn) == {callback.report.data.no_pool is None}


AT_BOTH_ENDS = {"measure_strategy": "no"}


def test_two_trainings_in_one_process(tmp_path: Path):
    """What the first leaves behind, the second would find."""
    for number in range(2):
        callback = OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, **AT_BOTH_ENDS}))
        trainer = make_trainer(tmp_path / str(number), CASES["warm-up"], callbacks=[callback])
        assert_equal(run(trainer), unmeasured("warm-up"))


def test_the_data_come_in_the_same_order(tmp_path: Path):
    seen: list[list[int]] = []

    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = torch.utils.data.default_collate(rows)
        if batch["labels"].shape == (2,):  # of training: the probe set is drawn in one piece
            seen[-1].append(hash(tuple(batch["input_ids"].flatten().tolist())))
        return batch

    case = Case(bert, sentences, {"data_collator": collator, "max_steps": 12})
    for callbacks in (
        [],
        [OptimizabilityCallback(OptimizabilityConfig(**{**CONFIG, "measure_steps": 6, "probe_examples": 3}))],
    ):
        seen.append([])
        make_trainer(tmp_path, case, callbacks=callbacks).train()
    plain, measured = seen
    assert len(plain) >= 12 and measured[-len(plain) :] == plain


STAGES = {
    "gradient": ("hf_optimizability.measurement.measure", "gradient"),
    "product": ("hf_optimizability.curvature.hessian", "second_backward"),
    "trace": ("hf_optimizability.measurement.curvature_pass", "estimate_spectrum"),
    "update": ("hf_optimizability.measurement.optimizer_step", "optimizer_update"),
    "step": ("hf_optimizability.measurement.optimizer_step", "critical_learning_rate"),
    "noise": ("hf_optimizability.measurement.measure", "noise_scale"),
}
IN_THREE_BATCHES = {**CONFIG, "probe_examples": 6, "probe_batch_size": 2, "engine": "double_backward"}
"""The noise scale takes that many."""

ERRORS = {
    "error": RuntimeError("broken on purpose"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "refused": MeasurementError("weights_changed"),
}


def break_stage(monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    module, name = STAGES[stage]

    def fail(*args: object, **kwargs: object) -> None:
        torch.rand(3)
        raise error

    monkeypatch.setattr(sys.modules[module], name, fail)


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        # Stages far apart with one error, and one stage with each; all pairs by `make test-slow`.
        (stage, error)
        if stage == "product" or (error == "error" and stage in ("gradient", "update", "noise"))
        else pytest.param(stage, error, marks=pytest.mark.slow)
        for stage in STAGES
        for error in ERRORS
    ],
)
def test_training_is_the_same_when_a_measurement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: str
):
    plain = unmeasured("warm-up")
    break_stage(monkeypatch, stage, ERRORS[error])
    callback = OptimizabilityCallback(OptimizabilityConfig(**{**IN_THREE_BATCHES, **AT_BOTH_ENDS}))
    assert_equal(run(make_trainer(tmp_path, CASES["warm-up"], callbacks=[callback])), plain)
    assert not callback.report.measurements and len(callback.report.failures) == 2


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def interrupt(folder: Path, name: str, *callbacks: TrainerCallback) -> dict[str, Any]:
    """What a training leaves behind that one of the callbacks interrupts at the second step."""
    trainer = make_trainer(folder, CASES[name], callbacks=list(callbacks))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    return left_behind(trainer)


@cache
def interrupted(name: str) -> dict[str, Any]:
    """The same without measurements."""

    def stop() -> None:
        raise KeyboardInterrupt

    with TemporaryDirectory() as folder:
        return interrupt(Path(folder), name, At(2, stop))


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *((stage, "warm-up") for stage in ("product", "noise")),
        *(
            pytest.param(stage, "warm-up", marks=pytest.mark.slow)  # they let go of the model in the same place
            for stage in ("gradient", "trace", "update", "step")
        ),
        ("product", "BatchNorm"),
        *(
            pytest.param("product", name, marks=pytest.mark.slow)
            for name in ("checkpointing", "bf16 autocast", "tied", "torch_compile")
        ),
        pytest.param("noise", "pure bf16", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_in_a_measurement_leaves_all_as_it_was_after_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
):
    """To the last bit as after Ctrl-C at the same step of a training without measurements."""

    plain = interrupted(name)
    break_now = At(1, lambda: break_stage(monkeypatch, stage, KeyboardInterrupt()))
    callback = OptimizabilityCallback(OptimizabilityConfig(**IN_THREE_BATCHES))
    assert_equal(interrupt(tmp_path, name, break_now, callback), plain)
    assert [measurement.step for measurement in callback.report.measurements] == [0]


def test_sft_trainer_through_the_mixin(tmp_path: Path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = ["<s>", "</s>", "<pad>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processing_class = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    texts = [" ".join("abcdefghij"[index % 5 : 3 + index % 7]) or "a b" for index in range(16)]

    def trainer(folder: str, cls: type[Trainer], **more: Any) -> Trainer:
        args = tiny_training.arguments(tmp_path / folder, SFTConfig, **FEW_STEPS, max_length=8, bf16=False)
        data = Dataset.from_dict({"text": texts})
        return cls(
            model=tiny_training.model("gpt2"), args=args, train_dataset=data, processing_class=processing_class, **more
        )

    plain = run(trainer("plain", SFTTrainer))
    measuring = type("MeasuringSFTTrainer", (OptimizabilityTrainerMixin, SFTTrainer), {})
    measured = trainer("measured", measuring, optimizability=OptimizabilityConfig(**CONFIG))
    assert_equal(run(measured), plain)
    report = measured.optimizability_report()
    assert [measurement.step for measurement in report.measurements] == [0, 2, 4] and not report.failures
