"""The networks of a run as programs of torch.export, which run without this package.

encoder.pt2        clip [B, T, C, H, W] in [0, 1] -> state [B, D + Z]; its first D numbers are the embedding
rollout_step.pt2   state [B, D + Z], and action [B, A] if the run is conditioned on actions -> a sampled next state

With data.history_segments, the state of encoder.pt2 has an empty history, which grows with each rollout step. The batch
size B is dynamic. A rollout step draws from torch's default generator, which `torch.manual_seed` seeds.

Legend: B clips, T frames, C channels, H = W pixels, D embedding dimensions, Z numbers of scene code and history, A
numbers of an action.
"""

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError, one_line
from worldmodel.config import DataConfig, frame_channels
from worldmodel.nets.world_model import WorldModel

ENCODER, ROLLOUT_STEP = "encoder.pt2", "rollout_step.pt2"


class EncoderProgram(nn.Module):
    """Clip [B, T, C, H, W] -> state [B, D + Z]."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        return self.model.observe(clip)


class RolloutStepProgram(nn.Module):
    """State [B, D + Z] and action [B, A] -> a next state, with a latent drawn from the prior."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, state: Tensor, action: Tensor | None = None) -> Tensor:
        return self.model.edit(state, self.model.sample(state, action=action), action)


def write_programs(folder: Path, model: WorldModel, data: DataConfig) -> None:
    """Write encoder.pt2 and rollout_step.pt2, for the CPU, into the folder.

    Raises:
        UserError: torch.export cannot trace the networks, or the files cannot be written.
    """
    model = copy.deepcopy(model).cpu().eval()
    clip = torch.rand(2, data.num_frames, frame_channels(data), data.size_px, data.size_px)
    with torch.no_grad():
        state = model.observe(clip)
    action = (torch.zeros(2, model.action_dim),) if model.action_dim else ()
    _write(folder / ENCODER, EncoderProgram(model), clip)
    _write(folder / ROLLOUT_STEP, RolloutStepProgram(model), state, *action)


def _write(path: Path, module: nn.Module, *inputs: Tensor) -> None:
    """Trace a module with example inputs, whose first size is dynamic, and write the program."""
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # torch.export raises errors of many kinds
        raise UserError(f"these networks cannot be exported as {path.name}: {one_line(error)}") from error
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about weights in channels-last order
            torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error
