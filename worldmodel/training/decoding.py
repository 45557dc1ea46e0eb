"""Train a decoder from frozen embeddings to frames, so that forecasts can be seen.

Training clips are embedded once by the encoder of targets, in whose space futures are predicted. The decoder learns to
turn the embedding of a segment, with the last frame before it, into the segment's frames, by squared error. The run's
own networks stay as they are.

A future of several segments is decoded segment by segment, each after the last frame decoded before it. So part of the
decoder's examples come after a decoded frame, too.

Legend: N clips, L transitions of a clip from segment to segment, T frames of a segment, C channels, P pixels of a
decoded side, D embedding dimensions, B examples.
"""

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from data_pipelines.batches import Batch
from data_pipelines.errors import UserError
from data_pipelines.transforms import on_device, to_float
from worldmodel.data import segments_of
from worldmodel.evaluation.embed import Networks, frozen
from worldmodel.nets.decoder import Decoder, decoded_px
from worldmodel.runs.metrics import DecoderFacts
from worldmodel.training.machine import computes_bf16
from worldmodel.training.optimisation import learning_rate, parameter_groups, set_lr, step_generator

BATCH_SIZE = 32
PEAK_LR = 2e-3
WEIGHT_DECAY = 1e-4
WARMUP_SHARE = 0.1
INPUT_NOISE = 0.1
"""Standard deviation of the noise on standardised embeddings: predicted ones lie a little off the real ones."""
DECODED_BEFORE_SHARE = 0.5
"""Share of the later transitions of a clip whose last frame before is a decoded one."""
MAX_PIXEL_BYTES = 2**29
HELD_OUT_CLIPS = 256
AT_ONCE = 128
LOG_EVERY = 25


@dataclass(frozen=True)
class DecoderSettings:
    """steps: updates of BATCH_SIZE segments. clips: at most so many clips are embedded for training."""

    steps: int
    clips: int
    seed: int = 0


