"""Rounds of all kinds for a given time: findings are saved with the command that repeats them, a table at the end."""

import gc
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.fuzz import archive_kinds, convert_kinds, run_kinds, table_kinds, video_kinds
from benchmarks.fuzz.kinds import Kind
from benchmarks.fuzz.sandbox import Outcome, Verdict, prepare_in_child, run_case
from data_pipelines.decoders import resolve_decoder
from data_pipelines.errors import UserError
from worldmodel.report.tables import aligned_table

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kinds in (video_kinds.KINDS, table_kinds.KINDS, archive_kinds.KINDS, convert_kinds.KINDS, run_kinds.KINDS)
    for kind in kinds
}
SAVED_OF_A_SORT = 3  # findings with the same place or reason that are saved


@dataclass
class Tally:
    """The rounds of one kind."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_mib: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.verdicts[outcome.verdict] += 1
        self.slowest_s = max(self.slowest_s, outcome.cpu_s)
        self.peak_mib = max(self.peak_mib, outcome.peak_mib)

    def cells(self, name: str) -> list[str]:
        verdicts = [
            self.verdicts.total(),
            *(self.verdicts[key] for key in ("refused", "accepted", "skipped", "finding")),
        ]
        return [name, *(f"{number:,}" for number in verdicts), f"{self.slowest_s:.1f}", f"{self.peak_mib:.0f}"]


class Workplace:
    """A folder with the seeds of kinds, prepared at a kind's first use, and with the current round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _import_early()

    def run(self, kind: Kind, seed: int) -> Outcome:
        seeds = self.folder / "seeds" / kind.name
        if not seeds.is_dir():
            prepare_in_child(kind, seeds)
        shutil.rmtree(self.round_folder, ignore_errors=True)
        return run_case(kind, seed, seeds, self.round_folder)

    @property
    def round_folder(self) -> Path:
        return self.folder / "round"


def _import_early() -> None:
    """Import modules that every round would import otherwise; child processes are forks of this one."""
    import av
    import h5py  # noqa: F401  # it asks the system for its processor once
    import matplotlib.font_manager

    for name in ("decord", "torchcodec"):
        with suppress(UserError):
            resolve_decoder(name)
    matplotlib.use("agg")
    av.logging.set_level(av.logging.PANIC)
    torch.set_num_threads(1)
    gc.freeze()  # so that children do not copy what they only look at


def kind_of(seed: int, names: Sequence[str]) -> Kind:
    """Return the kind of a round; kinds alternate."""
    return KINDS[names[seed % len(names)]]


def fuzz_for(seconds: float, first_seed: int, names: Sequence[str], out: Path) -> int:
    """Run rounds from first_seed on until the time is over, print findings and the table, and return the exit code."""
    tallies = {name: Tally() for name in names}
    sorts: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    seed = first_seed
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder, tqdm(total=round(seconds), unit="s") as bar:
        workplace = Workplace(Path(folder))
        try:
            for seed in count(first_seed):
                passed_s = time.monotonic() - start_s
                bar.update(min(round(passed_s), bar.total) - bar.n)
                bar.set_postfix(rounds=seed - first_seed, findings=sorts.total())
                if passed_s >= seconds and seed > first_seed:
                    break
                kind = kind_of(seed, names)
                outcome = workplace.run(kind, seed)
                tallies[kind.name].add(outcome)
                if outcome.verdict == "skipped":
                    skips[f"{kind.name}: {outcome.reason}"] += 1
                if outcome.verdict == "finding":
                    sort = f"{kind.name}: {outcome.place or outcome.reason[:60]}"
                    sorts[sort] += 1
                    if sorts[sort] <= SAVED_OF_A_SORT:
                        bar.write(describe(kind, seed, outcome, save(workplace.round_folder, kind, seed, out)))
        except KeyboardInterrupt:
            bar.write("interrupted")
    print_table(tallies, sorts, skips)
    print(f"to continue: --seed {seed}")
    return int(bool(sorts))


def repeat(kind: Kind, seed: int, out: Path) -> int:
    """Run one round, print its outcome and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        workplace = Workplace(Path(folder))
        outcome = workplace.run(kind, seed)
        saved = save(workplace.round_folder, kind, seed, out)
    print(describe(kind, seed, outcome, saved))
    return int(outcome.verdict == "finding")


def save(round_folder: Path, kind: Kind, seed: int, out: Path) -> Path:
    """Copy a round: its input after the attempt, and its output."""
    saved = out / f"{kind.name}_{seed}"
    shutil.rmtree(saved, ignore_errors=True)
    saved.mkdir(parents=True)
    shutil.copytree(
        round_folder / "input", saved / "input", symlinks=True, copy_function=_copy_regular, dirs_exist_ok=True
    )
    if (round_folder / "output.txt").is_file():
        shutil.copyfile(round_folder / "output.txt", saved / "output.txt")
    return saved


def _copy_regular(source: str, target: str) -> None:
    if Path(source).is_file():  # no named pipe
        shutil.copy2(source, target)


def describe(kind: Kind, seed: int, outcome: Outcome, saved: Path) -> str:
    command = f"python -m benchmarks.fuzz --kinds {kind.name} --seed {seed} --repeat"
    place = f" at {outcome.place}" if outcome.place else ""
    return (
        f"{outcome.verdict.upper()} {kind.name} {seed}: {outcome.reason or 'no reason'}{place}\n"
        f"  {outcome.cpu_s:.1f} s, {outcome.peak_mib:.0f} MiB; saved in {saved}; again: {command}"
    )


def print_table(tallies: Mapping[str, Tally], sorts: Counter[str], skips: Counter[str]) -> None:
    header = ["kind", "rounds", "refused", "accepted", "skipped", "findings", "slowest, s", "peak, MiB"]
    print(aligned_table([header, *(tally.cells(name) for name, tally in tallies.items())]))
    for sort, number in sorts.most_common():
        print(f"{number:>6,} times {sort}")
    for reason, number in skips.most_common(5):
        print(f"{number:>6,} times skipped {reason}")
