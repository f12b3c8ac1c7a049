"""One pass gives every depth the numbers of its own forward pass."""

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from open_mythos.analysis.depth_sweep import depth_sweep, states_by_loop
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tiny
from tiny import random_ids, tiny_config, tiny_model


@pytest.mark.parametrize("changes", [{"halting": "none"}, {"halting": "settled"}, {}, {"attn_type": "mla"}])
def test_states_are_those_of_a_forward_pass_of_each_depth(changes: dict[str, Any]) -> None:
    config = mythos_tiny().replace(**changes)
    model = tiny_model(config)
    ids = random_ids(config, 3, 9)
    with torch.no_grad():
        context = model.context(9)
        found = dict(states_by_loop(model, ids, [1, 2, 3, 5, 20], context))
        exits = set()
        for depth, state in found.items():
            alone = model(ids, depth, full_output=True)
            torch.testing.assert_close(state, alone.state, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.decode(state, context), alone.logits, rtol=1e-3, atol=1e-3)
            exits |= set(alone.exit_loops.flatten().tolist())
    assert list(found) == [1, 2, 3, 5, 20]
    assert config.halting == "none" or len(exits) > 3  # positions really stopped at different loops


def test_rows_are_the_plain_definitions() -> None:
    model = OpenMythos(mythos_tiny()).eval()
    ids = random_ids(model.config, 4, 6)
    with torch.no_grad():
        logits = model(ids, 2)
        targets = logits.argmax(-1)
    targets[0, 3] = (targets[0, 3] + 1) % 256  # one wrong
    targets[1, :4] = -100
    targets[2] = -100  # this sequence asks nothing
    row = next(row for row in depth_sweep(model, (ids, targets), [4, 2]) if row["n_loops"] == 2)
    assert row["length"] == 6
    assert row["accuracy"] == pytest.approx(13 / 14)
    assert row["exact_match"] == pytest.approx(2 / 3)
    assert row["loss"] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())), rel=1e-5)


def test_batches_of_several_lengths_are_sorted_and_summed() -> None:
    model = OpenMythos(mythos_tiny())
    batches = [(ids, ids) for ids in (random_ids(model.config, 2, n, n) for n in (8, 4, 8))]
    rows = depth_sweep(model, batches, (3, 1, 3))
    assert [(row["length"], row["n_loops"]) for row in rows] == [(4, 1), (4, 3), (8, 1), (8, 3)]
    joined = depth_sweep(model, (torch.cat([batches[0][0], batches[2][0]]),) * 2, [3])
    assert rows[3]["loss"] == pytest.approx(joined[0]["loss"])
    json.dumps(rows)


def test_what_does_not_apply_is_none() -> None:
    model = OpenMythos(mythos_tiny())
    ids = random_ids(model.config, 1, 4)
    nothing = depth_sweep(model, (ids, torch.full_like(ids, -100)), [1])[0]
    assert nothing["loss"] is nothing["accuracy"] is nothing["exact_match"] is None
    text = depth_sweep(model, (ids, ids), [1], exact_match=False)[0]
    assert text["accuracy"] is not None
    assert text["exact_match"] is None


def test_bad_input_is_named() -> None:
    model = OpenMythos(mythos_tiny())
    ids = random_ids(model.config, 1, 4)
    for loops in ([], [0, 2]):
        with pytest.raises(ValueError, match=r"loops is .*; it must hold integers of at least 1"):
            depth_sweep(model, (ids, ids), loops)
    with pytest.raises(ValueError, match=r"targets has shape \(1, 3\); it must be that of ids, \(1, 4\)"):
        depth_sweep(model, (ids, ids[:, 1:]), [1])


def test_batches_go_to_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device nothing can be computed, but what arrives there can be seen."""
    seen = []
    module = sys.modules["open_mythos.analysis.depth_sweep"]  # the package has a function of that name
    monkeypatch.setattr(module, "states_by_loop", lambda model, ids, *_: iter(seen.append(ids.device) or ()))
    model = tiny_model(tiny_config()).to("meta")
    ids = torch.zeros(2, 5, dtype=torch.int64)
    depth_sweep(model, (ids, ids), [1])
    assert [device.type for device in seen] == ["meta"]
