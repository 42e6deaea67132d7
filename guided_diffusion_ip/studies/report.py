"""One self-contained HTML page about training runs, samples, sweeps and measurements.

report_data     folders -> values of the kinds that can be shown
report          values -> sections of blocks -> report.html (Jinja's; it escapes everything)
report_curves   values -> pictures; those of measures are exposure_bias/plots.py's
"""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader

from ..exposure_bias.plots import Picture, drawn, is_number, measure_pictures, save_picture
from ..files import atomic_file
from ..runs.sampler_text import sampler_text, steps_along_sigma
from ..settings.flag import Role
from ..settings.flags import SECTIONS
from .report_curves import lambda_pictures, loss_pictures, metric_pictures
from .report_data import (
    KINDS,
    Measurement,
    Pictures,
    Run,
    Samples,
    Schedule,
    SweepRun,
    Training,
    collect,
)
from .sweep_table import TITLES, Table, best, headings, make_table, note, sampler_title

_MOST_GRIDS = 48
_COMPARABLE = (
    "Only values from the same features, reference and number of images compare; FID is a Frechet "
    "distance of Inception's features, of others it is just a Frechet distance."
)
Kind = TypeVar("Kind", bound=Run)


@dataclass(frozen=True)
class Best:
    """A cell of a table that is shown in bold."""

    text: str
    best: bool = True


@dataclass(frozen=True)
class Grid:
    """A table whose first `texts` columns are names, the others numbers; a row of one cell is a
    heading of those below it.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Best]]
    texts: int


@dataclass(frozen=True)
class Image:
    """A picture in the page itself; `src` is "" if the file is none."""

    src: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Block:
    """A piece of a section: whatever of these there is, in this order."""

    heading: str = ""
    table: Grid | None = None
    failures: Sequence[str] = ()
    plot: Image | None = None
    images: Sequence[Image] = ()
    notes: Sequence[str] = ()
    code: str = ""
    folded: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """`anchor` is its id in the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def write_report(paths: Sequence[str], out: str, plots_dir: str = "", title: str = "") -> list[str]:
    """Write the page to `out`, and with `plots_dir` its pictures as NAME.svg and NAME.png; returns
    all paths written.

    Raises:
        ValueError: nothing to show at a path, or matplotlib is missing.
    """
    runs = collect(paths)
    trained, measured = of_kind(runs, Training), of_kind(runs, Measurement)
    training = [*loss_pictures(trained), *metric_pictures(trained)]
    bias = measure_pictures([(run.label, run.content) for run in measured])
    lambdas = lambda_pictures(runs)
    sections = [
        Section("metrics", "Metrics", metric_blocks(runs)),
        Section("training", "Training", [plot_block(picture) for picture in training]),
        Section("samples", "Samples from equal seeds", sample_blocks(runs)),
        Section("bias", "Exposure bias", [*map(plot_block, bias), *measure_blocks(measured)]),
        Section("lambda", "Epsilon scaling", [plot_block(picture) for picture in lambdas]),
        Section("pictures", "Pictures", picture_blocks(of_kind(runs, Pictures))),
        Section("commands", "Commands and settings", [command_block(run) for run in runs]),
    ]
    counts = {kind.title: len(of_kind(runs, kind)) for kind in KINDS}
    names = ", ".join(os.path.basename(os.path.abspath(path)) for path in paths)
    loader = FileSystemLoader(os.path.dirname(os.path.abspath(__file__)))
    page = Environment(loader=loader, autoescape=True).get_template("report.html")
    content = page.render(
        title=title or f"Report: {names}",
        subtitle=", ".join(f"{kind}: {count}" for kind, count in counts.items() if count),
        sections=[section for section in sections if section.blocks],
    )
    with atomic_file(out) as file:
        file.write(content.encode("utf-8", "backslashreplace"))
    pictures = [*training, *bias, *lambdas] if plots_dir else []
    return [out, *(path for picture in pictures for path in save_picture(picture, plots_dir))]


def of_kind(runs: Sequence[Run], kind: type[Kind]) -> list[Kind]:
    """The runs of one kind."""
    return [run for run in runs if isinstance(run, kind)]


def plot_block(picture: Picture) -> Block:
    """A drawing with its title above, and what is to be said about it below."""
    shown = Image(_data_url("svg+xml", drawn(picture, "svg")), picture.description)
    return Block(picture.title, plot=shown, notes=[picture.note] if picture.note else [])


