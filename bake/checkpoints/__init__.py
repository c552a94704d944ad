"""Read a Hugging Face checkpoint lazily and write an edited one, byte for byte.

Reading order: ``dtypes``, ``strictjson``, ``header``, ``index``, ``config``, ``folder``,
``source``, ``hashes``, ``checkpoint``; for the Hub ``hub_names``, ``hub_errors``,
``hub_patience``, ``hub_ranges``, ``hub``, ``hub_tree``; for writing ``stream``, ``outline``,
``writer``.
"""

from bake.checkpoints.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoints.config import DELETE, patch_config
from bake.checkpoints.header import TensorInfo
from bake.checkpoints.outline import NewCheckpoint, NewTensor
from bake.checkpoints.stream import Producer
from bake.checkpoints.writer import WrittenFiles, write_checkpoint

__all__ = [
    "DELETE",
    "Checkpoint",
    "NewCheckpoint",
    "NewTensor",
    "Producer",
    "TensorInfo",
    "WrittenFiles",
    "open_checkpoint",
    "patch_config",
    "write_checkpoint",
]
