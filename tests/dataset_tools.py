"""Calling the scripts in datasets/, and small sources in the published forms."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PARTIAL = "--allow_partial"


def script(name):
    """The module datasets/NAME.py."""
    spec = importlib.util.spec_from_file_location(
        f"datasets_{name}", ROOT / "datasets" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *argv):
    script(name).main([str(word) for word in argv])


def pixels(n, height, width, seed=0):
    """Smooth random pictures: what jpeg and webp keep well."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), np.uint8)
    return [
        Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in small
    ]


def arrays(path):
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def contents(folder):
    """{relative name: bytes} of all files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def into_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)


def into_tar(path, files):
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


def into_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
