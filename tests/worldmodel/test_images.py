"""Runs on pairs of images: training, exact resume, evaluation with probes and DCI, and one line for a mistake."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

import worldmodel
from data_pipelines.errors import UserError
from data_pipelines.worlds.digit_images import write_digit_images
from tests.conftest import REPO
from tests.worldmodel.training.test_loop import assert_same_weights
from worldmodel.commands.main import main
from worldmodel.config import Config, ImagesConfig, cautions, load_config
from worldmodel.evaluation.embed import Networks, embed_split
from worldmodel.evaluation.images import attributes_of, context_labels
from worldmodel.runs.checkpoint import VideosChangedError
from worldmodel.runs.metrics import Metrics
from worldmodel.sources import make_source
from worldmodel.training.augment import augmented
from worldmodel.training.loop import train
from worldmodel.training.session import Interrupted

CPU = torch.device("cpu")
COUNTS = {"train": 80, "selection": 30, "test": 30}
TINY = [
    "data.batch_size=16",
    "model.encoder.width=0.125",
    "model.hidden_dim=16",
    "model.embedding_dim=8",
    "model.latent.dim=2",
    "train.steps=6",
    "train.warmup_steps=0",
    "train.eval_every=6",
    "train.checkpoint_every=2",
    "evaluation.queries=24",
    "evaluation.num_samples=4",
    "evaluation.fit_clips=64",
    "evaluation.selection_clips=24",
    "tracking.wandb=disabled",
]
Configured = Callable[..., Config]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images") / "digits"
    write_digit_images(root, COUNTS)  # type: ignore[arg-type]
    return root


@pytest.fixture
def configured(digits: Path, tmp_path: Path) -> Configured:
    fixed = [*TINY, f"data.root={digits}", f"run_dir={tmp_path / 'run'}"]
    return lambda *overrides: load_config(REPO / "configs" / "digits.yaml", [*fixed, *overrides])


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluated run, whose label is the slant."""
    folder = tmp_path_factory.mktemp("run") / "run"
    command = ["--config", str(REPO / "configs" / "digits.yaml"), *TINY, f"data.root={digits}", f"run_dir={folder}"]
    assert main(["train", *command, "evaluation.label=slant"]) == 0
    assert main(["evaluate", "--run", str(folder)]) == 0
    return folder


def test_single_images_are_probed_for_class_and_attributes(run: Path) -> None:
    metrics: Metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["probes"]) == {"backbone", "embedding", "r", "embedding_and_r"}
    for targets in metrics["probes"].values():
        assert set(targets) == {"label", "slant", "thickness", "width"}
        assert targets["label"]["linear"] is not None and 0 <= targets["label"]["linear"] <= 1
    assert (score := metrics["dci"]["disentanglement"]) is not None and 0 <= score <= 1
    # Forecasts of the slant of the target: persistence is the slant of the context.
    assert metrics["space"] == "slant" and {"model", "label_persistence"} <= set(metrics["forecasts"])
    assert "width" in (run / "report.html").read_text()


def test_probed_labels_are_those_of_the_context(configured: Configured, digits: Path) -> None:
    config = configured()
    model = worldmodel.build_model(config).eval()
    layout = worldmodel.build.clip_layout(config)
    networks = Networks(model, model.embedder, CPU, make_source(config), layout)
    clips = embed_split(networks, "test", 100, seed=0, progress=False)
    rows = [json.loads(line) for line in (digits / "test" / "metadata.jsonl").read_text().splitlines()]
    of_slant = {round(row["slant"], 4): row for row in rows}
    found = context_labels(clips.labels)
    assert len(found["slant"]) > 20 and clips.labels["slant"].shape[1:] == (3, 1)
    for slant, label in zip(found["slant"][:, 0].tolist(), found["label"].tolist(), strict=True):
        assert of_slant[round(slant, 4)]["label"] == label
    assert attributes_of(found).shape == (len(clips), 3)
    assert len(clips.places.video.unique()) == len(clips)


def test_a_resumed_run_continues_bit_for_bit(configured: Configured, tmp_path: Path) -> None:
    whole = train(configured(f"run_dir={tmp_path / 'whole'}"))
    asked = iter([0, 0, 0, 15])
    with pytest.raises(Interrupted):
        train(configured(), stop=lambda: next(asked))
    assert_same_weights(train(configured(), resume=True), whole)


