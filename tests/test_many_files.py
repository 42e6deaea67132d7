"""Sets in hundreds of files, read by a process that may have 64 open: how many there are must not
matter.
"""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from launch import clean_env

# Each function makes and reads one kind of set; what it raises is its result.
CASES = '''
import json, os, resource, sys, tempfile, traceback, zipfile
import numpy as np
import torch
from PIL import Image

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

from guided_diffusion_ip.preparation import writers
from guided_diffusion_ip.data.image_datasets import load_data
from guided_diffusion_ip.data.image_io import to_uint8
from guided_diffusion_ip.data.image_set import open_image_set
from guided_diffusion_ip.preparation.lmdb_source import LmdbSource
from guided_diffusion_ip.data.npz_io import NpzReader, merge_npz, write_npz
from guided_diffusion_ip.preparation.writers import pack_images
from guided_diffusion_ip.data.sources import open_source
from guided_diffusion_ip.diffusion import *
from guided_diffusion_ip.evaluation.compare import Reference, compare
from guided_diffusion_ip.data.image_set import open_images
from guided_diffusion_ip.evaluation.report import describe_set
from guided_diffusion_ip.exposure_bias.measure_run import PartialSums
from guided_diffusion_ip.studies.report_data import collect
from guided_diffusion_ip.runs.likelihood import LikelihoodRun
from guided_diffusion_ip.runs.sample_batch import process_sampler
from guided_diffusion_ip.runs.samples import SampleRun
from guided_diffusion_ip.features.spaces import open_features

N = 200
images = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
process = SpacedDiffusion(use_timesteps=[0], betas=[0.5], model_mean_type=ModelMeanType.START_X,
                          model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)


def number(i):
    """[1, 1, 4, 4]: an image that says which one it is."""
    return torch.full((1, 1, 4, 4), i / N)


def merge():
    for i in range(N):
        write_npz(f"{i}.npz", {"arr_0": images[i:i + 1], "arr_1": np.array([i])})
    merge_npz("all.npz", [f"{i}.npz" for i in range(N)], N)
    with np.load("all.npz") as npz:
        assert np.array_equal(npz["arr_0"], images) and np.array_equal(npz["arr_1"], np.arange(N))


def sampling():
    run = SampleRun(process_sampler(process, (1, 4, 4), solver="ddim"), N, "out", {}, lambda index: {"y": torch.tensor(index)})
    path = run(lambda x, t, y: number(int(y)), 1, torch.device("cpu"), png=True)
    with np.load(path) as npz:
        assert npz["arr_0"][:, 0, 0, 0].tolist() == [int((i / N + 1) * 127.5) for i in range(N)]
        assert npz["arr_1"].tolist() == list(range(N))


def likelihood():
    run = LikelihoodRun(process, N, lambda index: (number(index[0]), {}), "out", {})
    assert run(lambda x, t: torch.zeros_like(x), 1, torch.device("cpu"))["num_images"] == N


def measures():
    partial = PartialSums("partial")
    for i in range(N):
        partial.write(i, 0, [i], {"norm": {"sum": np.array([float(i)])}})
    assert partial.missing(N + 1) == [N]
    sums, n = partial.total()
    assert n == N and sums["norm"]["sum"].tolist() == [N * (N - 1) / 2]


def make_pictures(folder="pictures"):
    """The images as PNGs in the folder, and all of pictures/ in pictures.zip."""
    os.makedirs(folder)
    with zipfile.ZipFile("pictures.zip", "w") as packed:
        for i, image in enumerate(images):
            path = f"{folder}/{i:03d}.png"
            Image.fromarray(image).save(path)
            packed.write(path, os.path.relpath(path, "pictures"))


def folder_and_zip():
    make_pictures()
    for path in ("pictures", "pictures.zip"):
        seen = np.concatenate(list(open_images(path, "samples").batches(0, N, 50)))
        assert np.array_equal(seen, images)
        source = open_source(path, class_cond=False)
        assert all(np.array_equal(np.asarray(source.image(i, 3)), images[i]) for i in range(N))


def one_npz_after_another():
    for i in range(N):
        write_npz(f"{i}.npz", {"arr_0": images[i:i + 1]})
        np.savez_compressed(f"c{i}.npz", arr_0=images[i:i + 1])
    for i in range(N):
        for name in (f"{i}.npz", f"c{i}.npz"):
            for opened in (open_images(name, "samples").rows(0, 1), open_source(name, class_cond=False).pixels):
                assert np.array_equal(opened, images[i:i + 1])
            reader = NpzReader(name)
            reader.rows("arr_0", 0, 1), reader.mapped("arr_0")
            reader.close()


def lmdb():
    import lmdb
    Image.fromarray(images[0]).save("one.png")
    data = open("one.png", "rb").read()
    with lmdb.open("images") as env, env.begin(write=True) as transaction:
        for i in range(N):
            transaction.put(b"%03d" % i, data)
    source = LmdbSource("images")
    assert len(source) == N and all(np.array_equal(np.asarray(source.image(i, 3)), images[0]) for i in range(N))


def report():
    for i in range(N):
        os.makedirs(f"runs/{i}")
        with open(f"runs/{i}/measures.json", "w") as file:
            file.write(json.dumps({"num_images": 1, "num_timesteps": 1, "settings": {}, "measures": {}}))
    assert len(collect(["runs"])) == N


def evaluation():
    make_pictures()
    write_npz("images.npz", {"arr_0": images})
    space = open_features("pixels", device="cpu")
    sides = [open_images(path, "samples") for path in ("pictures", "images.npz")]
    found = compare(Reference(sides[0]), sides[1], space, ["fid", "prec", "kid"], batch_size=7, say=lambda text: None)
    assert found.metrics["fid"].value < 1e-6 and found.metrics["prec"].value == 1
    assert describe_set("pictures", sides[0], "")["images"] == N


def image_sets_and_training_batches():
    make_pictures("pictures/a")
    for path in ("pictures", "pictures.zip"):
        own = open_image_set(path, (4, 4), 3)
        assert np.array_equal(own.pixels(range(N)), images) and own.digest(N)
        for workers in (0, 2):
            pack_images("packed.npz", own, workers=workers)
            with np.load("packed.npz") as npz:
                assert np.array_equal(npz["arr_0"], images)
            stream = load_data(data_dir=path, batch_size=5, image_size=4, random_flip=False, deterministic=True,
                               num_workers=workers, cache_mb=0)
            seen = torch.cat([next(stream)[0] for _ in range(N // 5)])
            stream.close()
            assert np.array_equal(to_uint8(seen + 0.5 / 127.5).numpy(), images)


def preparation():
    class Rows:
        names = [str(i) for i in range(N)]
        image = staticmethod(lambda i, channels: Image.fromarray(images[i]))
        __len__ = staticmethod(lambda: N)
    writers.render_npz(".", Rows(), lambda image, name: np.asarray(image), (4, 4), "line 4x4x3")
    writers.write_reference(".", N // 2, "line 4x4x3")
    with np.load("train.npz") as npz:
        assert np.array_equal(npz["arr_0"], images)


results = {}
for case in (evaluation, image_sets_and_training_batches, preparation, merge, sampling, likelihood,
             measures, folder_and_zip, one_npz_after_another, lmdb, report):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            case()
            results[case.__name__] = "ok"
        except ImportError as error:
            results[case.__name__] = f"skip: {error}"
        except Exception:
            results[case.__name__] = traceback.format_exc()
        os.chdir("/")
print(json.dumps(results))
'''


