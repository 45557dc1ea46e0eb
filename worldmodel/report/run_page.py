"""The report of a run: its scores and pictures as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipelines.errors import one_line_logger
from data_pipelines.files import write_errors, write_text
from worldmodel.config import to_yaml
from worldmodel.evaluation.decoded import DecodedFutures
from worldmodel.evaluation.illustrations import NO_ILLUSTRATIONS, Illustrations
from worldmodel.evaluation.records import load_records
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report import headline, numbers, published, run_charts, run_pictures, tables
from worldmodel.report.charts import latent_charts
from worldmodel.report.decoded_pictures import decoded_pictures
from worldmodel.report.page import plain, write_page
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.metrics import RunMetrics, read_decoder_facts, read_metrics, read_planning
from worldmodel.runs.opening import load_run_config
from worldmodel.runs.tracking import read_history, versions

logger = one_line_logger(__name__)


def report_of_run(run: Path) -> Path:
    """Write report.html into a run folder from the results of evaluations; return its path.

    The evaluation left metrics.json and illustrations.safetensors, planning left planning.json and
    planning.safetensors, decoding left decoder.json and decoded.safetensors. The report leaves out missing files. The
    forecasts are also written to forecasts.md.

    Raises:
        UserError: one of the files is damaged, or the report cannot be written.
    """
    folder = RunFolder(run)
    metrics, planning = read_metrics(run), read_planning(run)
    drawn = load_records(folder.illustrations, Illustrations) if metrics else []
    if metrics and not drawn:
        logger.warning("%s has no %s: evaluate the run again for the report's pictures", run, folder.illustrations.name)
    shown = RunMetrics()
    if metrics:
        shown.update(cast(RunMetrics, metrics))
        with write_errors(run):
            write_text(folder.forecasts, tables.markdown_table(shown) + "\n")
    if planning:
        shown["planning"] = planning
    step = headline.num_updates(shown)
    decoded = [futures for futures in load_records(folder.decoded, DecodedFutures) if futures.step == step]
    if decoded and (facts := read_decoder_facts(run)):
        shown["decoder"] = facts
    with write_errors(run):
        write_report(
            folder.report,
            title=run.resolve().name,
            metrics=shown,
            config_yaml=to_yaml(load_run_config(run)),
            history=read_history(run),
            illustrations=drawn[0] if drawn else NO_ILLUSTRATIONS,
            episodes=load_records(folder.planned_episodes, PlannedEpisode) if planning else [],
            decoded=decoded,
            versions=versions(),
        )
    return folder.report


def write_report(
    path: Path,
    *,
    title: str,
    metrics: RunMetrics,
    config_yaml: str,
    history: Sequence[Mapping[str, Any]],
    illustrations: Illustrations,
    versions: Mapping[str, str],
    episodes: Sequence[PlannedEpisode] = (),
    decoded: Sequence[DecodedFutures] = (),
) -> None:
    """Write the report of a run to `path`, one self-contained HTML file.

    history are the rows of metrics.jsonl. Missing parts of the metrics are left out, and a missing number is shown as a
    dash. The file appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    segments, remainder = divmod(illustrations.frames.shape[1], illustrations.num_frames)
    assert illustrations.frames.dtype == np.uint8 and segments >= 2 and remainder == 0, illustrations.frames.shape
    metrics, latents = plain(metrics), illustrations.latents
    write_page(
        path,
        "run_page.html.j2",
        title=title,
        headline=headline.headline(metrics),
        tiles=headline.tiles(metrics),
        metrics=metrics,
        table=tables.score_table(metrics),
        skill_table=tables.skill_table(metrics),
        explained=tables.explained(metrics),
        has_oracle="simulator_oracle" in numbers.forecast_names(metrics),
        futures=run_pictures.future_pictures(illustrations, metrics),
        fans=illustrations.fans,
        decoded=[pair for futures in decoded for pair in decoded_pictures(futures)],
        num_decoded=decoded[0].num_samples if decoded else 0,
        decoder=headline.decoder_facts(metrics),
        horizon_charts=run_charts.horizon_cards(metrics),
        calibration=run_charts.calibration_cards(metrics),
        latents=latent_charts(latents) if latents is not None else [],
        change_name=latents.change_name if latents is not None else "",
        retrieval=tables.retrieval_table(metrics),
        retrieval_chart=run_charts.retrieval_chart(metrics),
        neighbours=run_pictures.neighbour_pictures(illustrations),
        timeline=run_pictures.timeline_pictures(illustrations),
        planning=tables.planning_table(metrics),
        protocol=headline.protocol_facts(metrics),
        published=published.published_for(metrics),
        own_success=published.own_success(metrics),
        own_setting=published.own_setting(metrics),
        episodes=run_pictures.planning_pictures(episodes, metrics),
        has_ways=any(episode.way_px is not None for episode in episodes),
        has_imagined=any(episode.imagined_px is not None for episode in episodes),
        labels_chart=run_charts.labels_chart(metrics),
        factors=tables.factor_table(metrics),
        factor_cards=run_charts.factor_cards(metrics),
        curves=run_charts.curve_pictures(history),
        probes=tables.probe_tables(metrics),
        embedding_table=tables.score_table(metrics, "embedding.forecasts") if metrics.get("quantity") else None,
        embedding_skill_table=tables.skill_table(metrics, "embedding.forecasts"),
        facts=headline.facts(metrics),
        versions=versions,
        config_yaml=config_yaml,
        metrics_json=json.dumps(metrics, indent=1, ensure_ascii=False),
    )
