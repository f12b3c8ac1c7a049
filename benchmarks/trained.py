"""Held-out texts of a trained run, for the benchmarks that need a model which has learned something."""

from __future__ import annotations

from pathlib import Path

from open_mythos import OpenMythos
from open_mythos.recipes.folder import RunFolder
from open_mythos.recipes.material import open_material


def model_and_texts(run: Path, n_texts: int) -> tuple[OpenMythos, list[list[int]]]:
    """The run's model, and so many held-out rows of token ids, each as long as the model's context."""
    folder, model = RunFolder(run), OpenMythos.from_pretrained(run)
    material = open_material(folder.read(), folder.data, pinned=True)
    texts: list[list[int]] = []
    for _, batches in material.held_out([model.config.max_seq_len], n_texts):
        for batch in batches:
            texts += batch.ids.tolist()
    return model, texts[:n_texts]
