"""Model folders: `config.json` and `model.safetensors`.

Main entries: `save`, `load_config`, `load_weights`. No pickle, no code: JSON and safetensors only.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_mythos.config import MythosConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the folder; each file is written beside its place and then moved there, so that none is ever half there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    partial = directory / f".{WEIGHTS_FILE}.partial"
    try:
        save_file(weights, partial, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{directory / WEIGHTS_FILE} could not be written: {error}") from error
    partial.replace(directory / WEIGHTS_FILE)
    config = model.config
    assert isinstance(config, MythosConfig)
    partial = directory / f".{CONFIG_FILE}.partial"
    partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / CONFIG_FILE)


def load_config(directory: str | Path) -> MythosConfig:
    """The configuration of a model folder."""
    path = _file(directory, CONFIG_FILE)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it must be the config of a saved model") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}; it must be a JSON object")
    return MythosConfig.from_dict(data)


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Fill the model with the folder's weights, in the dtype they have there; every name and shape must match."""
    path = _file(directory, WEIGHTS_FILE)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        first = names[0]
        raise ValueError(
            f"{path} does not fit its config in {len(names)} tensors, first {first!r}: "
            f"it is {found.get(first, 'missing')}, it must be {expected.get(first, 'absent')}"
        )
    _adopt_dtypes(model, weights, path)
    model.load_state_dict(weights)


def _adopt_dtypes(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Cast every parameter to what it is in the file; buffers, which have no say, follow the first of them."""
    first = True
    for name, parameter in model.named_parameters():
        dtype = weights[name].dtype
        if not dtype.is_floating_point:
            raise ValueError(f"{path} holds {name!r} as {dtype}; it must be of a floating-point type")
        if first:
            model.to(dtype)
            first = False
        parameter.data = parameter.data.to(dtype)


def _file(directory: str | Path, name: str) -> Path:
    path = Path(directory) / name
    if not path.is_file():
        raise ValueError(
            f"{directory} is not a complete model folder: it has no {name}; "
            f"it must hold {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    return path
