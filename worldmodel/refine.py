"""Refinement: the encoder stands still, and what predicts goes on learning from its embeddings.

While the encoder learns, batch statistics move every embedding with the batch that it is in, and the editor cannot tell
that noise from the future. Afterwards the embeddings of many clips are computed once, with running statistics, and
editor, posterior and prior learn from them for thousands of updates that cost what a small network costs.

Legend: N clips, K steps of prediction, D embedding dimensions, R latent dimensions, A numbers of an action.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from worldmodel.config import Config
from worldmodel.data import Batch, training_inputs
from worldmodel.evaluation.forecast import frozen
from worldmodel.model import WorldModel
from worldmodel.optimisation import learning_rate, parameter_groups, set_lr, step_generator

Autocast = Callable[[], AbstractContextManager[None]]
"""Accelerator.autocast: a context of the precision that training has."""

WARMUP_STEPS = 100


class EmbeddedClips(NamedTuple):
    """real [N, K + 1, D] and seen [N, K, D] as WorldModel.embed has them, known_r [N, R], actions [N, K, A]; None for
    what the model does not take."""

    real: Tensor
    seen: Tensor | None
    known_r: Tensor | None
    actions: Tensor | None

    def rows(self, chosen: Tensor | slice) -> "EmbeddedClips":
        seen, known_r, actions = (None if part is None else part[chosen] for part in self[1:])
        return EmbeddedClips(self.real[chosen], seen, known_r, actions)


def embed_clips(
    config: Config,
    model: WorldModel,
    teacher: nn.Module | None,
    batches: Iterator[Batch],
    device: torch.device,
    autocast: Autocast,
    stop: Callable[[], int],
) -> EmbeddedClips:
    """The embeddings of the next train.refine_clips clips of a stream, in evaluation mode.

    `stop` tells the number of a signal that came, or 0: fewer clips are embedded then.
    """
    missing = config.train.refine_clips
    parts: list[EmbeddedClips] = []
    with frozen(*filter(None, (model, teacher))), tqdm(total=missing, desc="embedding", unit="clip") as bar:
        while missing > 0 and not (parts and stop()):
            segments, known_r, actions = training_inputs(next(batches), config, device)
            with autocast():
                targets = teacher(model.targets_of(segments)) if teacher else None
                embedded = model.embed(segments, targets)
            parts.append(EmbeddedClips(*embedded, known_r, actions).rows(slice(missing)))
            missing -= len(segments)
            bar.update(len(parts[-1].real))
    real, *others = zip(*parts, strict=True)
    seen, known_r, actions = (None if column[0] is None else torch.cat(column) for column in others)
    return EmbeddedClips(torch.cat(real), seen, known_r, actions)


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

    Batches of data.batch_size clips are drawn with replacement. `log` gets the number of updates and the mean losses
    since the last call every train.log_every of them; `stop` tells the number of a signal that came, or 0.

    Returns: the number of the signal that ended it early, or 0.
    """
    train = config.train
    model.embedder.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, train.weight_decay), train.refine_lr, fused=True)
    sums: dict[str, Tensor] = {}
    signal_number = 0
    for step in tqdm(range(train.refine_steps), desc="refining", unit="step"):
        if signal_number := stop():
            break
        set_lr(optimizer, learning_rate(step, train.refine_lr, WARMUP_STEPS, train.refine_steps))
        generator = step_generator(config.seed, train.steps + step, 0, device)
        chosen = torch.randint(len(clips.real), (config.data.batch_size,), generator=generator, device=device)
        real, seen, known_r, actions = clips.rows(chosen)
        with autocast():
            losses = model.losses(real, seen, known_r, model.beta, generator, actions=actions)
        losses["loss"].backward()
        if train.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums = {name: sums.get(name, 0) + value.detach() for name, value in losses.items()}
        if (step + 1) % train.log_every == 0:
            log(step + 1, {name: float(value) / train.log_every for name, value in sums.items()})
            sums = {}
    model.embedder.requires_grad_(True)
    return signal_number
