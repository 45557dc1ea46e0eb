import torch

from worldmodel.build import build_model
from worldmodel.config import Config, Conv3dConfig, ModelConfig, VideosConfig
from worldmodel.nets.teacher import Teacher
from worldmodel.nets.world_model import WorldModel


def student() -> WorldModel:
    torch.manual_seed(0)
    model = ModelConfig(encoder=Conv3dConfig(width=0.125), hidden_dim=16, embedding_dim=8)
    return build_model(Config(run_dir="", data=VideosConfig(channels=1), model=model))


def test_parameters_follow_by_the_momentum() -> None:
    world = student()
    teacher = Teacher(world.embedder)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in world.embedder.parameters():
            parameter.add_(1.0)
    teacher.update(world.embedder, 0.9)
    for old, new in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_a_student_that_learns_nothing_is_followed() -> None:
    world = student()
    teacher = Teacher(world.embedder)
    world.embedder.requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    teacher.update(world.embedder, 0.9)
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.parameters(), strict=True))


def test_it_shares_nothing_with_the_student_and_has_no_gradient() -> None:
    world = student()
    teacher = Teacher(world.embedder)
    assert not any(p.requires_grad for p in teacher.parameters())
    own = {p.data_ptr() for p in [*teacher.parameters(), *teacher.buffers()]}
    assert own.isdisjoint(p.data_ptr() for p in [*world.parameters(), *world.buffers()])
    assert not teacher(torch.rand(2, 3, 1, 64, 64)).requires_grad
