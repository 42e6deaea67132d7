"""Default < config file < command line; what is saved can be read again."""

from pathlib import Path

import pytest
import yaml

from guided_diffusion_ip.settings.adopt import adopt_checkpoint_config
from guided_diffusion_ip.settings.config import parse
from guided_diffusion_ip.settings.flags import SECTIONS
from guided_diffusion_ip.settings.train_prologue import settle_batch
from guided_diffusion_ip.settings.yaml_file import read_yaml


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model:\n  num_channels: 64\n  image_size: 32x48\ntrain:\n  lr: 1e-5\n  batch_size: 8\n  "
        "ema_rate: 0.5\nsample:\n  batch_size: 77\ndiffusion:\n  input_pertub: 0.2\npaper:\n  "
        "anything: [1, 2]\n"
    )
    return str(path)


def test_precedence(config):
    cfg = parse("image_train", "", ["--config", config, "--batch_size", "4"])
    assert (cfg.batch_size, cfg.num_channels, cfg.num_heads) == (4, 64, 4)
    assert (
        cfg.lr == 1e-5
        and cfg.ema_rate == "0.5"
        and cfg.input_perturbation == 0.2
        and cfg.image_size == "32x48"
    )


def test_a_missing_config_is_told_where_configs_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(__file__).resolve().parent.parent / "configs"
    with pytest.raises(
        ValueError,
        match=(f"configs/demo.yaml does not exist .*{tmp_path}.*did you mean {folder}/demo.yaml"),
    ) as error:
        read_yaml("configs/demo.yaml")
    assert read_yaml(str(error.value).split()[-1].rstrip("?"))["model"]
    with pytest.raises(
        ValueError, match=f"mine.yaml does not exist .*; {folder} holds the papers' settings$"
    ):
        read_yaml("mine.yaml")


def test_a_script_reads_only_its_own_sections(config):
    assert parse("image_sample", "", ["--config", config]).batch_size == 77
    with pytest.raises(AttributeError):
        parse("image_sample", "", ["--config", config]).lr


def test_training_is_respaced_only_by_an_explicit_flag(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sample:\n  timestep_respacing: '100'\n")
    assert parse("image_train", "", ["--config", str(path)]).timestep_respacing == ""
    assert (
        parse(
            "image_train", "", ["--config", str(path), "--timestep_respacing", "50"]
        ).timestep_respacing
        == "50"
    )


def test_what_is_saved_is_read_again(config, tmp_path):
    cfg = parse("image_train", "", ["--config", config, "--seed", "3"])
    (tmp_path / "saved.yaml").write_text(cfg.as_yaml())
    again = parse("image_train", "", ["--config", str(tmp_path / "saved.yaml")])
    assert again.values == cfg.values and again.paper == {"anything": [1, 2]}
    assert list(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == [
        "model",
        "diffusion",
        "train",
        "image_train",
        "paper",
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--num_channels", "32"],
            "--num_channels sets num_channels to 32.*trained with num_channels 64",
        ),
        (["--num_channels", "64"], None),
        (["--dropout", "0.3"], None),
        (["--input_pertub", "0.9"], None),
        (["--diffusion_steps", "500"], "trained with diffusion_steps 1000"),
    ],
)
def test_a_checkpoint_brings_its_architecture(config, tmp_path, argv, message):
    (tmp_path / "config.yaml").write_text(parse("image_train", "", ["--config", config]).as_yaml())
    cfg = parse("image_sample", "", argv)
    if message is None:
        cfg = adopt_checkpoint_config(cfg, str(tmp_path / "config.yaml"))
        assert cfg.num_channels == 64 and cfg.image_size == "32x48" and cfg.batch_size == 16
    else:
        with pytest.raises(ValueError, match=message):
            adopt_checkpoint_config(cfg, str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    "text, value",
    [("1.017", 1.017), ("published", "published"), ("1.0,1.01,1.02", [1.0, 1.01, 1.02])],
)
def test_eps_scaler_forms(text, value):
    assert parse("image_sample", "", ["--eps_scaler", text]).eps_scaler == value


@pytest.mark.parametrize(
    "words, value",
    [
        (["--class_cond"], True),
        (["--class_cond", "yes"], True),
        (["--class_cond=0"], False),
        ([], False),
    ],
)
def test_booleans(words, value):
    assert parse("image_train", "", words).class_cond is value


def test_every_flag_has_help_and_takes_its_own_default():
    for section, flags in SECTIONS.items():
        for flag in flags:
            assert flag.help and flag.convert(flag.default) == flag.default, (section, flag.name)


def test_published_settings_of_the_papers():
    """facts that people will look up: gamma and lambda per data set."""
    configs = Path(__file__).resolve().parent.parent / "configs"
    gammas = {
        "cifar10_ip": 0.15,
        "imagenet32_ip": 0.1,
        "lsun_tower64_ip": 0.1,
        "celeba64_ip": 0.1,
        "ffhq128_ip": 0.1,
        "cifar10": 0.0,
    }
    for name, gamma in gammas.items():
        assert (
            parse("image_train", "", ["--config", str(configs / f"{name}.yaml")]).input_perturbation
            == gamma
        )
    lambdas = {
        "cifar10": (1.017, 1.017, 1.017),
        "lsun_tower64": (1.011, 1.007, 1.006),
        "ffhq128": (1.008, 1.007, 1.005),
        "imagenet64": (1.006, 1.006, 1.006),
        "imagenet128": (1.005, 1.004, 1.004),
    }
    for name, values in lambdas.items():
        paper = parse("image_sample", "", ["--config", str(configs / f"{name}.yaml")]).paper
        assert tuple(paper["eps_scaler"][steps] for steps in (20, 50, 100)) == values


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], 64),
        (["--batch_size", "7"], 7),
        (["--global_batch_size", "32"], 32),
        (["--batch_size", "9", "--global_batch_size", "9"], 9),
    ],
)
def test_a_batch_size_on_the_command_line_wins_over_either_in_the_file(argv, expected, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {global_batch_size: 64}\n")
    cfg = parse("image_train", "", ["--config", str(tmp_path / "c.yaml"), *argv])
    assert settle_batch(cfg).batch_size == expected


def test_two_batch_sizes_that_contradict_each_other():
    cfg = parse("image_train", "", ["--batch_size", "9", "--global_batch_size", "8"])
    with pytest.raises(ValueError, match="contradict"):
        settle_batch(cfg)


def test_a_script_reads_its_own_flag_though_a_section_has_one_of_that_name(tmp_path):
    """eval_interval counts validations of the classifier, and evaluations of image_train's samples."""
    path = tmp_path / "config.yaml"
    path.write_text("train: {eval_interval: 1000}\nclassifier_train: {eval_interval: 7}\n")
    assert parse("classifier_train", "", ["--config", str(path)]).eval_interval == 7
    assert parse("image_train", "", ["--config", str(path)]).eval_interval == 1000
    path.write_text("train: {eval_interval: 1000}\n")
    assert parse("classifier_train", "", ["--config", str(path)]).eval_interval == 5
