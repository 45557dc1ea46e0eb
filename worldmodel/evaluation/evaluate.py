"""Evaluate a trained run, and store the results in its folder."""

import dataclasses
from pathlib import Path

from data_pipelines.errors import UserError
from worldmodel.evaluation.decoded import store_futures, stored_facts
from worldmodel.evaluation.factors import evaluate_factors
from worldmodel.evaluation.forecast import evaluate_forecasts
from worldmodel.evaluation.ordinary import ordinary_transitions, save_ordinary
from worldmodel.evaluation.readout import save_readout
from worldmodel.evaluation.recalibration import save_recalibration
from worldmodel.evaluation.records import save_records
from worldmodel.evaluation.surprise import Timeline, why_unsupported
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import Metrics, Training, read_metrics, write_metrics
from worldmodel.runs.trained_run import TrainedRun

MIN_TIMELINE_TRANSITIONS = 4


def evaluate(run: TrainedRun, *, compare: Path | None = None) -> Metrics:
    """Score a run on its test split; write metrics.json and, for a run on videos, the arrays of the report.

    `compare` is the folder of an evaluated run without a latent. Its forecasts become the control "no_latent".

    Raises:
        UserError: the run folder is not writable, a split has too few clips or lacks a label, or the run to compare
            with was not evaluated on the same queries.

    Examples:
        >>> metrics = worldmodel.evaluate(worldmodel.load("runs/demo"))
        >>> metrics["forecasts"]["model"]["energy_score"]
    """
    RunFolder(run.folder).check_writable()
    if run.source.content == "factors":
        if compare is not None:
            raise UserError("a run on a causal world has no forecasts to compare: compare runs on their known factors")
        metrics = _with_training(run, evaluate_factors(run.networks, run.config.evaluation))
    else:
        metrics = _evaluate_videos(run, compare)
    write_metrics(run.folder, metrics)
    return metrics


def _evaluate_videos(run: TrainedRun, compare: Path | None) -> Metrics:
    """Return the metrics of forecasts; write the other files of an evaluation."""
    folder = RunFolder(run.folder)
    compared = None if compare is None else compared_metrics(compare)  # mistakes show before minutes of work
    evaluation = evaluate_forecasts(run.networks, run.config.evaluation)
    metrics = _with_training(run, evaluation.metrics)
    if compared is not None:
        if compared.get("queries_sha256") != metrics["queries_sha256"]:
            raise UserError(f"{compare} was scored on other queries: evaluate both runs on the same data and settings")
        metrics["forecasts"]["no_latent"] = compared["forecasts"]["model"]
    if evaluation.readout is not None and evaluation.quantity is not None:
        save_readout(run.folder, evaluation.readout, evaluation.quantity, run.state["step"])
    if evaluation.recalibrated:
        save_recalibration(run.folder, evaluation.recalibrated, run.state["step"])
    if not why_unsupported(run.model):
        ordinary = ordinary_transitions(run.networks, run.config.evaluation.selection_clips)
        save_ordinary(run.folder, ordinary, run.state["step"])
    illustrations = dataclasses.replace(evaluation.illustrations, timeline=timeline_of_test_video(run))
    save_records(folder.illustrations, [illustrations])
    if stored_facts(run.folder, run.state["step"]) is not None:
        store_futures(run.folder, run.networks, run.config, run.state["step"])
    return metrics


def _with_training(run: TrainedRun, scores: Metrics) -> Metrics:
    """Return the scores preceded by the facts of the training."""
    training = Training(seconds=run.state["train_seconds"], steps=run.state["step"])
    metrics = Metrics(run=run.folder.name, train=training, seed=run.config.seed)
    metrics.update(scores)
    return metrics


def timeline_of_test_video(run: TrainedRun) -> Timeline | None:
    """Return the surprise along the first test video with several transitions; None if there is no such video.

    None too if the model cannot score videos.
    """
    if why_unsupported(run.model):
        return None
    path = next(run.source.video_files("test", MIN_TIMELINE_TRANSITIONS), None)
    return None if path is None else run.surprise(path, progress=True)


def compared_metrics(compare: Path) -> Metrics:
    """Return the metrics of another run, whose forecasts of a labelled quantity can be compared with.

    Raises:
        UserError: that run was not evaluated, or its forecasts have no labelled quantity.
    """
    path = RunFolder(compare).metrics
    metrics = read_metrics(compare)
    if metrics is None:
        raise UserError(f"{path} does not exist: evaluate that run first")
    if metrics.get("quantity") is None:
        raise UserError(
            f"{compare} was scored in embedding space alone, which two runs do not share: comparing needs the law "
            "of a written world, at the size of its videos, or evaluation.label"
        )
    if metrics.get("forecasts", {}).get("model") is None:
        raise UserError(f"{path} has no forecasts of that run: evaluate it again")
    return metrics