def image(path: str, alt: str = "", caption: str = "") -> Image:
    """An image file. In an SVG that is shown as an image no script runs, and nothing is loaded."""
    with open(path, "rb") as file:
        content = file.read()
    name = os.path.basename(path)
    if path.endswith(".svg"):
        return Image(_data_url("svg+xml", content), alt or name, caption or name)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return Image(_data_url("png", content), alt or name, caption or name)
    return Image("", name, caption)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def metric_blocks(runs: Sequence[Run]) -> list[Block]:
    """The table of each sweep, and one of all samples that have been evaluated."""
    blocks = []
    for run in of_kind(runs, SweepRun):
        places, results = [cell.place for cell in run.cells], [cell.result for cell in run.cells]
        table = make_table(places, results, run.metrics, run.features)
        failures = [
            "failed: {column}, {sampler}, {steps} steps, seed {seed}: ".format(**cell.place)
            + cell.error
            for cell in run.cells
            if cell.error and cell.result is None
        ]
        warnings = dict.fromkeys(warning for cell in run.cells for warning in cell.warnings)
        heading = f"Sweep {run.label}"
        blocks.append(Block(heading, sweep_grid(table), failures, notes=[note(table), *warnings]))
    return blocks + samples_block(of_kind(runs, Samples))


def sweep_grid(table: Table) -> Grid:
    """A line for each metric, below it a row for each sampler and step count; the best mean of a
    row is bold.
    """
    rows: list[list[str | Best]] = []
    for (metric, sampler, steps), entries in table.rows:
        if [table.title(metric)] not in rows:
            rows.append([table.title(metric)])
        texts = [entry.text().replace("+-", "\u00b1") for entry in entries]
        chosen = best(metric, entries)
        cells = [Best(text) if i == chosen else text for i, text in enumerate(texts)]
        rows.append([sampler, steps, *cells])
    return Grid(headings(table)[1:], rows, texts=2)


def samples_block(runs: Sequence[Samples]) -> list[Block]:
    """A row for each set of samples that has been evaluated."""
    found = [(run, run.evaluation) for run in runs if run.evaluation is not None]
    if not found:
        return []
    names = list(dict.fromkeys(name for _, evaluation in found for name in evaluation.metrics))
    rows = []
    for run, evaluation in found:
        metrics = evaluation.metrics
        values = [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]
        space = os.path.basename(evaluation.features)
        rows.append([run.label, _made_by(run.settings), space, evaluation.count, *values])
    titles = [TITLES.get(name, name) for name in names]
    grid = Grid(["samples", "made by", "features", "images", *titles], rows, texts=3)
    return [Block("Samples", grid, notes=[_COMPARABLE])]


def sample_blocks(runs: Sequence[Run]) -> list[Block]:
    """Grids of the same seed beside each other: image i of each began with the same noise."""
    groups: dict[str, list[Image]] = {}
    for run in of_kind(runs, SweepRun):
        cells = [cell for cell in run.cells if cell.grid and cell.result]
        seed = min((cell.place["seed"] for cell in cells), default="")
        for cell in [cell for cell in cells if cell.place["seed"] == seed][:_MOST_GRIDS]:
            place, column = cell.place, cell.place["column"]
            title = f"{sampler_title(place)}, {place['steps']} steps, seed {seed}"
            title = f"Sweep {run.label}: {title}"
            shown = image(cell.grid, f"samples of {column}, {title}", column)
            groups.setdefault(title, []).append(shown)
    for made in [samples for samples in of_kind(runs, Samples) if samples.grid][:_MOST_GRIDS]:
        caption = f"{made.label}: {_made_by(made.settings)}"
        title = f"Seed {made.settings.get('seed', 'not known')}"
        groups.setdefault(title, []).append(image(made.grid, f"samples in {made.label}", caption))
    for training in of_kind(runs, Training):
        if training.grids:
            grids = [
                image(path, f"samples of {training.label}", os.path.basename(path))
                for path in few(training.grids, 4)
            ]
            groups[f"During training: {training.label}"] = grids
    return [Block(title, images=images) for title, images in groups.items()]


