"""Measure how well the surprise of a run detects what is impossible in its world.

python benchmarks/surprise.py --run runs/kicked
python benchmarks/surprise.py --run runs/occlusion --num-videos 256

Kicked world: the AUROC over transitions for teleports, freezes, appearances and changes of digit, of the surprise and
of its parts, and the shares of transitions that exceed the threshold at a rate of false alarms: in videos without an
event, and at each event. Occlusion: the share of pairs whose impossible video surprises more, for digits that vanish,
change or appear behind a screen. The results are written to surprise_events.json in the run's folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from worldmodel import load
from worldmodel.commands.exits import report_errors
from worldmodel.commands.shared import check_counts, check_device, check_seed, write_result
from worldmodel.evaluation.surprise import MEASURES
from worldmodel.evaluation.surprise_events import detect
from worldmodel.runs.folder import RunFolder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run trained on the kicked world or on occlusion")
    parser.add_argument(
        "--num-videos", type=int, default=64, help="videos per event, and without an event, or pairs (default: 64)"
    )
    parser.add_argument("--false-alarms", type=float, default=0.01, help="rate of the threshold (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--device", help="torch device (default: cuda if there is a GPU, else cpu)")
    args = parser.parse_args()
    with report_errors():
        check_counts(args, "num_videos")
        check_seed(args)
        run = load(args.run, which=args.checkpoint, device=check_device(args.device))
        RunFolder(args.run).check_writable()
        result = detect(run, args.num_videos, args.seed, args.false_alarms)
        facts = {"num_videos": args.num_videos, "seed": args.seed, "step": run.num_updates}
        out = RunFolder(args.run).surprise_events
        write_result(out, facts | result)
        print("", *tables(result), "", out, sep="\n")
    return 0


def tables(result: dict[str, Any]) -> list[str]:
    if "pairs" in result:
        lines = [f"{'event':<14} {'impossible above possible':>26} {'95% interval':>16}"]
        for event, found in result["pairs"].items():
            low, high = found["ci95"]
            lines.append(f"{event:<14} {found['share']:>26.3f} {f'{low:.3f} - {high:.3f}':>16}")
        return lines
    lines = [f"{'AUROC':<14} {'surprise':>8} {'KL':>6} {'prediction error':>17} {'scene change':>13} {'stillness':>10}"]
    for event in result["auroc"][MEASURES[0]]:
        surprise, kl, error, scene, still = (result["auroc"][measure][event] for measure in MEASURES)
        name = event.replace("_", " ")
        lines.append(f"{name:<14} {surprise:>8.3f} {kl:>6.3f} {error:>17.3f} {scene:>13.3f} {still:>10.3f}")
    alarms = result["alarms"]
    low, high = alarms["normal_ci95"]
    lines += ["", f"above {alarms['threshold']:.3f}, the threshold at a false alarm rate of {alarms['rate']:g}:"]
    lines.append(f"{'normal':<14} {alarms['normal']:>8.4f} ({low:.4f} - {high:.4f})")
    lines += [f"{event.replace('_', ' '):<14} {share:>8.3f}" for event, share in alarms["detected"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
