"""guided_diffusion's process for those who subclass it, set methods on an instance, or replace
functions of its modules.
"""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from golden_tools import DATA, seeded_image, seeded_normal

from guided_diffusion_ip.compat import gaussian_diffusion, losses, respace
from guided_diffusion_ip.compat.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from guided_diffusion_ip.compat.respace import SpacedDiffusion
from guided_diffusion_ip.diffusion import gaussian_diffusion as core
from guided_diffusion_ip.diffusion.solvers import SOLVERS
from guided_diffusion_ip.diffusion.solvers.loop import last_of, run
from guided_diffusion_ip.diffusion.solvers.paths import ProcessPath
from guided_diffusion_ip.script_util import create_gaussian_diffusion

SHAPE = (2, 3, 4, 4)
X, NOISE = seeded_image("compat/x", SHAPE), seeded_normal("compat/noise", SHAPE)
T = torch.tensor([0, 3])
KEPT = range(0, 40, 5)
BETAS = gaussian_diffusion.get_named_beta_schedule("linear", 40)
MSE, KL = LossType.MSE, LossType.RESCALED_KL


class Net(torch.nn.Module):
    """Smooth, bounded, with a learned variance unless said otherwise; keeps the t it was given."""

    def __init__(self, channels=6):
        super().__init__()
        self.w = torch.nn.Parameter(seeded_normal("compat/w", (channels, 3)) / 2)
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(t.tolist())
        shift = 0.1 * torch.sin(t.float() / 100).view(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("oc,nchw->nohw", self.w, x) + shift)


def cond_fn(x, t, y=None):
    return 0.1 * x + t.float().view(-1, 1, 1, 1) / 1000


def make(base, mean=ModelMeanType.EPSILON, var=ModelVarType.LEARNED_RANGE, loss=MSE, **options):
    """A process of 40 steps, or of 8 out of 40."""
    options = dict(betas=BETAS, model_mean_type=mean, model_var_type=var, loss_type=loss, **options)
    return base(KEPT, **options) if issubclass(base, SpacedDiffusion) else base(**options)


def numbers(result):
    """Everything in it, in one row."""
    parts = [result[name] for name in sorted(result)] if isinstance(result, dict) else [result]
    return torch.cat([part.detach().flatten().float() for part in parts])


GUIDED = {"cond_fn": cond_fn, "model_kwargs": {}}
# What a script does, and the loss that the process needs for it.
ACTIONS = {
    "ddpm": (MSE, lambda d, net: d.p_sample_loop(net, SHAPE)),
    "ddim": (MSE, lambda d, net: d.ddim_sample_loop(net, SHAPE)),
    "guided ddpm": (MSE, lambda d, net: d.p_sample_loop(net, SHAPE, **GUIDED)),
    "guided ddim": (MSE, lambda d, net: d.ddim_sample_loop(net, SHAPE, **GUIDED)),
    "reverse": (MSE, lambda d, net: d.ddim_reverse_sample(net, X, T)),
    "mse": (MSE, lambda d, net: d.training_losses(net, X, T)),
    "kl": (KL, lambda d, net: d.training_losses(net, X, T)),
    "bpd": (MSE, lambda d, net: d.calc_bpd_loop(net, X)),
}
EVERYWHERE = set(ACTIONS)
CHAIN = "model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, "
CHAIN += "model_kwargs=None, device=None, progress=False"
STEP = "model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None"
ASK = "model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None"
BOUND = "model, x_start, x_t, t, clip_denoised=True, model_kwargs=None"
GUIDE = "cond_fn, p_mean_var, x, t, model_kwargs=None"
# Hook: its published parameters, and the actions in which guided-diffusion calls it.
HOOKS = {
    "p_mean_variance": (ASK, EVERYWHERE),
    "p_sample": (STEP, {"ddpm", "guided ddpm"}),
    "p_sample_loop": (CHAIN, {"ddpm", "guided ddpm"}),
    "p_sample_loop_progressive": (CHAIN, {"ddpm", "guided ddpm"}),
    "ddim_sample": (STEP + ", eta=0.0", {"ddim", "guided ddim"}),
    "ddim_sample_loop": (CHAIN + ", eta=0.0", {"ddim", "guided ddim"}),
    "ddim_sample_loop_progressive": (CHAIN + ", eta=0.0", {"ddim", "guided ddim"}),
    "ddim_reverse_sample": (ASK + ", eta=0.0", {"reverse"}),
    "_predict_xstart_from_eps": ("x_t, t, eps", EVERYWHERE),
    "_predict_eps_from_xstart": ("x_t, t, pred_xstart", {"ddim", "guided ddim", "bpd"}),
    "_vb_terms_bpd": (BOUND, {"mse", "kl", "bpd"}),
    "_prior_bpd": ("x_start", {"bpd"}),
    "_scale_timesteps": ("t", EVERYWHERE),
    "condition_mean": (GUIDE, {"guided ddpm"}),
    "condition_score": (GUIDE, {"guided ddim"}),
    "q_sample": ("x_start, t, noise=None", {"mse", "kl", "bpd"}),
    "q_mean_variance": ("x_start, t", {"bpd"}),
    "q_posterior_mean_variance": ("x_start, x_t, t", EVERYWHERE),
    "training_losses": ("model, x_start, t, model_kwargs=None, noise=None", {"mse", "kl"}),
    "calc_bpd_loop": ("model, x_start, clip_denoised=True, model_kwargs=None", {"bpd"}),
}


