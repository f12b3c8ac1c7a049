"""Debug mode names the layer where numbers stop being finite."""

import pytest
import torch

from open_mythos.analysis.finite import NonFiniteError, check_finite, non_finite_weights
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny
from tiny import random_ids

IDS = random_ids(mythos_tiny(), 1, 5)


@pytest.fixture
def model() -> OpenMythos:
    return OpenMythos(mythos_tiny()).eval()


@pytest.mark.parametrize(
    "name",
    ["embed.weight", "recurrent.blocks.0.ffn.down", "recurrent.blocks.0.ffn.router_bias", "coda.0.attn.out.weight"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_before_anything_runs(model: OpenMythos, name: str, value: float) -> None:
    model.state_dict()[name].view(-1)[3] = value
    assert non_finite_weights(model) == [name]
    with pytest.raises(NonFiniteError, match=f"weights are not finite.*{name}") as caught, check_finite(model):
        pytest.fail("the context must not be entered")
    assert caught.value.layer == name


@pytest.mark.parametrize("layer", ["prelude.0.ffn.down", "recurrent.blocks.0.attn.out", "coda.0.ffn.up"])
def test_the_first_layer_with_non_finite_activations_is_named(model: OpenMythos, layer: str) -> None:
    """A finite weight so large that float32 overflows in this layer's output."""
    with torch.no_grad():
        model.get_submodule(layer).weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=f"output of {layer}, in its call number 1") as caught, check_finite(model):
        model(IDS, 2)
    assert caught.value.layer == layer


def test_a_looped_layers_call_is_counted(model: OpenMythos) -> None:
    act = model.recurrent.act
    assert act is not None
    calls = []

    def spoil(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output / (len(calls) < 3)  # the third loop divides by zero

    act.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"output of recurrent.act, in its call number 3"), check_finite(model):
        model(IDS, 4)


def test_numbers_computed_between_layers_are_caught_at_the_next_one(model: OpenMythos) -> None:
    with pytest.raises(NonFiniteError, match=r"input of coda.0, in its call number 1"), check_finite(model):
        model.decode(torch.full((1, 2, 64), float("nan")))


def test_a_healthy_model_passes_and_keeps_no_hooks(model: OpenMythos) -> None:
    with check_finite(model):
        model(IDS, 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
