"""Sweeps: the grid that a file describes, cells computed once by processes that die, wait or fail,
and the table.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import yaml

from guided_diffusion_ip.diffusion.solvers import SOLVERS, Solver
from guided_diffusion_ip.runs.sampler_text import sampler_text
from guided_diffusion_ip.studies.sweep import read_sweep
from guided_diffusion_ip.studies.sweep_run import Launch
from guided_diffusion_ip.studies.sweep_table import Entry, as_csv, as_markdown, best, make_table

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    image_size=8,
    in_channels=1,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,1",
    attention_resolutions="4",
    learn_sigma=True,
    noise_schedule="cosine",
    num_head_channels=32,
)


# ---- the file ----


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with files under the names that sweep files mention."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "ref.npz", "s-ddpm-10.yaml", "s-ddpm-20.yaml"):
        Path(name).write_text(name)
    return tmp_path


def spec(**changes):
    content = {
        "checkpoints": {"baseline": "a.pt", "IP": "b.pt"},
        "reference": "ref.npz",
        "features": "pixels",
        "steps": [10, 20],
        "num_samples": 8,
        **changes,
    }
    return yaml.safe_dump(
        {key: value for key, value in content.items() if value is not None}, sort_keys=False
    )


def cells_of(**changes):
    Path("sweep.yaml").write_text(spec(**changes))
    return read_sweep("sweep.yaml").cells


def test_the_grid_is_the_product_and_eta_is_ddims(place):
    cells = cells_of(sampler=["ddpm", "ddim"], eta=[0, 1], seeds=[0, 1], **{"lambda": [1.0, 1.02]})
    assert len(cells) == 2 * (1 + 2) * 2 * 2 * 2  # DDPM once, DDIM for each eta
    assert len({cell.key for cell in cells}) == len({cell.name for cell in cells}) == len(cells)
    ddim = next(cell for cell in cells if cell.sampler == "ddim" and cell.eta == 1)
    words = " ".join(ddim.sample_args)
    assert "--use_ddim True --eta 1" in words and "--num_samples 8" in words
    assert all("--use_ddim" not in cell.sample_args for cell in cells if cell.sampler == "ddpm")


def test_rules_take_cells_out(place):
    options = {"sampler": ["ddpm", "ddim"], "lambda": [1, {"ES": 1.02}]}
    assert len(cells_of(**options)) == 16
    kept = cells_of(**options, exclude=[{"sampler": "ddim", "lambda": "ES"}])
    assert len(kept) == 12 and not any(
        cell.sampler == "ddim" and cell.scaling.label for cell in kept
    )
    one = {"checkpoint": "IP", "lambda": "ES", "steps": 20, "sampler": "ddpm"}
    kept = cells_of(**options, only=[{"lambda": 1.0, "steps": [10]}, one])
    assert len(kept) == 4 + 1


def test_lambda_in_all_its_forms(place):
    lambdas = [
        1.0,
        1.017,
        "published",
        {"ES*": {"b": 1.0, "k": 0.0025}},
        {"by": {10: 1.03, 20: 1.01}},
        {"cal": "s-{sampler}-{steps}.yaml"},
    ]
    cells = cells_of(checkpoints={"A": "a.pt"}, **{"lambda": lambdas})
    flags = {(cell.scaling.label, cell.steps): dict(cell.scaling.flags) for cell in cells}
    assert flags["", "10"] == {"eps_scaler": "1.0"} and flags["lambda 1.017", "20"] == {
        "eps_scaler": "1.017"
    }
    assert flags["ES", "10"] == {"eps_scaler": "published"}
    assert flags["ES*", "10"] == {"eps_scaler": "1.0", "eps_scaler_k": "0.0025"}
    assert [flags["by", steps]["eps_scaler"] for steps in ("10", "20")] == ["1.03", "1.01"]
    assert flags["cal", "20"] == {"eps_schedule": "s-ddpm-20.yaml"}
    assert {cell.column for cell in cells} == {
        "A",
        "A + ES",
        "A + lambda 1.017",
        "A + ES*",
        "A + by",
        "A + cal",
    }


def test_the_key_is_that_of_what_decides_the_numbers(place):
    def keys(**changes):
        return [cell.key for cell in cells_of(**changes)]

    before = keys()
    assert (
        keys(sample={"batch_size": 3}, evaluate={"batch_size": 5}, metrics=["fid", "prec"])
        == before
    )
    for changes in (
        dict(num_samples=9),
        dict(seeds=1),
        dict(features="inception"),
        dict(sample={"clip_denoised": False}),
    ):
        assert not set(keys(**changes)) & set(before), changes
    Path("ref.npz").write_text("other images")
    assert not set(keys()) & set(before)
    Path("ref.npz").write_text("ref.npz")
    Path("b.pt").write_text("trained further")
    assert [a == b for a, b in zip(keys(), before)] == [True, True, False, False]


def test_cells_of_earlier_sweeps_are_found(place):
    """Their folders end in these hashes."""
    cells = cells_of(
        checkpoints={"A": "a.pt"},
        steps=[10],
        sampler=["ddpm", "ddim", "heun", "euler"],
        eta=[0, 1],
        **{"lambda": [1.0, {"ES": 1.02}]},
    )
    assert [cell.folder for cell in cells] == [
        "A-ddpm-10-steps-seed-0-ecc89a2464",
        "A-ES-ddpm-10-steps-seed-0-c3eb5a226b",
        "A-ddim-10-steps-seed-0-bcc5188269",
        "A-ES-ddim-10-steps-seed-0-8c1ee6196f",
        "A-ddim-eta1-10-steps-seed-0-5d4a5ce887",
        "A-ES-ddim-eta1-10-steps-seed-0-59935414c1",
        "A-heun-10-steps-seed-0-ee560281bf",
        "A-ES-heun-10-steps-seed-0-50d9b7f082",
        "A-euler-10-steps-seed-0-1b056fa560",
        "A-ES-euler-10-steps-seed-0-b6e41ef580",
    ]


def test_a_solver_of_the_registry_is_swept(place, monkeypatch):
    """`either` takes noise levels for EDM's models, and the steps of a process for others."""
    mine = Solver("mine", "My own", "either", SOLVERS["ddpm"].step, options=("eta",))
    monkeypatch.setitem(SOLVERS, "mine", mine)
    Path("edm.yaml").write_text("model: {framework: edm}\n")
    checkpoints = {"A": "a.pt", "B": {"path": "b.pt", "config": "edm.yaml"}}
    cells = cells_of(checkpoints=checkpoints, sampler="mine", steps=[10], eta=[0, 1])
    assert [cell.name for cell in cells] == [
        f"{name}, mine{eta}, 10 steps, seed 0" for name in "AB" for eta in ("", "-eta1")
    ]
    for cell, steps in zip(cells, ("timestep_respacing",) * 2 + ("edm_steps",) * 2, strict=True):
        words = " ".join(cell.sample_args)
        assert f"--{steps} 10 " in words and f"--sampler mine --eta {cell.eta:g}" in words
    assert make_table([cells[1].describe()], [None], ["fid"], "pixels").rows[0][0] == (
        "fid",
        "My own, eta 1",
        "10",
    )
    settings = {"solver": "mine", "eta": 0.5, "edm_steps": 18, "timestep_respacing": "10"}
    assert sampler_text(settings) == "My own, eta 0.5, steps 10, lambda 1"
    assert sampler_text({**settings, "framework": "edm"}).startswith("My own, eta 0.5, steps 18")
    with pytest.raises(ValueError, match="ddim, .*, mine"):
        cells_of(sampler="other")


