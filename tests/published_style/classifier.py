"""A classifier's own training loop as people wrote them for guided_diffusion, on the CPU (DDP
without device_ids).
"""

import argparse
import os

import torch as th
import torch.distributed as dist
import torch.nn.functional as F
from guided_diffusion import dist_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
)
from guided_diffusion.train_util import log_loss_dict, parse_resume_step_from_filename
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    logger.configure()
    net, process = create_classifier_and_diffusion(
        **args_to_dict(args, classifier_and_diffusion_defaults().keys())
    )
    net.to(dist_util.dev())
    sampler = create_named_schedule_sampler(args.schedule_sampler, process)

    first = 0
    if args.resume_checkpoint:
        first = parse_resume_step_from_filename(args.resume_checkpoint)
        net.load_state_dict(
            dist_util.load_state_dict(args.resume_checkpoint, map_location=dist_util.dev())
        )
    dist_util.sync_params(net.parameters())
    trainer = MixedPrecisionTrainer(
        model=net, use_fp16=args.classifier_use_fp16, initial_lg_loss_scale=16.0
    )
    parallel = DDP(net, broadcast_buffers=False, bucket_cap_mb=128, find_unused_parameters=False)
    images = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=True,
    )
    opt = AdamW(trainer.master_params, lr=args.lr, weight_decay=args.weight_decay)

    for step in range(first, args.iterations):
        logger.logkv("step", step)
        batch, given = next(images)
        batch, labels = batch.to(dist_util.dev()), given["y"].to(dist_util.dev())
        t, _ = sampler.sample(batch.shape[0], dist_util.dev())
        batch = process.q_sample(batch, t)
        trainer.zero_grad()
        for rows in th.arange(len(batch)).chunk(2):
            logits = parallel(batch[rows], timesteps=t[rows])
            loss = F.cross_entropy(logits, labels[rows], reduction="none")
            hits = (logits.argmax(dim=1) == labels[rows]).float()
            log_loss_dict(process, t[rows], {"train_loss": loss.detach(), "train_acc@1": hits})
            trainer.backward(loss.mean() * len(rows) / len(batch))
        trainer.optimize(opt)
        if step % args.log_interval == 0:
            logger.dumpkvs()

    if dist.get_rank() == 0:
        th.save(
            trainer.master_params_to_state_dict(trainer.master_params),
            os.path.join(logger.get_dir(), f"model{args.iterations:06d}.pt"),
        )
        th.save(opt.state_dict(), os.path.join(logger.get_dir(), f"opt{args.iterations:06d}.pt"))
    dist.barrier()


def create_argparser():
    flags = dict(
        data_dir="",
        iterations=150000,
        lr=3e-4,
        weight_decay=0.0,
        batch_size=4,
        schedule_sampler="uniform",
        resume_checkpoint="",
        log_interval=10,
    )
    flags.update(classifier_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, flags)
    return parser


if __name__ == "__main__":
    main()
