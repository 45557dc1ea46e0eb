"""Time rollouts: the latency for one clip, and the throughput of batched samples against a loop over single samples.

python benchmarks/rollout.py --config configs/demo.yaml --out rollout.json

Latency is the time to sample --samples futures of --steps segments of one clip, on one CPU thread, with the model
loaded. Throughput counts queries x samples x steps per second, on one thread and on all available cores: one rollout of
all samples of --queries clips, against a loop that calls the same rollout for each sample of each clip. The two
alternate, --repeats times; medians are reported. Without --run the weights are random, which costs the same. A model
that is conditioned on actions gets random ones.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from worldmodel import WorldModel, load
from worldmodel.build import build_model
from worldmodel.commands.exits import report_errors
from worldmodel.commands.process import keep_freed_memory
from worldmodel.commands.shared import check_counts, check_out_file, write_result
from worldmodel.config import Config, load_config
from worldmodel.sources import make_source
from worldmodel.training.machine import fair_share_of_cores, machine_description
from worldmodel.training.timing import seconds_in_turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, help="folder of a trained run")
    which.add_argument(
        "--config",
        type=Path,
        default=Path("configs/demo.yaml"),
        help="config of a model with random weights (default: configs/demo.yaml)",
    )
    parser.add_argument("--out", type=Path, default=Path("rollout.json"), help="JSON file to write")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16, help="segments to predict (default: 16)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    with report_errors():
        check_counts(args, "queries", "samples", "steps", "repeats")
        check_out_file(args.out, ".json")
        trained = load(args.run) if args.run else None
        config = trained.config if trained else load_config(args.config)
        if make_source(config).content != "frames":
            raise UserError(
                f"{args.run or args.config} has data.source={config.data.source}: rollouts are timed on clips of video"
            )
        model = trained.model if trained else build_model(config).eval()
        result = bench(model, random_clips(config, args.queries), args.samples, args.steps, args.repeats)
        write_result(args.out, result)
        print(f"{summary(result)}\n{args.out}")
    return 0


def random_clips(config: Config, count: int) -> Tensor:
    """Return random segments in [0, 1] of the config's shape: [count, T, C, H, W]."""
    data = config.data
    return torch.rand(count, data.num_frames, data.channels, data.size_px, data.size_px)


@torch.inference_mode()
def bench(model: WorldModel, clips: Tensor, samples: int, steps: int, repeats: int) -> dict[str, Any]:
    """Return the latency in ms and the throughputs, each with all repeats. clips: [Q, T, C, H, W]."""
    actions = 2 * torch.rand(len(clips), steps, model.action_dim) - 1 if model.action_dim else None
    of_clips = [None] * len(clips) if actions is None else actions.split(1)

    def latency() -> None:
        model.rollout(clips[:1], steps, samples, actions=of_clips[0])

    def batched() -> None:
        model.rollout(clips, steps, samples, actions=actions)

    def loop() -> None:
        for clip, taken in zip(clips.split(1), of_clips, strict=True):
            for _ in range(samples):
                model.rollout(clip, steps, 1, actions=taken)

    count = len(clips) * samples * steps
    threads_before, throughput = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        [latencies_s] = seconds_in_turns([latency], repeats, "latency")
        for num_threads in sorted({1, fair_share_of_cores()}):
            torch.set_num_threads(num_threads)
            batched_s, loop_s = seconds_in_turns([batched, loop], repeats, f"throughput, {num_threads} threads")
            throughput.append(
                {
                    "num_threads": num_threads,
                    "batched_per_s": count / median(batched_s),
                    "loop_per_s": count / median(loop_s),
                    "ratio": median(loop_s) / median(batched_s),
                    "batched_s": batched_s,
                    "loop_s": loop_s,
                }
            )
    finally:
        torch.set_num_threads(threads_before)
    return {
        "machine": machine_description(),
        "queries": len(clips),
        "samples": samples,
        "steps": steps,
        "clip": list(clips.shape[1:]),
        "latency_ms": 1e3 * median(latencies_s),
        "latencies_ms": [1e3 * seconds for seconds in latencies_s],
        "throughput": throughput,
    }


def summary(result: dict[str, Any]) -> str:
    frames, channels, height, width = result["clip"]
    lines = [
        f"latency: {result['latency_ms']:.1f} ms for {result['samples']} rollouts of {result['steps']} segments of one "
        f"clip of {frames} frames of {width}x{height}x{channels}, on one thread"
    ]
    for row in result["throughput"]:
        threads = "one thread" if row["num_threads"] == 1 else f"{row['num_threads']} threads"
        lines.append(
            f"throughput on {threads}: {row['batched_per_s']:,.0f} steps a second batched over {result['queries']} "
            f"queries, {row['loop_per_s']:,.0f} in a loop over samples: {row['ratio']:.1f} x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