BAD = [
    (dict(step=[1]), "unknown key 'step'.*Did you mean steps"),
    (dict(reference="no.npz"), "no.npz does not exist"),
    (dict(checkpoints={"A": "nowhere.pt"}), "checkpoint A: nowhere.pt does not exist"),
    (dict(checkpoints={"A": {"path": "a.pt", "confg": "x"}}), "Did you mean config"),
    (dict(sampler="dppm"), "Did you mean ddpm"),
    (dict(steps=[0]), "steps 0"),
    (dict(steps=None), "steps is missing"),
    (dict(seeds=[1.5]), "seeds 1.5"),
    (dict(eta=[-1]), "eta -1"),
    (dict(exclude=[{"stps": 1}]), "Did you mean steps"),
    (dict(only=[{"seed": 7}]), "leave no cell"),
    ({"lambda": [{"ES": {10: 1.0}}]}, "no value for 20 steps"),
    ({"lambda": ["nowhere.yaml"]}, "nowhere.yaml does not exist"),
    ({"lambda": [True]}, "allowed are a number"),
    ({"lambda": ["{no}.yaml"]}, "braces"),
    (dict(sample={"seed": 1}), "set by seeds"),
    (dict(keep_samples="maybe"), "true or false"),
    (dict(metrics=[]), "metrics"),
]


