"""Refinement: the encoder is frozen, and the other networks continue to learn from its embeddings.

While the encoder learns, batch statistics move each embedding with its batch, and the editor cannot separate that noise
from the future. Refinement embeds many clips once, with running statistics. Editor, posterior and prior then learn from
them for thousands of updates, each at the cost of a small network.

Legend: N clips of L segments, B clips of an update, T frames, C channels, H = W pixels, J segments of a history, K
steps of prediction, D embedding dimensions, F features, R latent dimensions, A numbers of an action, M similar clips, I
pairs of segments.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from data_pipelines.batches import Batch, BatchStream
from data_pipelines.errors import UserError
from worldmodel.build import clip_layout
from worldmodel.config import Config
from worldmodel.data import training_inputs
from worldmodel.evaluation.embed import frozen
from worldmodel.nets.distance import similar_clips
from worldmodel.nets.scene import NoScene
from worldmodel.nets.world_model import Embedded, WorldModel
from worldmodel.sources.source import Source
from worldmodel.training.finite import Guard, first_overflow
from worldmodel.training.linear_start import keep_share, start_linear, starts_linear
from worldmodel.training.losses import DistanceExamples, TrainingModel
from worldmodel.training.optimisation import learning_rate, parameter_groups, set_lr, step_generator

Autocast = Callable[[], AbstractContextManager[None]]
"""Accelerator.autocast: a context of the precision of training."""

WARMUP_STEPS = 100
SEGMENTS_AT_ONCE = 256
FRESH_SHARE = 0.4
PAIRS_PER_CLIP = 2
NEAREST_OF = 8


@dataclass(frozen=True)
class RefinementClips:
    """N clips of L segments after the encoders, in evaluation mode.

    own: [N, L, D], the model's embeddings of all segments, first those of the history of the first context.
    targets: [N, L - 1, D], the target encoder's embeddings of all segments but the first.
    features: [N, L, F], the encoder's features that a scene code is read from; F is 0 without one.
    known_r: [N, R], the r of an oracle latent; [N, 0] for other latents.
    actions: [N, J + `steps_of`, A], each after its segment; A is 0 for a model without actions.
    """

    own: Tensor
    targets: Tensor
    features: Tensor
    known_r: Tensor
    actions: Tensor

    @cached_property
    def change_spread(self) -> Tensor:
        """The standard deviation of each dimension's change in a step, [D]."""
        return (self.own[:, 1:] - self.own[:, :-1]).std(dim=(0, 1))

    def map(self, change: Callable[[Tensor], Tensor]) -> "RefinementClips":
        """Apply a function to each tensor."""
        return RefinementClips(**{each.name: change(getattr(self, each.name)) for each in fields(self)})


@dataclass(frozen=True)
class RefinementBatch:
    """The arguments of `TrainingModel.refinement_losses` for one update: B clips, each from one of its steps."""

    embedded: Embedded
    known_r: Tensor
    actions: Tensor
    examples: DistanceExamples | None


def refinement_stream(source: Source, config: Config, device: torch.device) -> BatchStream:
    """Open the stream of clips to embed, each with segments for `steps_of` steps.

    Without train.refine_clip_step, a clip starts where the refined steps of the one before it end. Each segment is then
    embedded about once, and many videos are seen.
    """
    clip_step = config.train.refine_clip_step or config.train.refine_horizon * clip_layout(config).span
    return source.training_stream(steps_of(config), rank=0, world_size=1, device=device, clip_step=clip_step)


def steps_of(config: Config) -> int:
    """Return the number of prediction steps that a refined clip has segments for."""
    return config.train.refine_horizon + rollout_steps_of(config) - 1


def rollout_steps_of(config: Config) -> int:
    """Return the number of steps that refinement predicts in sequence."""
    return config.train.refine_rollout_steps or config.objective.rollout_steps


def embed_refinement_clips(
    config: Config,
    model: WorldModel,
    target_encoder: nn.Module,
    batches: Iterator[Batch],
    device: torch.device,
    autocast: Autocast,
    stop: Callable[[], int],
) -> RefinementClips:
    """Embed train.refine_clips clips of a stream, each with segments for `steps_of` steps.

    `stop` returns the number of a signal that came, or 0. After a signal, fewer clips are embedded.
    """
    missing, layout = config.train.refine_clips, clip_layout(config)
    parts: list[RefinementClips] = []
    with frozen(model, target_encoder), tqdm(total=missing, desc="embedding", unit="clip") as bar:
        while missing > 0 and not (parts and stop()):
            inputs = training_inputs(next(batches), layout, steps_of(config), device)
            segments = inputs.segments
            with autocast():
                features = encode_segments(model.embedder.features, segments)
                own = model.embedder.project(features.flatten(0, 1)).unflatten(0, segments.shape[:2])
                is_own = target_encoder is model.embedder
                targets = own[:, 1:] if is_own else encode_segments(target_encoder, segments[:, 1:])
            part = RefinementClips(own, targets, model.scene.select(features), inputs.known_r, inputs.actions)
            parts.append(part.map(itemgetter(slice(missing))))
            missing -= len(segments)
            bar.update(len(parts[-1].own))
    return RefinementClips(
        **{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(RefinementClips)}
    )


