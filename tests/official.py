"""Stand-ins for the original checkpoints: their names, keys and shapes with fixed pseudo-random values.

The tensors in tests/golden were computed by the original code from exactly these numbers.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
KEYS: dict[str, dict[str, dict[str, list[int]]]] = json.loads((GOLDEN / "official_keys.json").read_text())
FAMILIES = tuple(KEYS)


def stand_in(tag: str, key: str, shape: Sequence[int]) -> Tensor:
    """The value of one parameter: seeded by its name, scaled so that activations stay of order one."""
    values = np.random.RandomState(zlib.crc32(f"{tag}/{key}".encode())).standard_normal(shape).astype(np.float32)
    if key == "output.weight":
        values *= np.float32(0.05)  # keeps the restored image near [0, 1]
    if len(shape) >= 2 and not key.endswith("temperature"):
        return torch.from_numpy(values / np.sqrt(np.float32(np.prod(shape[1:]))))
    if key.endswith("temperature") or ("norm" in key and key.endswith("weight")):
        return torch.from_numpy(1 + np.float32(0.1) * values)
    return torch.from_numpy(np.float32(0.05 if key == "time_mlp" else 0.02) * values)


def state_dict(family: str, network: str) -> dict[str, Tensor]:
    """The parameters of `network` (net_g, net_le, net_le_dm, net_d) of `family` (gopro, realblur)."""
    return {key: stand_in(f"golden/{family}/{network}", key, shape) for key, shape in KEYS[family][network].items()}


def write_checkpoint(family: str, folder: Path) -> Path:
    """Writes one .pth file a network and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for network in KEYS[family]:
        torch.save({"params": state_dict(family, network)}, folder / f"{network}.pth")
    return folder
