"""guided_diffusion's module names, mapped to ours, so that scripts written for it run unmodified.

    python -m guided_diffusion_ip.compat their_script.py --its flags

(also under mpiexec, torchrun and srun) or, in code, before anything imports guided_diffusion:

    import guided_diffusion_ip.compat
    guided_diffusion_ip.compat.install()

on_path/ holds the package that `import guided_diffusion` then finds, on_path_last/ the one that
`import improved_diffusion` finds where there is no other. They are folders on sys.path, rather than
import hooks, because processes that Python spawns (data loaders) inherit sys.path and nothing else.
docs/drop_in.md has the details.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from types import ModuleType

PACKAGE = "guided_diffusion"
IMPROVED = "improved_diffusion"
_HERE = os.path.dirname(os.path.abspath(__file__))
ON_PATH = os.path.join(_HERE, "on_path")
ON_PATH_LAST = os.path.join(_HERE, "on_path_last")

# Published module -> ours. Where one published module is several of ours, compat/ has a module that
# puts them together.
MODULES = {
    "dist_util": "guided_diffusion_ip.compat.dist_util",
    "fp16_util": "guided_diffusion_ip.compat.fp16_util",
    "gaussian_diffusion": "guided_diffusion_ip.compat.gaussian_diffusion",
    "image_datasets": "guided_diffusion_ip.compat.image_datasets",
    "logger": "guided_diffusion_ip.compat.logger",
    "losses": "guided_diffusion_ip.compat.losses",
    "nn": "guided_diffusion_ip.compat.nn",
    "resample": "guided_diffusion_ip.compat.resample",
    "respace": "guided_diffusion_ip.compat.respace",
    "script_util": "guided_diffusion_ip.compat.script_util",
    "train_util": "guided_diffusion_ip.compat.train_util",
    "unet": "guided_diffusion_ip.compat.unet",
}

# Those whose API in improved_diffusion is the same, or a part of it; and its own script_util.
OF_IMPROVED = {
    **{name: home for name, home in MODULES.items() if name not in ("fp16_util", "unet")},
    "script_util": "guided_diffusion_ip.compat.improved_script_util",
}


def install() -> None:
    """Make `import guided_diffusion` find ours, in this process and in those that it spawns.

    Raises:
        ValueError: another package of that name has been imported before.
    """
    loaded = sys.modules.get(PACKAGE)
    if loaded is not None and not is_ours(loaded.__file__):
        raise ValueError(
            f"a package named {PACKAGE} has already been imported from {loaded.__file__}: call "
            "guided_diffusion_ip.compat.install() before the first import of it"
        )
    if ON_PATH not in sys.path:
        sys.path.insert(0, ON_PATH)
    if ON_PATH_LAST not in sys.path:
        sys.path.append(ON_PATH_LAST)
    importlib.import_module(PACKAGE)


def is_ours(file: str | None) -> bool:
    """Does this file (a package's __init__.py) belong to the package in on_path/?"""
    return file is not None and os.path.dirname(os.path.dirname(os.path.abspath(file))) == ON_PATH


def register(package: ModuleType, modules: Mapping[str, str] = MODULES) -> None:
    """Give a package these modules as its submodules: the very module objects, so that what they
    hold exists once.

    They are also found in package.package, as in a checkout that is a folder of that name.
    """
    sys.modules[f"{package.__name__}.{package.__name__}"] = package
    setattr(package, package.__name__, package)
    for name, home in modules.items():
        module = importlib.import_module(home)
        for prefix in (package.__name__, f"{package.__name__}.{package.__name__}"):
            sys.modules[f"{prefix}.{name}"] = module
        setattr(package, name, module)
