from typing import Any

import torch

from worldmodel import parts
from worldmodel.config import (
    BlocksEditorConfig,
    LinearEditorConfig,
    LowRankEditorConfig,
    MlpEditorConfig,
    ResidualEditorConfig,
    SumEditorConfig,
)
from worldmodel.nets.editors import (
    BlocksEditor,
    Editor,
    LinearEditor,
    LowRankEditor,
    MlpEditor,
    ResidualEditor,
    SumEditor,
    WithPredictor,
)

CONFIGS: dict[str, Any] = {
    "mlp": MlpEditorConfig,
    "residual": ResidualEditorConfig,
    "blocks": BlocksEditorConfig,
    "linear": LinearEditorConfig,
    "sum": SumEditorConfig,
    "low_rank": LowRankEditorConfig,
}


def make_editor(config: Any, **sizes: Any) -> Any:
    return parts.build_module("model.editor.name", config, Editor, **sizes)


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sum_is_the_sum_and_without_a_latent_the_context() -> None:
    context, r = batch(0, 5, 4), batch(1, 5, 4)
    torch.testing.assert_close(SumEditor()(context, r) - r, context)
    assert torch.equal(SumEditor()(context, context[:, :0]), context)


def test_residual_adds_its_network_to_the_context() -> None:
    torch.manual_seed(0)
    editor = ResidualEditor(6, 8, 3).eval()
    context, r = batch(0, 5, 6), batch(1, 5, 3)
    torch.testing.assert_close(editor(context, r) - context, editor.net(torch.cat([context, r], dim=1)))


def test_low_rank_equals_its_modules_one_by_one() -> None:
    """t = z + sum_i tanh(r_i) (B_i A_i z + b_i), with each A_i, B_i as a layer of its own."""
    dims, latent_dim = 6, 3
    editor = LowRankEditor(dims, latent_dim)
    with torch.no_grad():
        editor.up.copy_(batch(2, latent_dim, latent_dim, dims))
        editor.shift.copy_(batch(3, latent_dim, dims))
    context, r = batch(0, 5, dims), batch(1, 5, latent_dim)
    expected = context.clone()
    for i in range(latent_dim):
        down = torch.nn.Linear(dims, latent_dim)
        up = torch.nn.Linear(latent_dim, dims, bias=False)
        with torch.no_grad():
            rows = slice(i * latent_dim, (i + 1) * latent_dim)
            down.weight.copy_(editor.down.weight[rows])
            down.bias.copy_(editor.down.bias[rows])
            up.weight.copy_(editor.up[i].T)
            expected += torch.tanh(r[:, i : i + 1]) * (up(down(context)) + editor.shift[i])
    torch.testing.assert_close(editor(context, r), expected)


def test_low_rank_starts_as_the_identity_and_a_zero_coordinate_does_nothing() -> None:
    editor = LowRankEditor(6, 3)
    context, r = batch(0, 5, 6), batch(1, 5, 3)
    torch.testing.assert_close(editor(context, r), context)
    torch.nn.init.normal_(editor.up)
    torch.nn.init.normal_(editor.shift)
    assert not torch.allclose(editor(context, r), context)
    torch.testing.assert_close(editor(context, torch.zeros(5, 3)), context)


def test_the_linear_editor_adds_a_linear_map_of_r_that_starts_as_identity() -> None:
    editor = LinearEditor(3, 5)
    context, r = batch(0, 4, 3), batch(1, 4, 5)
    torch.testing.assert_close(editor(context, r), context + r[:, :3])
    torch.nn.init.normal_(editor.weight)
    torch.testing.assert_close(editor(context, r), context + torch.stack([editor.weight @ each for each in r]))


def test_blocks_start_as_the_context_and_are_a_linear_map_plus_a_residual_network() -> None:
    torch.manual_seed(0)
    editor = BlocksEditor(6, 8, 3, num_blocks=2)
    context, r = batch(0, 5, 6), batch(1, 5, 3)
    assert torch.equal(editor(context, r), context)
    for parameter in editor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    both = torch.cat([context, r], dim=1)
    hidden = both @ editor.first.weight.T + editor.first.bias
    blocks: Any = editor.blocks
    for norm, wide, _, narrow in blocks:
        centred = hidden - hidden.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden + narrow(torch.nn.functional.gelu(wide(scaled * norm.weight + norm.bias)))
    expected = context + editor.linear(both) + editor.last(hidden)
    torch.testing.assert_close(editor(context, r), expected)
    torch.testing.assert_close(editor(context[:2], r[:2]), expected[:2])


def test_with_layer_norm_no_clip_depends_on_the_others() -> None:
    torch.manual_seed(0)
    context, r = batch(0, 5, 6), batch(1, 5, 3)
    sizes: dict[str, Any] = {"embedding_dim": 6, "hidden_dim": 8, "latent_dim": 3, "predictor": True}
    for name in ("mlp", "residual", "low_rank"):
        by_batch, by_layer = make_editor(CONFIGS[name](), **sizes), make_editor(CONFIGS[name](norm="layer"), **sizes)
        for editor, alone in ((by_batch, False), (by_layer, True)):
            assert torch.allclose(editor(context, r)[:2], editor(context[:2], r[:2]), atol=1e-6) == alone


def test_the_name_in_the_config_makes_the_editor() -> None:
    sizes: dict[str, Any] = {"embedding_dim": 6, "hidden_dim": 8}
    kinds = {
        (name, predictor): type(make_editor(CONFIGS[name](), **sizes, latent_dim=6, predictor=predictor))
        for name in CONFIGS
        for predictor in (False, True)
    }
    assert kinds["mlp", False] is kinds["mlp", True] is MlpEditor
    assert kinds["residual", False] is kinds["residual", True] is ResidualEditor
    assert kinds["blocks", False] is kinds["blocks", True] is BlocksEditor
    assert kinds["linear", False] is kinds["linear", True] is LinearEditor
    assert kinds["sum", False] is SumEditor and kinds["low_rank", False] is LowRankEditor
    assert kinds["sum", True] is kinds["low_rank", True] is WithPredictor
    assert type(make_editor(LowRankEditorConfig(), **sizes, latent_dim=0, predictor=False)) is SumEditor