def watched(function, parameters, calls):
    """`function`, which takes exactly these parameters (after self) and notes its calls."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def method(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)  # a TypeError for any other parameter
        calls.append(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return method


def overridden(base, hook, parameters, calls):
    def method(self, *args, **kwargs):
        published = getattr(super(Own, self), hook)
        return watched(published, parameters, calls)(*args, **kwargs)

    Own = type("Own", (base,), {hook: method})
    return Own


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["subclass", "instance"])
@pytest.mark.parametrize("base", [GaussianDiffusion, SpacedDiffusion])
def test_a_hook_is_called_where_guided_diffusion_calls_it(base, how, hook, action):
    """With published parameters; and super() and the replaced method do what they did."""
    (parameters, where), (loss, act) = HOOKS[hook], ACTIONS[action]
    calls = []
    if how == "subclass":
        process = make(overridden(base, hook, parameters, calls), loss=loss)
    else:
        process = make(base, loss=loss)
        setattr(process, hook, watched(getattr(process, hook), parameters, calls))
    torch.manual_seed(0)
    result = act(process, Net())
    assert bool(calls) == (action in where)
    torch.manual_seed(0)
    assert torch.equal(numbers(result), numbers(act(make(base, loss=loss), Net())))


@pytest.mark.parametrize("action", ACTIONS)
def test_networks_that_predict_x_prev_go_through_their_hook(action):
    loss, act = ACTIONS[action]
    calls = []
    own = overridden(SpacedDiffusion, "_predict_xstart_from_xprev", "x_t, t, xprev", calls)
    act(make(own, mean=ModelMeanType.PREVIOUS_X, loss=loss), Net())
    assert calls


@pytest.mark.parametrize("action", ACTIONS)
def test_wrap_model_is_called_and_may_be_replaced(action):
    """Also by a wrapper that does not know its own kind: once for each call of the network."""
    loss, act = ACTIONS[action]
    base, net = make(SpacedDiffusion, loss=loss), Net()
    torch.manual_seed(0)
    act(base, net)
    asked = len(net.seen)
    assert {step for t in net.seen for step in t} <= set(KEPT)

    class Wrapper:
        def __init__(self, model):
            self.model = model

        def __call__(self, x, t, **kwargs):
            return self.model(x, t + 100, **kwargs)

    class Own(SpacedDiffusion):
        def _wrap_model(self, model):
            return model if isinstance(model, Wrapper) else Wrapper(model)

    net = Net()
    act(make(Own, loss=loss), net)
    assert len(net.seen) == asked and min(step for t in net.seen for step in t) >= 100


OWN_BODIES = {
    "_predict_xstart_from_eps": lambda self, x_t, t, eps: x_t - eps,
    "_predict_eps_from_xstart": lambda self, x_t, t, pred_xstart: x_t - 2 * pred_xstart,
    "_vb_terms_bpd": lambda self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None: {
        "output": x_t.mean(dim=(1, 2, 3)),
        "pred_xstart": x_start,
    },
    "_prior_bpd": lambda self, x_start: torch.ones(len(x_start)),
    "q_sample": lambda self, x_start, t, noise=None: x_start + noise,
    "condition_mean": lambda self, cond_fn, p_mean_var, x, t, model_kwargs=None: p_mean_var["mean"],
    "condition_score": lambda self, cond_fn, p_mean_var, x, t, model_kwargs=None: p_mean_var,
    "p_mean_variance": lambda self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None: {
        "mean": model(x, self._scale_timesteps(t))[:, :3],
        "variance": torch.ones_like(x),
        "log_variance": torch.zeros_like(x),
        "pred_xstart": self._predict_xstart_from_eps(x_t=x, t=t, eps=x / 2),
    },
}


@pytest.mark.parametrize(
    "hook, action", [(hook, action) for hook in OWN_BODIES for action in sorted(HOOKS[hook][1])]
)
def test_an_own_body_takes_effect(hook, action):
    loss, act = ACTIONS[action]
    results = []
    for base in (SpacedDiffusion, type("Own", (SpacedDiffusion,), {hook: OWN_BODIES[hook]})):
        torch.manual_seed(0)
        results.append(numbers(act(make(base, loss=loss), Net())))
    assert not torch.equal(*results)


# ---- signatures and shapes ----


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_options_by_position(loop):
    process, noise = make(SpacedDiffusion), NOISE.clone()
    kwargs = {"y": torch.zeros(2)}

    def shrink(x):
        return x / 2

    options = dict(
        clip_denoised=False, denoised_fn=shrink, cond_fn=cond_fn, model_kwargs=kwargs, device="cpu"
    )
    eta = () if loop == "p_sample_loop" else (0.5,)
    results = []
    for suffix in ("", "_progressive"):
        for named in (False, True):
            torch.manual_seed(0)
            method = getattr(process, loop + suffix)
            if named:
                out = method(Net(), SHAPE, noise, **options, **({"eta": 0.5} if eta else {}))
            else:
                out = method(Net(), SHAPE, noise, *options.values(), False, *eta)
            results.append(out if suffix == "" else list(out)[-1]["sample"])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_noise_says_the_shape_of_the_images():
    noise = torch.randn(2, 3, 8, 8)
    assert make(SpacedDiffusion).ddim_sample_loop(Net(), SHAPE, noise).shape == noise.shape


@pytest.mark.parametrize("var", ModelVarType)
def test_variances_have_the_shape_of_the_images(var):
    process = make(SpacedDiffusion, var=var)
    results = [process.q_mean_variance(X, T), process.q_posterior_mean_variance(X, NOISE, T)]
    results.append(process.p_mean_variance(Net(6 if var.is_learned else 3), X, T).values())
    assert {tuple(part.shape) for result in results for part in result} == {SHAPE}


def test_a_fixed_small_variance_is_0_at_the_clean_end():
    read = make(GaussianDiffusion, var=ModelVarType.FIXED_SMALL).p_mean_variance(Net(3), X, T)
    assert read["variance"][0].eq(0).all() and read["variance"][1].gt(0).all()
    assert read["log_variance"].isfinite().all()


def test_attributes():
    process = make(SpacedDiffusion, rescale_timesteps=True)
    assert process.timestep_map == list(KEPT) and process.use_timesteps == set(KEPT)
    assert process.original_num_steps == 40 and process.num_timesteps == 8
    assert process.rescale_timesteps and process.loss_type is MSE
    assert process.model_mean_type is ModelMeanType.EPSILON
    assert process.model_var_type is ModelVarType.LEARNED_RANGE
    expected = np.cumprod(1 - BETAS)[list(KEPT)]
    np.testing.assert_allclose(process.alphas_cumprod, expected, rtol=1e-12)
    assert isinstance(process, GaussianDiffusion) and isinstance(process, core.GaussianDiffusion)


def test_tables_may_be_replaced_between_calls():
    process = make(GaussianDiffusion)
    process.q_sample(X, T, NOISE)
    process.sqrt_alphas_cumprod = np.zeros(40)
    process.sqrt_one_minus_alphas_cumprod = np.ones(40)
    assert torch.equal(process.q_sample(X, T, NOISE), NOISE)


# ---- noise ----


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_draws_noise_at_every_step(eta):
    """So that the second batch of a seeded script has guided-diffusion's noise."""
    process = make(SpacedDiffusion)
    torch.manual_seed(0)
    process.ddim_sample_loop(Net(), SHAPE, eta=eta)
    second = torch.randn(SHAPE)
    torch.manual_seed(0)
    draws = [torch.randn(SHAPE) for _ in range(1 + process.num_timesteps + 1)]
    assert torch.equal(second, draws[-1])


