"""guided_diffusion.image_datasets: training images, and what other loaders take from there."""

from __future__ import annotations

import os
from typing import Any

from .. import dist_util
from ..data.image_datasets import ImageDataset, center_crop_arr, load_data, random_crop_arr

__all__ = ["MPI", "ImageDataset", "center_crop_arr", "load_data", "random_crop_arr"]

_EXTENSIONS = ("jpg", "jpeg", "png", "gif")


def _list_image_files_recursively(data_dir: str | os.PathLike) -> list[str]:
    """The paths of all images in a local folder and its sub-folders: in each folder by name, those
    of a sub-folder where its name stands. (jpg, jpeg, png and gif, as guided-diffusion has it.)

    Raises:
        ValueError: no such folder.
    """
    folder = os.fspath(data_dir)
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: there is no such folder; remote ones are for load_data alone")
    found: list[str] = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            found += _list_image_files_recursively(path)
        elif name.rpartition(".")[2].lower() in _EXTENSIONS and not name.startswith("."):
            found.append(path)
    return found


class _World:
    """The part of mpi4py's COMM_WORLD that loaders use, for processes of whichever launcher."""

    @property
    def rank(self) -> int:
        return dist_util.get_rank()

    @property
    def size(self) -> int:
        return dist_util.get_world_size()

    def Get_rank(self) -> int:  # noqa: N802 (mpi4py's name)
        return self.rank

    def Get_size(self) -> int:  # noqa: N802 (mpi4py's name)
        return self.size

    def allgather(self, sendobj: Any) -> list[Any]:
        return dist_util.all_gather_objects(sendobj)

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return dist_util.all_gather_objects(obj)[root]

    def Barrier(self) -> None:  # noqa: N802 (mpi4py's name)
        dist_util.barrier()

    barrier = Barrier


class MPI:
    """In place of mpi4py.MPI: COMM_WORLD, with this process's rank and their number."""

    COMM_WORLD = _World()
