# SPDX-License-Identifier: Apache-2.0
"""No report tells who made it and where, whatever exceptions, names and logs say."""

from __future__ import annotations

import ast
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import Function
from transformers import TrainerCallback

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.redaction import public_name, redact_secrets
from hf_optimizability.training.provenance import describe_model
from tests.support import tiny_models, tiny_training
from tests.support.planted_secrets import LOOK_LIKE_SECRETS as LOOK_LIKE_ONE
from tests.support.planted_secrets import Secret, secrets
from tests.support.tiny_training import CONFIG


USER, HOST, SECRET = "adalovelace", "gpu-sentinel-17", "sentinel-of-an-api-key"
HOME = f"/home/{USER}"
TOKEN = "hf_" + "Sentinel" * 4
LEAK = (
    f"[Errno 2] No such file: '{HOME}/my thesis/train.csv' ({HOME}/x, ~/y/z.py, {HOME}, /scratch/{USER}/deep/z.bin:3) "
    f"for {USER}@{HOST}.example.org:29500 with {TOKEN} and {SECRET}"
)
PRIVATE = (USER, HOST, TOKEN, SECRET, "/home", "thesis", "scratch", "deep", "example.org")


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user on another machine."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, HOME)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example.org")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"open {HOME} failed", "open ~ failed"),
        (f"{HOME}/a/b.py:3: error", "~/a/b.py:3: error"),
        ("/Users/grace/x and /root/.cache/y", "~/x and ~/.cache/y"),
        (f"token {TOKEN}", "token <secret>"),
        (f"key={SECRET}", "key=<secret>"),
        ("get https://ada:s3cret@host/x", "get https://<secret>@host/x"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: <secret>"),
        ("x?password=hunter2 failed", "x?<secret> failed"),
        ("/tmp and /dev, and/or n/a", "/tmp and /dev, and/or n/a"),
    ],
)
def test_what_the_log_does_not_show(text: str, expected: str):
    assert redact_secrets(text) == expected


LOOK_LIKE_SECRETS = [
    TOKEN, SECRET, f"x {SECRET} y", "api_org_" + "x" * 34, "hf_oauth_eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "sk-proj-" + "q1" * 20, "ghp_" + "d" * 36, "AKIAIOSFODNN7EXAMPLE", "c0ffee" * 7, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.x",
    "wJalrXUtnFEMI7K7MDENG0bPxRfiCYEXAMPLEKEY", "password=hunter2", "Bearer abcdefghijklmnop123456",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END", "https://ada:pw@host.corp/data.csv",
    "s3://secret-bucket/ada/train.parquet", "hdfs://namenode.corp/user/ada", "ada@corp.com", "ada@gpu7.corp:/mnt/x",
    "/home/ada", "/mnt/secret/x.csv", "path=/home/ada/secret/x.csv", "~/x", "~bob/x", "../../secret/ada/x.csv",
    "./mine", "secret/ada/x.csv", "data/x.csv", r"C:\Users\Ada Lovelace\x", r"\\corp-server\secret\x", "C:/data",
    "'/mnt/it's secret/x.csv'", "[/mnt/secret/x.csv]", "/secret_project_dir", "file:///srv/data/x.csv",
    "b'/mnt/secret/x.csv'", "/mnt/secret/a:/mnt/secret/b", "eval_/secret_loss", "eval_data/x.csv_loss", "a/x.xlsx",
    "nTfd0bUAlyB6VckfmB-l7VjxwG9oCw_k8F-_-", "org/mF-7QmVEW3xvnA-jVS_gXWB5Mk-_h9ob-eKdwc", "a" * 1_000_000,
]  # fmt: skip


@pytest.mark.parametrize("name", LOOK_LIKE_SECRETS)
def test_names_that_look_like_secrets_are_hashed(name: str):
    assert re.fullmatch("private-[0-9a-f]{8}", public_name(name))
    assert public_name(name) == public_name(name) != public_name(f"{name}x")


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.0.attention.self.query.weight", "org/name", "google/bert_uncased_L-2_H-128_A-2", "imdb",
        "Wav2Vec2ForSequenceClassification", "Data2VecAudioForAudioFrameClassification", "recall@10", "map@0.5",
        "optimizability/train_grad_norm/layer.0", "eval_accuracy", "rewards/margins", "AdamW",
        "2026-01-02T03:04:05+00:00", "2.13.0+cpu", "5f2a9c01d3e7b684", "text-classification",
        "Ünïcode naïve", "a b", "", "A", "+", "n/a",
        "cosine_with_restarts", "hf_model.encoder.layer.0.attention.weight", "eval_hf_text_encoder_accuracy",
        "Qwen/Qwen3-MoE-15B-A2B", "meta-hunyuan_v1_moe/HunYuanMoEV1-2-7b-hf",
        "MobileNetV2ForImageClassification", "sentence-transformers/all-MiniLM-L6-v2", "bart-large-cnn-samsum",
        "precision_at_recall_0.95", "conv_stem.first_conv.normalization", "hidden_layers.0.w13_weight",
    ],
)  # fmt: skip
def test_names_stay(name: str):
    assert public_name(name) == name