def test_ddpm_draws_before_a_cond_fn_that_draws():
    process, drawn = make(SpacedDiffusion), []

    def random(x, t):
        drawn.append(torch.randn(SHAPE))
        return torch.zeros_like(x)

    torch.manual_seed(0)
    process.p_sample(Net(), X, T, cond_fn=random, model_kwargs={})
    torch.manual_seed(0)
    assert torch.equal([torch.randn(SHAPE), torch.randn(SHAPE)][1], drawn[0])


# ---- the map of timesteps ----


def test_scale_timesteps_keeps_the_map():
    class Own(SpacedDiffusion):
        def _scale_timesteps(self, t):
            return t

    net, guided = Net(), []

    def note(x, t):
        guided.append(t.tolist())
        return x

    make(Own).p_sample(net, X, T, cond_fn=note, model_kwargs={})
    assert net.seen == [[0, 15]] and guided == [[0, 15]]


def test_rescaling_is_in_the_wrapper():
    process, net = make(SpacedDiffusion, rescale_timesteps=True), Net()
    wrapped = process._wrap_model(net)
    assert process._wrap_model(wrapped) is wrapped and isinstance(wrapped, respace._WrappedModel)
    assert wrapped.model is net and wrapped.timestep_map == list(KEPT)
    assert wrapped.rescale_timesteps is True and wrapped.original_num_steps == 40
    assert process._scale_timesteps(T) is T
    wrapped(X, T)
    process.training_losses(net, X, T)
    assert net.seen == [[0.0, 375.0]] * 2
    plain = Net()
    make(GaussianDiffusion, rescale_timesteps=True).p_sample(plain, X, T)
    assert plain.seen == [[0.0, 75.0]]


