"""Files with the weights of the Inception network: PyTorch's, TensorFlow's, damaged and hostile
ones; where they are found.
"""

import functools
import hashlib
import http.server
import os
import pickle
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import stand_in_inception as stand_in
import torch
from stand_in_inception import constant, field, node, tensor, varint

from guided_diffusion_ip.features import inception, inception_weights, tf_graph
from guided_diffusion_ip.features.spaces import open_features


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return stand_in.write_pth(tmp_path_factory.mktemp("inception") / "stand_in.pth")


@pytest.fixture(scope="session")
def graph(tmp_path_factory):
    return stand_in.write_pb(tmp_path_factory.mktemp("inception") / "stand_in.pb")


# ---- weights files ----


def test_a_graph_gives_the_checkpoints_weights_bit_for_bit(checkpoint, graph):
    a, b = inception_weights.load(checkpoint), inception_weights.load(graph)
    assert (a.kind, a.published, b.kind, b.published) == ("pth", False, "pb", None)
    assert a.state.keys() == b.state.keys() and all(
        torch.equal(a.state[name], b.state[name]) for name in a.state
    )
    found, want = tf_graph.read_inception(graph), stand_in.state_dict()
    assert found.keys() == want.keys() and all(
        np.array_equal(found[name], want[name]) for name in want
    )


def test_unknown_weights_are_used_with_a_warning(checkpoint, graph):
    space = open_features("inception", device="cpu", inception_weights=str(checkpoint))
    assert (
        "not the published weights" in space.warnings[0] and space.describe()["published"] is False
    )
    network = open_features("inception", device="cpu", inception_weights=str(graph))
    assert (
        "TF graph, hash not known" in network.warnings[0]
        and network.describe()["sha256"] in network.warnings[0]
    )


def test_published_weights_need_no_warning(checkpoint, monkeypatch):
    digest = inception_weights.load(checkpoint).sha256
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", digest)
    network = open_features("inception", device="cpu", inception_weights=str(checkpoint))
    assert network.warnings == [] and network.describe()["published"] is True


@functools.cache
def meta_state():
    """The right names and shapes, with no numbers to speak of."""
    return {
        name: torch.zeros(1).expand(shape) for name, shape in inception.parameter_shapes().items()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"Mixed_6d.branch1x1.conv.weight": None},
            r"1 of 471 parameters; Mixed_6d\.branch1x1\.conv\.weight is missing",
        ),
        (
            {"fc.weight": torch.zeros(1000, 2048)},
            r"fc\.weight is \[1000, 2048\], needs \[1008, 2048\]",
        ),
        ({"fc.weight": "text"}, r"fc\.weight is no tensor"),
        (
            {"fc.weight": torch.zeros(1, dtype=torch.int64).expand(1008, 2048)},
            r"fc\.weight is \[1008, 2048\]",
        ),
    ],
)
def test_a_wrong_parameter_is_named(tmp_path, change, message):
    state = {name: value for name, value in {**meta_state(), **change}.items() if value is not None}
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message):
        inception_weights.load(tmp_path / "wrong.pth")


def test_entries_of_other_checkpoints_are_left_alone(tmp_path):
    more = {
        "AuxLogits.fc.weight": torch.ones(3),
        "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.ones(1, dtype=torch.float16).expand(1008, 2048),
    }
    torch.save(
        {**meta_state(), **more}, tmp_path / "more.pth", _use_new_zipfile_serialization=False
    )
    state = inception_weights.load(tmp_path / "more.pth").state
    assert state.keys() == meta_state().keys() and state["fc.weight"].dtype == torch.float32


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["pickle", "torch", "legacy", "torchscript"])
def test_files_that_would_run_code_do_not(tmp_path, how):
    path, trap = tmp_path / "weights.pth", tmp_path / "ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(str(trap))))
    elif how == "torchscript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    else:
        torch.save(
            {"fc.weight": Evil(str(trap))}, path, _use_new_zipfile_serialization=how == "torch"
        )
    with pytest.raises(ValueError, match=r"weights\.pth"):
        inception_weights.load(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\n\n\n",
        b"hello world, this is text",
        b"PK\x03\x04 no archive",
        b"\n\xff" * 50,
        b"\nlines\nof\ntext\n" * 9,
    ],
)
def test_files_of_another_kind_are_one_clear_error(tmp_path, content):
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(ValueError, match="odd"):
        inception_weights.load(tmp_path / "odd")