def encode_segments(encode: Callable[[Tensor], Tensor], segments: Tensor) -> Tensor:
    """Encode segments [B, L, T, C, H, W] to [B, L, F], in chunks that fit into caches."""
    chunks = segments.flatten(0, 1).split(SEGMENTS_AT_ONCE)
    return torch.cat([encode(chunk) for chunk in chunks]).unflatten(0, segments.shape[:2])


# -------------------------------------------------------------------------------------------------------- one update


def draw_batch(
    clips: RefinementClips,
    config: Config,
    training: TrainingModel,
    generator: torch.Generator,
    similar: Tensor | None = None,
) -> RefinementBatch:
    """Draw a batch of clips with replacement, and for each the context that its prediction starts from.

    Noise of train.refine_noise is added to the embeddings of the contexts.

    The scene code of FRESH_SHARE of the clips is read from the context, that of the others from any segment up to the
    context. With `similar` [N, M], the most similar clips of each clip, examples for a temporal distance are drawn.
    """
    model, device, num_steps = training.model, clips.own.device, training.num_steps
    count = config.train.refine_batch_size or config.data.batch_size
    num_before = model.history.num_segments
    clip = torch.randint(len(clips.own), (count,), generator=generator, device=device)
    first = torch.randint(config.train.refine_horizon, (count,), generator=generator, device=device)
    read_at = (torch.rand(count, generator=generator, device=device) * (first + 1)).long()
    fresh = torch.rand(count, generator=generator, device=device) < FRESH_SHARE
    read_at = torch.where(fresh, first, read_at)

    def at(values: Tensor, begin: int, end: int) -> Tensor:
        """Select values [N, L, ...] from `begin` to `end` steps after each context: [B, end - begin, ...]."""
        return values[clip[:, None], num_before + first[:, None] + torch.arange(begin, end, device=device)]

    context = at(clips.own, 0, 1)[:, 0]
    if config.train.refine_noise:
        spread = config.train.refine_noise * clips.change_spread
        context = context + spread * torch.randn(context.shape, generator=generator, device=device)
    seen = at(clips.own, model.seen_at, model.seen_at + num_steps)
    embedded = Embedded(
        before=at(clips.own, -num_before, 0),
        real=torch.cat([context[:, None], at(clips.targets, 0, num_steps)], dim=1),
        seen=seen if model.latent.sees_later else seen[..., :0],
        features=clips.features[clip, num_before + read_at],
        age=first - read_at,
    )
    examples = None
    if similar is not None:
        other = torch.randint(clips.own.shape[1], (count,), generator=generator, device=device)
        examples = draw_pairs(clips, similar, clips.features[clip, other], PAIRS_PER_CLIP * count, generator)
    return RefinementBatch(embedded, clips.known_r[clip], at(clips.actions, -num_before, num_steps), examples)


