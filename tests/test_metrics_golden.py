"""What the published evaluator says of seeded features: full rank, fewer images than features, one
of each.
"""

import functools
import hashlib
import json

import features_recipe
import numpy as np
import pytest
from golden_tools import DATA

from guided_diffusion_ip.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

GOLDEN = json.loads((DATA / "metrics_golden.json").read_text())
CASES = GOLDEN["cases"]
# Half precision is not defined to the bit across hardware; its noise falls with the number of
# images.
HALF_TOLERANCE = {"deficient": 0.003, "full": 0.0005, "mixed": 0.003}


def slow_but(quick, cases):
    return [
        case
        if case == quick
        else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]


@functools.cache
def rows(layer, kind, n):
    x = getattr(features_recipe, layer)(kind, n)
    x.flags.writeable = False
    return x


def both(case, layer):
    sets = []
    for kind in ("ref", "sample"):
        x = rows(layer, kind, CASES[case][f"{kind}_rows"])
        assert (
            hashlib.sha256(x.tobytes()).hexdigest() == CASES[case]["sha256"][f"{layer}_{kind}"]
        ), "the recipe has changed"
        sets.append(x)
    return sets


@pytest.mark.parametrize(
    "case, name, layer",
    slow_but(
        ("full", "fid", "pool"),
        [(case, *what) for case in CASES for what in (("fid", "pool"), ("sfid", "spatial"))],
    ),
)
def test_frechet_distance(case, name, layer):
    moments = []
    for x in both(case, layer):
        side = FeatureStatistics()
        for batch in np.array_split(x, 23):
            side.update(batch)
        moments += [side.mean, side.cov]
    value = frechet_distance(*moments)
    assert value == pytest.approx(CASES[case][f"{name}_accurate"], rel=1e-8)
    assert value == pytest.approx(
        CASES[case][name], rel=2e-6
    )  # roots of rounding noise; means in float32


@pytest.mark.parametrize("case", slow_but("deficient", ("deficient", "full")))
def test_inception_score(case):
    weight = features_recipe.softmax_weight()
    assert hashlib.sha256(weight.tobytes()).hexdigest() == GOLDEN["softmax_weight_sha256"]
    logits = both(case, "pool")[1] @ weight
    for split_size, value in CASES[case]["inception_score"].items():
        assert inception_score(logits, int(split_size)) == pytest.approx(value, rel=1e-6), (
            split_size
        )


@pytest.mark.parametrize("case", slow_but("deficient", CASES))
def test_precision_and_recall(case):
    for arithmetic in ("float32", "float64"):
        assert precision_recall(*both(case, "pool"), arithmetic=arithmetic) == tuple(
            CASES[case][f"precision_recall_{arithmetic}"]
        ), arithmetic
    half, published = (
        precision_recall(*both(case, "pool"), arithmetic="half"),
        CASES[case]["precision_recall_half"],
    )
    assert half == pytest.approx(published, abs=HALF_TOLERANCE[case])
    # Half precision is biased upward: what lands there is not plain float32.
    assert sum(half) != sum(CASES[case]["precision_recall_float32"])