RANDOM = settings(deadline=None, derandomize=True, database=None, max_examples=300, phases=[Phase.generate])

AROUND = (
    ("", ""), ("eval_", "_loss"), ("encoder.", ".weight"), ("optimizability/", ""), ("optimizability/task/", "/loss"),
    ("optimizability/train_grad_norm/", ""),
)  # fmt: skip
"""What stands around a name in a key."""


@RANDOM
@given(secrets(LOOK_LIKE_ONE), st.sampled_from(AROUND))
def test_random_secrets_are_hashed_alone_and_within_keys(secret: Secret, around: tuple[str, str]):
    name = public_name(secret.text.join(around))
    assert not [part for part in secret.parts if part in name]
    assert re.fullmatch(r"(optimizability/(task/|train_grad_norm/)?)?private-[0-9a-f]{8}(/loss)?", name)


@pytest.mark.parametrize("key", ["optimizability/task/{}/loss", "optimizability/train_grad_norm/{}"])
@pytest.mark.parametrize("name", ["~/x", "/home/ada", "data/x.csv", "ada@corp.com", "https://ada:pw@host/x"])
def test_the_name_in_a_key_of_our_own_is_hashed_and_the_key_is_kept(key: str, name: str):
    assert public_name(key.format(name)) == key.format(public_name(name)) != key.format(name)


WORD = st.sampled_from([
    "encoder", "decoder", "layer", "layers", "blocks", "attention", "self", "query", "key", "value", "dense", "output",
    "LayerNorm", "embeddings", "word_embeddings", "mlp", "gate_up_proj", "down_proj", "rotary_emb", "lora_A", "score",
    "default", "classifier", "conv1", "bn2", "downsample", "weight", "bias", "token_type_embeddings", "experts",
    "secrets", "password", "tokenizer", "signature", "passage_encoder", "pathology", "home",
])  # fmt: skip
PARAMETERS = st.lists(st.one_of(WORD, st.integers(0, 127).map(str)), min_size=1, max_size=10).map(".".join)
METRICS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "eval_", "train_", "test_", "rewards/", "eval_rewards/", "epoch/"]),
    st.lists(WORD, min_size=1, max_size=3, unique=True).map("_".join),
    st.sampled_from(["", "@10", "@0.5", "_loss", "_f1", "-macro", " (mean)", " %"]),
)
LABELS = st.sampled_from([
    "LABEL_0", "entailment", "not spam", "B-PER", "I-ORG", "5 stars", "n/a", "yes/no", "C++", "C#", "A", "0", "+1",
    "größer", "正面", "😀", "tench, Tinca tinca", "Sci/Tech", "O", "[CLS]", "<unk>", "#", "50 %", "a|b", "US$",
    "www", "e.g.", "AT&T", "Ph.D.", "R&B / soul",
])  # fmt: skip


@RANDOM
@given(st.one_of(PARAMETERS, METRICS, LABELS))
def test_ordinary_names_stay(name: str):
    assert public_name(name) == name
    assert public_name(f"optimizability/task/{name}/loss") == f"optimizability/task/{name}/loss"


@pytest.mark.parametrize("variable", ["HF_TOKEN", "GITHUB_PAT", "DB_PASS", "MYSQL_PWD", "S3_KEY_ID", "DATABASE_URL"])
def test_a_secret_of_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "three plain words")
    monkeypatch.setenv("PWD", "some other words")
    assert redact_secrets("got three plain words") == "got <secret>"
    assert public_name("x three plain words") != "x three plain words"
    assert public_name("some other words") == "some other words"


def test_a_secret_that_is_passed():
    assert redact_secrets("an opaque one, None", secrets=["opaque", None, ""]) == "an <secret> one, None"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"{HOME}/thesis/bert-tuned", "bert-tuned"),
        (f"{HOME}/thesis/bert-tuned/", "bert-tuned"),
        ("out/gone/checkpoint-50", "checkpoint-50"),
        ("~/models/bert", "bert"),
        ("./bert", "bert"),
        (r"C:\Users\ada\bert", "bert"),
        ("tests", "tests"),
        ("google/bert_uncased", "google/bert_uncased"),
        ("gpt2", "gpt2"),
        ("", ""),
    ],
)
def test_a_model_is_called_by_its_name(path: str, name: str):
    model = tiny_models.bert()
    model.config._name_or_path = model.name_or_path = path
    assert describe_model(model).id == name