@pytest.fixture(scope="module")
def results():
    """What became of each case, by its name."""
    done = subprocess.run(
        [sys.executable, "-c", CASES], capture_output=True, text=True, env=clean_env()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        "evaluation",
        "image_sets_and_training_batches",
        "preparation",
        "merge",
        "sampling",
        "likelihood",
        "measures",
        "folder_and_zip",
        "one_npz_after_another",
        "lmdb",
        "report",
    ],
)
def test_hundreds_of_files_by_a_process_that_may_open_64(results, case):
    if results[case].startswith("skip"):
        pytest.skip(results[case])
    assert results[case] == "ok", results[case]


FIFTY_THOUSAND = textwrap.dedent("""
    import resource, sys, time, torch
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    from guided_diffusion_ip.diffusion import *
    from guided_diffusion_ip.runs.sample_batch import process_sampler
    from guided_diffusion_ip.runs.samples import SampleRun
    process = SpacedDiffusion(use_timesteps=[0], betas=[0.5], model_mean_type=ModelMeanType.START_X,
                              model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)

    def model(x, t, y):  # each pixel of image i tells i: its two halves, in base 256
        halves = torch.stack([y // 256, y % 256]).float() / 127.5 - 1 + 0.5 / 127.5
        return halves.repeat_interleave(32).view(1, 1, 8, 8)

    n, start = int(sys.argv[2]), time.time()
    SampleRun(process_sampler(process, (1, 8, 8), solver="ddim"), n, sys.argv[1], {}, lambda index: {"y": torch.tensor(index)})(
        model, 1, torch.device("cpu"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, time.time() - start)
""")


@pytest.mark.slow
def test_fifty_thousand_images_one_by_one(tmp_path):
    """50,000 shards by a process that may open 256 files: every image in its place, and no more
    memory than for 500.
    """

    def run(n):
        done = subprocess.run(
            [sys.executable, "-c", FIFTY_THOUSAND, str(tmp_path / str(n)), str(n)],
            capture_output=True,
            text=True,
            env=clean_env(),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peak, seconds = done.stdout.split()[-2:]
        print(f"{n} images: {peak} MB at most, {float(seconds):.0f} s")
        with np.load(tmp_path / str(n) / f"samples_{n}x8x8x1.npz") as npz:
            assert npz["arr_1"].tolist() == list(range(n))
            seen = npz["arr_0"].reshape(n, 2, 32)
            assert (
                seen == np.stack([np.arange(n) // 256, np.arange(n) % 256], axis=1)[..., None]
            ).all()
        assert sorted(p.name for p in (tmp_path / str(n)).iterdir()) == [
            "grid.png",
            f"samples_{n}x8x8x1.npz",
            "settings.yaml",
        ]
        return int(peak)

    small = run(500)
    # Names and numbers of 50,000 shards are some 20 MB.
    assert run(50_000) - small < 48, "peak memory in MB"
