"""edm_pickle.py: weights and arguments come out exactly, and nothing that a file names or carries
along is run.
"""

import copyreg
import functools
import io
import math
import os
import pickle
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from edm_files import (
    KWARGS,
    Persistent,
    as_published,
    easy_dict,
    edm_file,
    nvidia_modules,
    small_denoiser,
)

from guided_diffusion_ip.interop.edm_pickle import EDMCheckpoint, edm_flags, read_edm_pickle


def read(tmp_path, data):
    path = tmp_path / "edm-small.pkl"
    path.write_bytes(data)
    return read_edm_pickle(path)


def dumps(content, protocol=4):
    with nvidia_modules():
        return pickle.dumps(content() if callable(content) else content, protocol)


# ---- what is published ----


@pytest.mark.parametrize("zip_storages", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_weights_names_and_arguments_are_exact(tmp_path, protocol, zip_storages):
    denoiser = small_denoiser()
    found = read(tmp_path, edm_file(denoiser, protocol, zip_storages))
    want = denoiser.state_dict()
    assert list(found.state) == list(want) and len(want) > 50
    assert all(
        torch.equal(found.state[name], value) and type(found.state[name]) is torch.Tensor
        for name, value in want.items()
    )
    assert found.precond == "EDMPrecond" and found.init_kwargs == KWARGS
    small_denoiser().load_state_dict(found.state)


def test_half_weights_stay_half_and_numpy_settings_are_read(tmp_path):
    denoiser = small_denoiser(torch.float16)
    kwargs = {**KWARGS, "dropout": np.float32(0.25), "channel_mult": (np.int64(1), 2)}
    found = read(
        tmp_path,
        edm_file(denoiser, kwargs=kwargs, history=np.arange(4), big=np.arange(3, dtype=">i4")),
    )
    assert all(
        torch.equal(found.state[name], value) and found.state[name].dtype == value.dtype
        for name, value in denoiser.state_dict().items()
    )
    assert found.init_kwargs["dropout"] == 0.25 and found.init_kwargs["channel_mult"] == [1, 2]


def test_net_and_bare_objects_are_found_and_buffers_that_are_not_saved_are_not_read(tmp_path):
    denoiser = small_denoiser()
    denoiser.register_buffer("scratch", torch.ones(3), persistent=False)
    for content in (
        lambda: {"ema": None, "net": as_published(denoiser, **KWARGS)},
        lambda: as_published(denoiser, **KWARGS),
    ):
        assert list(read(tmp_path, dumps(content)).state) == list(denoiser.state_dict())
    for content in ({"loss_fn": None}, [1], {}):
        with pytest.raises(ValueError, match="no network under 'ema' or 'net'"):
            read(tmp_path, dumps(content))


def test_tensors_may_be_parts_of_a_storage_but_not_exceed_it(tmp_path):
    whole = torch.arange(12.0)
    parts = {
        "a": whole[2:8].view(2, 3).t(),
        "b": whole[8:],
        "c": torch.zeros(0, 4),
        "d": torch.tensor(3.0),
    }
    found = read(tmp_path, dumps(lambda: Persistent("N", {"_parameters": parts})))
    for name, value in parts.items():
        assert torch.equal(found.state[name], value) and found.state[name].is_contiguous()
        assert found.state[name].untyped_storage().nbytes() == value.numel() * 4


class Rebuild:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def typed_storage(length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what these files hold
        return torch.arange(float(length)).storage()


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (13,), (1,)),
        (1, (12,), (1,)),
        (0, (2, 3), (6, 4)),
        (0, (1 << 40,), (0,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 99, (1,) * 99),
        (0, (1 << 200,), (0,)),
        (0, (2.0,), (1,)),
        (12, (1,), (1,)),
        (0, [2], (1,)),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(tmp_path, offset, size, stride):
    data = dumps({"ema": Rebuild(typed_storage(12), offset, size, stride, False, {})})
    with pytest.raises(ValueError, match="refused, because this pickle holds a tensor"):
        read(tmp_path, data)


def test_one_storage_may_not_serve_many_tensors_in_full(tmp_path):
    storage = typed_storage(12)
    halves = {str(i): Rebuild(storage, 6 * i, (6,), (1,), False, {}) for i in range(2)}
    assert read(tmp_path, dumps(lambda: Persistent("N", {"_buffers": halves}))).state[
        "1"
    ].tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="share their numbers"):
        read(
            tmp_path,
            dumps(
                lambda: Persistent(
                    "N", {"_buffers": {**halves, "2": Rebuild(storage, 0, (1,), (1,), False, {})}}
                )
            ),
        )


# ---- what could run code ----


class Calls:
    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Hooked:
    """Pickles as an instance of a class with a state, by NEWOBJ and BUILD."""

    def __setstate__(self, state):
        raise AssertionError("run")

    def __reduce_ex__(self, protocol):
        return copyreg.__newobj__, (Hooked,), {"a": 1}


def inner_file(function, mark):
    """A file of torch.save with a call in it, in the place where a storage belongs."""
    file = io.BytesIO()
    torch.save(Calls(function, f"touch {mark}"), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def hostile(mark):
    """What a malicious file could hold, and the name that has to be in the refusal."""
    touch = f"touch {mark}"
    makes = f"open({str(mark)!r}, 'w')"
    return {
        "system": (Calls(os.system, touch), "posix.system|nt.system"),
        "eval": (Calls(eval, makes), "builtins.eval"),
        "exec": (Calls(exec, makes), "builtins.exec"),
        "nested": (Calls(eval, Calls(eval, repr(makes))), "builtins.eval"),
        "inside_allowed": (
            Calls(torch._utils._rebuild_parameter, Calls(os.system, touch)),
            "posix.system|nt.system",
        ),
        "getattr": (Calls(getattr, Calls(getattr, dict, "update"), "__self__"), "builtins.getattr"),
        "import": (Calls(__import__, "os"), "builtins.__import__"),
        "partial": (functools.partial(os.system, touch), "functools.partial"),
        "reconstructor": (
            Calls(copyreg._reconstructor, dict, object, None),
            "copyreg._reconstructor|copy_reg._reconstructor",
        ),
        "setstate": (Hooked(), "test_edm_pickle.Hooked"),
        "numpy_load": (Calls(np.load, str(mark)), "numpy.load"),
        "objects": (
            np.array([Calls(os.system, touch)], dtype=object),
            "'O8', which is no plain number",
        ),
        "torch_load": (Calls(torch.load, str(mark)), "torch.serialization.load"),
        "inner": (
            Calls(torch.storage._load_from_bytes, inner_file(os.system, mark)),
            "posix.system inside a storage",
        ),
        "inner_eval": (
            Calls(torch.storage._load_from_bytes, inner_file(eval, mark)),
            "eval inside a storage",
        ),
        "inner_tensor": (
            Calls(torch.storage._load_from_bytes, saved(torch.ones(2))),
            "Tensor in the place of a storage",
        ),
        "state_for_a_tensor": (
            Calls(torch._utils._rebuild_parameter, torch.ones(1), state={"data": 1}),
            "a state for Tensor",
        ),
        "module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    }


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


PLACES = {
    "beside": lambda bad: {"ema": as_published(small_denoiser(), **KWARGS), "loss_fn": bad},
    "state": lambda bad: {"ema": Persistent("EDMPrecond", {"_parameters": bad})},
    "argument": lambda bad: easy_dict(ema=Persistent("EDMPrecond", {"_init_kwargs": {"x": [bad]}})),
}


@pytest.mark.parametrize("name", hostile(""))
def test_everything_else_is_refused_by_name_and_nothing_is_run(tmp_path, name):
    mark = tmp_path / "was_run"
    bad, text = hostile(mark)[name]
    for protocol, place in ((2, "argument"), (4, "beside"), (5, "state")):
        with pytest.raises(
            ValueError, match="^[^\n]*edm-small.pkl: refused, because this pickle holds [^\n]*$"
        ) as error:
            read(tmp_path, dumps(lambda: PLACES[place](bad), protocol))
        names = [
            name
            for option in text.split("|")
            for name in (option, option.replace("builtins", "__builtin__"))
        ]
        assert any(name in str(error.value) for name in names)  # protocol 2 has Python 2's names
    assert not mark.exists()


def test_module_src_is_not_run(tmp_path):
    mark = tmp_path / "was_run"
    makes = f"open({str(mark)!r}, 'w').close()"
    source = f"{makes}\nclass EDMPrecond:\n    def __setstate__(self, state):\n        {makes}\n"
    assert exec(source.splitlines()[0]) is None and mark.exists()  # it would work
    mark.unlink()
    weight = torch.arange(3.0)
    found = read(
        tmp_path,
        dumps(lambda: {"ema": Persistent("EDMPrecond", {"_parameters": {"w": weight}}, source)}),
    )
    assert torch.equal(found.state["w"], weight) and not mark.exists()


def text(word):
    return b"\x8c" + bytes([len(word)]) + word


PERSISTENT = text(b"torch_utils.persistence") + text(b"_reconstruct_persistent_obj") + b"\x93"
ORDERED = text(b"collections") + text(b"OrderedDict") + b"\x93"
MODULE_DICT = text(b"torch.nn.modules.container") + text(b"ModuleDict") + b"\x93"


@pytest.mark.parametrize(
    "program, message",
    {
        "EXT1": (b"\x82\x01", "instruction EXT1"),
        "EXT2": (b"\x83\x01\x00", "instruction EXT2"),
        "EXT4": (b"\x84\x01\x00\x00\x00", "instruction EXT4"),
        "PERSID": (b"Pstorage\n", "instruction PERSID"),
        "BINPERSID": (text(b"storage") + b"Q", "instruction BINPERSID"),
        "INST": (b"(ios\nsystem\n", "os.system, which could"),
        "INST_known": (b"(icollections\nOrderedDict\n", "instruction INST"),
        "OBJ": (b"(" + ORDERED + b"o", "instruction OBJ"),
        "NEWOBJ_EX": (ORDERED + b")}\x92", "instruction NEWOBJ_EX"),
        "NEXT_BUFFER": (b"\x97", "instruction NEXT_BUFFER"),
        "dotted": (
            text(b"collections") + text(b"OrderedDict.fromkeys") + b"\x93",
            "collections.OrderedDict.fromkeys, which",
        ),
        "call_of_a_dict": (b"})R", "a call on dict"),
        "call_of_a_result": (ORDERED + b")R)R", "a call on dict"),
        "call_with_a_list": (ORDERED + b"]R", "arguments on list"),
        "build_on_a_name": (
            PERSISTENT + b"N}" + text(b"__setstate__") + ORDERED + b"s\x86b",
            "a state for _Name",
        ),
        "build_on_a_dict": (b"}}" + text(b"__class__") + ORDERED + b"sb", "a state for dict"),
        "build_slots_on_a_module": (
            MODULE_DICT + b")\x81N}\x86b",
            "a state for ModuleDict that is no dict",
        ),
        "build_twice": (MODULE_DICT + b")\x81}" + text(b"a") + b"Nsb}b", "a second one"),
        "append_to_a_module": (MODULE_DICT + b")\x81Na", "APPEND on _Object"),
        "item_of_a_name": (PERSISTENT + b"NNs", "SETITEM on _Name"),
        "no_class": (
            PERSISTENT + b"}" + text(b"type") + text(b"module") + b"s\x85R",
            "a persistent object that is no class",
        ),
        "no_state": (
            PERSISTENT + b"}" + text(b"type") + text(b"class") + b"s\x85R",
            "without class_name and state",
        ),
        "unknown_byte": (b"\xff", "is damaged: no instruction of a pickle"),
        "long_bytearray": (b"\x96" + struct.pack("<Q", 1 << 60) + b"abc", "is damaged"),
        "long_bytes": (b"\x8e" + struct.pack("<Q", 1 << 60) + b"abc", "is damaged"),
        "memo_bomb": (b"Nr\xff\xff\xff\x7f0", "NoneType, and no network"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_instructions_that_could_run_code_are_refused(tmp_path, program, message):
    with pytest.raises(ValueError, match=f"edm-small.pkl[^\n]*{message}"):
        read(
            tmp_path,
            b"\x80\x04" + program + (b"N" if message.startswith("NoneType") else b"") + b".",
        )


def test_bombs_end_in_one_line(tmp_path):
    deep = b"\x80\x04)" + b"\x85" * 200_000
    for data in (deep + b".", b"\x80\x04}" + deep[2:] + b"Ns."):  # the second asks for its hash
        with pytest.raises(ValueError, match="edm-small.pkl"):
            read(tmp_path, data)

    def module(parts):
        return Persistent("M", {"_modules": parts, "_parameters": {"w": torch.ones(1)}})

    def doubled():
        inner = module({})
        for _ in range(60):
            inner = module({"a": inner, "b": inner})
        return {"ema": inner}

    def chain():
        inner = module({})
        state = inner.record["state"]["_modules"]
        state["again"] = state  # a dict that is its own item
        return {"ema": inner}

    for content, message in (
        (doubled, "in the network twice"),
        (chain, "dict as a part of the network"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, dumps(content))


def test_a_chain_of_modules_without_end_is_one_line(tmp_path):
    step = (
        PERSISTENT
        + b"}("
        + text(b"type")
        + text(b"class")
        + text(b"class_name")
        + text(b"M")
        + text(b"state")
        + b"}"
        + text(b"_modules")
        + b"}"
        + text(b"a")
    )
    data = b"\x80\x04" + step * 5000 + b"N" + b"ssu\x85R" * 5000 + b"."
    with pytest.raises(ValueError, match="edm-small.pkl is damaged: maximum recursion depth"):
        read(tmp_path, data)


def test_truncated_and_random_bytes_are_one_line(tmp_path):
    parts = {"w": torch.arange(6.0), "b": torch.zeros(2, 2)}
    whole = dumps(
        lambda: {
            "ema": Persistent(
                "EDMPrecond", {"_modules": {"model": Persistent("M", {"_parameters": parts})}}
            )
        }
    )
    rng = random.Random(0)
    cuts = [0, 1, 2, 11, *(rng.randrange(len(whole)) for _ in range(40)), len(whole) - 1]
    changed = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        changed.append(bytes(data))
    noise = [rng.randbytes(rng.randrange(300)) for _ in range(300)]
    refused = 0
    for data in [*(whole[:cut] for cut in cuts), *changed, *noise, b"PK\x03\x04" + bytes(50)]:
        try:
            read(tmp_path, data)
        except ValueError as error:
            assert (
                "\n" not in str(error) and "edm-small.pkl" in str(error) and len(str(error)) < 600
            )
            refused += 1
    assert refused >= len(cuts) + len(noise) + len(changed) // 2


def test_missing_file_names_itself(tmp_path):
    with pytest.raises(OSError, match="absent.pkl"):
        read_edm_pickle(tmp_path / "absent.pkl")


# ---- flags ----


def checkpoint(precond="EDMPrecond", **kwargs):
    return EDMCheckpoint(precond, {**KWARGS, **kwargs}, {})


def test_flags_of_the_published_networks():
    assert edm_flags(checkpoint()) == {
        "model": {
            "framework": "edm",
            "image_size": 16,
            "in_channels": 3,
            "num_channels": 32,
            "channel_mult": "1,2",
            "num_res_blocks": 1,
            "attention_resolutions": "8",
            "dropout": 0.13,
            "use_fp16": False,
            "class_cond": False,
        },
        "edm": {
            "precond": "edm",
            "edm_network": "ddpmpp",
            "augment_dim": 9,
            "label_dropout": 0,
            "sigma_data": 0.5,
        },
    }
    ncsnpp = dict(
        embedding_type="fourier",
        encoder_type="residual",
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
    )
    found = edm_flags(checkpoint("VEPrecond", label_dim=10, **ncsnpp))
    assert found["edm"] == {
        "precond": "ve",
        "edm_network": "ncsnpp",
        "augment_dim": 9,
        "label_dropout": 0,
    }
    assert found["model"]["class_cond"] is True and found["model"]["num_classes"] == 10
    # What ImageNet-64's file leaves to defaults.
    bare = dict(
        img_resolution=64, img_channels=3, label_dim=1000, use_fp16=True, model_type="DhariwalUNet"
    )
    found = edm_flags(EDMCheckpoint("EDMPrecond", bare, {}))
    assert found["edm"] == {
        "precond": "edm",
        "edm_network": "adm",
        "augment_dim": 0,
        "label_dropout": 0,
        "sigma_data": 0.5,
    }
    want = {
        "num_channels": 192,
        "channel_mult": "1,2,3,4",
        "num_res_blocks": 3,
        "attention_resolutions": "32,16,8",
        "dropout": 0.1,
        "use_fp16": True,
        "num_classes": 1000,
    }
    assert {key: found["model"][key] for key in want} == want


@pytest.mark.parametrize(
    "precond, kwargs, message",
    [
        ("EDMPrecond", {"sigma_min": 0.01}, "sigma_min 0.01, for which there is no flag"),
        ("VPPrecond", {"M": 500, "beta_d": 20}, "M 500, beta_d 20|beta_d 20, M 500"),
        ("EDMPrecond", {"channel_mult_emb": 8}, "channel_mult_emb 8"),
        ("EDMPrecond", {"new_thing": 1}, "new_thing 1"),
        ("VPPrecond", {"sigma_data": 0.5}, "sigma_data 0.5"),
        ("EDMPrecond", {"model_type": ["UNet"]}, "which is not known"),
        (
            "EDMPrecond",
            {"decoder_type": "skip"},
            "decoder_type 'skip'.*--edm_network names no such",
        ),
        (
            "EDMPrecond",
            {"model_type": "UNet"},
            "'UNet', which is not known: SongUNet, DhariwalUNet",
        ),
        ("SongUNet", {}, "a SongUNet, which is no preconditioning"),
    ],
)
def test_settings_without_a_flag_are_named(precond, kwargs, message):
    with pytest.raises(ValueError, match=message):
        edm_flags(checkpoint(precond, **kwargs))


def test_published_defaults_of_the_range_are_not_odd():
    edm_flags(checkpoint("EDMPrecond", sigma_min=0, sigma_max=math.inf, sigma_data=0.5))
    edm_flags(checkpoint("VEPrecond", sigma_min=0.02, sigma_max=100))
    edm_flags(checkpoint("VPPrecond", beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5))
    edm_flags(checkpoint("iDDPMPrecond", C_1=0.001, C_2=0.008, M=1000))
