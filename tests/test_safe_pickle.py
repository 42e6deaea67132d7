"""safe_pickle.py: arrays, lists and text come out, and nothing that a pickle names is run."""

import io
import os
import pickle
import subprocess

import numpy as np
import pytest

from guided_diffusion_ip.preparation.safe_pickle import load_batch

# As Python 2 wrote CIFAR-10: protocol 2, text as bytes, numpy's old module names.
PYTHON_2 = (
    b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x06\x00\x01\x02\x03\xfe\xfftbU\x06labels](K\x01K\x02eu."
)


def load(data):
    return load_batch(io.BytesIO(data), "data_batch_1")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol):
    data = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    batch = {
        b"data": data,
        "labels": [3, 1, 4, 1, 5],
        b"filenames": [b"a.png", "b.png"],
        "batch_label": b"batch 1 of 5",
        "mean": np.linspace(0, 1, 4),
        "turned": np.asfortranarray(data),
        "big": np.arange(3, dtype=">i4"),
        "labels2": np.arange(3),
    }
    read = load(pickle.dumps(batch, protocol))
    assert list(read) == [key.decode() if isinstance(key, bytes) else key for key in batch]
    for key, value in batch.items():
        found = read[key.decode() if isinstance(key, bytes) else key]
        assert type(found) is type(value) and np.array_equal(found, value)
        assert not isinstance(value, np.ndarray) or found.dtype == value.dtype


def test_python_2():
    # The real pickle module reads the same, so that the handwritten bytes are what they claim to
    # be.
    for read in (
        load(PYTHON_2),
        {key.decode(): value for key, value in pickle.loads(PYTHON_2, encoding="bytes").items()},
    ):
        assert read["data"].tolist() == [[0, 1, 2], [3, 254, 255]] and read["labels"] == [1, 2]
        assert read["data"].dtype == np.uint8


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, subprocess.getoutput, np.load])
def test_other_functions_are_refused_by_name_and_not_run(tmp_path, protocol, function):
    mark = tmp_path / "was_run"
    argument = f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"
    name = rf"[\w.]+\.{function.__name__}"
    for batch in (
        {"data": Calls(function, argument)},
        Calls(function, argument),
        [Calls(function, argument)],
    ):
        with pytest.raises(
            ValueError,
            match=f"^data_batch_1: refused, because this pickle holds {name}, which could run",
        ):
            load(pickle.dumps(batch, protocol))
    assert not mark.exists()


def test_names_with_dots_and_other_codecs_are_refused():
    for data, text in (
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", r"numpy\.ndarray\.tofile"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
            "encoded as 'rot13'",
        ),
        (pickle.dumps({"data": np.array([{}], dtype=object)}), "'O8', which is no plain number"),
        (pickle.dumps({"data": {1: 2}}), "dict: only"),
        (pickle.dumps([1]), "list instead of a dict"),
        (pickle.dumps({"labels": [[1]]}), "a list of something else"),
    ):
        with pytest.raises(ValueError, match=text):
            load(data)


def test_damage_is_named():
    whole = pickle.dumps({"data": np.zeros((4, 4), np.uint8)}, 2)
    for cut in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="^data_batch_1 is damaged"):
            load(whole[:cut])
    wrong = whole.replace(b"K\x04K\x04", b"K\x04K\x05")
    assert wrong != whole
    with pytest.raises(ValueError, match="^data_batch_1 is damaged"):
        load(wrong)
