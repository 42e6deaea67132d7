"""Run a script that was written for guided_diffusion.

python -m guided_diffusion_ip.compat [--ours] SCRIPT.py [its arguments]

--ours (or GUIDED_DIFFUSION_IP_REPLACE=1): also in the place of a changed guided_diffusion package
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import NoReturn

from . import IMPROVED, ON_PATH, ON_PATH_LAST, PACKAGE, install, is_ours
from .other_package import changed_modules, find_package

REPLACE = "GUIDED_DIFFUSION_IP_REPLACE"


def main() -> None:
    """Become `python SCRIPT.py arguments`, with guided_diffusion's names mapped to ours."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    replace = os.environ.get(REPLACE) == "1"
    if words[:1] == ["--ours"]:
        replace, words = True, words[1:]
    if not words:
        _refuse(f"no script given. {' '.join(__doc__.split())}")
    script = words[0]
    if not os.path.isfile(script):
        _refuse(f"script {script}: {'it is a folder' if os.path.isdir(script) else 'no such file'}")
    sys.argv = words
    _arrange_path(os.path.dirname(os.path.abspath(script)), replace)
    _tell_num_classes(words)
    sys.excepthook = _traceback_of_the_script(script)
    run(script)


def run(script: str) -> None:
    """Execute the file as the module __main__, which it stays until the process ends."""
    module = ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=__builtins__, __package__=None)
    sys.modules["__main__"] = module
    with open(script, "rb") as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _arrange_path(folder: str, replace: bool) -> None:
    """sys.path as the script expects it: its folder first, then our guided_diffusion, and not the
    current folder.
    """
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # `python -m` put the current folder there
    # Where the library is used from its repository, spawned processes must still find it.
    library = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if library not in sys.path:
        sys.path.append(library)
    sys.path.insert(0, folder)
    other = _other_package(folder)
    if other is not None and not replace:
        _refuse_changed(other)
    # Before a package of that name in the script's own folder.
    sys.path.insert(0 if os.path.isdir(os.path.join(folder, PACKAGE)) else 1, ON_PATH)
    install()
    improved = find_package(_beside(folder), IMPROVED)
    if improved is not None and not replace and changed_modules(improved):
        sys.path.remove(ON_PATH_LAST)  # it is theirs to provide
    if other is not None and _rank() == 0:
        print(
            f"note: {PACKAGE} is provided by guided_diffusion_ip; the one in {other} is not used",
            file=sys.stderr,
        )


def _beside(folder: str) -> tuple[str, str, str]:
    """The script's folder and the two above, where a repository has its package."""
    above = os.path.dirname(folder)
    return folder, above, os.path.dirname(above)


def _other_package(folder: str) -> str | None:
    """The package in whose place ours comes: beside the script, or installed."""
    beside = find_package(_beside(folder), PACKAGE)
    if beside is not None:
        return beside
    found = importlib.util.find_spec(PACKAGE)
    if found is None or is_ours(found.origin):
        return None
    if found.origin is not None:
        return os.path.dirname(found.origin)
    places = found.submodule_search_locations or ()  # a folder without __init__.py
    return find_package(map(os.path.dirname, places), PACKAGE)


def _refuse_changed(other: str) -> None:
    changed = changed_modules(other)
    if not changed:
        return
    if _rank() != 0:
        sys.exit(2)
    _refuse(
        f"{other} is a changed {PACKAGE} ({', '.join(changed)}), and guided_diffusion_ip would "
        "take its place without these changes: if you want that, put --ours before the script or "
        f"set {REPLACE}=1"
    )


def _rank() -> int:
    from .. import logger

    return logger.get_rank_without_mpi_import()


def _tell_num_classes(words: Sequence[str]) -> None:
    """`--num_classes N` is script_util.NUM_CLASSES as well: scripts draw labels below it."""
    values = [word.partition("=")[2] for word in words if word.startswith("--num_classes=")]
    values += [after for word, after in itertools.pairwise(words) if word == "--num_classes"]
    if values and values[-1].isdigit():
        from . import script_util

        script_util.NUM_CLASSES = int(values[-1])


def _traceback_of_the_script(script: str) -> Callable[..., None]:
    """An excepthook that shows what `python SCRIPT.py` would show: not the frames that lead to the
    script.
    """

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        own = trace
        while own is not None and own.tb_frame.f_code.co_filename != script:
            own = own.tb_next
        if own is not None or isinstance(error, SyntaxError) and error.filename == script:
            trace = own
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    return show


if __name__ == "__main__":
    main()
