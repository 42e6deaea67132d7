"""The Time-Shift sampler: which step it tells the network."""

import torch
from test_solvers import SHAPE, exact_epsilon, process

from guided_diffusion_ip.diffusion.solvers import time_shift
from guided_diffusion_ip.diffusion.solvers.paths import AlongProcess
from guided_diffusion_ip.runs.sample_batch import Sampler


def test_time_shift_finds_the_step_of_constant_images():
    """x_0 = 0: the variance of a chain at step tau is 1 - alpha_bar_tau, but for its sample."""
    whole = Sampler(AlongProcess(process()), SHAPE, solver="ddim").bind(None)
    tau = torch.tensor([600, 640, 655, 700])
    x = torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(4))
    x = x * whole.at(tau, x).sigma
    found = time_shift.nearest_in_variance(whole, x, torch.full((4,), 650), 60)
    # The third is 1 - ab = 0.987, with a standard error of 0.3 %: a few steps there.
    assert (found - tau.clamp(620, 680)).abs().max() <= 25
    assert found[0] == 620  # the end of the window


def test_time_shift_without_a_window_is_ddim_and_with_one_tells_each_image_its_own_step():
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    noise = noise * torch.tensor([0.7, 1.0, 1.3]).view(-1, 1, 1, 1)
    told = []

    def network(x, t):
        told.append(t.tolist())
        return exact_epsilon(x, t)

    def chain(solver, **options):
        sampler = Sampler(AlongProcess(process("10")), SHAPE, solver=solver, options=options)
        path = sampler.bind(network)
        return list(sampler.chain(path, noise, torch.randn_like)), path

    plain, path = chain("ddim")
    told.clear()
    still, _ = chain("time_shift", time_shift_window=0)
    assert told == [[int(path.original(torch.tensor(i)))] * 3 for i in range(9, -1, -1)]
    torch.testing.assert_close(still[-1].x, plain[-1].x, rtol=1e-4, atol=1e-5)
    told.clear()
    chain("time_shift", time_shift_window=80, time_shift_cutoff=300)
    meant = [int(path.original(torch.tensor(i))) for i in range(9, -1, -1)]
    assert any(len(set(ts)) > 1 for ts in told)  # images differ
    for ts, t in zip(told, meant):
        assert all(abs(one - t) <= 40 for one in ts) and (t > 300 or set(ts) == {t})
