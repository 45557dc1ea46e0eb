"""Evaluate a trained run, and store the results in its folder."""

import dataclasses
from itertools import islice
from pathlib import Path

from data_pipelines.errors import UserError, one_line_logger
from data_pipelines.files import write_errors
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
from worldmodel.runs.opening import load_run_config
from worldmodel.runs.trained_run import TrainedRun

log = one_line_logger(__name__)

MIN_TIMELINE_TRANSITIONS = 4
MAX_TIMELINE_VIDEOS = 3  # that are tried


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
    stored_facts(run.folder, run.num_updates)  # a damaged file shows before minutes of work
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
        if compared.get("quantity") != metrics["quantity"] or compared.get("horizon") != metrics["horizon"]:
            raise UserError(
                f"{compare} was scored by another quantity or horizon: evaluate both runs with the same "
                "evaluation.label, data.size_px and evaluation.horizon"
            )
        metrics["forecasts"]["no_latent"] = compared["forecasts"]["model"]
    ordinary = None
    if not why_unsupported(run.model):
        ordinary = ordinary_transitions(run.networks, run.config.evaluation.selection_clips)
    illustrations = dataclasses.replace(evaluation.illustrations, timeline=timeline_of_test_video(run))
    with write_errors(run.folder):
        for path in (folder.readout, folder.recalibration, folder.surprise):
            path.unlink(missing_ok=True)  # of an evaluation with other settings
        if evaluation.readout is not None and evaluation.quantity is not None:
            save_readout(run.folder, evaluation.readout, evaluation.quantity, run.num_updates)
        if evaluation.recalibrated:
            save_recalibration(run.folder, evaluation.recalibrated, run.num_updates)
        if ordinary is not None:
            save_ordinary(run.folder, ordinary, run.num_updates)
        save_records(folder.illustrations, [illustrations])
    if stored_facts(run.folder, run.num_updates) is not None:
        store_futures(run.folder, run.networks, run.config, run.num_updates)
    return metrics


def _with_training(run: TrainedRun, scores: Metrics) -> Metrics:
    """Return the scores preceded by the facts of the training."""
    training = Training(seconds=run.state["train_seconds"], steps=run.state["step"], refine_steps=run.refine_steps)
    metrics = Metrics(run=run.folder.resolve().name, train=training, seed=run.config.seed)
    metrics.update(scores)
    return metrics


def timeline_of_test_video(run: TrainedRun) -> Timeline | None:
    """Return the surprise along the first test video with several transitions; None if there is no such video.

    None too if the model cannot score videos.
    """
    if why_unsupported(run.model):
        return None
    for path in islice(run.source.video_files("test", MIN_TIMELINE_TRANSITIONS), MAX_TIMELINE_VIDEOS):
        try:
            return run.surprise(path, progress=True)
        except UserError as error:  # a damaged video, of which evaluations leave out the clips
            log.warning("the report does not show the surprise of a video: %s", error)
    return None


def compared_metrics(compare: Path) -> Metrics:
    """Return the metrics of another run, whose forecasts of a labelled quantity can be compared with.

    Raises:
        UserError: that run was not evaluated, has a latent, or its forecasts have no labelled quantity.
    """
    path = RunFolder(compare).metrics
    metrics = read_metrics(compare)
    if metrics is None:
        raise UserError(f"{path} does not exist: evaluate that run first")
    if (latent := load_run_config(compare).model.latent.name) != "none":
        raise UserError(f"{compare} has model.latent={latent}: compare with a run without a latent variable")
    if metrics.get("quantity") is None:
        raise UserError(
            f"{compare} was scored in embedding space alone, which two runs do not share: comparing needs the law "
            "of a written world, at the size of its videos, or evaluation.label"
        )
    if metrics.get("forecasts", {}).get("model") is None:
        raise UserError(f"{path} has no forecasts of that run: evaluate it again")
    return metrics
