"""logger: what arrives in which file, who writes, and that logging neither waits nor crashes."""

import csv
import io
import json
import math
import os
import re
import sys
import tempfile
import textwrap

import launch
import numpy as np
import pytest
import torch

from guided_diffusion_ip import logger


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", *logger._RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    logger.reset()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def objects(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def dump(**values):
    logger.logkvs(values)
    return logger.dumpkvs()


# ---- values ----


def test_values_of_all_kinds_reach_all_files(tmp_path, capsys):
    logger.configure(tmp_path / "run", rank=0)
    logger.logkvs(
        {
            "samples": 5,
            "lr": np.float32(0.5),
            "flag": True,
            "note": 'a,"b"',
            "loss": torch.tensor(0.25),
        }
    )
    logger.logkv("step", torch.tensor([7]))
    assert dump() == {"samples": 5, "lr": 0.5, "flag": 1, "note": 'a,"b"', "loss": 0.25, "step": 7}
    assert dump() == {}
    assert rows(tmp_path / "run/progress.csv") == [
        {"samples": "5", "lr": "0.5", "flag": "1", "note": 'a,"b"', "loss": "0.25", "step": "7"}
    ]
    assert objects(tmp_path / "run/progress.json")[0]["loss"] == 0.25
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "run/log.txt").read_text()
    assert printed.count("\n") == 1 and printed.startswith("step 7  loss 0.25  samples 5")


def test_means_are_over_what_was_logged_since_the_last_dump(tmp_path):
    logger.configure(tmp_path, ["csv"], rank=0)
    for value in (1, torch.tensor(2.0), np.float64(6)):
        logger.logkv_mean("loss", value)
    assert logger.getkvs() == {"loss": 3.0} == dump()
    logger.logkv_mean("loss", 5.0)
    assert dump() == {"loss": 5.0}
    half = torch.tensor(40000.0, dtype=torch.float16)  # the sum is beyond float16
    logger.logkv_mean("loss", half)
    logger.logkv_mean("loss", half)
    assert dump() == {"loss": 40000.0}


def test_a_tensor_is_copied_when_logged_and_read_when_dumped(tmp_path, monkeypatch):
    logger.configure(tmp_path, ["json"], rank=0)
    reads = []
    item = torch.Tensor.item
    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, name=name: reads.append(name) or item(self)
        )
    last, mean = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)
    product = last * 1
    logger.logkv("last", product)
    logger.logkv_mean("mean", mean)
    with logger.profile_kv("data"):
        logger.logkv_mean("mean", mean)
    mean.fill_(100)
    product.detach().fill_(100)
    assert reads == []
    values = logger.dumpkvs()
    assert reads == ["item", "item"] and values["last"] == 1.0 and values["mean"] == 2.0


@pytest.mark.parametrize("value", [torch.ones(2), np.ones((2, 2)), torch.ones(0)])
def test_more_than_one_number_is_refused_with_the_key(value, tmp_path):
    logger.configure(tmp_path, ["json"], rank=0)
    for log in (logger.logkv, logger.logkv_mean):
        with pytest.raises(ValueError, match="'histogram' has shape"):
            log("histogram", value)


def test_nan_and_inf_are_written_not_raised(tmp_path, capsys):
    logger.configure(tmp_path, ["stdout", "log", "csv", "json", "tensorboard"], rank=0)
    dump(step=1, loss=math.nan, grad_norm=torch.tensor(math.inf), loss_q0=-math.inf, loss_q1=1.0)
    assert rows(tmp_path / "progress.csv") == [
        {"step": "1", "loss": "nan", "grad_norm": "inf", "loss_q0": "-inf", "loss_q1": "1.0"}
    ]
    assert objects(tmp_path / "progress.json") == [
        {"step": 1, "loss": None, "grad_norm": None, "loss_q0": None, "loss_q1": 1.0}
    ]
    assert "loss nan" in (tmp_path / "log.txt").read_text()


# ---- files ----


def test_a_new_key_adds_a_csv_column_and_pads_older_rows(tmp_path):
    logger.configure(tmp_path, ["csv"], rank=0)
    dump(step=1, loss=2.0)
    dump(step=2, loss=1.0, note="two\nlines")
    dump(step=3)
    text = (tmp_path / "progress.csv").read_text()
    assert text.splitlines()[0] == "step,loss,note" and text.count("step") == 1
    assert rows(tmp_path / "progress.csv") == [
        {"step": "1", "loss": "2.0", "note": ""},
        {"step": "2", "loss": "1.0", "note": "two\nlines"},
        {"step": "3", "loss": "", "note": ""},
    ]
    assert sorted(os.listdir(tmp_path)) == ["progress.csv"]