def draw_pairs(
    clips: RefinementClips, similar: Tensor, other_features: Tensor, count: int, generator: torch.Generator
) -> DistanceExamples:
    """Draw pairs of segments that should be far apart, in any order, from `similar` clips [N, M].

    Half of the pairs are any two segments. In the other half, the second is the nearest of NEAREST_OF segments, so that
    segments that merely look alike, for example across a wall, are drawn often.
    """
    device, num_segments = clips.own.device, clips.own.shape[1]

    def draw(stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, shape, generator=generator, device=device)

    clip, segment = draw(len(clips.own), count), draw(num_segments, count)
    others = similar[clip[:, None], draw(similar.shape[1], count, NEAREST_OF)]
    segments = draw(num_segments, count, NEAREST_OF)
    away = (clips.own[others, segments] - clips.own[clip, segment][:, None]).square().sum(dim=-1)
    rows, nearest = torch.arange(count, device=device), away.argmin(dim=1)
    chosen = torch.where(rows < count // 2, 0, nearest)
    other, other_segment = others[rows, chosen], segments[rows, chosen]
    in_order = torch.stack([torch.stack([clip, other]), torch.stack([segment, other_segment])])
    clip, segment = torch.where(draw(2, count).bool(), in_order.flip(1), in_order)
    return DistanceExamples(other_features, clips.own[clip, segment], clips.features[clip, segment])


def most_similar(model: WorldModel, clips: RefinementClips) -> Tensor:
    """Return the most similar clips of each clip by a learned scene code: [N, M]. Without one, each has only itself."""
    if isinstance(model.scene, NoScene):
        return torch.arange(len(clips.own), device=clips.own.device)[:, None]
    means = clips.features.mean(dim=1, dtype=torch.float32)
    return similar_clips(model.scene.project(means), model.scene.correlation)


# -------------------------------------------------------------------------------------------------------- all updates


def refine(
    config: Config,
    training: TrainingModel,
    clips: RefinementClips,
    device: torch.device,
    autocast: Autocast,
    log: Callable[[int, dict[str, float]], None],
    stop: Callable[[], int],
    score: Callable[[], float],
    turns: AbstractContextManager[None],
) -> int:
    """Train all networks but the embedder on embedded clips, for train.refine_steps updates.

    With train.refine_eval_every, the weights with the lowest score are kept.

    Args:
        log: takes the number of updates and the mean losses since its last call, every train.log_every updates.
        stop: returns the number of a signal that came, or 0.
        score: scores the networks as they are; lower is better. Used with train.refine_eval_every, and to choose a
            linear start.
        turns: the context of each update (turns.py).

    Returns: the number of the signal that ended refinement early, or 0.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    if signal_number := stop():  # it may have come after so few clips that a start cannot be fitted to them
        return signal_number
    train, model = config.train, training.model
    model.embedder.requires_grad_(False)
    if train.refine_rollout_steps:
        training.step_weights = [1 / train.refine_rollout_steps] * train.refine_rollout_steps
    model.scene.learn(clips.features)
    start = None
    if starts_linear(model):
        num_steps = clips.actions.shape[1]
        contexts, targets = clips.own[:, :num_steps], clips.targets[:, :num_steps]
        start_linear(model, contexts.flatten(0, 1), targets.flatten(0, 1), clips.actions.flatten(0, 1), score)
        start = copied_state(training)
    similar = None
    if model.distance.num_values:
        similar = most_similar(model, clips)
        model.distance.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameter_groups(training, train.weight_decay), train.refine_lr, fused=True)
    guard = Guard(optimizer, device)

    def losses_at(step: int) -> dict[str, Tensor]:
        generator = step_generator(config.seed, train.steps + step, device)
        batch = draw_batch(clips, config, training, generator, similar)
        with autocast():
            return training.refinement_losses(batch.embedded, batch.known_r, batch.actions, batch.examples, generator)

    def check_finite(num_done: int) -> None:
        if num_bad := guard.num_steps():
            bad = num_done - num_bad  # it runs again, on the same weights
            with first_overflow(training) as modules, suppress(RuntimeError):
                losses_at(bad)
            first = f", first the output of {modules[0]}" if modules else ""
            raise UserError(
                f"at step {bad + 1} of refinement the loss or its gradient is not finite{first}: lower train.refine_lr "
                "or set train.clip_norm, and train into another run_dir; the checkpoint before refinement is intact"
            )

    best_score, best_weights = math.inf, {}
    sums: dict[str, Tensor] = {}
    signal_number = 0
    for step in tqdm(range(train.refine_steps), desc="refining", unit="step"):
        if signal_number := stop():
            break
        set_lr(optimizer, learning_rate(step, train.refine_lr, WARMUP_STEPS, train.refine_steps))
        with turns:
            losses = losses_at(step)
            losses["loss"].backward()
            if train.clip_norm:
                nn.utils.clip_grad_norm_(training.parameters(), train.clip_norm)
            guard.watch(losses["loss"])
            optimizer.step()
            optimizer.zero_grad()
        sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        if (step + 1) % train.log_every == 0:
            check_finite(step + 1)
            log(step + 1, {name: float(value) / train.log_every for name, value in sums.items()})
            sums = {}
        if train.refine_eval_every and ((step + 1) % train.refine_eval_every == 0 or step + 1 == train.refine_steps):
            check_finite(step + 1)
            found = score()
            log(step + 1, {"selection_energy_score": found})
            if found < best_score:
                best_score = found
                best_weights = copied_state(training)
    else:
        check_finite(train.refine_steps)
    if best_weights:
        training.load_state_dict(best_weights)
    if start is not None:
        keep_share(training, start)
    model.embedder.requires_grad_(True)
    return signal_number


def copied_state(training: TrainingModel) -> dict[str, Tensor]:
    """Return a copy of all weights and buffers by name."""
    return {name: value.clone() for name, value in training.state_dict().items()}