def few(items: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly spread, with the last."""
    if len(items) <= count:
        return list(items)
    return [items[(len(items) - 1) * i // (count - 1)] for i in range(count)]


def picture_blocks(runs: Sequence[Pictures]) -> list[Block]:
    """Folders of pictures."""
    return [Block(run.label, images=[image(path) for path in run.pictures]) for run in runs]


def measure_blocks(runs: Sequence[Measurement]) -> list[Block]:
    """The numbers that curves do not tell exactly, and pictures that lie beside them."""
    if not runs:
        return []
    rows = []
    for run in runs:
        measures = run.content["measures"]
        ratio = measures.get("norm", {}).get("ratio")
        ratios = [v for v in ratio[1:] if is_number(v)] if isinstance(ratio, list) else []
        variance = measures.get("variance", {})
        variances = [variance.get(name) for name in ("final", "final_expected")]
        rows.append(
            [
                run.label,
                _made_by(run.content["settings"]),
                str(run.content.get("num_images", "")),
                f"{sum(ratios) / len(ratios):.4f}" if ratios else "",
                *(f"{value:.4f}" if is_number(value) else "" for value in variances),
            ]
        )
    titles = ["measurement", "sampler", "images", "mean ratio, t > 0", "variance of samples"]
    grid = Grid([*titles, "of real images"], rows, texts=2)
    beside = [
        Block(f"Pictures in {run.label}", images=[image(path) for path in run.pictures])
        for run in runs
        if run.pictures
    ]
    return [Block("In numbers", grid), *beside]


def _made_by(settings: Mapping[str, Any]) -> str:
    return f"{sampler_text(settings)}, seed {settings.get('seed', '?')}"


def command_block(run: Run) -> Block:
    """What makes the same again, and with which settings."""
    folded = [("settings", run.config.rstrip("\n"))] if run.config else []
    if isinstance(run, SweepRun):
        every = "\n".join(line for cell in run.cells for line in cell.commands)
        folded += [(f"commands of the {len(run.cells)} cells", every)] if every else []
    code = "\n".join(shlex.join(["python", *words]) for words in run_commands(run))
    return Block(f"{run.label} ({run.kind})", notes=[run.path], code=code, folded=folded)


def run_commands(run: Run) -> list[list[str]]:
    """What makes the same again: scripts with their arguments."""
    if isinstance(run, Training):
        config = os.path.join(run.path, "config.yaml")
        return [["scripts/image_train.py", "--config", config, "--out_dir", "NEW"]]
    if isinstance(run, SweepRun):
        return [["scripts/sweep.py", os.path.join(run.path, "sweep.yaml"), "--out_dir", run.path]]
    if isinstance(run, Schedule):
        return [
            ["scripts/image_sample.py", "--model_path", "CHECKPOINT", "--eps_schedule", run.path]
        ]
    return _sample_commands(run) if isinstance(run, Samples) else []


def _sample_commands(run: Samples) -> list[list[str]]:
    settings, evaluation = run.settings, run.evaluation
    if "model_path" not in settings:
        return []
    model_path = checkpoint_near(run.path, str(settings["model_path"]))
    words = ["scripts/image_sample.py", "--model_path", model_path]
    along_sigma = steps_along_sigma(settings)
    for flag in SECTIONS["sample"]:
        name = "sampler" if flag.name == "solver" else flag.name  # as settings.yaml has it
        value = settings.get(name)
        unfit = "sigma" if not along_sigma else ""
        if flag.role is not Role.IMAGES or flag.solvers and flag.solvers == unfit:
            continue
        if flag.solvers and value == flag.default or along_sigma and name == "timestep_respacing":
            continue
        if value not in (None, "", False) or name == "clip_denoised" and value is False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name}", text]
    commands = [[*words, "--out_dir", run.path]]
    if evaluation is not None and evaluation.sides:
        features, metrics = evaluation.features or "inception", ",".join(evaluation.metrics)
        result = os.path.join(run.path, "evaluation.json")
        flags = ["--features", features, "--metrics", metrics, "--json", result]
        commands.append(["evaluations/evaluator.py", *evaluation.sides, *flags])
    return commands


def checkpoint_near(folder: str, name: str) -> str:
    """The checkpoint of that name in one of the folders above; its bare name if there is none."""
    for _ in range(4):
        path = os.path.join(folder, os.path.basename(name))
        if os.path.exists(path):
            return path
        folder = os.path.dirname(folder) or "."
    return name
