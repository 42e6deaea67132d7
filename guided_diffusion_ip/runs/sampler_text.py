"""How settings, of flags or of a settings.yaml, say in words what samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..diffusion.epsilon_scaling import EpsilonScaling
from ..diffusion.solvers import SOLVERS


def solver_name(settings: Mapping[str, Any]) -> str:
    """ddpm, ddim, heun, ...; older settings say it by use_ddim alone."""
    named = settings.get("solver") or settings.get("sampler")
    return str(named) if named else "ddim" if settings.get("use_ddim") else "ddpm"


def steps_along_sigma(settings: Mapping[str, Any]) -> bool:
    """Whether the steps are edm_steps along noise levels, rather than those of a process."""
    solver = SOLVERS.get(solver_name(settings))
    if solver is None:  # of somebody else's program
        return "edm_steps" in settings
    return solver.goes_along_sigma(settings.get("framework") == "edm")


def sampler_text(settings: Mapping[str, Any]) -> str:
    """DDPM, steps 100, lambda 1.017."""
    name = solver_name(settings)
    solver = SOLVERS.get(name)
    words = [name.capitalize() if solver is None else solver.title]
    for option in solver.options if solver is not None else ():
        value = settings.get(option, 0)
        words.append(
            f"{option} {value:g}" if isinstance(value, (int, float)) else f"{option} {value}"
        )
    if steps_along_sigma(settings):
        words.append(f"steps {settings.get('edm_steps', '?')}")
        if churn := settings.get("S_churn"):
            words.append(f"S_churn {churn:g}")
    else:
        steps = settings.get("timestep_respacing") or settings.get("diffusion_steps", "?")
        words.append(f"steps {steps}")
    words.append(_scaling(settings.get("eps_scaler", 1.0), settings.get("eps_scaler_k", 0.0)))
    if (guidance := settings.get("guidance_scale", 1)) != 1:
        words.append(f"guidance scale {guidance:g}")
    return ", ".join(words)


def _scaling(b: Any, k: Any) -> str:
    try:
        return f"lambda {EpsilonScaling.of(b, k)}"
    except (TypeError, ValueError):  # of somebody else's program
        return f"lambda {b}"
