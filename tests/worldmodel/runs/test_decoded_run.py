"""`worldmodel decode`: its files, what it keeps, the pictures in the report, and one line for a mistake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldmodel
from data_pipelines.errors import UserError
from worldmodel.commands.main import main
from worldmodel.evaluation.decoded import DecodedFutures, decode_paths, load_decoder
from worldmodel.evaluation.records import load_records, save_records
from worldmodel.planning.plan import plan
from worldmodel.planning.protocol import PlanningProtocol
from worldmodel.report.run_page import report_of_run
from worldmodel.runs.folder import RunFolder
from worldmodel.runs.hub import OF_RESULTS

CLIP = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoded_run(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoded") / "run"
    shutil.copytree(evaluated_run, folder)
    assert main(["decode", "--run", str(folder), "--steps", "3", "--clips", "20"]) == 0
    return folder


def test_its_files(decoded_run: Path) -> None:
    folder = RunFolder(decoded_run)
    facts = json.loads(folder.decoder_facts.read_text())
    assert (facts["step"], facts["decoder_steps"], facts["clips"], facts["seed"]) == (6, 3, 20, 0)
    assert facts["mse"] > 0 and facts["mean_picture_mse"] > 0 and facts["held_out_clips"] == 24
    assert sorted(path.name for path in folder.futures.iterdir()) == [
        f"clip_{number}.{suffix}" for number in (1, 2, 3) for suffix in ("png", "webp")
    ]
    with Image.open(folder.futures / "clip_1.webp") as moving:
        assert moving.n_frames == 6  # type: ignore[attr-defined]
    (futures,) = load_records(folder.decoded, DecodedFutures)
    assert futures.num_samples == 8 and futures.samples.shape == (3, 6, 3, 1, 64, 64)
    assert futures.spread.max() > 0 and futures.step == 6


def test_pictures_are_of_the_test_clips(decoded_run: Path) -> None:
    run = worldmodel.load(decoded_run)
    (futures,) = load_records(RunFolder(decoded_run).decoded, DecodedFutures)
    context = torch.from_numpy(futures.context)
    decoder = load_decoder(decoded_run, run.config, 6)
    real = run.target_encoder(torch.from_numpy(futures.real) / 255)
    expected = decode_paths(decoder, real[:, None, None], context[:, -1] / 255)[:, 0, 0]
    torch.testing.assert_close(torch.from_numpy(futures.decoded_real) / 255, expected, rtol=0, atol=0.01)


def test_the_report_shows_them_below_its_limit(decoded_run: Path) -> None:
    page = (decoded_run / "report.html").read_text()
    assert "Futures as pictures" in page and page.count("frame by frame: what came, 6 sampled futures") == 3
    assert 'data-metric="decoder.mse"' in page and len(page) < 5_000_000


@pytest.mark.parametrize("refine_steps", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_the_report_shows_those_of_the_weights_that_were_evaluated(
    decoded_run: Path, tmp_path: Path, refine_steps: int
) -> None:
    """A checkpoint is known by its updates of training (6) and refinement."""
    run = tmp_path / "run"
    shutil.copytree(decoded_run, run)
    folder = RunFolder(run)
    save_records(folder.decoded, [replace(each, step=10) for each in load_records(folder.decoded, DecodedFutures)])
    metrics = json.loads(folder.metrics.read_text())
    metrics["train"]["refine_steps"] = refine_steps
    folder.metrics.write_text(json.dumps(metrics))
    assert ("Futures as pictures" in report_of_run(run).read_text()) == (refine_steps == 4)


@pytest.mark.slow
def test_damaged_facts_are_written_again(
    decoded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are found before minutes of work."""
    run = tmp_path / "run"
    shutil.copytree(decoded_run, run)
    RunFolder(run).decoder_facts.write_text("{")
    with monkeypatch.context() as patched:
        patched.setattr("worldmodel.evaluation.evaluate.evaluate_forecasts", None)
        with pytest.raises(UserError, match=r"decoder\.json is damaged"):
            worldmodel.evaluate(worldmodel.load(run))
    protocol = PlanningProtocol("no:env", {}, seeds=1, episodes=1, budget=1, first_seed=0)
    with pytest.raises(UserError, match=r"decoder\.json is damaged"):
        plan(worldmodel.load(run), protocol)
    assert main(["decode", "--run", str(run), "--steps", "1", "--clips", "8", "--overwrite"]) == 0
    assert "mean squared error" in capsys.readouterr().out
    assert json.loads(RunFolder(run).decoder_facts.read_text())["decoder_steps"] == 1


