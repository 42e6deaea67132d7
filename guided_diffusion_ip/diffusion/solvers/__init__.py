"""Solvers: from noise to images, a step at a time. One file each, and one line in SOLVERS.

    solver      what a solver is: a name, the kind of path, a function that takes one step
    paths       noise levels and how the network is asked there: the steps of a process
    sigma_path  the same for EDM's noise levels
    loop        the loop that drives a solver along a path
    ddpm ddim euler heun

A solver of one's own is added by `SOLVERS["mine"] = Solver("mine", "Mine", "either", step)`.
"""

from importlib import import_module

from .solver import Solver

FILES = ("ddpm", "ddim", "euler", "heun", "dpmpp_2m", "time_shift")
SOLVERS: dict[str, Solver] = {}
for _file in FILES:
    _solver: Solver = import_module(f".{_file}", __name__).SOLVER
    SOLVERS[_solver.name] = _solver

__all__ = ["SOLVERS", "Solver"]
