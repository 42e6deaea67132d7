"""The registry of metrics is what everything else reads, and the Python API does what evaluator.py
does.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion_ip.data.image_set import ImageSet, in_memory
from guided_diffusion_ip.evaluation.compare import Reference, compare, unavailable
from guided_diffusion_ip.evaluation.evaluate import PUBLISHED, EvaluationRequest, evaluate
from guided_diffusion_ip.evaluation.opening import FeatureChoice
from guided_diffusion_ip.evaluation.reference_file import ReferenceRequest, make_reference
from guided_diffusion_ip.evaluation.report import as_json, table
from guided_diffusion_ip.features.space import Features, image_tensor
from guided_diffusion_ip.features.spaces import SPACES, open_features
from guided_diffusion_ip.metrics import METRIC_NAMES, METRICS
from guided_diffusion_ip.metrics.entry import MOMENTS, REFERENCE_ROWS, ROWS, Metric, Value
from guided_diffusion_ip.settings.flags import SCRIPTS
from guided_diffusion_ip.studies.sweep_table import Entry, best, make_table

README = Path(__file__).resolve().parent.parent / "evaluations" / "README.md"


def images(n, seed):
    """uint8 [n, 4, 4, 3]."""
    return np.random.default_rng(seed).integers(0, 200 + seed, (n, 4, 4, 3)).astype(np.uint8)


def quiet(text):
    return None


def test_a_name_is_in_flags_and_in_the_readme():
    for script, flag in (("evaluator", "metrics"), ("image_train", "eval_metrics")):
        helps = {found.name: found.help for found in SCRIPTS[script].flags()}
        assert METRIC_NAMES in helps[flag]
    text = README.read_text()
    for name, entry in METRICS.items():
        assert name == entry.name and (entry.title in text or f"--metrics {name}" in text)


def test_a_metric_in_the_registry_works_everywhere(monkeypatch):
    """Computed once for two names, larger is better, in tables of evaluations and of sweeps."""
    calls = []

    def both(reference, samples, options):
        calls.append((len(reference.rows), samples.rows.shape, samples.pool.n))
        return {"a": Value(1.5, spread=0.25, detail="mine"), "b": Value(2.0, few="so so")}

    needs = frozenset({ROWS, REFERENCE_ROWS})
    a = Metric("a", "Metric A", needs, True, both, progress="{samples} against {reference}")
    b = replace(a, name="b", title="Metric B")
    for entry in (a, b):
        monkeypatch.setitem(METRICS, entry.name, entry)
    said = []
    request = EvaluationRequest(images(30, 0), images(20, 1), "pixels", metrics=("b", "a"))
    evaluation = evaluate(request, said.append)
    assert calls == [(30, (20, 48), 0)], "computed once, and no moments that nobody needs"
    assert said.count("20 against 30") == 1 and evaluation.values == {"a": 1.5, "b": 2.0}
    text = table(evaluation)
    assert re.search(r"Metric A \(mine\) +1.5 \+- 0.25 +20 +30\n", text)
    assert "Metric B@20" in text
    assert (
        "warning: 20 samples and 30 reference images for features of 48 dimensions: Metric B@20 so "
        "so, comparable only with values of as many images"
    ) in text
    stated = json.loads(as_json(evaluation))["metrics"]
    assert stated["a"] == {"value": 1.5, "samples": 20, "reference": 30, "standard_deviation": 0.25}
    assert best("a", [Entry((1.0,)), Entry((2.0,))]) == 1
    assert make_table([], [], ["a"], "pixels").title("a") == "Metric A"


def test_needs_decide_what_is_extracted_and_what_is_left_out(monkeypatch):
    space = open_features("pixels", device="cpu")
    assert "no spatial part" in unavailable("sfid", space, True)
    assert "no classes" in unavailable("is", space, True)
    assert "statistics only" in unavailable("kid", space, False)
    assert not unavailable("fid", space, False)
    reference = Reference(in_memory(images(60, 0)))
    assert reference.measured(["is"], space).known is None, "nothing to extract"
    moments = reference.measured(["fid"], space).known
    assert moments.pool.n == 60 and moments.rows.size == 0
    rows = reference.measured(["kid"], space).known
    assert rows.rows.shape == (60, 48) and rows.pool.n == 0
    known = reference.measured(["fid", "kid"], space)
    monkeypatch.setattr(ImageSet, "batches", None)
    assert known.measured(["kid"], space) is known, "measured once"


def test_two_titles_and_one_direction():
    assert METRICS["is"].title == "Inception Score" and METRICS["is"].short == "IS"
    assert {name for name, entry in METRICS.items() if entry.larger_is_better} >= {
        "is",
        "prec",
        "recall",
    }
    assert METRICS["fid"].title_for("pixels") == "Frechet distance"
    assert METRICS["fid"].title_for("inception", "FID@50") == "FID@50"
    assert set(PUBLISHED) <= set(METRICS) and MOMENTS in METRICS["fid"].needs


def test_paths_and_arrays_give_the_same_numbers(tmp_path):
    ref, samples = images(60, 0), images(50, 1)
    np.savez(tmp_path / "ref.npz", arr_0=ref)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    of_files = evaluate(
        EvaluationRequest(tmp_path / "ref.npz", str(tmp_path / "samples.npz"), "pixels"), quiet
    )
    of_arrays = evaluate(EvaluationRequest(ref, torch.from_numpy(samples), "pixels"), quiet)
    assert of_files.values == of_arrays.values and set(of_files.values) == {"fid", "prec", "recall"}
    stated = json.loads(as_json(of_arrays))
    assert stated["reference"]["path"] == "(memory)" and len(stated["samples"]["sha256"]) == 64
    out = str(tmp_path / "statistics.npz")
    make_reference(ReferenceRequest(ref, out, FeatureChoice("pixels")), quiet)
    stored = evaluate(EvaluationRequest(out, samples, "pixels"), quiet)
    assert stored.values == {"fid": pytest.approx(of_files.values["fid"], rel=1e-9)}


class Means:
    """A feature space of one's own: the mean of each channel."""

    name, dim, has_spatial, has_logits = "means", 3, False, False

    def __init__(self):
        self.warnings = ["three numbers are few"]

    def describe(self):
        return {"name": self.name}

    def __call__(self, images):
        return Features(image_tensor(images).float().mean((1, 2)))