@pytest.mark.parametrize(
    "changes, words", BAD, ids=lambda value: None if isinstance(value, dict) else value[:20]
)
def test_bad_files_are_one_line(changes, words, place):
    with pytest.raises(ValueError, match=words) as error:
        cells_of(**changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("sweep.yaml")


def test_launchers():
    def first(*words):
        return Launch(("s.py", "e.py"), words).command("s.py", ["--x", "1"])

    assert first() == [sys.executable, "s.py", "--x", "1"]
    assert first("torchrun", "--nproc_per_node", "2") == [
        "torchrun",
        "--nproc_per_node",
        "2",
        "s.py",
        "--x",
        "1",
    ]
    assert first("mpiexec", "-n", "2") == ["mpiexec", "-n", "2", sys.executable, "s.py", "--x", "1"]


# ---- the table ----


def result(**metrics):
    return {"metrics": {name: {"value": value} for name, value in metrics.items()}}


def test_the_table_is_the_papers(place):
    cells = cells_of(
        seeds=[0, 1], steps=[20, 10], metrics="fid,prec", **{"lambda": [1, {"ES": 1.02}]}
    )
    values = {
        cell.folder: 10.0 * (cell.checkpoint == "baseline")
        + (not cell.scaling.label)
        + 2 * cell.seed
        for cell in cells
    }
    results = [result(fid=values[cell.folder], prec=values[cell.folder] / 100) for cell in cells]
    results[[cell.name for cell in cells].index("IP-ES, ddpm, 10 steps, seed 1")] = None
    table = make_table([cell.describe() for cell in cells], results, ["fid", "prec"], "pixels")
    assert table.columns == ("baseline", "IP", "baseline + ES", "IP + ES")
    assert [place for place, _ in table.rows] == [
        (m, "DDPM", s) for m in ("fid", "prec") for s in ("20", "10")
    ]
    entries = dict(table.rows)["fid", "DDPM", "20"]
    assert [entry.mean for entry in entries] == [12, 2, 11, 1] and entries[
        0
    ].spread == pytest.approx(2**0.5)
    assert best("fid", entries) == 3 and best("prec", entries) == 0
    holed = dict(table.rows)["fid", "DDPM", "10"][3]
    assert (holed.values, holed.missing, holed.spread) == (
        (0.0,),
        1,
        None,
    ) and "1 missing" in holed.text()
    text = as_markdown(table)
    assert "**1 +- 1.4**" in text and "Frechet distance" in text and "FID" not in text
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert (
        float(rows[0]["IP + ES"]) == 1 and rows[0]["IP n"] == "2" and rows[1]["IP + ES std"] == ""
    )


def test_an_entry_without_values():
    assert (
        Entry((), 2).text() == "missing"
        and Entry(()).text() == ""
        and best("fid", [Entry((1.0,)), Entry(())]) is None
    )


# ---- cells in processes: programs that stand in for the two scripts, so that many can run in
# little time ----

SAMPLE = """
import os, sys, time
out = sys.argv[sys.argv.index("--out_dir") + 1]
with open("started", "a") as file: file.write(out + chr(10))
if "--seed" in sys.argv and sys.argv[sys.argv.index("--seed") + 1] == os.environ.get("FAILS"):
    print("error: out of luck", file=sys.stderr); sys.exit(2)
time.sleep(float(os.environ.get("SLEEP", 0)))
os.makedirs(out, exist_ok=True)
open(os.path.join(out, "samples_8x8x8x1.npz"), "w").write("-".join(sys.argv[1:]))
"""
EVALUATE = """
import json, sys, zlib
text = open(sys.argv[2]).read().split("--out_dir")[0]
names = sys.argv[sys.argv.index("--metrics") + 1].split(",")
json.dump({"metrics": {name: {"value": zlib.crc32((name + text).encode()) / 1e6} for name in names}},
          open(sys.argv[sys.argv.index("--json") + 1], "w"))
"""
SWEEP = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from guided_diffusion_ip.studies.sweep import read_sweep
from guided_diffusion_ip.studies.sweep_run import Launch, run_sweep
from guided_diffusion_ip.studies.sweep_table import as_csv, make_table
sweep = read_sweep("sweep.yaml")
open(f"ready-{os.getpid()}", "w").close()
while "GO" in os.environ and not os.path.exists(os.environ["GO"]): time.sleep(0.01)
done = run_sweep(sweep, sys.argv[1], Launch(("sample.py", "evaluate.py"), (), int(sys.argv[2])))
results = [done.results.get(cell.folder) for cell in sweep.cells]
table = make_table([cell.describe() for cell in sweep.cells], results, sweep.metrics, "pixels")
open(sys.argv[1] + ".csv", "w").write(as_csv(table))
print(len(done.computed), "computed", sorted(done.errors.values()))
"""


@pytest.fixture
def programs(place):
    Path("sample.py").write_text(SAMPLE)
    Path("evaluate.py").write_text(EVALUATE)
    Path("sweep.yaml").write_text(spec(seeds=[0, 1]))  # 8 cells
    return place


def start(out, processes=1, **env):
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, out, str(processes)],
        env={**launch.clean_env(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return out


def starts():
    return Path("started").read_text().split() if Path("started").exists() else []


def wait_for_results(out, count, process):
    for _ in range(600):
        if len(found := list(Path(out).glob("cells/*/result.json"))) >= count:
            return found
        assert process.poll() is None, "the sweep ended early"
        time.sleep(0.02)
    raise AssertionError("no result within 12 s")


def state(paths):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths
    }


@pytest.mark.parametrize("processes", [1, 3])
def test_killed_and_continued(processes, programs):
    finish(start("whole", processes))
    os.remove("started")
    process = start("killed", processes, SLEEP="0.3")
    found = wait_for_results("killed", 2, process)
    process.send_signal(signal.SIGKILL)  # its children live on for a moment, and hold their cells
    process.communicate()
    done = state(found)
    assert 2 <= len(done) < 8
    said = finish(start("killed", processes, SLEEP="0.3"))
    assert state(done) == done, "a finished cell was computed again"
    assert (
        f"{8 - len(done)} computed" in said
        or len(list(Path("killed").glob("cells/*/result.json"))) == 8
    )
    assert Path("killed.csv").read_text() == Path("whole.csv").read_text()
    for path in done:
        assert sum(path.parent.name in line for line in starts()) == 1
    before = len(starts())
    assert "0 computed" in finish(start("killed"))
    assert len(starts()) == before


def test_the_second_of_two_waits_and_each_cell_is_computed_once(programs):
    both = [start("out", 2, SLEEP="0.3", GO="go"), start("out", 2, SLEEP="0.3", GO="go")]
    for _ in range(1000):
        if len(list(programs.glob("ready-*"))) == 2:
            break
        time.sleep(0.02)
    Path("go").touch()
    said = [finish(process) for process in both]
    assert sorted(starts()) == sorted(set(starts())) and len(starts()) == 8
    counts = sorted(int(text.splitlines()[-1].split()[0]) for text in said)
    assert counts == [0, 8], said
    assert sum("waiting for process" in text for text in said) == 1, said
    assert len(list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))) == 2


def test_a_failing_cell_is_told_and_tried_again(programs):
    said = finish(start("out", FAILS="1"))
    assert "4 computed" in said and "exit code 2: out of luck" in said
    assert len(list(Path("out").glob("cells/*/failed.json"))) == 4
    assert "4 computed []" in finish(start("out"))
    assert not list(Path("out").glob("cells/*/failed.json")) and len(starts()) == 12


def test_a_killed_program_is_a_failed_cell(programs):
    Path("sample.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed by SIGKILL" in finish(start("out"))


def test_one_more_metric_needs_no_new_samples(programs):
    finish(start("out"))
    Path("sweep.yaml").write_text(spec(seeds=[0, 1], metrics=["prec"]))
    assert "8 computed" in finish(start("out"))
    results = [
        json.loads(path.read_text())["metrics"] for path in Path("out").glob("cells/*/result.json")
    ]
    assert all(set(metrics) == {"fid", "prec"} for metrics in results)
    Path("sweep.yaml").write_text(spec(seeds=[0, 1], metrics=["fid"]))
    assert "0 computed" in finish(start("out"))


def test_ctrl_c_stops_the_programs(programs):
    process = start("out", 2, SLEEP="30")
    for _ in range(500):
        if len(starts()) == 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    began = time.time()
    process.communicate(timeout=20)
    assert (
        process.returncode != 0
        and time.time() - began < 10
        and not list(Path("out").glob("cells/*/failed.json"))
    )


def test_samples_may_go(programs):
    Path("sweep.yaml").write_text(spec(keep_samples=False))
    finish(start("out"))
    assert (
        not list(Path("out").glob("cells/*/samples/*.npz"))
        and len(list(Path("out").glob("cells/*/result.json"))) == 4
    )


# ---- the real scripts ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, by a real process, and the images it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(
        folder / "images.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8),
    )
    flags = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    done = launch.run(
        [
            sys.executable,
            "scripts/image_train.py",
            *flags,
            "--data_dir",
            str(folder / "images.npz"),
            "--out_dir",
            str(folder / "run"),
            "--max_steps",
            "2",
            "--batch_size",
            "4",
            "--ema_rate",
            "0.5",
            "--lr",
            "0.01",
        ],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def sweep_of(trained, path, **changes):
    path.write_text(
        spec(
            **{
                "checkpoints": {"tiny": str(trained / "run" / "ema_0.5_000002.pt")},
                "num_samples": 6,
                "steps": [2],
                "reference": str(trained / "images.npz"),
                **changes,
            }
        )
    )
    return str(path)


def sweep(*args, **kwargs):
    return launch.run([sys.executable, "scripts/sweep.py", *map(str, args)], timeout=300, **kwargs)


def test_real_cells_one_of_which_fails(trained, tmp_path):
    (tmp_path / "torn.pt").write_bytes(b"torn")
    (tmp_path / "config.yaml").write_text((trained / "run" / "config.yaml").read_text())
    checkpoints = {
        "torn": str(tmp_path / "torn.pt"),
        "tiny": str(trained / "run" / "ema_0.5_000002.pt"),
    }
    path = sweep_of(
        trained,
        tmp_path / "s.yaml",
        checkpoints=checkpoints,
        exclude={"checkpoint": "torn", "lambda": "ES"},
        **{"lambda": [1.0, {"ES": 1.5}]},
    )
    done = sweep(path, "--out_dir", tmp_path / "out", "--processes", 2)
    assert (
        done.returncode == 1
        and "failed: torn" in done.stderr
        and "1 of 3 cells failed" in done.stderr
    ), done.stderr
    assert (
        "2 of 3 cells computed now" in done.stdout
        and "tiny + ES" in done.stdout
        and "missing" in done.stdout
    )
    made = {}
    for file in (tmp_path / "out").glob("cells/*/result.json"):
        content = json.loads(file.read_text())
        made[content["made_with"]["eps_scaler"]] = content
        assert (
            content["metrics"]["fid"]["samples"] == 6
            and "image_sample.py" in content["commands"][0]
        )
    assert (
        set(made) == {1.0, 1.5}
        and made[1.0]["metrics"]["fid"]["value"] != made[1.5]["metrics"]["fid"]["value"]
    )
    row = next(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert float(row["tiny"]) == made[1.0]["metrics"]["fid"]["value"] and row["torn"] == ""


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(steps=[2], metrics="fod"), "fod"),
        (dict(sample={"clip_denoisd": True}), "Did you mean --clip_denoised"),
        ({"lambda": "published"}, "table of lambdas"),
        (dict(sample={"image_size": 16}), "leave it out"),
        (dict(stepz=1), "Did you mean steps"),
        (dict(checkpoints={"x": "nowhere.pt"}), "nowhere.pt does not exist"),
    ],
)
def test_bad_sweeps_are_one_line_and_write_nothing(
    changes, words, trained, tmp_path, capsys, monkeypatch
):
    import runpy

    path = sweep_of(trained, tmp_path / "s.yaml", **changes)
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", path, "--out_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "sweep.py"), run_name="__main__")
    err = capsys.readouterr().err.strip().splitlines()
    assert (
        end.value.code == 2
        and len(err) == 1
        and err[0].startswith(f"error: {path}")
        and words in err[0]
    ), err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_scripts_killed_and_continued(trained, tmp_path):
    path = sweep_of(trained, tmp_path / "s.yaml", steps=[2, 3], seeds=[0, 1])
    assert sweep(path, "--out_dir", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "scripts/sweep.py", path, "--out_dir", str(tmp_path / "killed")],
        cwd=ROOT,
        env=launch.clean_env(),
        stdout=subprocess.DEVNULL,
    )
    for _ in range(3000):
        if done := list((tmp_path / "killed").glob("cells/*/result.json")):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = state(done)
    again = sweep(path, "--out_dir", tmp_path / "killed")
    assert again.returncode == 0 and state(before) == before
    for name in ("table.csv", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun --standalone --nproc_per_node 2"])
def test_cells_under_a_launcher_give_the_same(launcher, trained, tmp_path):
    path = sweep_of(trained, tmp_path / "s.yaml")
    program = str(Path(sys.executable).parent / launcher)
    for out, more in (("one", []), ("two", ["--launcher", program])):
        done = sweep(path, "--out_dir", tmp_path / out, *more)
        assert done.returncode == 0, done.stderr
    values = [
        json.loads(next((tmp_path / out).glob("cells/*/result.json")).read_text())["metrics"][
            "fid"
        ]["value"]
        for out in ("one", "two")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
