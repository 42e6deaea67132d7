"""Measure the exposure bias of a trained model: what its sampling chain does that its training
inputs do not.

    python scripts/exposure_bias.py --model_path runs/NAME/ema_0.9999_100000.pt --data_dir DIR \\
        --num_images 500 --timestep_respacing 20 --batch_size 100
    mpiexec -n 4 python scripts/exposure_bias.py ...    (or torchrun --nproc_per_node 4 ...)

The measures (docs/exposure_bias.md): norm, delta, variance, prediction, accumulation,
discretisation; --measures takes some of them. The sampler is that of image_sample, with its flags.
Results go to --out_dir: measures.json, measures.npz, and a picture of each measure as PNG and SVG.
They depend on --seed, but for rounding not on batch size or number of processes. The same command
again continues an interrupted run.
"""

import os
from typing import Any

from guided_diffusion_ip import dist_util, files
from guided_diffusion_ip.exposure_bias import plots
from guided_diffusion_ip.exposure_bias.discretisation import Discretisation
from guided_diffusion_ip.exposure_bias.measure_run import MeasureRun
from guided_diffusion_ip.exposure_bias.measures import Accumulation, create_measures
from guided_diffusion_ip.features.spaces import open_features
from guided_diffusion_ip.runs.sample_batch import Sampler
from guided_diffusion_ip.settings.config import Config, command, parse
from guided_diffusion_ip.settings.flag import items
from guided_diffusion_ip.settings.make_sampler import make_sampler
from guided_diffusion_ip.settings.measuring import (
    open_real_images,
    parse_numbers,
    place_beside,
    what_decides,
)
from guided_diffusion_ip.settings.models import load_model_and_diffusion
from guided_diffusion_ip.settings.sampling import complete_settings
from guided_diffusion_ip.settings.solver import sampler_text
from guided_diffusion_ip.sizes import parse_size


def main() -> None:
    cfg = complete_settings(parse("exposure_bias", __doc__))
    if cfg.plots:
        plots.require_matplotlib()
    dist_util.setup_dist()
    model, diffusion = load_model_and_diffusion(cfg)
    size = parse_size(cfg.image_size)
    sampler, real = make_sampler(cfg, diffusion, size), open_real_images(cfg, size)
    measures = asked_for(cfg, sampler)
    settings = what_decides(
        cfg,
        real,
        measures=cfg.measures,
        accumulation_steps=cfg.accumulation_steps,
        features=cfg.features,
        eps_scaler=cfg.eps_scaler,
        eps_scaler_k=cfg.eps_scaler_k,
    )
    out_dir = files.results_folder(
        cfg.out_dir, place_beside(cfg.model_path, "exposure_bias", settings)
    )
    run = MeasureRun(measures, sampler, len(real), real, out_dir, settings)
    for note in cfg.notes_on_origin():
        dist_util.say(note)
    dist_util.say(
        f"images: {len(real)} spread over {real.text}\n"
        f"measuring {cfg.measures} with {cfg.model_path}, {sampler_text(cfg)}, into {out_dir}"
    )
    content = run(model, cfg.batch_size, dist_util.dev())
    if dist_util.is_main():
        tell(content)
        pictures = plots.save_plots(content, out_dir) if cfg.plots else []
        print(
            f"result: {run.json_path}\n"
            + "".join(f"picture: {path}\n" for path in pictures if path.endswith(".png")),
            end="",
            flush=True,
        )
    dist_util.cleanup()


def asked_for(cfg: Config, sampler: Sampler) -> list[Any]:
    """The measures that --measures names; by default, those that this sampler allows."""
    names, steps = items(cfg.measures), sampler.num_steps
    if Discretisation.name in names:
        try:
            sampler.finer()
        except ValueError as error:
            if "measures" in cfg.given:
                raise
            dist_util.say(f"note: {Discretisation.name} is left out: {error}")
            names.remove(Discretisation.name)
    lengths, space = (), None
    if Accumulation.name in names:
        quarters = sorted({max(1, round(steps * share)) for share in (0.25, 0.5, 0.75, 1)})
        lengths = parse_numbers(cfg.accumulation_steps, "accumulation_steps") or quarters
        space = open_features(
            cfg.features,
            device=dist_util.dev(),
            inception_weights=cfg.inception_weights,
            log=dist_util.say,
        )
    measures = create_measures(names, lengths, space)
    for measure in measures:
        measure.walks(steps)  # what does not fit this process is said before anything is computed
    return measures


def tell(content: dict[str, Any]) -> None:
    """The figures that matter most, in a few lines."""
    found, last = content["measures"], content["num_timesteps"] - 1
    if "norm" in found:
        ratio, error = found["norm"]["ratio"], found["norm"]["ratio_error"]
        print(
            "norm: chain / training inputs "
            + ", ".join(
                f"{ratio[t]:.4f} +- {error[t]:.4f} at t = {t}"
                for t in sorted({0, 1, last // 2, last} & set(range(last + 1)))
            )
        )
    if "discretisation" in found:
        rows, t = found["discretisation"], min(1, last)
        print(
            f"discretisation: at t = {t} the ratio {rows['ratio'][t]:.4f} becomes "
            f"{rows['extrapolated'][t]:.4f} +- {rows['extrapolated_error'][t]:.4f} without the "
            "sampler's finite steps"
        )
    if "delta" in found:
        t = min(1, last)
        print(
            f"delta: at t = {t}: {found['delta']['delta_single'][t]:.5f} after one step, "
            f"{found['delta']['delta_multi'][t]:.5f} after the whole chain"
        )
    if "variance" in found:
        rows = found["variance"]
        print(
            f"variance: finished images {rows['final']:.4f}, real ones {rows['final_expected']:.4f}"
        )
    if "prediction" in found:
        nu, gamma = found["prediction"]["nu"], found["prediction"]["gamma"]
        print(
            f"prediction: nu_t {min(nu):.4f} to {max(nu):.4f}; as an error of epsilon "
            f"{min(gamma):.4f} to {max(gamma):.4f}"
        )
    if "accumulation" in found:
        rows = found["accumulation"]
        print(
            f"accumulation: Frechet distance ({os.path.basename(rows['features'])}) "
            + ", ".join(
                f"{value:.4f} after {k} steps" for k, value in zip(rows["steps"], rows["frechet"])
            )
        )


if __name__ == "__main__":
    command(main)
