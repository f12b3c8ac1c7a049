"""Power iteration agrees with the dense Jacobian."""

import pytest
import torch
from torch import Tensor

from open_mythos.analysis.jacobian import jacobian_norm, jacobian_spectral_radius
from open_mythos.model.mythos import OpenMythos
from tiny import random_ids, tiny_config, tiny_model

TINY = tiny_config(dim=8, n_heads=2, n_kv_heads=1, n_experts=0)

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_jacobian(model: OpenMythos, ids: Tensor, n_loops: int) -> Tensor:
    """Row by row in reverse mode, through the fast kernels; (n, n) for the n numbers of the state."""
    with torch.no_grad():
        e = model.encode(ids)
        h = model.recurrent.initial_state(e)
        for t in range(n_loops):
            h = model.loop_step(h, e, t)
    jacobian = torch.autograd.functional.jacobian(lambda state: model.loop_step(state, e, n_loops), h)
    assert isinstance(jacobian, Tensor)
    return jacobian.reshape(h.numel(), h.numel())


@pytest.mark.parametrize(("attn_type", "n_experts"), [("gqa", 8), ("mla", 0)])
def test_radius_and_norm_agree_with_the_dense_jacobian(attn_type: str, n_experts: int) -> None:
    config = TINY.replace(attn_type=attn_type, n_experts=n_experts)
    model, ids = tiny_model(config), random_ids(config, 2, 3)
    dense = dense_jacobian(model, ids, 2)
    radius = float(torch.linalg.eigvals(dense).abs().max())
    assert jacobian_spectral_radius(model, ids, 2, iterations=60) == pytest.approx(radius, rel=0.03)
    assert jacobian_norm(model, ids, 2, iterations=20) == pytest.approx(
        float(torch.linalg.matrix_norm(dense, 2)), rel=0.01
    )


def test_a_dominant_complex_pair_is_found() -> None:
    """Growth per step oscillates then; a single step's growth would be off by tens of per cent."""
    for seed in range(20):
        model, ids = tiny_model(TINY, seed), random_ids(TINY, 1, 3, seed)
        eigenvalues = torch.linalg.eigvals(dense_jacobian(model, ids, 1))
        dominant = eigenvalues[eigenvalues.abs().argmax()]
        if abs(float(dominant.imag)) > 0.2 * float(dominant.abs()):
            break
    else:
        pytest.fail("no seed gave a complex dominant pair")
    found = jacobian_spectral_radius(model, ids, 1, iterations=100)
    assert found == pytest.approx(float(dominant.abs()), rel=0.03)


def test_without_branches_the_radius_is_that_of_a() -> None:
    model = OpenMythos(TINY)
    with torch.no_grad():
        for block in model.recurrent.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        model.recurrent.injection.log_a[3] -= (
            2  # one channel decays far more slowly, so that the power iteration converges
        )
    rho = float(model.recurrent.injection.get_A().detach().max())
    assert jacobian_spectral_radius(model, random_ids(TINY, 1, 2), 1, iterations=50) == pytest.approx(rho, rel=2e-3)


def test_the_seed_decides_the_start_and_bad_input_is_named() -> None:
    model, ids = tiny_model(TINY), random_ids(TINY, 1, 2)
    runs = [jacobian_spectral_radius(model, ids, 1, iterations=2, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match="iterations is 1; it must be at least 2"):
        jacobian_spectral_radius(model, ids, 1, iterations=1)
    with pytest.raises(ValueError, match="n_loops is -1; it must be at least 0"):
        jacobian_norm(model, ids, -1)
