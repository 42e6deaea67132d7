"""guided_diffusion.dist_util: processes, devices, checkpoint files.

setup_dist() makes a process group for one process too, because scripts call torch.distributed
themselves.
"""

from __future__ import annotations

import os
from typing import Any

from .. import dist_util
from ..dist_util import cleanup, dev, setup_dist, sync_params
from .checkpoints import plain_classes_allowed

__all__ = [
    "GPUS_PER_NODE",
    "SETUP_RETRY_COUNT",
    "cleanup",
    "dev",
    "load_state_dict",
    "setup_dist",
    "sync_params",
]

# To be read and set, without effect: a process takes the GPU of its local rank, and whoever started
# the processes retries.
GPUS_PER_NODE = 8
SETUP_RETRY_COUNT = 3


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> Any:
    """What torch.save() wrote, read by each rank itself; map_location is "cpu" unless given.

    Always with weights_only=True: a checkpoint cannot run code, whatever the script asks for.

    Raises:
        ValueError: the file is missing, damaged or no checkpoint, or holds more than tensors, plain
            containers and records such as argparse.Namespace (`checkpoints`).
        TypeError: an option other than map_location, weights_only, mmap and pickle_module.
    """
    # torch.load's, of which our reader needs none.
    for name in ("weights_only", "mmap", "pickle_module"):
        kwargs.pop(name, None)
    with plain_classes_allowed():
        return dist_util.load_state_dict(path, **kwargs)