def test_a_resume_notices_other_pairs(configured: Configured, digits: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"

    def write(skipped: int) -> None:
        lines = ["first,second"]
        for split in COUNTS:
            rows = (digits / split / "metadata.jsonl").read_text().splitlines()
            names = [f"{split}/{json.loads(row)['file_name']}" for row in rows]
            lines += [f"{a},{b}" for a, b in zip(names, names[1 + skipped :], strict=False)]
        pairs.write_text("\n".join(lines))

    by_file = (f"data.relation={{name: file, path: '{pairs}'}}",)
    write(0)
    folder = train(configured(*by_file, "train.steps=2"))
    write(1)
    with pytest.raises((VideosChangedError, UserError), match="have changed since its checkpoint"):
        train(configured(*by_file, "train.steps=2"), resume=True)
    assert worldmodel.load(folder).config.data.relation.path == str(pairs)  # type: ignore[union-attr]


def test_each_image_of_a_clip_has_an_augmentation_of_its_own(configured: Configured) -> None:
    config = configured("data.relation=same_image", "data.augment={brightness: 0.5}")
    stream = make_source(config).training_stream(1, rank=0, world_size=1, device=CPU)
    [batch] = islice(stream.batches(0), 1)
    assert torch.equal(batch["video"][:, 0], batch["video"][:, 1])
    changed = augmented(batch, config, 0, CPU)["video"]
    means = changed.mean(dim=(2, 3, 4))  # [B, S]
    assert (means.std(dim=1) > 1e-4).all()
    # A share of a batch is changed as within the whole: by rows, whatever the process.
    part = {**batch, "video": batch["video"][5:9], "row": batch["row"][5:9], "labels": {}}
    assert torch.equal(augmented(part, config, 0, CPU)["video"], changed[5:9])  # type: ignore[arg-type]


def test_positions_follow_the_image_that_they_are_of(configured: Configured) -> None:
    flip = "data.augment={flip: horizontal, position_labels: {place: [0, 1, 0, 1]}}"
    config = configured(flip)
    stream = make_source(config).training_stream(1, rank=0, world_size=1, device=CPU)
    [batch] = islice(stream.batches(0), 1)
    place = torch.rand(16, 3, 2, generator=torch.Generator().manual_seed(0))
    new = augmented({**batch, "labels": {"place": place}}, config, 0, CPU)
    mirrored = (new["video"] - batch["video"].flip(-1) / 255).abs().amax(dim=(2, 3, 4)) < 1e-5
    expected = torch.where(mirrored, 1 - place[..., 0], place[..., 0])
    torch.testing.assert_close(new["labels"]["place"][..., 0], expected)
    assert mirrored.any(dim=1).sum() > mirrored.all(dim=1).sum()  # drawn for each image


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.root=nowhere"], "data root 'nowhere' is not a folder: give a folder that holds images"),
        (["data.root=s3://bucket/images"], "is a URL: data.source=images reads folders, so copy the images first"),
        (["data.relation={name: same_class, label: species}"], "have no label 'species'"),
        (["data.relation=file"], "cannot read 'pairs.csv'"),
        (["data.relation=same_image", "data.augment={}"], "data.relation=same_image needs data.augment"),
        (["data.relation.path=x.csv"], "unknown key data.relation.path"),
        (["objective.rollout_steps=2"], "data.source=images has one step"),
        (["data.num_frames=2"], "unknown key data.num_frames=2"),
        (["model.action_dim=2"], "model.action_dim=2 needs the action at every frame: data.source=videos"),
        (["model.latent=oracle"], "model.latent=oracle needs model.latent.label"),
        (["evaluation.label=label"], "evaluation.label='label' is not a per-frame label"),
    ],
)
def test_mistakes(
    digits: Path, tmp_path: Path, overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [*TINY, f"data.root={digits}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "train.eval_every=1"]
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(REPO / "configs" / "digits.yaml"), *fixed, *overrides])
        main(["evaluate", "--run", str(tmp_path / "run")])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and told in error


def test_few_images_need_splits(tmp_path: Path, digits: Path, configured: Configured) -> None:
    for number, image in enumerate(sorted((digits / "train").rglob("*.png"))[:9]):
        (tmp_path / "few" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / str(number % 2) / image.name).write_bytes(image.read_bytes())
    source = make_source(configured(f"data.root={tmp_path / 'few'}"))
    with pytest.raises(UserError, match=r"has 9 images to divide, fewer than 10: add images, or make the folders"):
        source.check_split("train", 1, set(), "keys")


def test_a_later_image_without_augmentation_is_advised_against(configured: Configured) -> None:
    assert not list(cautions(configured()))
    [caution] = cautions(configured("data.augment={}"))
    assert "the later image, which the posterior sees, is the target itself" in caution


def test_the_defaults_fit_an_encoder(configured: Configured) -> None:
    config = Config(run_dir="", data=ImagesConfig())
    clip = torch.zeros(2, 1, 3, 64, 64)
    assert worldmodel.build_model(config).eval().encode(clip).shape == (2, config.model.embedding_dim)