@pytest.mark.parametrize("part", [0.01, 0.3, 0.999])
def test_a_file_cut_short_is_one_clear_error(tmp_path, graph, checkpoint, part):
    for whole in (graph, checkpoint):
        content = whole.read_bytes()
        (tmp_path / "cut").write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ValueError, match="cut"):
            inception_weights.load(tmp_path / "cut")


# ---- TensorFlow graphs ----


def graph_file(tmp_path, *nodes):
    path = tmp_path / "graph.pb"
    path.write_bytes(b"".join(nodes))
    return path


def test_numbers_may_be_one_by_one_or_one_for_all(tmp_path):
    three = np.array([1, 2, 3], np.float32)
    one_by_one = b"".join(varint(5 << 3 | 5) + struct.pack("<f", v) for v in three)
    path = graph_file(
        tmp_path,
        constant("conv/batchnorm/beta", three, one_by_one),
        constant("conv/batchnorm/gamma", three, field(5, struct.pack("<f", 7))),
    )
    found = tf_graph.read_inception(path)
    assert np.array_equal(found["Conv2d_1a_3x3.bn.bias"], three)
    assert np.array_equal(found["Conv2d_1a_3x3.bn.weight"], [7, 7, 7])


def const(value):
    return node("conv/batchnorm/beta", "Const", value=field(8, value))


@pytest.mark.parametrize(
    "bad",
    [
        const(tensor((3,), field(4, bytes(8)))),
        const(tensor((3,), b"")),
        const(tensor((1 << 63, 0), field(4, bytes(4)))),
        const(tensor((1,) * 40, field(4, bytes(4)))),
        const(tensor((2,), field(4, bytes(8)), dtype=3)),
        const(field(4, 5)),
        const(field(1, 1) + field(2, 9)),
        const(field(1, 1) + field(2, field(2, field(1, b"text")))),
        field(1, 3),
        varint(1 << 3 | 2) + varint(1 << 50) + b"x",
        varint(1 << 3 | 2) + b"\xff" * 12,
        varint(1 << 3 | 3),
        b"\x00\x00",
        node("y", "Relu", T=field(6, 1))[:-1],
    ],
)
def test_graphs_that_lie_are_one_clear_error(tmp_path, bad):
    with pytest.raises(ValueError, match="no frozen TensorFlow graph"):
        tf_graph.read_inception(graph_file(tmp_path, node("x", "Relu"), bad))


def test_a_shape_that_claims_terabytes_takes_no_memory(tmp_path):
    path = graph_file(tmp_path, const(tensor((1 << 20, 1 << 20), field(4, bytes(4)))))
    assert tf_graph.read_inception(path)["Conv2d_1a_3x3.bn.bias"].strides == (0, 0)
    with pytest.raises(ValueError, match=r"bn\.bias is \[1048576, 1048576\], needs \[32\]"):
        inception_weights.load(path)


def test_any_damage_gives_an_answer_or_a_clear_error(tmp_path):
    whole = bytearray(
        b"".join(
            (
                const(tensor((2,), field(5, bytes(8)))),
                node("x", "Relu", T=field(6, 1)),
                constant("softmax/weights", np.ones((2, 3), np.float32)),
            )
        )
    )
    r, errors = np.random.default_rng(1), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for at in r.integers(0, len(whole), r.integers(1, 4)):
            damaged[at] = r.integers(0, 256)
        try:
            tf_graph.read_inception(
                graph_file(tmp_path, bytes(damaged[: r.integers(1, len(whole) + 1)]))
            )
        except ValueError as error:
            assert "no frozen TensorFlow graph" in str(error)
            errors += 1
    assert 100 < errors < 400


# ---- where weights are ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and nothing said by the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(inception_weights.ENVIRONMENT, raising=False)
    return tmp_path