def test_a_restart_continues_the_files_and_drops_a_torn_line(tmp_path):
    for step in (1, 2):
        logger.configure(tmp_path, ["csv", "json", "log"], rank=0)
        dump(step=step, loss=0.5)
        logger.reset()
    for name in ("progress.csv", "progress.json"):
        with open(tmp_path / name, "a") as file:
            # Killed while writing.
            file.write("3,0.1" if name.endswith("csv") else '{"step": 3, "lo')
    logger.configure(tmp_path, ["csv", "json", "log"], rank=0)
    dump(lr=1.0, step=3)
    assert rows(tmp_path / "progress.csv") == [
        {"step": "1", "loss": "0.5", "lr": ""},
        {"step": "2", "loss": "0.5", "lr": ""},
        {"step": "3", "loss": "", "lr": "1.0"},
    ]
    assert [row["step"] for row in objects(tmp_path / "progress.json")] == [1, 2, 3]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_rows_are_on_disk_when_dumpkvs_returns(tmp_path):
    logger.configure(tmp_path, ["csv", "json", "log"], rank=0)
    dump(step=1)
    assert len(rows(tmp_path / "progress.csv")) == len(objects(tmp_path / "progress.json")) == 1
    assert (tmp_path / "log.txt").read_text() == "step 1\n"


def test_tensorboard_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger.configure(tmp_path, ["tensorboard"], rank=0)
    dump(step=10, loss=0.5, eta="1h")
    dump(step=20, loss=0.25, eta="0h")
    logger.reset()
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert events.Tags()["scalars"] == ["loss"]


def test_torch_and_tensorboard_are_imported_only_when_asked_for(tmp_path):
    code = f"""
        import sys
        from guided_diffusion_ip import logger
        logger.configure({str(tmp_path)!r}); logger.logkv("loss", 1.0); logger.dumpkvs()
        assert not {{"torch", "tensorboard", "mpi4py", "numpy", "tqdm"}} & set(sys.modules)
    """
    done = launch.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr


def test_an_unknown_format_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="'wandb'.*stdout, log, csv, json, tensorboard"):
        logger.configure(tmp_path, ["wandb"], rank=0)
    with pytest.raises(ValueError, match="'wandb'"):
        logger.make_output_format("wandb", str(tmp_path))


# ---- who and where ----


@pytest.mark.parametrize(
    "variable", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"]
)
def test_ranks_other_than_0_write_and_print_nothing(variable, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "1")
    logger.warn("before configure")
    logger.configure(tmp_path / "run")
    logger.error("lost")
    assert dump(loss=torch.tensor(2.0)) == {"loss": 2.0}
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
    assert logger.get_dir() == str(tmp_path / "run")
    logger.configure(tmp_path / "run", rank=0)  # the caller knows better than the environment
    assert (tmp_path / "run").exists()


def test_the_default_folder_is_below_runs_and_not_the_temp_folder(tmp_path, capsys):
    before = set(os.listdir(tempfile.gettempdir()))
    logger.configure()
    first = logger.get_dir()
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", first)
    assert (tmp_path / first).is_dir()
    assert first in capsys.readouterr().out
    logger.configure()
    assert logger.get_dir() != first and os.path.dirname(logger.get_dir()) == "runs"
    new = set(os.listdir(tempfile.gettempdir())) - before  # other programs may write there, too
    assert not [name for name in new if "openai" in name or "runs" in name]
    dump(loss=1.0)
    assert sorted(os.listdir(logger.get_dir())) == ["log.txt", "progress.csv", "progress.json"]


def test_openai_logdir_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "mine"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "csv, log")
    logger.configure(log_suffix="-x")
    assert logger.get_dir() == str(tmp_path / "mine")
    assert sorted(os.listdir(tmp_path / "mine")) == ["log-x.txt", "progress-x.csv"]
    logger.configure(str(tmp_path / "explicit"))
    assert logger.get_dir() == str(tmp_path / "explicit")


def test_without_configure_lines_are_printed_and_no_file_appears(tmp_path, capsys):
    logger.log("a", 1)
    dump(loss=0.5)
    assert capsys.readouterr().out == "a 1\nloss 0.5\n" and os.listdir(tmp_path) == []
    assert os.path.isdir(logger.get_dir())


def test_scoped_configure_returns_to_the_logger_before(tmp_path):
    logger.configure(tmp_path / "outer", ["csv"], rank=0)
    outer = logger.get_current()
    logger.logkv("step", 1)
    with pytest.raises(KeyError), logger.scoped_configure(str(tmp_path / "inner"), ["csv"]):
        dump(inner=1)
        raise KeyError
    assert logger.get_current() is outer
    dump()
    assert rows(tmp_path / "outer/progress.csv") == [{"step": "1"}]
    assert rows(tmp_path / "inner/progress.csv") == [{"inner": "1"}]


def test_levels(capsys):
    logger.debug("hidden")
    logger.info("shown")
    logger.warn("careful")
    logger.error("broken")
    assert capsys.readouterr().out == "shown\nwarning: careful\nerror: broken\n"
    logger.set_level(logger.DEBUG)
    logger.debug("details")
    logger.set_level(logger.ERROR)
    logger.warn("hidden")
    assert capsys.readouterr().out == "details\n"
    logger.set_level(logger.DISABLED)
    logger.error("hidden")
    dump(loss=1)
    assert capsys.readouterr().out == ""


