"""Thousands of damaged inputs: no traceback, no signal, no hang, no memory without end, and nothing
under a final name where an input is refused.

    pytest -m slow tests/test_fuzz.py                     5,000 inputs, in one process
    python -m pytest tests/test_fuzz.py -k quick          the first of them
    FUZZ_FIRST=1234 FUZZ_COUNT=1 pytest -m slow tests/test_fuzz.py -s      one of them alone
"""

import collections
import os
import re
import shutil
import warnings

import pytest
from fuzzing import running
from fuzzing.targets import Base, case_of

QUICK = 120
FIRST, COUNT = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_COUNT", "5000"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # What children would otherwise import again and again.
    import matplotlib.pyplot  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import guided_diffusion_ip.api
    import guided_diffusion_ip.evaluation.evaluate
    import guided_diffusion_ip.exposure_bias.calibrate
    import guided_diffusion_ip.settings.image_training
    import guided_diffusion_ip.studies.report  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no threads of its parent's
    yield Base(tmp_path_factory.mktemp("base"))
    torch.set_num_threads(threads)


def fuzz(base, tmp_path, numbers):
    codes, failures = collections.Counter(), []
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        case = case_of(base, folder, number)
        with warnings.catch_warnings():  # of forking where other threads exist
            warnings.simplefilter("ignore")
            outcome = running.run(case, folder)
        codes[outcome.code] += 1
        if outcome.complaint:
            failures.append((number, outcome))
            print(f"{number}: {case.target}: {outcome.complaint}\n  {case.script} {case.argv}")
            print("  " + "\n  ".join(outcome.said.splitlines()[-12:]))
        elif FIRST and COUNT == 1:
            print(case.script, case.argv, outcome.code, outcome.said, sep="\n")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{sum(codes.values())} inputs: exit codes {dict(codes)}")
    assert not failures, "\n".join(
        f"{number}: {outcome.case.target}: {outcome.complaint}: {outcome.said[-300:]!r}"
        for number, outcome in failures[:20]
    )
    if sum(codes.values()) >= QUICK:
        assert codes[0] and codes[2] > codes[0] / 4, "both right and refused inputs"


def test_quick(base, tmp_path):
    fuzz(base, tmp_path, range(QUICK))


@pytest.mark.slow
def test_all(base, tmp_path):
    fuzz(base, tmp_path, range(FIRST, FIRST + COUNT))


def test_the_judge_sees_what_is_wrong(base, tmp_path, monkeypatch):
    """A fuzzer that never complains shows nothing."""
    monkeypatch.setattr(running, "SECONDS", 3)
    monkeypatch.setattr(running, "MEMORY", 400 << 20)
    for code, complaint in {
        "1 / 0": "ended with a traceback",
        "import os; os.kill(os.getpid(), 9)": "was killed by SIGKILL",
        "while True: pass": "took longer than",
        "x = b'1' * (600 << 20)": "took [5-9][0-9]{2} MB",
        "import sys; open('made.npz', 'w'); print('error: x'); sys.exit(2)": "refused its input and",
        "import sys; sys.exit(3)": "ended with exit code 3",
        "import sys; sys.exit(2)": "ended with exit code 2 and 0 lines",
        "import sys; print('error: ' + 'x' * 9999); sys.exit(2)": "too long or not printable",
    }.items():
        (tmp_path / "made.npz").unlink(missing_ok=True)
        (tmp_path / "script.py").write_text(code)
        case = running.Case("judge", str(tmp_path / "script.py"), [], ("made.npz",))
        assert re.search(complaint, running.run(case, tmp_path).complaint), code
