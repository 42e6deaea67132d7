"""A sampling script as people wrote them for guided_diffusion: batches from all ranks, gathered,
cut, saved by rank 0.
"""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist
from guided_diffusion import dist_util, logger
from guided_diffusion.script_util import (
    NUM_CLASSES,
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
    net.to(dist_util.dev())
    if args.use_fp16:
        net.convert_to_fp16()
    net.eval()

    pictures, labels = [], []
    while len(pictures) * args.batch_size < args.num_samples:
        given = {}
        if args.class_cond:
            given["y"] = th.randint(
                low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev()
            )
        draw = process.ddim_sample_loop if args.use_ddim else process.p_sample_loop
        x = draw(
            net,
            (args.batch_size, 3, args.image_size, args.image_size),
            clip_denoised=args.clip_denoised,
            model_kwargs=given,
        )
        x = ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
        everyones = [th.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, x)
        pictures.extend(part.cpu().numpy() for part in everyones)
        if args.class_cond:
            everyones = [th.zeros_like(given["y"]) for _ in range(dist.get_world_size())]
            dist.all_gather(everyones, given["y"])
            labels.extend(part.cpu().numpy() for part in everyones)
        logger.log(f"{len(pictures) * args.batch_size} pictures so far")

    if dist.get_rank() == 0:
        arrays = [np.concatenate(part)[: args.num_samples] for part in (pictures, labels) if part]
        name = "x".join(str(side) for side in arrays[0].shape)
        np.savez(os.path.join(logger.get_dir(), f"samples_{name}.npz"), *arrays)
    dist.barrier()
    logger.log("done")


def create_argparser():
    flags = dict(
        clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path=""
    )
    flags.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser


if __name__ == "__main__":
    main()