def test_hooks_receive_the_network_itself():
    seen, net = [], Net()

    class Own(SpacedDiffusion):
        def p_mean_variance(self, model, *args, **kwargs):
            seen.append(model)
            return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    process = make(Own)
    process.p_sample(net, X, T)
    process.ddim_sample(net, X, T)
    process.ddim_reverse_sample(net, X, T)
    assert all(model is net for model in seen) and net.seen == [[0, 15]] * 3


# ---- modules ----


def twice(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


@pytest.mark.parametrize(
    "name, action",
    [
        *[("_extract_into_tensor", action) for action in ACTIONS],
        *[("mean_flat", action) for action in ("mse", "kl", "bpd")],
        *[("normal_kl", action) for action in ("mse", "kl", "bpd")],
        *[("discretized_gaussian_log_likelihood", action) for action in ("mse", "kl", "bpd")],
    ],
)
def test_functions_of_the_module_may_be_replaced(monkeypatch, name, action):
    loss, act = ACTIONS[action]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(numbers(act(make(SpacedDiffusion, loss=loss), Net())))
        monkeypatch.setattr(gaussian_diffusion, name, twice(getattr(gaussian_diffusion, name)))
    assert not torch.equal(*results)


def test_the_cosine_schedule_goes_through_betas_for_alpha_bar(monkeypatch):
    from guided_diffusion_ip.diffusion import noise_schedule

    for name in ("linear", "cosine"):
        ours = gaussian_diffusion.get_named_beta_schedule(name, 100)
        assert (ours == noise_schedule.get_named_beta_schedule(name, 100)).all()
    for name, steps in (("cosine", 0), ("linear", 5), ("quadratic", 100)):
        with pytest.raises(ValueError):
            gaussian_diffusion.get_named_beta_schedule(name, steps)
    monkeypatch.setattr(gaussian_diffusion, "betas_for_alpha_bar", lambda steps, level: [7] * steps)
    assert gaussian_diffusion.get_named_beta_schedule("cosine", 3) == [7, 7, 7]


def test_the_wrapper_may_be_replaced(monkeypatch):
    class Own(respace._WrappedModel):
        def __call__(self, x, ts, **kwargs):
            return super().__call__(x, ts + 1, **kwargs)

    net = Net()
    monkeypatch.setattr(respace, "_WrappedModel", Own)
    make(SpacedDiffusion).p_sample(net, X, T)
    assert net.seen == [[5, 20]]


@pytest.mark.parametrize(
    "arr, t, shape", [(BETAS, T, SHAPE), (BETAS, T[1:], SHAPE), (BETAS, T, (2,))]
)
def test_extract_into_tensor(arr, t, shape):
    out = gaussian_diffusion._extract_into_tensor(arr, t, shape)
    assert out.shape == shape and out.dtype == torch.float32
    assert torch.equal(
        out.flatten(1)[:, 0] if len(shape) > 1 else out, torch.tensor(arr).float()[t.expand(2)]
    )


@pytest.mark.parametrize(
    "module, names",
    [
        (
            gaussian_diffusion,
            "enum math np th mean_flat normal_kl get_named_beta_schedule "
            "betas_for_alpha_bar discretized_gaussian_log_likelihood ModelMeanType ModelVarType "
            "LossType GaussianDiffusion",
        ),
        (respace, "np th GaussianDiffusion space_timesteps SpacedDiffusion"),
        (losses, "np th normal_kl approx_standard_normal_cdf discretized_gaussian_log_likelihood"),
    ],
)
def test_a_star_brings_what_it_brought(module, names):
    brought = {}
    exec(f"from {module.__name__} import *", brought)
    assert set(brought) - {"__builtins__"} == set(names.split())


# ---- copies ----


@pytest.mark.parametrize("base", [GaussianDiffusion, SpacedDiffusion])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))]
)
def test_copies_do_the_same(base, copied):
    process = make(base)
    other = copied(process)
    for action, (_, act) in ACTIONS.items():
        results = []
        for each in (process, other):
            torch.manual_seed(0)
            results.append(numbers(act(each, Net())))
        assert torch.equal(*results), action