def test_a_comm_makes_rows_means_over_ranks(tmp_path):
    class Comm:
        def allgather(self, mine):  # rank 1 saw three batches, and a key that we did not
            return [mine, {"loss": (4.0, 3), "name": ("b", 1), "extra": (1, 1)}]

    logger.configure(tmp_path, ["csv"], comm=Comm(), rank=0)
    logger.logkv_mean("loss", torch.tensor(0.0))
    assert dump(name="a") == {"loss": 3.0, "name": "a", "extra": 1}
    logger.set_comm(None)
    assert dump(loss=1.0) == {"loss": 1.0}


def test_profile_adds_up_the_seconds(tmp_path):
    logger.configure(tmp_path, ["csv"], rank=0)

    @logger.profile("work")
    def work(seconds, *, result):
        """Works."""
        __import__("time").sleep(seconds)
        return result

    assert work(0.02, result=1) == 1 and work(0.03, result=2) == 2 and work.__doc__ == "Works."
    with pytest.raises(KeyError), logger.profile_kv("other"):
        raise KeyError
    values = dump()
    assert 0.05 <= values["wait_work"] < 0.5 and values["wait_other"] < 0.02


# ---- the line ----


@pytest.mark.parametrize(
    "value, text",
    [
        (1234567, "1,234,567"),
        (0, "0"),
        (0.051234, "0.05123"),
        (1e-4, "0.0001"),
        (3e-6, "3e-06"),
        (65536.0, "65,536"),
        (1234.56, "1,235"),
        ("2h", "2h"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_as_text(value, text):
    assert logger.outputs.number_text(value) == text


@pytest.mark.parametrize(
    "seen, shown",
    [
        ({0: 1.0, 1: 0.95, 3: 0.754}, "1/0.95/-/0.754"),
        ({2: 0.25}, "-/-/0.25/-"),
        ({3: math.nan}, "-/-/-/nan"),
        ({3: 4.0, 0: 1.0, 2: 3.0, 1: 2.0}, "1/2/3/4"),
    ],
)
def test_a_quartile_without_samples_keeps_its_place(seen, shown, capsys):
    dump(step=8, **{f"mse_q{q}": value for q, value in seen.items()}, mse_q10=7)
    assert capsys.readouterr().out.splitlines() == [f"step 8  mse_q {shown}  mse_q10 7"]


def test_step_and_loss_come_first_and_quartiles_share_a_cell(capsys):
    row = {"samples": 9, "loss_q1": 0.2, "loss_q0": 0.5, "loss": 1.5, "data_wait_%": 3.0}
    dump(**row, step=1000)
    text = "step 1,000  loss 1.5  samples 9  loss_q 0.5/0.2/-/-  data_wait_% 3"
    assert capsys.readouterr().out.splitlines() == [text]


def test_lines_do_not_tear_progress_bars(monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm

    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    logger.log("alone")
    with tqdm(total=3, file=screen) as bar:
        bar.update()
        logger.log("in between")
    lines = re.split(r"[\r\n]", screen.getvalue())
    assert "alone" in lines and "in between" in lines  # on lines of their own, not behind the bar


DAMAGE = {
    "garbage": b"garbage{\n",
    "zeros": b"\0" * 40 + b"\n",
    "no object": b"[1]\n",
    "not UTF-8": b'2,\xff\n{"loss": "\xff"}\n',
    "nested": b"[" * 100_000 + b"\n",
    "quote": b'2,"half\n',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_lines_are_set_aside_and_the_log_goes_on(tmp_path, capsys, damage):
    logger.configure(tmp_path, ["csv", "json", "log"], rank=0)
    dump(step=1, loss=0.5)
    dump(step=2, loss=0.4)
    logger.reset()
    for name in ("progress.csv", "progress.json", "log.txt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + damage)
    logger.configure(tmp_path, ["stdout", "csv", "json", "log"], rank=0, resume_step=1)
    dump(step=2, loss=0.3)
    logger.reset()
    table, found = rows(tmp_path / "progress.csv"), objects(tmp_path / "progress.json")
    assert [row["loss"] for row in table if row["step"] in "12"] == ["0.5", "0.3"]
    assert [row["loss"] for row in found] == [0.5, 0.3]
    assert (tmp_path / "progress.json.damaged").read_bytes() in damage
    assert "progress.json cannot be read; they are in" in capsys.readouterr().out


def test_a_table_whose_header_is_lost_is_set_aside(tmp_path):
    logger.configure(tmp_path, ["csv"], rank=0)
    dump(step=1, loss=0.5)
    logger.reset()
    (tmp_path / "progress.csv").write_bytes(b"\0\0\0\xff\n1,0.5\n")
    logger.configure(tmp_path, ["csv"], rank=0, resume_step=1)
    dump(step=2, loss=0.25)
    assert rows(tmp_path / "progress.csv")[-1] == {"step": "2", "loss": "0.25"}