@pytest.mark.slow
def test_a_decoder_is_kept_until_it_is_overwritten(
    decoded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(decoded_run, run)
    before = RunFolder(run).decoder.read_bytes()
    assert main(["decode", "--run", str(run), "--steps", "2"]) == 0
    assert RunFolder(run).decoder.read_bytes() == before and "mean squared error" in capsys.readouterr().out
    assert main(["decode", "--run", str(run), "--steps", "2", "--clips", "20", "--overwrite"]) == 0
    assert RunFolder(run).decoder.read_bytes() != before
    assert json.loads(RunFolder(run).decoder_facts.read_text())["decoder_steps"] == 2


def test_an_evaluation_renews_the_pictures(decoded_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(decoded_run, run)
    path = RunFolder(run).decoded
    (before,) = load_records(path, DecodedFutures)
    path.unlink()
    worldmodel.evaluate(worldmodel.load(run))
    (after,) = load_records(path, DecodedFutures)
    for name, value in vars(before).items():
        np.testing.assert_array_equal(getattr(after, name), value)


def test_decode_in_python(decoded_run: Path) -> None:
    run = worldmodel.load(decoded_run)
    futures = run.rollout(CLIP, 2, 3)
    frames = run.decode(CLIP, futures)
    assert frames.shape == (2, 3, 2, 3, 1, 64, 64) and 0 <= frames.min() <= frames.max() <= 1
    decoder = load_decoder(decoded_run, run.config, 6)
    with torch.no_grad():
        first = decoder(futures[1, 2, :1], CLIP[1:, -1]).clamp(0, 1)
        second = decoder(futures[1, 2, 1:], first[:, -1]).clamp(0, 1)
    torch.testing.assert_close(frames[1, 2], torch.cat([first, second]))
    with pytest.raises(UserError, match=r"futures of shape \[2, 16\] do not fit 2 clips"):
        run.decode(CLIP, run.encode(CLIP))


def test_an_export_holds_the_decoder(decoded_run: Path, tmp_path: Path) -> None:
    run = worldmodel.load(decoded_run)
    exported = worldmodel.load(worldmodel.export(run, tmp_path / "exported"))
    of_run = {"README.md", "checkpoints", "config.yaml"}
    assert {path.name for path in exported.folder.iterdir()} - of_run == {*OF_RESULTS} - {"recalibration.safetensors"}
    futures = run.rollout(CLIP, 1, 2)
    assert torch.equal(exported.decode(CLIP, futures), run.decode(CLIP, futures))


def test_a_decoder_that_does_not_fit(decoded_run: Path, tmp_path: Path) -> None:
    shutil.copytree(decoded_run, tmp_path / "run")
    run, folder = worldmodel.load(tmp_path / "run"), RunFolder(tmp_path / "run")
    futures = run.rollout(CLIP, 1, 2)
    content = folder.decoder.read_bytes()
    facts = json.loads(folder.decoder_facts.read_text())
    for damaged in (b"nothing", content[:-4], b"\x80\x04N."):
        folder.decoder.write_bytes(damaged)
        with pytest.raises(UserError, match=r"decoder\.safetensors is damaged, run `worldmodel decode"):
            run.decode(CLIP, futures)
    folder.decoder.write_bytes(content)
    folder.decoder_facts.write_text(json.dumps(facts | {"step": 4}))
    with pytest.raises(UserError, match="was trained at step 4, but the loaded checkpoint is from step 6"):
        run.decode(CLIP, futures)
    folder.decoder_facts.unlink()
    with pytest.raises(UserError, match="has no decoder: train one by `worldmodel decode --run"):
        run.decode(CLIP, futures)


@pytest.mark.parametrize(
    ("arguments", "tells"),
    [
        (["--run", "nowhere"], "no run in nowhere"),
        (["--run", "{run}", "--steps", "0"], "--steps must be at least 1"),
        (["--run", "{bare}"], "has no checkpoint yet: train it first"),
    ],
)
def test_mistakes(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], tells: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained_run / "config.yaml", bare)
    with pytest.raises(SystemExit) as ended:
        main(["decode", *(argument.format(run=trained_run, bare=bare) for argument in arguments)])
    assert ended.value.code == 2 and tells in capsys.readouterr().err
