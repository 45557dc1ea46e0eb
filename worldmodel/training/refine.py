"""Refinement: the encoder stands still, and what predicts goes on learning from its embeddings.

While the encoder learns, batch statistics move every embedding with the batch that it is in, and the editor cannot tell
that noise from the future. Afterwards the embeddings of many clips are computed once, with running statistics, and
editor, posterior and prior learn from them for thousands of updates that cost what a small network costs.

Legend: N clips, K steps of prediction, D embedding dimensions, R latent dimensions, A numbers of an action.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.errors import UserError
from worldmodel.config import Config
from worldmodel.data import segment_span, training_inputs
from worldmodel.evaluation.forecast import frozen
from worldmodel.nets.distance import clips_alike
from worldmodel.nets.world_model import Embedded, Pairs, WorldModel
from worldmodel.sources.source import Source
from worldmodel.training.finite import Guard, first_overflow
from worldmodel.training.optimisation import learning_rate, parameter_groups, set_lr, step_generator

Autocast = Callable[[], AbstractContextManager[None]]
"""Accelerator.autocast: a context of the precision that training has."""

WARMUP_STEPS = 100
SEGMENTS_AT_ONCE = 256
FRESH_SHARE = 0.4
PAIRS_PER_CLIP = 2
NEAR_OF = 8


class EmbeddedClips(NamedTuple):
    """N clips of L segments after the encoders, in evaluation mode.

    own [N, L, D] are the model's embeddings of all segments, targets [N, L - 1, D] those of all but the first in the
    space of targets, and features [N, L, F] what the encoder made of all, None where no scene code is read; known_r
    [N, R] is what an oracle latent takes, actions [N, H + K - 1, A] what the model is conditioned on.
    """

    own: Tensor
    targets: Tensor
    features: Tensor | None
    known_r: Tensor | None
    actions: Tensor | None

    def rows(self, chosen: slice) -> "EmbeddedClips":
        features, known_r, actions = (None if part is None else part[chosen] for part in self[2:])
        return EmbeddedClips(self.own[chosen], self.targets[chosen], features, known_r, actions)


def refinement_stream(source: Source, config: Config, device: torch.device) -> BatchStream:
    """The stream of what is embedded: clips for steps_of(config) steps, each cut where the refined steps of the one
    before it end. Whatever data.clip_step is, a segment is then embedded about once and many videos are seen.
    """
    clip_step = config.train.refine_horizon * segment_span(config.data)
    return source.training_stream(steps_of(config), rank=0, world_size=1, device=device, clip_step=clip_step)


def embed_clips(
    config: Config,
    model: WorldModel,
    target_encoder: nn.Module,
    batches: Iterator[Batch],
    device: torch.device,
    autocast: Autocast,
    stop: Callable[[], int],
) -> EmbeddedClips:
    """The embeddings of train.refine_clips clips of a stream, each for steps_of(config) steps.

    `stop` tells the number of a signal that came, or 0: fewer clips are embedded then.
    """
    missing = config.train.refine_clips
    parts: list[EmbeddedClips] = []
    with frozen(model, target_encoder), tqdm(total=missing, desc="embedding", unit="clip") as bar:
        while missing > 0 and not (parts and stop()):
            segments, known_r, actions = training_inputs(next(batches), config, steps_of(config), device)
            with autocast():
                encoded = in_parts(model.embedder.features, segments)
                own = model.embedder.project(encoded.flatten(0, 1)).unflatten(0, segments.shape[:2])
                shared = target_encoder is model.embedder
                targets = own[:, 1:] if shared else in_parts(target_encoder, segments[:, 1:])
            read_from = None if model.scene is None else encoded
            parts.append(EmbeddedClips(own, targets, read_from, known_r, actions).rows(slice(missing)))
            missing -= len(segments)
            bar.update(len(parts[-1].own))
    columns = list(zip(*parts, strict=True))
    features, known_r, actions = (None if column[0] is None else torch.cat(column) for column in columns[2:])
    return EmbeddedClips(torch.cat(columns[0]), torch.cat(columns[1]), features, known_r, actions)


def in_parts(encode: Callable[[Tensor], Tensor], segments: Tensor) -> Tensor:
    """[B, L, T, C, H, W] -> [B, L, F] of the segments one by one, a few at once: as many as caches hold."""
    parts = segments.flatten(0, 1).split(SEGMENTS_AT_ONCE)
    return torch.cat([encode(part) for part in parts]).unflatten(0, segments.shape[:2])


def steps_of(config: Config) -> int:
    """Steps of prediction that a refined clip has segments for."""
    return config.train.refine_horizon + config.objective.rollout_steps - 1


def draw_steps(
    clips: EmbeddedClips,
    config: Config,
    model: WorldModel,
    generator: torch.Generator,
    alike: Tensor | None = None,
) -> tuple[Embedded, Tensor | None, Tensor | None]:
    """A batch of clips, drawn with replacement, each from a step of its own: what the losses are computed from, known_r
    and actions. The scene code of FRESH_SHARE of them is read from the context, that of the others from any segment up
    to it. Pairs for a temporal distance are drawn where `alike` [N, M] tells which clips are like each."""
    device, num_steps = clips.own.device, model.num_steps
    count = config.train.refine_batch_size or config.data.batch_size
    clip = torch.randint(len(clips.own), (count,), generator=generator, device=device)
    first = torch.randint(config.train.refine_horizon, (count,), generator=generator, device=device)
    read_at = (torch.rand(count, generator=generator, device=device) * (first + 1)).long()
    fresh = torch.rand(count, generator=generator, device=device) < FRESH_SHARE
    read_at = torch.where(fresh, first, read_at)

    def successive(part: Tensor, begin: int) -> Tensor:
        return part[clip[:, None], first[:, None] + torch.arange(begin, begin + num_steps, device=device)]

    real = torch.cat([clips.own[clip, first][:, None], successive(clips.targets, 0)], dim=1)
    embedded = Embedded(
        real,
        successive(clips.own, model.seen_at) if model.sees_later else None,
        None if clips.features is None else clips.features[clip, read_at],
        first - read_at,
    )
    if alike is not None:
        other = torch.randint(clips.own.shape[1], (count,), generator=generator, device=device)
        embedded = embedded._replace(
            other_features=None if clips.features is None else clips.features[clip, other],
            pairs=draw_pairs(clips, alike, PAIRS_PER_CLIP * count, generator),
        )
    known_r = None if clips.known_r is None else clips.known_r[clip]
    return embedded, known_r, None if clips.actions is None else successive(clips.actions, 0)


def draw_pairs(clips: EmbeddedClips, alike: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Pairs of segments, in any order, that are to be far apart, drawn from clips that are `alike` [N, M].

    Half of them are of any two segments; of the others the second is the nearest of NEAR_OF segments, so that what is
    near only in looks, as on the other side of a wall, is often asked for.
    """
    device, num_segments = clips.own.device, clips.own.shape[1]

    def draw(stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, shape, generator=generator, device=device)

    clip, segment = draw(len(clips.own), count), draw(num_segments, count)
    others = alike[clip[:, None], draw(alike.shape[1], count, NEAR_OF)]
    segments = draw(num_segments, count, NEAR_OF)
    away = (clips.own[others, segments] - clips.own[clip, segment][:, None]).square().sum(dim=-1)
    rows, nearest = torch.arange(count, device=device), away.argmin(dim=1)
    chosen = torch.where(rows < count // 2, 0, nearest)
    other, other_segment = others[rows, chosen], segments[rows, chosen]
    in_order = torch.stack([torch.stack([clip, other]), torch.stack([segment, other_segment])])
    clip, segment = torch.where(draw(2, count).bool(), in_order.flip(1), in_order)
    return Pairs(clips.own[clip, segment], None if clips.features is None else clips.features[clip, segment])


def like_clips(model: WorldModel, clips: EmbeddedClips) -> Tensor:
    """Which clips are alike, by a scene code that has been learned; without one each is like itself alone: [N, M]."""
    if model.scene is None or clips.features is None:
        return torch.arange(len(clips.own), device=clips.own.device)[:, None]
    means = clips.features.mean(dim=1, dtype=torch.float32)
    return clips_alike(model.scene.kept(means), model.scene.correlation)


def refine(
    config: Config,
    model: WorldModel,
    clips: EmbeddedClips,
    device: torch.device,
    autocast: Autocast,
    log: Callable[[int, dict[str, float]], None],
    stop: Callable[[], int],
) -> int:
    """Train all of the model but its encoder and projector on embedded clips, for train.refine_steps updates.

    `log` gets the number of updates and the mean losses since the last call every train.log_every of them; `stop` tells
    the number of a signal that came, or 0.

    Returns: the number of the signal that ended it early, or 0.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    train = config.train
    model.embedder.requires_grad_(False)
    if model.scene is not None:
        assert clips.features is not None
        model.scene.learn(clips.features)
    alike = None
    if model.distance is not None:
        alike = like_clips(model, clips)
        model.distance.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameter_groups(model, train.weight_decay), train.refine_lr, fused=True)
    guard = Guard(optimizer, device)

    def losses_at(step: int) -> dict[str, Tensor]:
        generator = step_generator(config.seed, train.steps + step, device)
        embedded, known_r, actions = draw_steps(clips, config, model, generator, alike)
        with autocast():
            return model.losses(embedded, known_r, model.beta, generator, actions=actions)

    def check_finite(num_done: int) -> None:
        if num_bad := guard.num_steps():
            bad = num_done - num_bad  # it runs again, on the same weights
            with first_overflow(model) as modules, suppress(RuntimeError):
                losses_at(bad)
            first = f", first the output of {modules[0]}" if modules else ""
            raise UserError(
                f"at step {bad + 1} of refinement the loss or its gradient is not finite{first}: lower train.refine_lr "
                "or set train.clip_norm, and train into another run_dir; the checkpoint before refinement is intact"
            )

    sums: dict[str, Tensor] = {}
    signal_number = 0
    for step in tqdm(range(train.refine_steps), desc="refining", unit="step"):
        if signal_number := stop():
            break
        set_lr(optimizer, learning_rate(step, train.refine_lr, WARMUP_STEPS, train.refine_steps))
        losses = losses_at(step)
        losses["loss"].backward()
        if train.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        guard.watch(losses["loss"])
        optimizer.step()
        optimizer.zero_grad()
        sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        if (step + 1) % train.log_every == 0:
            check_finite(step + 1)
            log(step + 1, {name: float(value) / train.log_every for name, value in sums.items()})
            sums = {}
    else:
        check_finite(train.refine_steps)
    model.embedder.requires_grad_(True)
    return signal_number
