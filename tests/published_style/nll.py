"""A likelihood script as people wrote them for guided_diffusion: means over ranks by all_reduce,
curves saved by rank 0.
"""

import argparse
import os

import numpy as np
import torch.distributed as dist
from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    logger.configure()
    net, process = create_model_and_diffusion(
        **args_to_dict(args, model_and_diffusion_defaults().keys())
    )
    net.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    net.to(dist_util.dev()).eval()
    images = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        deterministic=True,
    )

    curves = {"vb": [], "mse": [], "xstart_mse": []}
    bits = []
    done = 0
    while done < args.num_samples:
        batch, given = next(images)
        batch = batch.to(dist_util.dev())
        given = {name: value.to(dist_util.dev()) for name, value in given.items()}
        found = process.calc_bpd_loop(
            net, batch, clip_denoised=args.clip_denoised, model_kwargs=given
        )
        for name, parts in curves.items():
            mean = found[name].mean(dim=0) / dist.get_world_size()
            dist.all_reduce(mean)
            parts.append(mean.detach().cpu().numpy())
        total = found["total_bpd"].mean() / dist.get_world_size()
        dist.all_reduce(total)
        bits.append(total.item())
        done += dist.get_world_size() * batch.shape[0]
        logger.log(f"{done} images, bpd={np.mean(bits)}")

    if dist.get_rank() == 0:
        for name, parts in curves.items():
            np.savez(
                os.path.join(logger.get_dir(), f"{name}_terms.npz"),
                np.mean(np.stack(parts), axis=0),
            )
    dist.barrier()
    logger.log("evaluation complete")


def create_argparser():
    flags = dict(data_dir="", clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
    flags.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser


if __name__ == "__main__":
    main()