def test_a_feature_space_of_ones_own():
    evaluation = evaluate(EvaluationRequest(images(60, 0), images(50, 1), Means()), quiet)
    assert evaluation.values["fid"] > 0 and evaluation.warnings == ("three numbers are few",)
    assert "features: means" in table(evaluation)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(metrics=("fid", "ssim")), "ssim is no metric; allowed: fid, sfid"),
        (dict(metrics=()), "nothing asked for"),
        (dict(pr_arithmetic="int8"), "pr_arithmetic 'int8' is not among float32"),
        (dict(batch_size=0), "batch_size 0 must be at least 1"),
        (dict(samples=np.zeros((5, 4, 4, 3))), "samples: images must be uint8"),
        (dict(samples=images(0, 1)), "samples: there are no images"),
        (dict(image_size=(8, 8)), "in memory are not scaled to 8 x 8"),
        (dict(metrics=("sfid",)), "sFID cannot be had"),
        (dict(samples=images(3, 1)), "3 images in the samples, but precision and recall need"),
    ],
)
def test_what_cannot_be_done_is_one_line(change, words):
    with pytest.raises(ValueError) as error:
        evaluate(
            EvaluationRequest(
                **(dict(reference=images(9, 0), samples=images(9, 1), features="pixels") | change)
            ),
            quiet,
        )
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_metric_in_compare_is_named():
    with pytest.raises(ValueError, match="ssim is no metric"):
        space = open_features("pixels", device="cpu")
        compare(Reference(), in_memory(images(9, 0)), space, ["ssim"], say=quiet)


def test_the_spaces_in_the_registry_are_those_of_the_message():
    with pytest.raises(ValueError) as error:
        open_features("clip", device="cpu")
    assert all(name in str(error.value) for name in SPACES)


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", arr_0=images(60, 0))
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "Frechet distance" in out and "KID" in out
    assert set(json.loads(Path("result.json").read_text())["metrics"]) == {"fid", "kid"}
