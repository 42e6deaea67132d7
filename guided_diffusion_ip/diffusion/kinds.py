"""What a network predicts, whose variance is used, and which loss is taken. Imports nothing of
ours.
"""

import enum


class ModelMeanType(enum.Enum):
    """What the network's output means (the first C channels, if it also predicts a variance)."""

    PREVIOUS_X = "previous_x"  # the mean of x_{t-1}
    START_X = "start_x"  # x_0
    EPSILON = "epsilon"  # the noise in x_t


class ModelVarType(enum.Enum):
    """Where the variance of p(x_{t-1} | x_t) comes from."""

    LEARNED = "learned"  # the network gives the log variance itself
    FIXED_SMALL = "fixed_small"  # the posterior variance, beta-tilde
    FIXED_LARGE = "fixed_large"  # beta
    LEARNED_RANGE = (
        "learned_range"  # the network interpolates between the two (Nichol 2021, Eq. 15)
    )

    @property
    def is_learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """MSE of the prediction, or the variational bound; `rescaled` brings the bound to a comparable
    size.
    """

    MSE = "mse"  # plain; a learned variance adds the bound as it is
    RESCALED_MSE = "rescaled_mse"  # the added bound is multiplied by T / 1000
    KL = "kl"  # the bound alone
    RESCALED_KL = "rescaled_kl"  # the bound times T: an estimate of the whole sum over t

    def is_vb(self) -> bool:
        """Is the variational bound the loss itself?"""
        return self in (LossType.KL, LossType.RESCALED_KL)