# ---- the library's numbers, and its remedies ----

GOLDEN = json.loads(np.load(DATA / "process_golden.npz")["cases"].tobytes())


def both(kwargs):
    """The library's process, and the same one here."""
    names = {"gamma": "input_perturbation", "b": "eps_scaler", "k": "eps_scaler_k"}
    skip = ("method", "eta", "num_timesteps", "timestep_map")
    ours = create_gaussian_diffusion(
        **{names.get(name, name): value for name, value in kwargs.items() if name not in skip}
    )
    return ours, SpacedDiffusion(ours.use_timesteps, **ours._original)


@pytest.mark.filterwarnings("ignore:input perturbation is meant for")
@pytest.mark.parametrize("i", range(len(GOLDEN["losses"])))
def test_losses_are_the_librarys(i):
    case, results = GOLDEN["losses"][i], []
    for process in both(case["kwargs"]):
        torch.manual_seed(0)
        net = Net(6 if case["kwargs"].get("learn_sigma") else 3)
        x = seeded_image(f"losses/{i}/x0", (len(case["t"]), 3, 8, 8))
        terms = process.training_losses(net, x, torch.tensor(case["t"]))
        terms["loss"].mean().backward()
        results.append({**terms, "grad": net.w.grad})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("guidance", [None, cond_fn])
