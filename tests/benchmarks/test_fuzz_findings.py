"""Rounds of the fuzzer that were findings once.

A seed stands for the input that the fuzzer builds of it. Where the fuzzer is changed it builds another one: put what
matters into a test that states the input, too (test_hostile_values.py, test_hostile.py).
"""

import pytest

from benchmarks.fuzz.rounds import KINDS, Workplace

FINDINGS: dict[str, tuple[int, ...]] = {
    "config": (802258,),
    "labels": (817135,),
    "lerobot": (22193, 22243, 23073, 23163, 23613, 24763, 1302363, 1516078),
    "metadata": (7302, 7492, 412932),
    "tar": (7284, 7414, 22934, 104624, 104954, 104964),
}
RUN_FINDINGS = (24419, 806939, 815119, 1506889)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in FINDINGS.items() for seed in seeds])
def test_what_was_found_is_mended(workplace: Workplace, kind: str, seed: int) -> None:
    outcome = workplace.run(KINDS[kind], seed)
    assert outcome.verdict in ("accepted", "refused"), outcome


@pytest.mark.slow  # a run must be trained first
@pytest.mark.parametrize("seed", RUN_FINDINGS)
def test_what_was_found_in_run_folders_is_mended(workplace: Workplace, seed: int) -> None:
    outcome = workplace.run(KINDS["run"], seed)
    assert outcome.verdict in ("accepted", "refused"), outcome