def test_order_of_places(home, monkeypatch):
    given, named, cached = (
        home / "given",
        home / "named",
        home / "cache/guided_diffusion_ip" / inception_weights.PUBLISHED_NAME,
    )
    cached.parent.mkdir(parents=True)
    for path in (given, named, cached):
        path.write_bytes(b"x")
    assert inception_weights.resolve() == str(cached)
    monkeypatch.setenv(inception_weights.ENVIRONMENT, str(named))
    assert inception_weights.resolve() == str(named)
    assert inception_weights.resolve(str(given)) == str(given)
    with pytest.raises(ValueError, match=r"--inception_weights names .*absent"):
        inception_weights.resolve(str(home / "absent"), allow_download=True)
    monkeypatch.setenv(inception_weights.ENVIRONMENT, str(home))
    with pytest.raises(ValueError, match=inception_weights.ENVIRONMENT):
        inception_weights.resolve()


def test_nothing_is_downloaded_unasked_and_the_error_says_all(home):
    with pytest.raises(ValueError) as error:
        inception_weights.resolve()
    for word in (
        inception_weights.URL,
        inception_weights.URL_TF,
        "6726825d",
        "--inception_weights PATH",
        "--download",
        inception_weights.ENVIRONMENT,
        inception_weights.cache_path(),
    ):
        assert word in str(error.value)
    assert "\n" not in str(error.value) and list(home.iterdir()) == []


CONTENT = bytes(range(256)) * 20000


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: /whole serves CONTENT, /half ends in the middle, /elsewhere
    leads to /whole, others are not found.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"http://{self.headers['Host']}/whole")
                return self.end_headers()
            if self.path not in ("/whole", "/half"):
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            return self.wfile.write(CONTENT[: len(CONTENT) // (1 + (self.path == "/half"))])

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield lambda path: monkeypatch.setattr(
        inception_weights, "URL", f"http://127.0.0.1:{serving.server_port}{path}"
    )
    serving.shutdown()
    serving.server_close()
    thread.join()


def test_a_download_does_not_leave_https(home, server, monkeypatch):
    server("/elsewhere")
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(ValueError, match="the download failed .it leads to http://.*not https"):
        inception_weights.resolve(allow_download=True, log=print)
    assert not os.path.exists(inception_weights.cache_path())


def test_download(home, server, monkeypatch):
    server("/whole")
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", hashlib.sha256(CONTENT).hexdigest())
    said = []
    path = inception_weights.resolve(allow_download=True, log=said.append)
    assert (
        path == inception_weights.cache_path()
        and Path(path).read_bytes() == CONTENT
        and len(said) == 1
    )
    server("/absent")
    assert (
        inception_weights.resolve(allow_download=True, log=said.append) == path and len(said) == 1
    )


@pytest.mark.parametrize(
    "path, message",
    [
        ("/whole", "not the published one"),
        ("/half", "ended after|IncompleteRead"),
        ("/absent", "404"),
    ],
)
def test_a_download_that_fails_leaves_nothing(home, server, path, message):
    server(path)
    with pytest.raises(
        ValueError, match=rf"download failed.*({message}).*--inception_weights PATH"
    ):
        inception_weights.resolve(allow_download=True, log=lambda line: None)
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_no_server_is_one_clear_error(home, server):
    server("/whole")
    url = inception_weights.URL
    free = int(url.rpartition(":")[2].partition("/")[0])
    inception_weights.URL = url.replace(str(free), "1")  # the fixture puts it back
    with pytest.raises(ValueError, match=r"download failed.*refused"):
        inception_weights.resolve(allow_download=True, log=lambda line: None)


def test_zip_archives_of_other_things_are_one_clear_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"images\.zip"):
        inception_weights.load(tmp_path / "images.zip")


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_numbers_of_all_lengths_are_read(number):
    """Up to the 10 bytes of 64 bits, as which protocol buffers write negative numbers."""
    assert list(tf_graph.fields(memoryview(field(3, number) + field(1, 7)))) == [
        (3, number),
        (1, 7),
    ]
    with pytest.raises(ValueError, match="a number that does not end"):
        list(tf_graph.fields(memoryview(b"\x18" + b"\xff" * 10 + b"\x01")))
