"""Configs: every preset loads, a mistake is one message that names key and remedy, YAML round-trips."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitscale.config.errors import UserError
from fitscale.config.load import load_config, to_yaml
from fitscale.config.schema import Config, EvaluationConfig
from fitscale.model.fit.config import FitConfig
from fitscale.run.claim import claim
from fitscale.run.comparability import sample_key
from fitscale.run.layout import RunDir

FIT_V1 = ("model.family=fit", "flow.kind=ddpm", "sampling.method=ddpm")
CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
DEMO_SIZES = [path for path in sorted((CONFIGS / "demo").glob("*.yaml")) if path.stem != "digits"]


def load(*arguments: str | Path) -> Config:
    return load_config([str(argument) for argument in arguments])


FIT, FLAG = (1e-4, 0.9, 0.999, 0.0, [], 1.0, 256), (5e-4, 0.9, 0.999, 0.0, [], 2.0, 256)
PUBLISHED = {  # lr, betas, weight decay and what it spares, clipping, images a step
    "fitv2": FIT,
    "fit": FIT,
    "flag_dit": FLAG,
    "large_dit": FLAG,
    "dimr": (2e-4, 0.99, 0.99, 0.03, ["nodecay_"], None, 1024),
}


def recipes_of(model: Path) -> list[Path]:
    family = model.stem.split("_")[0] if "_" in model.stem else "fitv2"
    return sorted((CONFIGS / "recipe").glob(f"{family}_*.yaml"))


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_model_goes_with_its_recipes(model):
    assert recipes_of(model)
    for recipe in recipes_of(model):
        config = load(model, recipe)
        optim, batch = config.optim, config.batch.global_batch_size
        settings = (optim.lr, *optim.betas, optim.weight_decay, optim.no_decay, optim.grad_clip, batch)
        assert settings == PUBLISHED[config.model.family]
        assert optim.ema_decays == [0.9999]


def test_every_file_of_configs_model_is_tested():
    assert {path.stem for path in MODELS} >= {"s", "b", "l", "xl", "xxl", "fit_b", "fit_xl", "flag_600m", "terdit_600m"}


@pytest.mark.parametrize("size", DEMO_SIZES, ids=lambda path: path.stem)
def test_demo_ladder_loads(size):
    config = load(CONFIGS / "demo/digits.yaml", size)
    assert config.model.name == size.stem
    assert config.model.token_channels == 1
    assert len(config.evaluation.steps(config.run.steps)) == config.evaluation.points


def test_high_resolution_recipe_trains_what_the_paper_trains():
    config = load(CONFIGS / "model/xl.yaml", CONFIGS / "recipe/fitv2_hr_512.yaml")
    assert config.optim.trainable == ["x_embedder", "bias", "adaLN", "final_layer"]
    assert (config.model.rope.method, config.model.rope.decouple) == ("ntk-aware", True)
    assert config.model.rope.original_length == 16 and config.model.depth == 36


def test_files_merge_left_to_right_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {depth: 3, hidden_size: 64, num_heads: 4}\n")
    (tmp_path / "b.yaml").write_text("model: {depth: 4}\n")
    config = load("model.num_heads=2", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert (config.model.depth, config.model.hidden_size, config.model.num_heads) == (4, 64, 2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.hiden_size=64"], ["model.hiden_size", "Did you mean", "'hidden_size'"]),
        (["optm.lr=1"], ["optm", "Did you mean", "'optim'"]),
        (["model.depth=deep"], ["model.depth", "deep"]),
        (["optim.lr=[1]"], ["optim.lr"]),
        (["run.name=[a"], ["run.name=[a", "not valid YAML"]),
        (["model=3"], ["model=3", "FitConfig"]),
        (["nowhere.yaml"], ["nowhere.yaml", "no such config file"]),
        (["model.num_heads=7"], ["model.hidden_size: 768", "model.num_heads = 7"]),
        (["model.hidden_size=72", "model.num_heads=12"], ["head dimension of 6", "multiple of 4"]),
        (["model.family=dit"], ["model.family", "fitv2, fit"]),
        (["model.depth=0"], ["model.depth", "0"]),
        (["model.rope.method=ntk"], ["model.rope.method", "ntk-aware"]),
        (["parallel.zero_stage=0", "parallel.precision=bf16"], ["parallel.zero_stage", "stage 0", "bf16", "1, 2 or 3"]),
        (["parallel.zero_stage=4"], ["parallel.zero_stage", "0, 1, 2, 3"]),
        (["parallel.tensor_parallel_size=5"], ["parallel.tensor_parallel_size", "num_heads = 12", "valid: 1, 2, 4"]),
        (["parallel.sequence_parallel=true"], ["parallel.sequence_parallel", "2 or more"]),
        (["flow.kind=ddpm"], ["flow.kind", "fitv2; valid: rectified"]),
        (["sampling.method=ddim"], ["sampling.method", "euler"]),
        (["sampling.guidance.channels=5"], ["sampling.guidance.channels", "in_channels = 4"]),
        (["sampling.guidance.channels=0"], ["sampling.guidance.channels", "the least is 1"]),
        (["sampling.spacing=leading"], ["sampling.spacing", "ddpm and ddim, not with euler"]),
        ([*FIT_V1, "sampling.spacing=even"], ["sampling.spacing", "linspace, leading, trailing"]),
        (["run.reset=[bias]"], ["run.reset", "needs run.init_weights"]),
        (["data.holdout_fraction=1.0"], ["data.holdout_fraction", "[0.0, 1.0)"]),
        (["optim.grad_clip=0"], ["optim.grad_clip", "above 0"]),
        (["data.latent.kind=pixels"], ["data.latent", "factor = 1"]),
        (["run.device=tpu"], ["run.device", "auto, cpu, cuda"]),
        (["optim.ema_decays[0]=0.5"], ["optim.ema_decays: must hold a list, [a, b]"]),
        (["data.mixture=[]"], ["data.mixture: must hold key: value pairs"]),
        (["optim.trainable=[[bias]]"], ["optim.trainable: ['bias'] is no word or number"]),
        (["run.name=${oc.env:HOME}"], ["values are written out"]),
        (["run.dir=runs/${run.name}"], ["values are written out"]),
        (["run.steps=???"], ["values are written out"]),
        (["model.depth=" + "9" * 5000], ["not valid YAML", "digits"]),
        (["optim.lr=0x" + "f" * 5000], ["not valid YAML", "too large"]),
        (["a." * 5000 + "b=1"], ["no key has more than 32 parts"]),
        (["run.name=" + "[" * 5000], ["10000 values, or 32 levels"]),
        (["run.name=[&a [1, 1], &b [*a, *a], &c [*b, *b]" + ", *c" * 2000 + "]"], ["10000 values, or 32 levels"]),
        (["x" * 5000], ["cannot be read", "File name too long"]),
        (["evaluation.points=1" + "0" * 12], ["evaluation.points: 1000000000000 is too large, the most is 10,000"]),
        (["model.depth=1000000000"], ["model.depth", "the most is 10,000"]),
        (["data.num_workers=9223372036854775807"], ["data.num_workers", "the most is 1,000"]),
        (["optim.lr=1e30"], ["optim.lr", "number from -2^63 to 2^63"]),
        (["optim.lr=1e15"], ["optim.lr", "is too large"]),
        (["evaluation.trusted=[abc]"], ["evaluation.trusted: 'abc' is no SHA-256, which is 64 digits"]),
    ],
    ids=lambda value: value[0][:40] if value and "=" in value[0] else None,
)
def test_a_mistake_is_one_message_with_key_and_remedy(arguments, parts):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
BOUNDS = "more than 10000 values, or 32 levels of them"
FILES = {
    "broken": ("a: [", "not valid YAML"),
    "a list": ("- 1\n- 2\n", "must hold key: value pairs"),
    "binary": ("\x80", "not valid YAML"),
    "8^11 values": (BOMB, BOUNDS),
    "deep": ("a: " + "[" * 100_000, BOUNDS),
    "large": ("a: " + "b" * 300_000, "more than 262144 bytes"),
    "itself": ("a: &a [*a]", "c.yaml"),
    "twice": ("run: {}\nrun: {}", "duplicate key"),
    "control": ("a: \x1b[31m", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_is_named(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load(path)
    assert "c.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [[], ["model.rope.theta=500", "run.init_weights=w.safetensors", "evaluation.features=f.pt"]]
)
def test_yaml_reads_back_to_an_equal_config(tmp_path, arguments):
    config = load(*arguments)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("value", "message"),
    [("{a b: x}", "valid: name: path"), ("{a: 5}", "valid: name: path"), ("[x]", "neither a path"), ("5", "neither a")],
)
def test_feature_networks_are_a_path_or_paths_by_name(value, message):
    for key in ("features", "reference"):
        with pytest.raises(UserError, match=rf"evaluation\.{key}.*{message}"):
            load_config([f"evaluation.{key}={value}"])
    two = load_config(["evaluation.features={inception: a.pt, dinov2: b.pt}", "evaluation.reference={dinov2: r.npz}"])
    assert two.evaluation.networks == {"inception": "a.pt", "dinov2": "b.pt"}
    assert two.evaluation.reference_of("dinov2") == "r.npz"
    with pytest.raises(UserError, match=r"evaluation\.reference\.inception: needed"):
        two.evaluation.reference_of("inception")
    assert load_config(["evaluation.features=a.pt"]).evaluation.networks == {"": "a.pt"}
    assert load_config([]).evaluation.networks == {}


@settings(max_examples=40, deadline=None)  # it writes files: slow where the disk is busy
@given(
    st.floats(min_value=1e-12, max_value=1e6, allow_nan=False),
    st.lists(st.floats(min_value=0, max_value=0.99999), max_size=3),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).filter(
        lambda text: "${" not in text
    ),
)
def test_yaml_keeps_every_number_and_text(tmp_path_factory, lr, decays, name):
    config = Config()
    config = replace(config, optim=replace(config.optim, lr=lr, ema_decays=decays), run=replace(config.run, name=name))
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(to_yaml(config))
    assert load(path) == config


def test_every_kind_of_flow_has_its_own_times():
    assert load().flow.time_distribution == "logit_normal"
    assert load(*FIT_V1).flow.time_distribution == "uniform"
    assert load("flow.time_distribution=uniform").flow.time_distribution == "uniform"
    assert "time_distribution: uniform" in to_yaml(load(*FIT_V1))  # the record of a run says which


def test_guidance_acts_on_three_channels_of_four_and_on_all_of_fewer():
    guidance = load().sampling.guidance
    assert [guidance.guided_channels(number) for number in (1, 2, 3, 4, 16)] == [1, 2, 3, 3, 3]
    assert load("sampling.guidance.channels=2").sampling.guidance.guided_channels(4) == 2
    assert load("model.in_channels=1").sampling.guidance.guided_channels(1) == 1


def test_a_key_is_what_it_was_before_spacing_had_a_name():
    def key(*arguments):
        config = load(*arguments)
        return sample_key(config, "raw")

    assert key()["guidance_channels"] == 3
    assert "spacing" not in key() | key(*FIT_V1)  # ddpm: spaced as ever
    assert "spacing" not in key(*FIT_V1, "sampling.method=ddim", "sampling.spacing=trailing")  # ddim, as it was
    assert key(*FIT_V1, "sampling.method=ddim")["spacing"] == "leading"
    assert key(*FIT_V1, "sampling.spacing=leading")["spacing"] == "leading"


def test_choices_of_the_sampler_are_in_the_key_where_they_are_not_as_ever():
    def key(*arguments):
        return sample_key(load(*arguments), "raw")

    usual, guide = key(), ("sampling.guidance.guide=runs/weak", "sampling.guidance.guide_step=1000")
    assert not {"last_step", "shift_base_tokens", "guidance_interval", "guide"} & set(usual)
    assert key("sampling.guidance.interval=[0.0,1.0]") == usual
    added = {
        ("sampling.guidance.interval=[0.2,0.8]",): {"guidance_interval": [0.2, 0.8]},
        ("sampling.shift_base_tokens=256",): {"shift_base_tokens": 256},
        guide: {"guide": ["runs/weak", 1000, None], "guidance_channels": 4},
    }
    for arguments, named in added.items():
        assert key(*arguments) == usual | named
    sde = key("sampling.method=sde")
    assert key("sampling.method=sde", "sampling.last_step=mean") == sde
    assert key("sampling.method=sde", "sampling.last_step=none") == sde | {"last_step": "none"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sampling.guidance.interval=[0.8,0.2]",), "sampling.guidance.interval: 0.8 is not below 0.2"),
        (("sampling.guidance.interval=[0.2,1.5]",), "sampling.guidance.interval: 1.5 is too large"),
        (("sampling.guidance.guide=runs/weak",), "sampling.guidance.guide_step: needed with the run directory"),
        (("sampling.guidance.guide_step=3",), "sampling.guidance.guide_step: goes with a run directory"),
        (
            ("sampling.guidance.guide=weak.safetensors", "sampling.guidance.guide_weights=raw"),
            "sampling.guidance.guide_weights: goes with a run directory",
        ),
        (("sampling.last_step=none",), "sampling.last_step: goes with sde and sde_heun, not with euler"),
        (("sampling.method=sde", "sampling.last_step=tweedie"), "is not one of mean, euler, none"),
        (
            ("sampling.method=dopri5", "sampling.shift_base_tokens=64"),
            "sampling.shift_base_tokens: goes with euler, heun, ab2, sde, sde_heun, not with dopri5",
        ),
        (("sampling.shift_base_tokens=0",), "sampling.shift_base_tokens: 0 is too small"),
    ],
)
def test_choices_of_the_sampler_that_cannot_be(arguments, message):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert message in str(caught.value)


def test_derived_sizes_follow_the_family():
    fitv2 = FitConfig(family="fitv2", hidden_size=1152, num_heads=16)
    assert (fitv2.head_dim, fitv2.mlp_hidden_size, fitv2.adaln_rank, fitv2.out_channels) == (72, 3072, 288, 4)
    fit = FitConfig(family="fit", hidden_size=1152, num_heads=16)
    assert (fit.mlp_hidden_size, fit.adaln_rank, fit.out_channels, fit.is_v2) == (4608, None, 8, False)
    assert fitv2.token_channels == 16


@given(st.integers(0, 12), st.integers(1, 10**6), st.integers(1, 10**6))
def test_evaluation_steps_ascend_to_the_last_step(points, first, last):
    steps = EvaluationConfig(points=points, first_step=first).steps(last)
    assert steps == sorted(set(steps)) and len(steps) <= points + 1
    assert (steps[-1] == last and steps[0] >= min(first, last)) if points else steps == []


def test_evaluation_steps_are_log_spaced():
    assert EvaluationConfig(points=4, first_step=1000).steps(8000) == [1000, 2000, 4000, 8000]


def test_a_run_directory_belongs_to_one_config(tmp_path):
    claim(load(f"run.dir={tmp_path}"))
    before = RunDir(tmp_path).config.read_bytes()
    with pytest.raises(UserError) as caught:
        claim(load(f"run.dir={tmp_path}", "model.depth=3", "optim.lr=0.5", "parallel.zero_stage=2"))
    message = str(caught.value)
    assert "model.depth: 15 there, 3 here" in message and "optim.lr" in message and "zero_stage" not in message
    assert RunDir(tmp_path).config.read_bytes() == before


def test_what_only_changes_speed_or_length_may_change(tmp_path):
    claim(load(f"run.dir={tmp_path}"))
    claim(
        load(
            f"run.dir={tmp_path}", "batch.pack_tokens=99", "parallel.zero_stage=2", "run.steps=9", "wandb.mode=offline"
        )
    )
    assert load(RunDir(tmp_path).config).run.steps == 9


def test_a_cosine_schedule_knows_its_last_step(tmp_path):
    claim(load(f"run.dir={tmp_path}", "optim.schedule=cosine"))
    with pytest.raises(UserError, match=r"run\.steps: 400000 there, 9 here"):
        claim(load(f"run.dir={tmp_path}", "optim.schedule=cosine", "run.steps=9"))


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not empty"):
        claim(load(f"run.dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_needs_a_directory():
    with pytest.raises(UserError, match=r"run\.dir: must be given"):
        claim(Config())
