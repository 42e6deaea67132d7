"""A grid of checkpoints x sampler x steps x lambda x eta x seed: sample, evaluate, and one table
like the papers'.

    python scripts/sweep.py configs/sweeps/demo.yaml --out_dir runs/sweep
    python scripts/sweep.py cifar10.yaml --out_dir runs/sweep --processes 4   # cells at a time
    python scripts/sweep.py cifar10.yaml --out_dir runs/sweep \\
        --launcher "torchrun --standalone --nproc_per_node 4"

The same command again continues an interrupted sweep, or one whose file has grown; finished cells
are not computed again. A second command on the same folder waits for the first. The table:
OUT_DIR/table.md, table.csv. More: docs/sweep.md.
"""

import json
import os
import shlex
import shutil
import signal
import sys

import torch

from guided_diffusion_ip.files import atomic_file, results_folder
from guided_diffusion_ip.metrics.registry import parse_metrics
from guided_diffusion_ip.settings.config import command, parse
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.studies.sweep import Sweep, read_sweep
from guided_diffusion_ip.studies.sweep_run import Launch, Outcome, run_sweep
from guided_diffusion_ip.studies.sweep_table import as_csv, as_markdown, make_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = (
    os.path.join(ROOT, "scripts", "image_sample.py"),
    os.path.join(ROOT, "evaluations", "evaluator.py"),
)


def main() -> None:
    cfg = parse("sweep", __doc__)
    if not cfg.sweep:
        raise ValueError(
            "which sweep? give its YAML file: sweep.py SWEEP.yaml --out_dir FOLDER (see --help)"
        )
    sweep = read_sweep(cfg.sweep)
    check(sweep)
    launcher = tuple(shlex.split(cfg.launcher))
    if launcher and shutil.which(launcher[0]) is None:
        raise ValueError(f"--launcher: there is no program {launcher[0]}")
    stem = os.path.splitext(os.path.basename(cfg.sweep))[0]
    out_dir = results_folder(cfg.out_dir, os.path.join("runs", f"sweep-{stem}"))
    print(f"{len(sweep.cells)} cells in {out_dir}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs is stopped too
    write(os.path.join(out_dir, "sweep.yaml"), sweep.text)
    write(
        os.path.join(out_dir, "cells.json"),
        json.dumps(
            {
                "metrics": sweep.metrics,
                "features": sweep.features,
                "cells": [{"folder": cell.folder, **cell.describe()} for cell in sweep.cells],
            },
            indent=1,
        )
        + "\n",
    )
    outcome = run_sweep(sweep, out_dir, Launch(SCRIPTS, launcher, cfg.processes, gpus()))
    report(sweep, out_dir, outcome)
    if outcome.errors:
        sys.exit(1)


def check(sweep: Sweep) -> None:
    """Try what the cells' programs would refuse, before anything is written or computed.

    Raises:
        ValueError: an unknown flag or metric, a contradiction to a checkpoint, no published lambda,
            a schedule for other steps.
    """
    try:
        parse_metrics(",".join(sweep.metrics))
        for cell in sweep.cells:
            complete_settings(parse("image_sample", "", list(cell.sample_args)))
            parse("evaluator", "", list(cell.evaluate_args))
    except ValueError as error:
        raise ValueError(f"{sweep.path}: {error}") from None


def gpus() -> tuple[str, ...]:
    """The GPUs that cells may be spread over."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name)
    return tuple(map(str, range(torch.cuda.device_count())))


def report(sweep: Sweep, out_dir: str, outcome: Outcome) -> None:
    """Write the table and show it, and what failed."""
    cells = [cell.describe() for cell in sweep.cells]
    results = [outcome.results.get(cell.folder) for cell in sweep.cells]
    table = make_table(cells, results, sweep.metrics, sweep.features)
    write(os.path.join(out_dir, "table.md"), as_markdown(table))
    write(os.path.join(out_dir, "table.csv"), as_csv(table))
    print(
        f"\n{as_markdown(table)}\n{len(outcome.computed)} of {len(sweep.cells)} cells computed "
        f"now; table: {os.path.join(out_dir, 'table.md')}, table.csv",
        flush=True,
    )
    for cell in sweep.cells:
        if cell.folder in outcome.errors:
            print(f"failed: {cell.name}: {outcome.errors[cell.folder]}", file=sys.stderr)
    if outcome.errors:
        print(
            f"error: {len(outcome.errors)} of {len(sweep.cells)} cells failed; the same command "
            "tries them again",
            file=sys.stderr,
        )


def write(path: str, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    command(main)
