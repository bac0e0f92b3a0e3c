# SPDX-License-Identifier: Apache-2.0
"""`push_to_hub` of a Trainer that measures, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.publishing.hub import HubError, ModelCardError, add_to_model_folder, push
from hf_optimizability.publishing.model_card import START
from tests.support import tiny_training
from tests.support.example_report import make_report
from tests.support.hub_stub import READER, Fault, HubStub
from tests.support.tiny_training import CONFIG
from tests.support.training_outcome import assert_equal, run


def make(folder: Path, *, report_dir: Path | None = None, **options: Any) -> OptimizabilityTrainer:
    given = {**CONFIG, "measure_strategy": "no"}  # at the start and at the end
    config = OptimizabilityConfig(**given, report_dir=None if report_dir is None else str(report_dir))
    settings = {"max_steps": 2, "hub_model_id": "ada/tuned", **options}
    trainer = tiny_training.trainer(folder / "out", cls=OptimizabilityTrainer, optimizability=config, **settings)
    assert isinstance(trainer, OptimizabilityTrainer)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> OptimizabilityTrainer:
    """A run whose report is not in its output folder."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make(folder, report_dir=folder / "reports")
    trainer.train()
    return trainer


@pytest.fixture
def elsewhere(trained: OptimizabilityTrainer, tmp_path: Path) -> OptimizabilityTrainer:
    """The same run, with an output folder and a token of each test's own, before its first push."""
    trained.args.output_dir, trained.args.hub_token, trained.hub_model_id = str(tmp_path / "out"), None, None
    (tmp_path / "out").mkdir()
    return trained


def reports(trainer: OptimizabilityTrainer) -> Path:
    return Path(str(trainer.optimizability_callback.config.report_dir))


def published(hub: HubStub) -> dict[str, bytes]:
    return hub.repositories["ada/tuned"].files