@pytest.mark.parametrize("i", range(len(GOLDEN["sampling"])))
def test_samples_are_the_librarys(i, guidance):
    kwargs, results = GOLDEN["sampling"][i]["kwargs"], []
    if guidance and kwargs.get("sigma_small"):
        pytest.skip("its variance at t = 0 is guided-diffusion's")
    for process in both(kwargs):
        loop = "p_sample_loop" if kwargs["method"] == "ddpm" else "ddim_sample_loop"
        torch.manual_seed(0)
        net = Net(6 if kwargs.get("learn_sigma") else 3)
        results.append(getattr(process, loop)(net, SHAPE, cond_fn=guidance))
    assert torch.equal(*results)


def test_likelihoods_are_the_librarys():
    results = []
    for process in both({"steps": 100, "timestep_respacing": "8", "learn_sigma": True}):
        torch.manual_seed(0)
        results.append(process.calc_bpd_loop(Net(), X))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "time_shift"])
def test_the_librarys_solvers_take_it(solver):
    results = []
    for process in both({"steps": 100, "timestep_respacing": "ddim10", "eps_scaler": 1.02}):
        path = ProcessPath(process, Net(3), guide_score=SOLVERS[solver].guide_score)
        torch.manual_seed(0)
        results.append(last_of(run(SOLVERS[solver], path, NOISE)).x)
    assert torch.equal(*results)


def test_a_finer_process_is_the_librarys():
    finer = [process.finer() for process in both({"steps": 100, "timestep_respacing": "10"})]
    assert finer[0].timestep_map == finer[1].timestep_map and len(finer[0].timestep_map) == 19
    assert (finer[0].betas == finer[1].betas).all()


@pytest.mark.parametrize("rule", ["p2", "min_snr"])
def test_loss_weights_are_the_librarys(rule):
    results = []
    for process in both({"steps": 100, "loss_weighting": rule}):
        torch.manual_seed(0)
        results.append(process.training_losses(Net(3), X, T)["loss"])
    assert torch.equal(*results)


@pytest.mark.parametrize("action", ACTIONS)
def test_lambda_acts_in_sampling_alone_and_once_under_an_override(action):
    loss, act = ACTIONS[action]
    results = {}
    own = overridden(SpacedDiffusion, "p_mean_variance", ASK, [])
    for name, base, b in (
        ("off", SpacedDiffusion, 1.0),
        ("on", SpacedDiffusion, 1.02),
        ("overridden", own, 1.02),
    ):
        torch.manual_seed(0)
        results[name] = numbers(act(make(base, loss=loss, eps_scaler=b), Net()))
    assert torch.equal(results["on"], results["overridden"])
    assert torch.equal(results["on"], results["off"]) == (action in ("reverse", "mse", "kl", "bpd"))


def test_lambda_reaches_a_step_of_ones_own():
    class Own(SpacedDiffusion):
        def p_sample(
            self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
        ):
            out = self.p_mean_variance(model, x, t)
            return {"sample": out["mean"], "pred_xstart": out["pred_xstart"]}

    plain, scaled = (make(Own, eps_scaler=b).p_sample_loop(Net(), SHAPE, NOISE) for b in (1, 1.02))
    assert not torch.equal(plain, scaled)


def test_input_pertub_may_be_given_and_set():
    process = make(SpacedDiffusion, input_pertub=0.1)
    other = make(SpacedDiffusion)
    assert (process.input_pertub, other.input_pertub) == (0.1, 0.0)
    other.input_pertub = 0.1
    results = []
    for each in (process, other, make(SpacedDiffusion)):
        torch.manual_seed(0)
        results.append(each.training_losses(Net(), X, T)["loss"])
    assert torch.equal(*results[:2]) and not torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="must be 0 or positive"):
        other.input_pertub = -1
