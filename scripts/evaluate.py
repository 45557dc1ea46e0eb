"""Score a trained run's forecasts and write metrics.json, forecasts.md and report.html into its folder.

python scripts/evaluate.py --run runs/demo [--compare runs/demo_byol]
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipelines.errors import UserError
from data_pipelines.files import write_text
from worldmodel import TrainedRun, load
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import add_allow_remote, check_remote, check_run_writable, report_errors, write_result
from worldmodel.evaluation.factors import evaluate_factors, factors_table
from worldmodel.evaluation.forecast import evaluate_forecasts
from worldmodel.evaluation.readout_file import save_readout
from worldmodel.evaluation.surprise import obstacle
from worldmodel.report.illustrations import Timeline
from worldmodel.report.illustrations_file import ILLUSTRATIONS_NAME, save_parts
from worldmodel.report.run_page import report_of_run
from worldmodel.report.tables import markdown_table, value_at
from worldmodel.runs.metrics import METRICS_NAME, read_metrics_file

MIN_TIMELINE_TRANSITIONS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--compare", type=Path, help="an evaluated run without a latent, shown as a control")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_allow_remote(parser)
    args = parser.parse_args()
    keep_freed_memory()
    with report_errors():
        evaluate(args.run, args.checkpoint, args.compare, torch.device(args.device), args.allow_remote)
    return 0


def evaluate(run: Path, which: str, compare: Path | None, device: torch.device, allow_remote: bool) -> None:
    trained = load(run, which="best" if which == "best" else "latest", device=device)
    check_remote(trained.source.url, allow_remote)
    check_run_writable(run)
    if trained.source.content == "factors":
        if compare is not None:
            raise UserError("--compare is for forecasts: scripts/compare.py compares runs on known factors")
        write_factor_scores(run, trained, device)
        return
    evaluation = evaluate_forecasts(trained.config, trained.model, trained.target_encoder, device)
    metrics = {
        **training_facts(run, trained),
        **evaluation.metrics,
    }
    if compare is not None:
        metrics["forecasts"]["no_latent"] = compared_forecast(compare, metrics)
    if evaluation.readout is not None and evaluation.quantity is not None:
        save_readout(run, evaluation.readout, evaluation.quantity, trained.state["step"])
    illustrations = dataclasses.replace(evaluation.illustrations, timeline=timeline_of_test_video(trained))
    save_parts(run / ILLUSTRATIONS_NAME, [illustrations])
    write_result(run / METRICS_NAME, metrics)
    table = markdown_table(metrics)
    write_text(run / "forecasts.md", table + "\n")
    print(f"\n{table}\n\n{report_of_run(run)}\n{run / 'metrics.json'}")


def timeline_of_test_video(trained: TrainedRun) -> Timeline | None:
    """Surprise along the first test video that holds several transitions; None without one, or where none is scored."""
    if obstacle(trained.model):
        return None
    path = next(trained.source.video_files("test", MIN_TIMELINE_TRANSITIONS), None)
    return None if path is None else trained.surprise(path, progress=True)


def training_facts(run: Path, trained: TrainedRun) -> dict[str, Any]:
    return {
        "run": run.name,
        "train": {"seconds": trained.state["train_seconds"], "steps": trained.state["step"]},
    }


def write_factor_scores(run: Path, trained: TrainedRun, device: torch.device) -> None:
    metrics = {
        **training_facts(run, trained),
        **evaluate_factors(trained.config, trained.model, device),
    }
    write_result(run / METRICS_NAME, metrics)
    print(f"\n{factors_table(metrics)}\n\n{run / 'metrics.json'}")


def compared_forecast(compare: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """The model's row of another evaluated run, if it answered the same queries."""
    path = compare / METRICS_NAME
    other = read_metrics_file(path)
    if other is None:
        raise UserError(f"{path} does not exist: evaluate that run first")
    if other.get("quantity") is None:
        raise UserError("--compare needs videos with labels: embeddings of two runs have no common scale")
    if other.get("queries_sha256") != metrics["queries_sha256"]:
        raise UserError(f"{compare} was scored on other queries: evaluate both runs on the same data and settings")
    if value_at(other, "forecasts.model") is None:
        raise UserError(f"{path} has no forecasts of that run: evaluate it again")
    return other["forecasts"]["model"]


if __name__ == "__main__":
    sys.exit(main())
