"""Reports: what is found in folders of each kind, and a page that is whole, loads nothing and shows
text as text.
"""

import base64
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import launch
import numpy as np
import pytest
import yaml
from PIL import Image

from guided_diffusion_ip.exposure_bias.plots import Curve, Panel, Picture, drawn, measure_pictures
from guided_diffusion_ip.settings.config import from_values, parse
from guided_diffusion_ip.settings.flag import Role
from guided_diffusion_ip.settings.flags import SECTIONS
from guided_diffusion_ip.studies.report import run_commands, write_report
from guided_diffusion_ip.studies.report_data import Samples, collect, read_curves, short_labels

pytest.importorskip("matplotlib")
EVIL = "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>\"'&$x^{"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the text outside of style, and whether every element is
    closed.
    """

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.words = [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert not self.stack, f"never closed: {self.stack}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.stack.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.stack and self.stack[-1] == name, f"</{name}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)

    def all(self, name):
        return [attributes for element, attributes in self.elements if element == name]


def check(path):
    """The page, after what must hold of every one."""
    page = Page(path)
    raw = Path(path).read_text(encoding="utf-8")
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "link", "object", "embed", "base", "form"}, names
    for name, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("data:image/", "#")), (name, key, value[:80])
    assert all("alt" in image for image in page.all("img"))
    styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", raw, re.S))
    styles += "".join(attributes.get("style") or "" for _, attributes in page.elements)
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids are those of one element each"
    targets = {
        attributes["href"][1:]
        for name, attributes in page.elements
        if (attributes.get("href") or "").startswith("#")
    }
    assert targets <= set(ids)
    return page


def picture(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16), shade, np.uint8)).save(path)


def training(folder, gamma=0.0, rows=12):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"diffusion": {"input_perturbation": gamma}, "train": {"lr": 0.001}})
    )
    lines = ["step,loss,mse,loss_q0,loss_q3,eta,fid@100"]
    lines += [
        f"{i},{1 / (i + 1)},{0.9 / (i + 1)},0.2,0.1,3m,{90 - i if i % 2 else ''}"
        for i in range(1, rows)
    ]
    (folder / "progress.csv").write_text("\n".join(lines))
    picture(folder / "samples_000005.png")
    return folder


def samples(folder, seed=0, lam=1.0, fid=1.25):
    picture(folder / "grid.png", 50 + int(10 * lam))
    (folder / "settings.yaml").write_text(
        yaml.safe_dump(
            {
                "model_path": "ema.pt",
                "seed": seed,
                "num_samples": 8,
                "use_ddim": False,
                "timestep_respacing": "20",
                "eps_scaler": lam,
            }
        )
    )
    (folder / "evaluation.json").write_text(
        json.dumps(
            {
                "metrics": {"fid": {"value": fid, "samples": 8}},
                "features": {"name": "pixels"},
                "reference": {"path": "/data/ref.npz"},
                "samples": {"path": "/data/s.npz"},
            }
        )
    )
    return folder


def sweep(folder, names=("baseline", "IP"), error="out of luck"):
    cells = []
    for column, name in enumerate(names):
        for seed in (0, 1):
            cell = {
                "folder": f"c{column}{seed}",
                "checkpoint": name,
                "sampler": "ddpm",
                "eta": 0.0,
                "steps": "20",
                "lambda": "1",
                "seed": seed,
                "column": name,
            }
            cells.append(cell)
            inner = folder / "cells" / cell["folder"]
            picture(inner / "samples" / "grid.png")
            if column == 1 and seed == 1:
                (inner / "failed.json").write_text(json.dumps({"error": error}))
                continue
            (inner / "result.json").write_text(
                json.dumps(
                    {
                        "cell": cell,
                        "metrics": {"fid": {"value": 3.5 + column + seed}},
                        "warnings": ["few images"],
                        "commands": ["python made-it.py"],
                    }
                )
            )
    (folder / "sweep.yaml").write_text("steps: [20]\n")
    (folder / "cells.json").write_text(
        json.dumps({"metrics": ["fid"], "features": "pixels", "cells": cells})
    )
    return folder


def measures(folder, steps=5, lam=1.0):
    folder.mkdir(parents=True)
    rising = list(np.linspace(1, 1.1, steps))
    (folder / "measures.json").write_text(
        json.dumps(
            {
                "num_images": 64,
                "num_timesteps": steps,
                "settings": {"seed": 0, "eps_scaler": lam, "timestep_respacing": str(steps)},
                "t": list(range(steps)),
                "lambda": [lam] * steps,
                "timestep_map": [200 * t for t in range(steps)],
                "measures": {
                    "norm": {"ratio": [None, *rising[1:]], "ratio_error": [0.01] * steps},
                    "delta": {"delta_multi": rising, "delta_single": rising},
                    "variance": {"error": rising, "final": 0.5, "final_expected": 0.4},
                    "prediction": {"nu": rising, "gamma": rising},
                    "accumulation": {"steps": [1, 5], "frechet": [0.1, 0.2]},
                },
            }
        )
    )
    picture(folder / "norm.png")
    return folder


def test_everything_on_one_page(tmp_path):
    training(tmp_path / "runs" / "gamma_0")
    training(tmp_path / "runs" / "gamma_1", gamma=0.1)
    samples(tmp_path / "runs" / "gamma_1" / "samples" / "a", lam=1.0)
    samples(tmp_path / "runs" / "gamma_1" / "samples" / "b", lam=1.02, fid=0.75)
    sweep(tmp_path / "runs" / "sweep")
    measures(tmp_path / "runs" / "bias", lam=1.01)
    (tmp_path / "runs" / "cal.yaml").write_text("steps: 3\nlambda: [1.01, 1.02, 1.0]\n")
    written = write_report(
        [str(tmp_path / "runs")], str(tmp_path / "r.html"), str(tmp_path / "figures"), "A title"
    )
    page = check(tmp_path / "r.html")
    for words in (
        "A title",
        "Training loss",
        "FID@100 during training",
        "losses of different gamma do not compare",
        "Loss by quarters of t: gamma_0",
        "Norm of the predicted noise",
        "delta_t",
        "Variance along the chain",
        "Error accumulation",
        "lambda(t)",
        "cal.yaml (3 steps)",
        "DDPM, steps 20, lambda 1.02, seed 0",
        "Seed 0",
        "1.25",
        "0.75",
        "failed: IP, ddpm, 20 steps, seed 1: out of luck",
        "4 \u00b1 0.71",
        "4.5 (1 missing)",
        "few images",
        "python made-it.py",
        "input_perturbation: 0.1",
        "python scripts/image_train.py --config",
        "python evaluations/evaluator.py /data/ref.npz /data/s.npz",
    ):
        assert words in page.text, words
    drawings = [path for path in written if path.endswith(".svg")]
    assert {Path(path).suffix for path in written} == {".html", ".svg", ".png"}
    # Losses, metric, quarters of two runs; five measures; lambda.
    assert len(drawings) == 2 + 1 + 2 + 5 + 1
    # Training grids, samples, cells of one seed; the measurement's own drawing is not shown again.
    assert len(page.all("img")) == len(drawings) + 2 + 2 + 2
    assert all(image["alt"] for image in page.all("img"))
    for path in written[1:]:
        assert Path(path).stat().st_size > 1000
    assert (
        base64.b64encode(
            (tmp_path / "runs" / "sweep" / "cells" / "c00" / "samples" / "grid.png").read_bytes()
        ).decode()
        in (tmp_path / "r.html").read_text()
    )


def test_hostile_names_and_values_are_text(tmp_path):
    run = training(tmp_path / "<img src=x onerror=alert(3)>")
    (run / "config.yaml").write_text(f"evil: {json.dumps(EVIL)}\n</pre><script>alert(4)</script>\n")
    (run / "progress.csv").write_text(f'step,loss,"{EVIL}",fid@1\n1,2,3,4\n2,1,2,3\n')
    samples(tmp_path / "$_{s")
    (tmp_path / "$_{s" / "settings.yaml").write_text(
        yaml.safe_dump({"model_path": EVIL, "seed": EVIL, "eps_scaler": EVIL})
    )
    sweep(tmp_path / "sweep", names=(EVIL, "_hidden"), error=EVIL)
    bias = measures(tmp_path / EVIL.replace("/", "_"))
    (bias / "settings.yaml").write_text(EVIL)
    (bias / "x.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(5)</script></svg>"
    )
    (bias / "text.png").write_text("<b>no picture</b>")
    write_report([str(tmp_path)], str(tmp_path / "r.html"), title=EVIL)
    page = check(tmp_path / "r.html")
    assert (
        page.text.count("<script>alert(1)</script>") >= 6
        and "<script>alert(4)</script>" in page.text
    )
    assert "text.png is no picture" in page.text and "$_{s" in page.text


@pytest.mark.parametrize(
    "name, content",
    [
        ("evaluation.json", '{"metrics": [1, 2], "features": 3}'),
        ("evaluation.json", "{torn"),
        ("settings.yaml", "a: [1\n"),
        ("settings.yaml", "just text"),
        ("grid.png", "junk"),
    ],
)
def test_torn_files_do_not_stop_a_report(name, content, tmp_path):
    samples(tmp_path / "s")
    (tmp_path / "s" / name).write_text(content)
    write_report([str(tmp_path / "s")], str(tmp_path / "r.html"))
    check(tmp_path / "r.html")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"lambda": "x"}',
        '{"measures": {"norm": {"ratio": 3}, "delta": {"delta_multi": ["a", null, 1e999]}, "accumulation": {"steps": 5}}}',
    ],
)
def test_measures_of_another_form(content, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "measures.json").write_text(content)
    write_report([str(tmp_path / "m")], str(tmp_path / "r.html"))
    check(tmp_path / "r.html")


def test_a_sweep_of_another_form(tmp_path):
    folder = sweep(tmp_path / "sweep")
    cell = {
        key: [EVIL] for key in ("checkpoint", "sampler", "eta", "steps", "lambda", "seed", "column")
    }
    (folder / "cells.json").write_text(
        json.dumps(
            {
                "metrics": [["fid"], 3],
                "features": {},
                "cells": [
                    {"folder": "../../c00", **cell},
                    {"folder": 7, **cell},
                    {"folder": "c00", **cell, "eta": "x"},
                    5,
                ],
            }
        )
    )
    write_report([str(folder)], str(tmp_path / "r.html"))
    check(tmp_path / "r.html")


def test_a_sweep_that_is_still_running(tmp_path):
    folder = sweep(tmp_path / "sweep")
    (folder / "cells.json").unlink()
    write_report([str(folder)], str(tmp_path / "r.html"))
    assert "4 \u00b1 0.71" in check(tmp_path / "r.html").text


def test_what_is_found_where(tmp_path):
    training(tmp_path / "a")
    samples(tmp_path / "a" / "samples" / "x")
    sweep(tmp_path / "b" / "deep" / "sweep")
    picture(tmp_path / "c" / "p.png")
    found = collect([str(tmp_path / name) for name in ("a", "b", "c", "a")])
    assert [(run.kind, run.label) for run in found] == [
        ("training", "a"),
        ("samples", "x"),
        ("sweep", "sweep"),
        ("pictures", "c"),
    ]
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="holds nothing to show"):
        collect([str(tmp_path / "d")])
    assert short_labels(["/r/a/s", "/r/b/s", "/r/c"]) == ["a/s", "b/s", "c"]


def test_long_curves_are_thinned_and_holes_left_out(tmp_path):
    (tmp_path / "p.csv").write_text(
        "step,loss,fid@5\n" + "".join(f"{i},{i % 2},{'nan' if i else ''}\n" for i in range(5000))
    )
    curves = read_curves(str(tmp_path / "p.csv"))
    assert (
        list(curves) == ["loss"]
        and len(curves["loss"]) == 500
        and {value for _, value in curves["loss"]} == {0.5}
    )


def test_pictures_show_labels_as_they_are():
    curves = [Curve("_hidden $a", [(1, 1), (2, 2)]), Curve("b", [(1, 1), (2, 3)], 1, 0, [0.1, 0.1])]
    panel = Panel("P", "x", "y", curves, lines=[1])
    svg = drawn(Picture("p", "T", [panel]), "svg", "title $_{").decode()
    assert "_hidden $a" in svg and "title $_{" in svg
    assert drawn(Picture("p", "T", [panel]), "png").startswith(b"\x89PNG")


def test_several_measurements_share_the_axes_of_each_measure(tmp_path):
    content = json.loads((measures(tmp_path / "m") / "measures.json").read_text())
    alone = {picture.name: picture for picture in measure_pictures([("", content)])}
    both = {picture.name: picture for picture in measure_pictures([("a", content), ("b", content)])}
    assert list(alone) == list(both) == ["norm", "delta", "variance", "prediction", "accumulation"]
    (ratio,) = alone["norm"].panels  # what the file lacks is not drawn
    assert [t for t, _ in ratio.curves[0].points] == [200, 400, 600, 800]
    assert [curve.label for curve in alone["delta"].panels[0].curves] == [
        "whole chain",
        "single step",
    ]
    curves = both["delta"].panels[0].curves
    assert [(c.label, c.color, c.dash) for c in curves] == [
        ("a", 0, 0),
        ("b", 1, 0),
        ("dashed: single step", 0, 1),
        ("", 1, 1),
    ]


def test_the_script(tmp_path):
    training(tmp_path / "run")
    done = launch.run(
        [sys.executable, "scripts/report.py", str(tmp_path / "run"), "--plots", str(tmp_path / "f")]
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"report: {tmp_path}/run/report.html" in done.stdout
        and len(list((tmp_path / "f").iterdir())) == 8
    )
    check(tmp_path / "run" / "report.html")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "does not exist"),
        ([], "RUN"),
        (["tests", "--ot", "x"], "--ot"),
        (["configs"], "holds nothing to show"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/report.py", *arguments])
    monkeypatch.chdir(launch.ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path("scripts/report.py", run_name="__main__")
    err = capsys.readouterr().err.strip().splitlines()
    assert (
        end.value.code == 2 and len(err) == 1 and err[0].startswith("error: ") and words in err[0]
    )


@pytest.mark.parametrize(
    "given",
    [
        {"use_ddim": True, "eta": 0.5, "timestep_respacing": "20", "seed": 3},
        {"solver": "time_shift", "time_shift_window": 30, "timestep_respacing": "10"},
        {"solver": "heun", "edm_steps": 9, "S_churn": 4.0, "rho": 5.0, "num_samples": 7},
        {"dynamic_threshold": 0.995, "clip_denoised": False, "eps_scaler": [1.0, 1.01]},
    ],
)
def test_the_command_of_samples_makes_them_again(given, tmp_path):
    """Every flag that decides images is in it, however many there will be."""
    values = from_values("image_sample", {"model_path": "ema.pt", **given}).values
    decisive = {flag.name for flag in SECTIONS["sample"] if flag.role is Role.IMAGES}
    settings = {name: value for name, value in values.items() if name in decisive}
    settings["sampler"] = settings.pop("solver")
    samples = Samples(str(tmp_path), {"model_path": "ema.pt", **settings}, None, "")
    (words,) = run_commands(samples)
    again = parse("image_sample", "", words[1:]).values
    assert {name: again[name] for name in decisive} == {name: values[name] for name in decisive}
