"""Measure how well the surprise of a run detects impossible events: teleports, freezes, appearances, changes of digit.

python benchmarks/surprise.py --run runs/kicked

For runs on the kicked world. Prints the AUROC over transitions per event, of the surprise and of its parts: KL(q || p),
the posterior's prediction error and the scene change. Writes them to surprise_events.json in the run's folder.
"""

import argparse
import sys
from pathlib import Path

import torch

from worldmodel import load
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, write_result
from worldmodel.evaluation.surprise import MEASURES
from worldmodel.evaluation.surprise_events import detect_events
from worldmodel.runs.folder import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run trained on the kicked world")
    parser.add_argument(
        "--num-videos", type=int, default=64, help="videos per event, and without an event (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "num_videos")
        run = load(args.run, which=args.checkpoint, device=args.device)
        RunFolder(args.run).check_writable()
        result = detect_events(run, args.num_videos, args.seed)
        facts = {"num_videos": args.num_videos, "seed": args.seed, "step": run.state["step"]}
        out = RunFolder(args.run).surprise_events
        write_result(out, facts | {"auroc": result})
        print(f"\n{table(result)}\n\n{out}")
    return 0


def table(result: dict[str, dict[str, float]]) -> str:
    lines = [f"{'AUROC':<14} {'surprise':>8} {'KL':>6} {'prediction error':>17} {'scene change':>13}"]
    for event in result[MEASURES[0]]:
        surprise, kl, error, scene = (result[measure][event] for measure in MEASURES)
        lines.append(f"{event.replace('_', ' '):<14} {surprise:>8.3f} {kl:>6.3f} {error:>17.3f} {scene:>13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