@dataclass(frozen=True)
class DecodingExamples:
    """N real clips of L + 1 segments.

    embeddings [N, L, D]: of all segments but the first, in the space of targets. frames uint8 [N, 1 + L * T, C, P, P]:
    the last frame of the first segment, and all frames of the others.
    """

    embeddings: Tensor
    frames: Tensor

    @property
    def num_frames(self) -> int:
        """T, the frames of a segment."""
        return (self.frames.shape[1] - 1) // self.embeddings.shape[1]

    def at(self, clips: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings [B, D], the frames before [B, C, P, P] and the frames [B, T, C, P, P], in [0, 1]."""
        device = self.embeddings.device
        first = transitions * self.num_frames
        rows = first[:, None] + torch.arange(self.num_frames + 1)
        frames = to_float(on_device(self.frames[clips[:, None], rows], device))
        return self.embeddings[clips.to(device), transitions.to(device)], frames[:, 0], frames[:, 1:]


def fit_decoder(
    networks: Networks, settings: DecoderSettings, *, step: int, horizon: int
) -> tuple[Decoder, DecoderFacts]:
    """Train a decoder on the run's training clips, and compare its errors on test clips with those of simple pictures.

    step: the number of updates of the run's checkpoint, which the facts state. horizon: that of the futures to decode.

    Raises:
        UserError: the run is not of videos, the data cannot be read, or the decoder's loss is not finite.
    """
    source, device, started_s = networks.source, networks.device, time.monotonic()
    if source.content != "frames":
        raise UserError("a run on a causal world has no frames to decode: decode a run on videos")
    steps = transitions_of(networks.layout.num_segments, horizon)
    with closing(source.training_stream(steps, rank=0, world_size=1, device=device).batches(0)) as batches:
        examples = embed_examples(networks, batches, settings.clips, "embedding")
    held_out = embed_examples(networks, source.evaluation_batches("test", HELD_OUT_CLIPS), HELD_OUT_CLIPS, "test")
    decoder = train_decoder(examples, settings)
    facts = DecoderFacts(
        step=step,
        decoder_steps=settings.steps,
        clips=len(examples.embeddings),
        seed=settings.seed,
        seconds=time.monotonic() - started_s,
        held_out_clips=len(held_out.embeddings),
    )
    facts.update(squared_errors(decoder, held_out))
    return decoder, facts


def transitions_of(num_segments: int, horizon: int) -> int:
    """Return the steps of prediction that training clips have segments for: two transitions if futures have several."""
    return 1 + max(0, 3 - num_segments) if horizon > 1 else 1


def embed_examples(networks: Networks, batches: Iterable[Batch], count: int, title: str) -> DecodingExamples:
    """Embed up to `count` clips of a stream, fewer if their frames would take more than MAX_PIXEL_BYTES.

    Raises:
        UserError: there are no clips.
    """
    device, num_frames = networks.device, networks.layout.num_frames
    channels, size_px, _ = networks.source.frame_shape
    side_px = decoded_px(size_px)
    embeddings: list[Tensor] = []
    frames: list[Tensor] = []
    with frozen(networks.target_encoder), tqdm(total=count, desc=title, unit="clip") as bar:
        for batch in batches:
            total = batch["video"].shape[1] // num_frames
            bytes_each = (1 + (total - 1) * num_frames) * channels * side_px**2
            most = min(count, max(1, MAX_PIXEL_BYTES // bytes_each))
            segments = segments_of(batch, total, device)[: most - sum(map(len, frames))]
            targets = segments[:, 1:].flatten(0, 1).split(AT_ONCE)
            encoded = torch.cat([networks.target_encoder(part).float() for part in targets])
            embeddings.append(encoded.unflatten(0, (-1, total - 1)))
            frames.append(as_bytes(resized(segments.flatten(1, 2)[:, num_frames - 1 :], side_px)).cpu())
            bar.update(len(segments))
            if sum(map(len, frames)) == most:
                break
    if not embeddings:
        raise UserError("the test split has no clip: add videos")
    return DecodingExamples(torch.cat(embeddings), torch.cat(frames))


def resized(frames: Tensor, side_px: int) -> Tensor:
    """Resize frames [B, T, C, H, W] in [0, 1] to [B, T, C, side_px, side_px]."""
    if frames.shape[-1] == side_px:
        return frames
    images = F.interpolate(frames.flatten(0, 1), (side_px, side_px), mode="bilinear", antialias=True)
    return images.unflatten(0, frames.shape[:2]).clamp(0, 1)


def as_bytes(frames: Tensor) -> Tensor:
    """Convert frames in [0, 1] to uint8."""
    return (frames * 255).round().byte()


# ---------------------------------------------------------------------------------------------------------- training


def train_decoder(examples: DecodingExamples, settings: DecoderSettings) -> Decoder:
    """Train a decoder with fresh weights on embedded clips. The same seed gives the same weights.

    Raises:
        UserError: the loss is not finite.
    """
    decoder, device = new_decoder(examples, settings.seed), examples.embeddings.device
    optimizer = torch.optim.AdamW(parameter_groups(decoder, WEIGHT_DECAY), PEAK_LR, fused=True)
    warmup_steps = max(1, round(WARMUP_SHARE * settings.steps))
    with tqdm(range(settings.steps), desc="training the decoder", unit="step") as bar:
        for step in bar:
            set_lr(optimizer, learning_rate(step, PEAK_LR, warmup_steps, settings.steps))
            generator = step_generator(settings.seed, step, torch.device("cpu"))
            with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
                embeddings, before, frames = draw_examples(decoder, examples, generator)
                decoded = decoder(embeddings, before)
            loss = F.mse_loss(decoded, frames)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % LOG_EVERY == 0:
                bar.set_postfix(mse=f"{loss.item():.5f}", refresh=False)
    if not torch.isfinite(loss):
        raise UserError(f"the decoder's loss is {loss.item()} after {settings.steps} steps: choose another seed")
    return decoder.eval()


def new_decoder(examples: DecodingExamples, seed: int) -> Decoder:
    """Return a decoder with random weights and the statistics of the examples, on their device."""
    _, num_transitions, dim = examples.embeddings.shape
    _, _, channels, side_px, _ = examples.frames.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(dim, examples.num_frames, channels, side_px)
    every = examples.embeddings.flatten(0, 1)
    parts = [part[:, 1:].sum(dim=0, dtype=torch.float64) for part in examples.frames.split(AT_ONCE)]
    total = torch.stack(parts).sum(dim=0).unflatten(0, (num_transitions, -1)).sum(dim=0)
    decoder.mean_picture.copy_(total / (255 * len(every)))
    decoder.centre.copy_(every.mean(dim=0))
    decoder.scale.copy_(every.std(dim=0, correction=0).clamp(min=1e-6))
    return decoder.to(examples.embeddings.device)


def draw_examples(
    decoder: Decoder, examples: DecodingExamples, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw BATCH_SIZE transitions with replacement, as `DecodingExamples.at` returns them, with noisy embeddings.

    Some come after the last frame that the decoder gives for the transition before, without gradient.
    """
    num_clips, num_transitions, dim = examples.embeddings.shape
    clips = torch.randint(num_clips, (BATCH_SIZE,), generator=generator)
    transitions = torch.randint(num_transitions, (BATCH_SIZE,), generator=generator)
    noise = torch.randn(BATCH_SIZE, dim, generator=generator)
    chosen = torch.rand(BATCH_SIZE, generator=generator) < DECODED_BEFORE_SHARE
    embeddings, before, frames = examples.at(clips, transitions)
    after = (chosen & (transitions > 0)).nonzero()[:, 0]
    if len(after):
        with torch.no_grad():
            earlier, earlier_before, _ = examples.at(clips[after], transitions[after] - 1)
            before[after] = decoder(earlier, earlier_before)[:, -1].clamp(0, 1)
    return embeddings + INPUT_NOISE * decoder.scale * noise.to(embeddings.device), before, frames


@torch.no_grad()
def squared_errors(decoder: Decoder, examples: DecodingExamples) -> DecoderFacts:
    """Return the mean squared errors of all transitions of the examples, of pixels in [0, 1].

    They are those of the decoder on its own embeddings (mse), of the mean picture, of the last frame before, and of the
    decoder on the embeddings of other clips: what it would show if the embedding did not matter.
    """
    num_clips, num_transitions, _ = examples.embeddings.shape
    totals = torch.zeros(4, dtype=torch.float64)
    for clips in torch.arange(num_clips).split(AT_ONCE):
        for transition in range(num_transitions):
            at = torch.full_like(clips, transition)
            embeddings, before, frames = examples.at(clips, at)
            others, _, _ = examples.at((clips + max(1, num_clips // 2)) % num_clips, at)
            pictures = (
                decoder(embeddings, before).clamp(0, 1),
                decoder.mean_picture,
                before[:, None],
                decoder(others, before).clamp(0, 1),
            )
            errors = [(picture - frames).square().sum(dtype=torch.float64) for picture in pictures]
            totals += torch.stack(errors).cpu()
    means = (totals / examples.frames[:, 1:].numel()).tolist()
    return DecoderFacts(mse=means[0], mean_picture_mse=means[1], last_frame_mse=means[2], other_embedding_mse=means[3])
