"""One self-contained HTML page about training runs, samples, sweeps and measurements.

report_data     folders -> Run
report          Run -> sections (this file), and report_curves: Run -> plots
report_plots    plots -> SVG, PNG
report_html     sections -> a page
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Any

from ..files import atomic_file
from .report_curves import lambda_plots, loss_plots, measure_plots, metric_plots
from .report_data import (
    MEASURES,
    PICTURES,
    SAMPLES,
    SCHEDULE,
    SWEEP,
    TRAINING,
    Run,
    collect,
    is_number,
    valid_result,
)
from .report_html import Html, figure, folded, join, page, picture, svg_figure, table, tag
from .report_plots import Plot, inline_svg, save_files
from .sweep_table import TITLES, Entry, Table, best, headings, make_table, note

_MOST_GRIDS = 48
_SAMPLE_FLAGS = (
    "num_samples",
    "seed",
    "sampler",
    "edm_steps",
    "S_churn",
    "use_ddim",
    "eta",
    "timestep_respacing",
    "clip_denoised",
    "eps_scaler",
    "eps_scaler_k",
    "class_ids",
    "guidance_scale",
)
KIND_NAMES = {
    TRAINING: "training runs",
    SAMPLES: "sets of samples",
    SWEEP: "sweeps",
    MEASURES: "measurements",
    SCHEDULE: "lambda schedules",
    PICTURES: "folders of pictures",
}


def write_report(paths: Sequence[str], out: str, plots_dir: str = "", title: str = "") -> list[str]:
    """Write the page to `out`, and with `plots_dir` its curves as NAME.svg and NAME.png; returns
    all paths written.

    Raises:
        ValueError: nothing to show at a path, or matplotlib is missing.
    """
    runs = collect(paths)
    plots = {
        "training": [*loss_plots(runs), *metric_plots(runs)],
        "bias": measure_plots(runs),
        "lambda": lambda_plots(runs),
    }
    parts = [
        ("metrics", "Metrics", metrics_section(runs)),
        (
            "training",
            "Training",
            plots_section(plots["training"]) if plots["training"] else Html(""),
        ),
        ("samples", "Samples from equal seeds", samples_section(runs)),
        (
            "bias",
            "Exposure bias",
            join(
                filter(
                    None,
                    (plots_section(plots["bias"]), measures_table(runs), measured_pictures(runs)),
                )
            ),
        ),
        ("lambda", "Epsilon scaling", plots_section(plots["lambda"])),
        ("pictures", "Pictures", pictures_section(runs)),
        ("commands", "Commands and settings", commands_section(runs)),
    ]
    kinds = {
        kind: len(of_kind(runs, kind))
        for kind in (TRAINING, SAMPLES, SWEEP, MEASURES, SCHEDULE, PICTURES)
    }
    what = ", ".join(f"{KIND_NAMES[kind]}: {count}" for kind, count in kinds.items() if count)
    content = page(
        title or f"Report: {', '.join(map(os.path.basename, map(os.path.abspath, paths)))}",
        what,
        [part for part in parts if part[2]],
    )
    with atomic_file(out) as file:
        file.write(content.encode())
    saved = (
        [path for group in plots.values() for plot in group for path in save_files(plot, plots_dir)]
        if plots_dir
        else []
    )
    return [out, *saved]


def of_kind(runs: Sequence[Run], kind: str) -> list[Run]:
    return [run for run in runs if run.kind == kind]


def plots_section(plots: Sequence[Plot]) -> Html:
    return (
        tag(
            "div",
            *(
                svg_figure(inline_svg(plot), plot.title, plot.described(), plot.note)
                for plot in plots
            ),
            class_="plots",
        )
        if plots
        else Html("")
    )


# ---- metrics ----


def metrics_section(runs: Sequence[Run]) -> Html:
    parts = []
    for run in of_kind(runs, SWEEP):
        cells = run.data["cells"]
        made = make_table(
            [cell for cell, *_ in cells],
            [result for _, result, *_ in cells],
            run.data["metrics"],
            run.data["features"],
        )
        parts += [
            tag("h3", f"Sweep {run.label}"),
            sweep_table(made),
            tag("p", note(made), class_="soft"),
        ]
        failed = [
            f"failed: {cell['column']}, {cell['sampler']}, {cell['steps']} steps, seed "
            f"{cell['seed']}: {error}"
            for cell, result, error, _ in cells
            if error and result is None
        ]
        parts += (
            [tag("ul", *(tag("li", line, class_="missing") for line in failed))] if failed else []
        )
        warnings = dict.fromkeys(
            str(w) for _, result, *_ in cells if result for w in result.get("warnings") or []
        )
        parts += [tag("p", warning, class_="soft") for warning in warnings]
    parts += samples_table(
        [run for run in of_kind(runs, SAMPLES) if valid_result(run.data["evaluation"])]
    )
    return join(parts)


def sweep_table(made: Table) -> Html:
    """A line for each metric, below it a row for each sampler and step count; the best mean of a
    row is bold.
    """
    rows: list[Sequence[object]] = []
    for (metric, sampler, steps), entries in made.rows:
        if [made.title(metric)] not in rows:
            rows.append([made.title(metric)])
        chosen = best(metric, entries)
        cells = [
            tag("b", entry_html(entry)) if i == chosen else entry_html(entry)
            for i, entry in enumerate(entries)
        ]
        rows.append([sampler, steps, *cells])
    return table(headings(made)[1:], rows, texts=2)


def entry_html(entry: Entry) -> Html:
    mean, plus_minus, spread = entry.text().partition(" +- ")
    return join([mean, tag("small", "\u00b1 ", spread)], " ") if plus_minus else join([mean])


def samples_table(runs: Sequence[Run]) -> list[Html]:
    if not runs:
        return []
    names = list(dict.fromkeys(name for run in runs for name in run.data["evaluation"]["metrics"]))
    rows = []
    for run in runs:
        evaluation = run.data["evaluation"]
        metrics, features = evaluation["metrics"], evaluation.get("features")
        space = features.get("name", "") if isinstance(features, dict) else ""
        count = next((str(m["samples"]) for m in metrics.values() if "samples" in m), "")
        rows.append(
            [
                run.label,
                sampler_text(run.data["settings"]),
                space,
                count,
                *(f"{metrics[name]['value']:.4g}" if name in metrics else "" for name in names),
            ]
        )
    titles = [TITLES.get(name, name) for name in names]
    return [
        tag("h3", "Samples"),
        table(["samples", "made by", "features", "images", *titles], rows, texts=3),
        tag(
            "p",
            "Only values from the same features, reference and number of images compare; FID is "
            "a Frechet distance of Inception's features, of others it is just a Frechet distance.",
            class_="soft",
        ),
    ]


def sampler_text(settings: dict[str, Any]) -> str:
    """DDPM, 20 steps, lambda 1.02, seed 0."""
    kind = f"DDIM, eta {settings.get('eta', 0)}" if settings.get("use_ddim") else "DDPM"
    steps = settings.get("timestep_respacing") or settings.get("diffusion_steps", "?")
    if "sampler" in settings:  # heun, euler
        kind, steps = str(settings["sampler"]).capitalize(), settings.get("edm_steps", "?")
    b, k = settings.get("eps_scaler", 1.0), settings.get("eps_scaler_k", 0.0)
    scaling = (
        "lambda by step" if isinstance(b, list) else f"lambda {b}" + (f" + {k} t" if k else "")
    )
    return f"{kind}, {steps} steps, {scaling}, seed {settings.get('seed', '?')}"


# ---- pictures ----


def samples_section(runs: Sequence[Run]) -> Html:
    """Grids of the same seed beside each other: image i of each began with the same noise."""
    groups: dict[str, list[Html]] = {}
    for run in of_kind(runs, SWEEP):
        cells = [(cell, grid) for cell, result, _, grid in run.data["cells"] if grid and result]
        seed = min((cell["seed"] for cell, _ in cells), key=str, default=None)
        for cell, grid in [(cell, grid) for cell, grid in cells if cell["seed"] == seed][
            :_MOST_GRIDS
        ]:
            eta = f", eta {cell['eta']}" if cell["eta"] else ""
            title = f"Sweep {run.label}: {str(cell['sampler']).upper()}{eta}, {cell['steps']} steps, seed {seed}"
            groups.setdefault(title, []).append(
                figure(picture(grid, f"samples of {cell['column']}, {title}"), cell["column"])
            )
    for run in [run for run in of_kind(runs, SAMPLES) if run.data["grid"]][:_MOST_GRIDS]:
        made_by = sampler_text(run.data["settings"])
        groups.setdefault(f"Seed {run.data['settings'].get('seed', 'not known')}", []).append(
            figure(picture(run.data["grid"], f"samples in {run.label}"), f"{run.label}: {made_by}")
        )
    for run in of_kind(runs, TRAINING):
        for path in few(run.data["grids"], 4):
            name = os.path.basename(path)
            groups.setdefault(f"During training: {run.label}", []).append(
                figure(picture(path, f"{name} of {run.label}"), name)
            )
    blocks = [
        tag(
            "div",
            tag("h3", title),
            tag("div", *grids, class_="grids"),
            class_="group large" if grids[2:] else "group",
        )
        for title, grids in groups.items()
    ]
    return tag("div", *blocks, class_="groups") if blocks else Html("")


def few(items: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly spread, with the last."""
    return (
        list(items)
        if len(items) <= count
        else [items[(len(items) - 1) * i // (count - 1)] for i in range(count)]
    )


def measured_pictures(runs: Sequence[Run]) -> Html:
    """Those that a measurement has drawn itself, folded away: most of it is in our curves."""
    return join(
        tag(
            "details",
            tag("summary", f"Pictures in {run.label}"),
            tag("div", *captioned(run.data["pictures"]), class_="pictures"),
        )
        for run in of_kind(runs, MEASURES)
        if run.data["pictures"]
    )


def pictures_section(runs: Sequence[Run]) -> Html:
    return join(
        part
        for run in of_kind(runs, PICTURES)
        for part in (
            tag("h3", run.label),
            tag("div", *captioned(run.data["pictures"]), class_="pictures"),
        )
    )


def captioned(paths: Sequence[str]) -> list[Html]:
    return [figure(picture(path, os.path.basename(path)), os.path.basename(path)) for path in paths]


# ---- measures ----


def measures_table(runs: Sequence[Run]) -> Html:
    """The numbers that curves do not tell exactly."""
    rows = []
    for run in of_kind(runs, MEASURES):
        content = run.data["content"]
        measures = content.get("measures") if isinstance(content.get("measures"), dict) else {}
        norm, variance = (
            measures.get(name) if isinstance(measures.get(name), dict) else {}
            for name in ("norm", "variance")
        )
        ratios = (
            [v for v in norm["ratio"][1:] if is_number(v)]
            if isinstance(norm.get("ratio"), list)
            else []
        )
        variances = [
            f"{variance[name]:.4f}" if is_number(variance.get(name)) else ""
            for name in ("final", "final_expected")
        ]
        rows.append(
            [
                run.label,
                sampler_text(run.data["settings"]),
                str(content.get("num_images", "")),
                f"{sum(ratios) / len(ratios):.4f}" if ratios else "",
                *variances,
            ]
        )
    if not rows:
        return Html("")
    titles = [
        "measurement",
        "sampler",
        "images",
        "mean ratio, t > 0",
        "variance of samples",
        "of real images",
    ]
    return join([tag("h3", "In numbers"), table(titles, rows, texts=2)])


# ---- commands ----


def commands_section(runs: Sequence[Run]) -> Html:
    parts = []
    for run in runs:
        commands = "\n".join(run_commands(run))
        parts += [tag("h3", f"{run.label} ({run.kind})"), tag("p", run.path, class_="soft")]
        parts += [tag("pre", commands)] if commands else []
        parts += [folded("settings", run.data["config"])] if run.data.get("config") else []
        every = [
            line
            for _, result, *_ in run.data.get("cells", [])
            if result
            for line in result.get("commands") or []
        ]
        parts += (
            [folded(f"commands of the {len(run.data['cells'])} cells", "\n".join(map(str, every)))]
            if every
            else []
        )
    return join(parts)


def run_commands(run: Run) -> list[str]:
    """What makes the same again."""
    settings = run.data.get("settings", {})
    if run.kind == TRAINING:
        config = os.path.join(run.path, "config.yaml")
        return [
            shlex.join(["python", "scripts/image_train.py", "--config", config, "--out_dir", "NEW"])
        ]
    if run.kind == SWEEP:
        return [
            shlex.join(
                [
                    "python",
                    "scripts/sweep.py",
                    os.path.join(run.path, "sweep.yaml"),
                    "--out_dir",
                    run.path,
                ]
            )
        ]
    if run.kind == SCHEDULE:
        return [
            shlex.join(
                [
                    "python",
                    "scripts/image_sample.py",
                    "--model_path",
                    "CHECKPOINT",
                    "--eps_schedule",
                    run.path,
                ]
            )
        ]
    if run.kind != SAMPLES or "model_path" not in settings:
        return []
    words = [
        "python",
        "scripts/image_sample.py",
        "--model_path",
        checkpoint_near(run.path, str(settings["model_path"])),
    ]
    for name in _SAMPLE_FLAGS:
        value = settings.get(name)
        if name == "timestep_respacing" and "sampler" in settings:
            continue  # DDPM's and DDIM's; Heun and Euler refuse it
        if value not in (None, "", False) or name == "clip_denoised" and value is False:
            words += [
                f"--{name}",
                ",".join(map(str, value)) if isinstance(value, list) else str(value),
            ]
    commands = [shlex.join([*words, "--out_dir", run.path])]
    evaluation = run.data["evaluation"]
    features = evaluation.get("features") if isinstance(evaluation.get("features"), dict) else {}
    sets = [evaluation.get(side) for side in ("reference", "samples")]
    if all(isinstance(side, dict) and "path" in side for side in sets):
        commands.append(
            shlex.join(
                [
                    "python",
                    "evaluations/evaluator.py",
                    *(str(side["path"]) for side in sets),
                    "--features",
                    str(features.get("file") or features.get("name", "inception")),
                    "--metrics",
                    ",".join(map(str, evaluation.get("metrics", {}))),
                    "--json",
                    os.path.join(run.path, "evaluation.json"),
                ]
            )
        )
    return commands


def checkpoint_near(folder: str, name: str) -> str:
    """The checkpoint of that name in one of the folders above; its bare name if there is none."""
    above = [folder]
    for _ in range(3):
        above.append(os.path.dirname(above[-1]) or ".")
    return next(
        (
            path
            for path in (os.path.join(f, os.path.basename(name)) for f in above)
            if os.path.exists(path)
        ),
        name,
    )
