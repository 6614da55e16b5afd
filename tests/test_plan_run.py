"""`fitscale plan`: its arithmetic against hand calculations, what it refuses, and that it needs no torch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fitscale.cli import main
from fitscale.config.errors import UserError
from fitscale.config.load import load_config, to_yaml
from fitscale.model import flops
from fitscale.model.backbone import parameter_table
from fitscale.plan.devices import DEVICES, device_reported_as, find_device
from fitscale.plan.layout import Machine, layouts
from fitscale.plan.memory import activation_bytes, rank_memory, rank_parameters, recomputed_blocks
from fitscale.plan.step import measured_utilisation, plan, simplest, typical_images
from fitscale.plan.traffic import step_traffic
from tests.shard_sets import LATENTS, indexed_set

ROOT = Path(__file__).parents[1]
MODELS = ("s", "b", "l", "xl", "xxl", "fit_b", "fit_xl")
H100 = DEVICES["h100"]
HPZ = "parallel.zero_hpz_partition_size=8"


def config_of(model: str, *overrides: str):
    return load_config([f"{ROOT}/configs/model/{model}.yaml", "parallel.precision=bf16", *overrides])


def layout(tp: int = 1, stage: int = 1, sp: bool = False, every: int = 0) -> list[str]:
    keys = {
        "tensor_parallel_size": tp,
        "zero_stage": stage,
        "sequence_parallel": sp,
        "activation_checkpoint_every": every,
    }
    return [f"parallel.{key}={value}" for key, value in keys.items()]


def plan_of(model: str, gpus: int, *overrides: str, mfu: float = 0.4, gpus_per_node: int = 8):
    config = config_of(model, *overrides)
    return plan(config, Machine(H100, gpus, gpus_per_node), typical_images(config), mfu)


@pytest.mark.parametrize("model", MODELS)
def test_inventory_holds_every_parameter(model):
    cfg = config_of(model).model
    assert sum(one.numel for one in parameter_table(cfg)) == flops.parameters(cfg)


@pytest.mark.parametrize("family", ["fitv2", "fit"])
def test_inventory_names_what_the_model_has(family):
    from fitscale.model.build import build_network
    from fitscale.parallel.groups import init_parallel

    flow = ["flow.kind=ddpm", "sampling.method=ddpm"] if family == "fit" else []
    tiny = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.num_classes=3"]
    config = load_config([f"model.family={family}", *tiny, *flow])
    init_parallel(config.parallel, "cpu")
    there = {name: tensor.numel() for name, tensor in build_network(config.model, config.parallel).named_parameters()}
    assert {one.name: one.numel for one in parameter_table(config.model)} == there


def test_tensor_parallelism_halves_attention_and_mlp_alone():
    cfg = config_of("xxl").model
    d, width = cfg.hidden_size, cfg.mlp_hidden_size
    split = cfg.depth * (4 * d * d + 3 * d * width + 3 * d + 2 * width)
    assert sum(one.local(2) for one in parameter_table(cfg)) == flops.parameters(cfg) - split // 2


@pytest.mark.parametrize(
    ("stage", "gradients", "optimizer", "weights"),
    [(1, 6, 12 / 8, 2), (2, 4 / 8, 12 / 8, 2), (3, 8 / 8, 12 / 8, 2 / 8)],
)
def test_state_of_a_rank_is_so_many_bytes_a_parameter(stage, gradients, optimizer, weights):
    config = config_of("b", *layout(stage=stage))
    moment, count = rank_memory(config, 8, 0, 0, on_cuda=True).step, flops.parameters(config.model)
    found = [part / count for part in (moment.weights, moment.gradients, moment.optimizer, moment.ema)]
    assert found == pytest.approx([weights, gradients, optimizer, 4 / 8])
    twice = rank_memory(config_of("b", *layout(stage=stage), "optim.ema_decays=[0.99,0.9]"), 8, 0, 0, on_cuda=True)
    assert twice.step.ema == 2 * moment.ema


def test_activations_of_a_block_by_hand():
    """FiTv2-B: 6 and 7 vectors of 768, 3 of 2,048, in bf16, of every token; recomputed, one vector and one block."""
    none, all_blocks = (activation_bytes(config_of("b", *layout(every=every)), 1000, 4, True) for every in (0, 1))
    block = 1000 * 2 * (13 * 768 + 3 * 2048)
    ends = 1000 * 2 * 7 * 768
    assert none == pytest.approx(15 * block + ends, rel=0.02)
    assert all_blocks == pytest.approx(15 * 1000 * 2 * 768 + block + ends, rel=0.02)
    assert [recomputed_blocks(config_of("b", *layout(every=every))) for every in (0, 1, 2, 4)] == [0, 15, 8, 4]
    split, scattered = (activation_bytes(config_of("b", *layout(tp=2, sp=sp)), 1000, 4, True) for sp in (False, True))
    assert split == pytest.approx(15 * 1000 * 2 * (6 * 768 + 3.5 * 768 + 1.5 * 2048) + ends, rel=0.02)
    assert scattered == pytest.approx(15 * block / 2 + ends, rel=0.02)


def test_what_data_parallel_ranks_send():
    count = flops.parameters(config_of("xxl").model)
    one, two, three = (step_traffic(config_of("xxl", *layout(stage=stage)), 8, 3, 1000) for stage in (1, 2, 3))
    ring = 7 / 8 * 2 * count  # bf16
    assert (one.gradients, one.weights) == pytest.approx((2 * 2 * ring, ring))  # gradients in fp32
    assert (two.gradients, two.weights) == pytest.approx((3 * 2 * 2 * ring, ring))
    assert three.gradients == pytest.approx(3 * 2 * ring)
    kept = 7 / 8 * 2 * 500e6
    assert three.weights == pytest.approx(3 * (2 * ring - kept), rel=0.01)
    assert step_traffic(config_of("xxl"), 1, 3, 1000).total == 0
    fp32_config = config_of("b", "parallel.precision=fp32", "parallel.zero_stage=0")
    fp32 = step_traffic(fp32_config, 4, 3, 1000)
    assert (fp32.gradients, fp32.weights) == (2 * 3 / 4 * 4 * flops.parameters(config_of("b").model), 0)
    alone, pair = (rank_memory(fp32_config, ranks, 0, 0, on_cuda=False) for ranks in (1, 2))
    assert (alone.step.buffers, pair.step.buffers) == (0.0, 4 * 40e6)  # one rank joins no gradients to sum them


def test_with_a_copy_in_the_node_only_a_steps_first_gather_leaves_it():
    sent = step_traffic(config_of("b", *layout(stage=3), HPZ), 16, 3, 1000)
    gathered = rank_parameters(config_of("b")).gathered
    kept = rank_parameters(config_of("b")).kept
    assert sent.copied_weights == pytest.approx(7 / 8 * 2 * (2 * (2 * gathered - kept) + gathered - kept))
    whole = 15 / 16 * 2 * flops.parameters(config_of("b").model)
    assert sent.weights - sent.copied_weights == pytest.approx(whole)
    fast, slow = (plan_of("xxl", 64, *layout(stage=3), *more, gpus_per_node=8) for more in ((HPZ,), ()))
    assert fast.traffic.gradients == slow.traffic.gradients
    outside, copied = fast.traffic.total - fast.traffic.copied_weights, fast.traffic.copied_weights
    at_most = outside / (0.8 * 8 * 50e9) + copied / (0.8 * 450e9)
    assert 0 < fast.exposed_s == pytest.approx(at_most - fast.busy_s)
    assert fast.memory.step.weights - slow.memory.step.weights == pytest.approx(
        2 / 8 * flops.parameters(fast.config.model)
    )


def test_what_tensor_parallel_ranks_send():
    def sent(**kinds) -> float:
        return step_traffic(config_of("b", *layout(tp=4, **kinds)), 1, 1, 1000).tensor_parallel

    vector = 1000 * 768 * 2
    assert sent() == pytest.approx(15 * 5 * 2 * 3 / 4 * vector)  # 2 sums forward, 3 backward; a sum is two passes
    assert sent(every=1) == pytest.approx(15 * 7 * 2 * 3 / 4 * vector)
    assert sent(sp=True) == pytest.approx((15 * 13 + 2) * 3 / 4 * vector)


def test_time_of_a_step_by_hand():
    one = plan_of("xl", 1, "run.steps=1000", mfu=0.5)
    cfg = one.config.model
    assert (
        one.train_flops
        == 256 * flops.train_flops(cfg, 256)
        == 256 * 6 * (flops.linear_macs(cfg, 256) + flops.mixing_macs(cfg, 256))
    )
    assert one.step_s == one.compute_s == pytest.approx(one.train_flops / (0.5 * 989e12))
    assert one.mfu == pytest.approx(0.5)
    assert one.images_per_s == pytest.approx(256 / one.step_s)
    assert one.days == pytest.approx(1000 * one.step_s / 86400)
    assert one.gpu_hours == pytest.approx(1000 * one.step_s / 3600)
    again = plan_of("xl", 1, *layout(every=1), mfu=0.5)
    assert again.compute_s == pytest.approx(4 / 3 * one.compute_s)
    assert again.mfu == pytest.approx(3 / 4 * one.mfu)


def test_communication_that_nothing_hides():
    eight = plan_of("xxl", 8, *layout(stage=1))
    sent = (2 * 4 + 2) * 7 / 8 * flops.parameters(eight.config.model)  # gradients in fp32, there and back; weights
    assert eight.exposed_s == pytest.approx(sent / (0.8 * 450e9))
    nodes = plan_of("xxl", 16, *layout(stage=1), gpus_per_node=4)  # four ports of 50 GB/s a node
    assert nodes.exposed_s == pytest.approx(nodes.traffic.total / (0.8 * 200e9))
    hidden = plan_of("xxl", 8, *layout(stage=2))
    assert hidden.exposed_s == pytest.approx(sent / 5 / (0.8 * 450e9))  # the weights alone


def test_no_step_takes_less_than_launching_its_kernels():
    """By hand: 62 kernels of 7 us a block and micro-batch, 16 more where the forward pass is run again; ZeRO-3 gathers
    every tensor twice; 5 ms once a step. 130 kernels where nothing is compiled."""
    one, again = (plan_of("b", 4, "batch.pack_tokens=4096", *layout(every=every)) for every in (0, 1))
    assert one.launch_s == pytest.approx(0.005 + 4 * 15 * 62 * 7e-6)
    assert again.launch_s == pytest.approx(0.005 + 4 * 15 * 78 * 7e-6)
    written = plan_of("b", 4, "batch.pack_tokens=4096", "parallel.compile=off", *layout())
    assert written.launch_s == pytest.approx(0.005 + 4 * 15 * 130 * 7e-6)
    tensors = len(parameter_table(one.config.model))
    gathering = plan_of("b", 4, "batch.pack_tokens=4096", *layout(stage=3))
    assert gathering.launch_s - one.launch_s == pytest.approx(4 * 2 * tensors * 1e-4)
    assert one.busy_s < one.launch_s == one.compute_s and one.mfu < 0.4
    large = plan_of("xl", 1)
    assert large.launch_s < large.busy_s == large.compute_s
    config = config_of("s", "parallel.precision=fp32")
    cpu = plan(config, Machine(DEVICES["cpu"], 1, 1), typical_images(config), 0.2)
    assert cpu.compute_s == cpu.busy_s + cpu.launch_s  # nothing runs ahead there


def test_of_layouts_that_are_as_fast_the_simplest_is_taken():
    plans = [plan_of("xxl", 8, *layout(stage=stage)) for stage in (3, 2, 1)]
    assert plans[0].step_s < plans[1].step_s < 1.05 * plans[0].step_s < plans[2].step_s
    assert simplest(plans) is plans[1] and simplest([plans[0], plans[2]]) is plans[0]


def test_packs_are_those_of_training():
    one = plan_of("b", 4, "batch.pack_tokens=4096")
    assert (one.packing.stats.packs_per_rank, one.longest_pack) == (4, 4096)  # 64 images of 256 tokens a rank
    uneven = plan_of("b", 3, "batch.pack_tokens=32768")
    assert uneven.packing.stats.imbalance == pytest.approx(86 / (256 / 3) - 1)
    assert uneven.compute_s == pytest.approx(86 * flops.train_flops(uneven.config.model, 256) / (0.4 * 989e12))


def test_sizes_come_from_the_index(tmp_path):
    index = indexed_set(tmp_path / "shards", 30, meta=LATENTS)
    config = config_of("b", f"data.shards={tmp_path / 'shards'}", "batch.global_batch_size=4096")
    images = typical_images(config)
    every = [height * width // 4 for height, width, count in index.meta.sizes for _ in range(count)]
    assert images.tokens_B.mean() == pytest.approx(sum(every) / len(every), rel=0.01)
    assert (images.tokens_B.min(), images.tokens_B.max()) == (min(every), max(every))
    assert "assumed" not in images.source
    absent = typical_images(config_of("b", f"data.shards={tmp_path / 'none'}"))
    assert set(absent.tokens_B) == {256} and "assumed: no shards at" in absent.source


def test_layouts_leave_out_what_cannot_be():
    def sizes(model: str, gpus: int, gpus_per_node: int = 8, fixed: tuple[str, ...] = ()) -> set[int]:
        found = layouts(config_of(model), Machine(H100, gpus, gpus_per_node), set(fixed))
        return {one.parallel.tensor_parallel_size for one in found}

    assert sizes("xxl", 64) == {1, 2, 4, 8}
    assert sizes("b", 64) == {1, 2, 4}  # 12 heads
    assert sizes("xxl", 64, gpus_per_node=4) == {1, 2, 4}
    assert sizes("xxl", 6) == {1, 2, 3, 6}
    assert sizes("xxl", 64, fixed=("tensor_parallel_size",)) == {1}
    found = layouts(config_of("b"), Machine(H100, 8, 8), set())
    assert len(found) == len({one.parallel for one in found}) == (1 + 2 * 2) * 3 * 2
    assert all(one.parallel.tensor_parallel_size > 1 or not one.parallel.sequence_parallel for one in found)
    copied = layouts(config_of("xxl", "parallel.zero_stage=3", HPZ), Machine(H100, 16, 8), set())
    assert {(one.parallel.tensor_parallel_size, one.parallel.zero_stage) for one in copied} == {(1, 3), (2, 3)}


def test_measured_utilisation_gives_back_the_time(tmp_path):
    config = config_of("xl", *layout(tp=2, stage=1))
    machine, images = Machine(H100, 16, 8), typical_images(config)
    took = plan(config, machine, images, 0.37).step_s
    assert measured_utilisation(took, config, machine, images) == pytest.approx(0.37)
    with pytest.raises(UserError, match="shorter than the communication"):
        measured_utilisation(1e-4, config, machine, images)


def run_directory(folder: Path, device: str, seconds: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config_of("b")))
    (folder / "environment.json").write_text(json.dumps({"world_size": 1, "device": device}))
    row = {"attempt": 1, "time_unix_s": 0.0, "data_wait_s": 0.25, "step_s": seconds}
    rows = [{**row, "step": 1, "step_s": 60.0}, *({**row, "step": step} for step in range(2, 6))]
    (folder / "throughput.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_a_measured_run_replaces_the_assumed_utilisation(tmp_path, capsys):
    run = run_directory(tmp_path / "run", "NVIDIA H100 80GB HBM3", 0.45)  # 0.2 s computing
    share = 256 * flops.train_flops(config_of("b").model, 256) / 0.2 / 989e12
    assert main(["plan", f"{ROOT}/configs/model/b.yaml", "--measured", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"computing at {share:.1%} of the peak (measured in {run})" in out


def refusal(capsys, *arguments: str) -> str:
    assert main(["plan", f"{ROOT}/configs/model/xxl.yaml", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_refusals(capsys, tmp_path):
    assert "'h300' is not a known device; valid: h100, h200, a100" in refusal(capsys, "--gpu", "h300")
    tp = "parallel.tensor_parallel_size="
    assert "8 does not divide 12 devices, 8 on a node" in refusal(capsys, f"{tp}8", "--gpus", "12")
    assert "8 devices, 4 on a node, within which it must stay; valid: 1, 2, 4" in refusal(
        capsys, f"{tp}8", "--gpus-per-node", "4"
    )
    assert "2 does not divide 6 devices, 3 on a node" in refusal(
        capsys, f"{tp}2", "--gpus", "6", "--gpus-per-node", "3"
    )
    assert "num_heads = 24 does not divide by 5; valid: 1, 2, 3" in refusal(capsys, f"{tp}5")
    assert "8 needs parallel.zero_stage of 3" in refusal(capsys, HPZ, "parallel.zero_stage=2")
    assert "8 does not divide 4 data-parallel ranks; valid: 1, 2, 4" in refusal(
        capsys, HPZ, "parallel.zero_stage=3", f"{tp}4", "--gpus", "16", "--mfu", "0.4"
    )
    assert "--mfu: 40.0 is not a utilisation" in refusal(capsys, "--mfu", "40")
    assert "--gpus: 0 is too small" in refusal(capsys, "--gpus", "0")
    assert "batch.pack_tokens: the image in slot 0 has 256" in refusal(capsys, "batch.pack_tokens=128")
    assert "holds no throughput.jsonl" in refusal(capsys, "--measured", str(tmp_path))
    run = run_directory(tmp_path / "run", "cpu (x86_64)", 9.0)
    run.joinpath("environment.json").write_text(json.dumps({"world_size": 1, "device": "GeForce RTX 9090"}))
    assert "ran on 'GeForce RTX 9090', whose peak is not known" in refusal(capsys, "--measured", str(run))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("environment.json", b"[]", "must hold a JSON object"),
        ("environment.json", b"[" * 100_000, "not JSON"),
        ("environment.json", b'{"device": 1, "world_size": 1}', "device is 1"),
        ("environment.json", b'{"device": "cpu"}', "world_size is missing"),
        ("environment.json", b'{"device": "cpu", "world_size": 0}', "world_size: 0 is too small"),
        ("throughput.jsonl", b'{"step": 1}\n', "line 1: time_unix_s is missing"),
        ("throughput.jsonl", b'{"step": 1, "time_unix_s": 0, "step_s": "x", "data_wait_s": 0}\n', "step_s is 'x'"),
    ],
)
def test_a_damaged_run_to_measure_by_is_one_line(capsys, tmp_path, name, content, message):
    run = run_directory(tmp_path / "run", "NVIDIA H100 80GB HBM3", 0.45)
    (run / name).write_bytes(content)
    assert message in refusal(capsys, "--measured", str(run))


def test_a_search_lists_what_fits_and_by_how_much_the_rest_does_not(capsys):
    recipe, model = f"{ROOT}/configs/recipe/fitv2_256.yaml", f"{ROOT}/configs/model/xxl.yaml"
    assert main(["plan", model, recipe, "--gpus", "1", "--gpu", "h100", "--target-steps", "1000"]) == 0
    out = capsys.readouterr().out
    assert "layouts fit on 1 x h100" in out and "over by" in out and "1,000 steps, 256,000 images" in out
    assert main(["plan", model, recipe, "parallel.zero_stage=2", "--gpus", "8", "--best", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:5]]
    assert [row[3] for row in rows] == ["2", "2", "2"]
    times = [float(row[7]) for row in rows]
    assert times == sorted(times)
    assert "ZeRO 2, bf16" in next(line for line in lines if line.startswith("layout"))


def test_a_layout_that_does_not_fit_says_by_how_much(capsys):
    assert main(["plan", f"{ROOT}/configs/model/xxl.yaml"]) == 0
    out = capsys.readouterr().out
    one = plan_of("xxl", 1)
    assert one.spare_bytes < 0
    assert f"does not fit, over by {-one.spare_bytes / 2**30:.1f} GiB" in out
    total = max(one.memory.backward.total, one.memory.step.total)
    assert one.memory.peak == total and math.isclose(H100.memory_bytes - 2 * 2**30 - total, one.spare_bytes)


def test_the_plan_needs_no_torch():
    code = (
        "import sys; from fitscale.cli import main; "
        "assert main(['plan', 'configs/model/b.yaml', '--gpus', '8']) == 0; print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "False", result.stderr


def test_devices():
    assert device_reported_as("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_reported_as("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    assert device_reported_as("Tesla T4") is None
    assert find_device("cpu").peak_flops_per_s < 1e12
    for device in DEVICES.values():
        assert device.inter_node_bytes_per_s <= device.intra_node_bytes_per_s


def test_metrics_take_the_peak_from_the_table(monkeypatch):
    from fitscale.train.metrics import peak_flops_per_s

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops_per_s(torch.device("cuda")) == DEVICES["h200"].peak_flops_per_s
    assert peak_flops_per_s(torch.device("cpu")) is None
