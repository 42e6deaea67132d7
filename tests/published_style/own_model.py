"""Somebody's own network, made from guided_diffusion's primitives, in its training loop; no images,
no folders.
"""

import helper  # lies beside this script
import torch as th
from guided_diffusion import dist_util, logger
from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.nn import conv_nd, linear, normalization, timestep_embedding, zero_module
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.train_util import TrainLoop, get_blob_logdir


class Net(th.nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.width = width
        self.time = linear(width, width)
        self.first = conv_nd(2, 1, width, 3, padding=1)
        self.norm = normalization(width)
        self.running = th.nn.BatchNorm2d(width)
        self.last = zero_module(conv_nd(2, width, 1, 3, padding=1))

    def forward(self, x, t):
        h = (
            self.norm(self.first(x))
            + self.time(timestep_embedding(t, self.width))[:, :, None, None]
        )
        return self.last(th.relu(self.running(h)))


def endless(batch_size):
    while True:
        yield helper.stripes(batch_size), {}


def main():
    dist_util.setup_dist()
    logger.configure(format_strs=["log", "csv"])
    process = SpacedDiffusion(
        use_timesteps=space_timesteps(40, [20]),
        betas=gd.get_named_beta_schedule("linear", 40),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=False,
    )
    loop = TrainLoop(
        model=Net().to(dist_util.dev()),
        diffusion=process,
        data=endless(8),
        batch_size=8,
        microbatch=4,
        lr=1e-3,
        ema_rate="0.9,0.99",
        log_interval=2,
        save_interval=3,
        resume_checkpoint="",
        schedule_sampler=None,
    )
    loop.run_loop()
    logger.log("checkpoints are in", get_blob_logdir())


if __name__ == "__main__":
    main()
