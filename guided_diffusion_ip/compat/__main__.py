"""Run a script that was written for guided_diffusion.

python -m guided_diffusion_ip.compat SCRIPT.py [its arguments]
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import NoReturn

from . import ON_PATH, PACKAGE, install, is_ours


def main() -> None:
    """Become `python SCRIPT.py arguments`, with guided_diffusion's names mapped to ours."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not words:
        _refuse(f"no script given. {' '.join(__doc__.split())}")
    script = words[0]
    if not os.path.isfile(script):
        _refuse(f"script {script}: {'it is a folder' if os.path.isdir(script) else 'no such file'}")
    sys.argv = words
    _arrange_path(os.path.dirname(os.path.abspath(script)))
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


def _arrange_path(folder: str) -> None:
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
    other = importlib.util.find_spec(PACKAGE)
    sys.path.insert(1, ON_PATH)
    install()
    from .. import logger

    if (
        other is not None
        and not is_ours(other.origin)
        and logger.get_rank_without_mpi_import() == 0
    ):
        print(
            f"note: {PACKAGE} is provided by guided_diffusion_ip; the one in "
            f"{os.path.dirname(other.origin or '') or 'the script folder'} is not used",
            file=sys.stderr,
        )


def _tell_num_classes(words: Sequence[str]) -> None:
    """`--num_classes N` is script_util.NUM_CLASSES as well: scripts draw labels below it."""
    values = [word.partition("=")[2] for word in words if word.startswith("--num_classes=")]
    values += [after for word, after in itertools.pairwise(words) if word == "--num_classes"]
    if values and values[-1].isdigit():
        from .. import script_util

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
