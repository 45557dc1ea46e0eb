"""Full states, as far as one process has them; tests/worldmodel/training/test_distributed.py has two."""

import pytest
import torch
from torch import nn

from tests.conftest import normal
from worldmodel.training.full_state import load_network_state, load_optimizer_state, network_state, optimizer_state


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network with a channels-last kernel, a frozen weight and one that never has a gradient."""
    torch.manual_seed(steps)
    conv = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = nn.Sequential(conv, nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    network[2].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(steps):
        network[:2](normal(step, 2, 2, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


@pytest.mark.parametrize("steps_before", [0, 1])
def test_full_states_are_loaded_bit_for_bit(steps_before: int) -> None:
    """The next step is the same, although files keep no memory layout. Parameters without state get none."""
    (one, its_optimizer), (other, others_optimizer) = trained(3), trained(steps_before)
    weights = {name: value.contiguous() for name, value in network_state(one).items()}
    moments = {name: value.clone().contiguous() for name, value in optimizer_state(one, its_optimizer).items()}
    names, states = ("0.weight", "0.bias", "1.weight", "1.bias"), ("step", "exp_avg", "exp_avg_sq")
    assert set(moments) == {f"{name}/{state}" for name in names for state in states}
    load_network_state(other, weights)
    load_optimizer_state(other, others_optimizer, moments)
    assert optimizer_state(other, others_optimizer).keys() == moments.keys()
    for network, optimizer in ((one, its_optimizer), (other, others_optimizer)):
        network[:2](normal(9, 2, 2, 4, 4)).square().sum().backward()  # type: ignore[index]
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_an_optimiser_without_steps_has_no_state() -> None:
    network, optimizer = trained(0)
    assert optimizer_state(network, optimizer) == {} and not optimizer.state


def test_optimiser_state_is_loaded_by_name() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = network()
    optimizer = torch.optim.AdamW(first.parameters())
    step(first, optimizer)
    second = network()
    second.load_state_dict(first.state_dict())
    # Other groups, other order: names decide.
    parameters = list(second.parameters())
    restored = torch.optim.AdamW([{"params": parameters[2:]}, {"params": parameters[:2]}])
    saved = {name: value.clone() for name, value in optimizer_state(first, optimizer).items()}
    load_optimizer_state(second, restored, saved)
    step(first, optimizer)
    step(second, restored)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
