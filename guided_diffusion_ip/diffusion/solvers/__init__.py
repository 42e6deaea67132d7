"""Solvers: from noise to images, a step at a time. One file each, and one line in SOLVERS.

    solver      what a solver is: a name, the kind of path, a function that takes one step
    paths       noise levels and how the network is asked there: the steps of a process
    sigma_path  the same for EDM's noise levels
    loop        the loop that drives a solver along a path
    ddpm ddim euler heun

A solver of one's own is added by `SOLVERS["mine"] = Solver("mine", "Mine", "either", step)`.
"""

from . import ddim, ddpm, euler, heun
from .solver import Solver

SOLVERS: dict[str, Solver] = {
    solver.name: solver for solver in (ddpm.SOLVER, ddim.SOLVER, euler.SOLVER, heun.SOLVER)
}

__all__ = ["SOLVERS", "Solver"]