class Identity(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return NoFurther.apply(gradient)


class NoFurther(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(LEAK)


class Talk(TrainerCallback):
    """Fails at the second measurement, and logs a text."""

    def __init__(self, model: nn.Module):
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            state.log_history.append({"note": LEAK, "step": 1})
            self.hook = self.model.register_forward_pre_hook(self.fail)
        elif state.global_step == 2:
            self.hook.remove()

    @staticmethod
    def fail(module: nn.Module, inputs: Any) -> None:
        if not module.training:
            raise OSError(LEAK)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (str(key), *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_a_report_names_neither_user_nor_place(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Where the model and the data are local, and every exception tells all there is to tell."""
    torch.manual_seed(0)
    model = tiny_models.bert()
    model.config._name_or_path = model.name_or_path = f"{HOME}/thesis/bert-tuned"
    model.bert.pooler.register_forward_hook(lambda module, inputs, output: Identity.apply(output))
    rows = datasets.Dataset.from_list(tiny_training.dataset("bert"))
    rows.info.dataset_name = "train"
    config = OptimizabilityConfig(**CONFIG, report_dir=str(tmp_path / USER / "report"))
    trainer = tiny_training.trainer(
        tmp_path / USER, cls=OptimizabilityTrainer, own=model, train_dataset=rows, eval_dataset=rows, max_steps=4,
        callbacks=[Talk(model)], optimizability=config, run_name=f"{USER} on {HOST}", hub_token=TOKEN,
    )  # fmt: skip
    monkeypatch.setattr(logging.getLogger("hf_optimizability"), "propagate", True)
    trainer.train()
    trainer.create_model_card()
    said = caplog.text + "".join(capfd.readouterr())
    assert said.count("No such file: ") == 2  # to the user's own log
    assert TOKEN not in said and SECRET not in said

    report = json.loads((tmp_path / USER / "report/report.json").read_text())
    assert [failure["step"] for failure in report["failures"]] == [2]
    assert {m["engine"] for m in report["measurements"]} == {"central_difference"}
    assert report["failures"][0]["why"]["error"] == "OSError"
    assert report["measurements"][0]["fallback"]["error"] == "RuntimeError"
    assert all(
        isinstance(value, (int, float, type(None))) for entry in report["log_history"] for value in entry.values()
    )
    assert report["model"]["id"] == "bert-tuned"
    for text in strings(report):
        assert not [private for private in (*PRIVATE, str(tmp_path)) if private in text], text
    section = (tmp_path / USER / "README.md").read_text().partition("<!-- optimizability:start")[2]
    for text in (
        section,
        *(path.read_bytes().decode(errors="replace") for path in (tmp_path / USER / "report").iterdir()),
    ):
        assert not [private for private in (*PRIVATE, str(tmp_path)) if private in text]


NEVER = {"eval", "exec", "pickle.load", "pickle.Unpickler", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}


def unsafe(source: str) -> list[str]:
    """Calls that may run what a file says."""
    found = []
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func)
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            name in NEVER
            or (name == "pickle.loads" and not ast.unparse(call.args[0]).startswith("pickle.dumps("))
            or (name == "torch.load" and told.get("weights_only") != "True")
            or told.get("trust_remote_code") == "True"
            or told.get("allow_pickle") == "True"
        ):
            found.append(ast.unparse(call))
    return found


def test_no_file_is_run():
    """Neither unpickled, nor as YAML with tags, nor as code that comes with a checkpoint unless the user asks."""
    root = Path(__file__).parent.parent
    for folder in ("hf_optimizability", "recipes"):
        for path in (root / folder).rglob("*.py"):
            assert unsafe(path.read_text()) == [], path
    for call in ("pickle.loads(file.read())", "torch.load(path)", "yaml.load(x)", "f(trust_remote_code=True)"):
        assert unsafe(call) == [call]


def test_both_names_of_a_pair_of_tasks_are_looked_at():
    assert public_name("optimizability/task_cosine/0/1") == "optimizability/task_cosine/0/1"
    token = "hf_" + "Ab3" * 12
    hashed = public_name(f"optimizability/task_cosine/positive/{token}")
    assert hashed.startswith("optimizability/task_cosine/positive/private-") and token not in hashed