def test_model_report_and_card_go_up_in_one_commit(hub: HubStub, tmp_path: Path):
    trainer = make(tmp_path)
    trainer.create_model_card(model_name="untrained")
    assert "ptimizability" not in (tmp_path / "out/README.md").read_text()

    trainer.train()
    trainer.push_to_hub(tags=["mine"])
    commits = hub.repositories["ada/tuned"].commits
    assert [commit.summary for commit in commits] == ["initial commit", "End of training"]
    folder = tmp_path / "out/optimizability"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"report.json", "report.md", "loss.png"}
    assert {name: published(hub)[f"optimizability/{name}"] for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    card = ModelCard(published(hub)["README.md"].decode())
    assert set(card.data.tags) == {"mine", "generated_from_trainer", "optimizability"}
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    trace = trainer.optimizability_report().measurements[-1].hessian.trace.value
    assert metrics["optimizability_hessian_trace"] == pytest.approx(trace, rel=1e-5)
    assert card.text.count("## Optimizability") == 1
    assert "### Framework versions" in card.text.split(START)[0]

    trainer.push_to_hub(tags=["mine"])
    assert len(commits) == 2
    assert push(folder, "ada/tuned").endswith(commits[-1].sha)  # both ways write the same
    assert len(commits) == 2


def test_a_push_that_fails_loses_nothing_and_can_be_made_again(
    hub: HubStub, tmp_path: Path, elsewhere: OptimizabilityTrainer
):
    kept = tmp_path / "out"
    for fault, message in {
        Fault("repos/create", 401): r"does not accept the token \(401",
        Fault("commit/main", 403): r"does not allow that \(403",
        Fault("commit/main", 503): r"The Hub has trouble \(503",
        Fault("commit/main", 0): "connection to the Hub broke",
        Fault("PUT /lfs", 403): r"does not allow that \(403",
    }.items():
        hub.faults = [fault]
        hub.large.clear()
        where = rf"The model and its report are in {kept}\.$"
        with pytest.raises(HubError, match=rf"^Could not finish pushing the model\. .*{message}.*{where}"):
            elsewhere.push_to_hub()
    assert len(OptimizabilityReport.load(kept / "optimizability").measurements) == 2
    hub.faults = []
    elsewhere.push_to_hub()
    assert published(hub)["model.safetensors"] == (kept / "model.safetensors").read_bytes()
    assert "optimizability/report.json" in published(hub)


def test_a_hub_that_fails_during_training_changes_nothing(hub: HubStub, tmp_path: Path):
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    plain = run(make(tmp_path / "plain", max_steps=3))
    hub.faults = [Fault("preupload", 403, times=1), Fault("commit/main", 500, times=1), Fault("commit/main", 0)]
    trainer = make(tmp_path / "run", max_steps=3, **options)
    assert_equal(run(trainer), plain)
    assert [fault.times for fault in hub.faults[:2]] == [0, 0] and hub.faults[2].times < 1_000
    assert "optimizability/report.json" not in published(hub)
    hub.faults = []
    trainer.push_to_hub()
    assert "optimizability/report.json" in published(hub)


def test_saving_does_not_fail_because_of_the_hub(
    hub: HubStub, tmp_path: Path, elsewhere: OptimizabilityTrainer, monkeypatch: pytest.MonkeyPatch
):
    """With `push_to_hub` in its arguments, a Trainer pushes what a script saves after training."""
    warnings: list[str] = []
    monkeypatch.setattr("hf_optimizability.training.trainer.logger.warning", warnings.append)
    monkeypatch.setattr(elsewhere.args, "push_to_hub", True)
    hub.faults = [Fault("commit/main", 503)]
    elsewhere.save_model()
    assert (tmp_path / "out/model.safetensors").exists()
    [warning] = warnings
    assert warning.startswith("Could not finish pushing the model. The Hub has trouble (503")
    hub.faults = []
    elsewhere.save_model()
    assert "optimizability/report.json" in published(hub)


def test_a_report_kept_elsewhere_is_copied(hub: HubStub, elsewhere: OptimizabilityTrainer):
    (reports(elsewhere) / "diary.txt").write_text("not for the Hub")
    elsewhere.push_to_hub()
    assert published(hub)["optimizability/report.json"] == (reports(elsewhere) / "report.json").read_bytes()
    assert "optimizability/loss.png" in published(hub)
    assert not [name for name in published(hub) if "diary" in name]


def test_a_card_that_fails_does_not_stop_the_push(
    hub: HubStub, tmp_path: Path, elsewhere: OptimizabilityTrainer, monkeypatch: pytest.MonkeyPatch
):
    warnings: list[str] = []
    monkeypatch.setattr("hf_optimizability.training.trainer.logger.warning", warnings.append)
    (tmp_path / "out/optimizability").write_text("a file in the folder's place")
    elsewhere.push_to_hub()
    assert "model.safetensors" in published(hub) and START.encode() not in published(hub)["README.md"]
    assert [warning[:60] for warning in warnings] == ["The model card has no optimizability report. FileExistsError"]


def test_what_killed_writers_left_is_not_pushed(tmp_path: Path):
    """`push_to_hub` uploads the folder as `create_model_card` leaves it."""
    folder = tmp_path / "optimizability"
    folder.mkdir()
    old = {".report.json.tmp", ".report.json.0123456789abcdef.tmp", ".loss.png.0123456789abcdef.tmp"}
    kept = {".report.html.0123456789abcdef.tmp", ".mine.tmp", "report.json.tmp"}
    for name in old | kept:
        (folder / name).write_text("torn")
    for name in old | kept - {".report.html.0123456789abcdef.tmp"}:
        os.utime(folder / name, (0, 0))
    add_to_model_folder(make_report(1), tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert not names & old and names >= kept | {"report.json", "report.html", "loss.png"}


def test_a_card_in_another_encoding_stays_as_it_is(tmp_path: Path):
    (tmp_path / "README.md").write_bytes("# Café\n".encode("latin-1"))
    with pytest.raises(ModelCardError, match=rf"^README\.md in {tmp_path} is not UTF-8"):
        add_to_model_folder(OptimizabilityReport(), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == "# Café\n".encode("latin-1")


def test_only_the_main_process_writes(
    tmp_path: Path, elsewhere: OptimizabilityTrainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(elsewhere, "is_world_process_zero", lambda: False)
    elsewhere.create_model_card()
    assert not list((tmp_path / "out").iterdir())


def test_a_token_of_the_arguments_shows_up_nowhere(
    hub: HubStub,
    elsewhere: OptimizabilityTrainer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    token = "opaque-sentinel-of-a-token"
    monkeypatch.delenv("HF_TOKEN")
    elsewhere.args.hub_token = token
    hub.writers.add(token)
    hub.faults = [Fault("commit/main", 400, says=f"Bearer {token}")]
    with pytest.raises(HubError, match="<secret>") as caught:
        elsewhere.push_to_hub()
    hub.faults = []
    elsewhere.push_to_hub()
    ours = b"".join(content for name, content in published(hub).items() if name != "training_args.bin")
    assert token.encode() not in ours
    assert token not in "".join([str(caught.value), *capfd.readouterr()])


def test_a_token_that_may_only_read(hub: HubStub, elsewhere: OptimizabilityTrainer):
    elsewhere.args.hub_token = READER
    with pytest.raises(HubError, match=r"does not allow that \(403"):
        elsewhere.push_to_hub()
