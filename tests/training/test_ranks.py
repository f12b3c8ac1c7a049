"""Several ranks are one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from open_mythos.training.depth import Uniform
from open_mythos.training.optim import OptimConfig
from open_mythos.training.ranks import joined
from open_mythos.training.trainer import Trainer, TrainerConfig
from training.forked import on_ranks
from training.runs import Recorder, small_model, small_source


def _train(cases):
    out = {}
    with joined(torch.device("cpu")) as ranks:
        for name, config in cases.items():
            trainer = Trainer(small_model(), small_source(), Uniform(least=1, most=4, grad_loops=2), TrainerConfig(**{"steps": 20, **config}), ranks=ranks)
            told = Recorder()
            trainer.run([told])
            biases = [b for n, b in trainer.model.named_buffers() if n.endswith("router_bias")]
            out[name] = (told.losses, biases)
    return out

CASES = {f"{p}-{m}-{o}": dict(parallel=p, micro_batch=m, optim=OptimConfig(kind=o)) for p in ("fsdp", "ddp") for m in (None, 2) for o in ("adamw", "muon")}

def test_x(tmp_path):
    import time
    t=time.time()
    one = _train(CASES)
    t1=time.time()
    res = on_ranks(2, tmp_path, _train, CASES)
    print(t1-t, time.time()-t1)
    for r in res:
        print(r.exit_code, r.stdout, r.stderr[-3000:])
    two = res[0].result
    for name in CASES:
        d = [abs(a-b) for a,b in zip(one[name][0], two[name][0])]
        print(name, max(d), d[1], d[5], max(float((a-b).abs().max()) for a,b in zip(one[name][1], two[name][1])))
