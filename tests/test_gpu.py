"""Training on a GPU: FiTv2-B in bf16 against the CPU in fp32. Needs one CUDA device; the CPU's share takes a minute."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fitscale.config.files import read_jsonl
from fitscale.data.build_index import build_index
from fitscale.data.shards import Sample, ShardSetMeta, Variant, write_shards
from fitscale.flow.transfer import send
from fitscale.run.layout import RunDir

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """64 smooth latents of 4 channels, 64 to 256 tokens."""
    folder = tmp_path_factory.mktemp("latents") / "shards"
    chance = np.random.default_rng(0)
    meta = ShardSetMeta("vae", factor=8, scaling=0.18215, channels=4, num_classes=1000, recipe={})
    samples = []
    for number in range(64):
        height, width = 16 + 4 * (number % 5), 16 + 4 * (number % 4)
        array = np.repeat(np.repeat(chance.standard_normal((4, height // 4, width // 4)), 4, 1), 4, 2)
        samples.append(Sample(f"latent-{number:02d}", number % 1000, [Variant(array.astype(np.float16))]))
    write_shards(folder, samples, meta, 64)
    build_index(folder)
    return folder


def arguments(run_dir: Path, shards: Path, model: str, *overrides: str) -> list[str]:
    """What `fitscale` is given to train a published size of model."""
    return [
        *("train", str(ROOT / "configs" / "model" / f"{model}.yaml"), f"run.dir={run_dir}", f"data.shards={shards}"),
        *("batch.global_batch_size=8", "batch.pack_tokens=2048", "data.num_workers=0", "optim.lr=1e-4"),
        *("evaluation.points=0", *overrides),
    ]


def losses(run_dir: Path, shards: Path, *overrides: str) -> list[float]:
    """Loss of every step of `fitscale train` in a process of its own."""
    command = [sys.executable, "-m", "fitscale", *arguments(run_dir, shards, "b", *overrides)]
    subprocess.run(command, check=True, cwd=ROOT)
    return [row["loss"] for row in read_jsonl(RunDir(run_dir).metrics)]


def test_tensors_are_sent_while_the_device_is_busy():
    device, numbers = torch.device("cuda"), torch.arange(1_000_000)
    send(numbers, device)  # what is pinned once is kept
    torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
    queued = torch.cuda.Event()
    queued.record()
    sent = send(numbers, device)
    assert not queued.query(), "the host has waited for the device"
    assert torch.equal(sent.cpu(), numbers) and send(sent, device) is sent


def synchronisations(run_dir: Path, shards: Path, model: str, pack_tokens: int) -> float:
    """How often the host waits for the device in a step of `fitscale train`, start and end left out."""
    program = "import torch; torch.cuda.set_sync_debug_mode('warn'); from fitscale.cli import main; main()"
    counts = []
    for steps in (4, 8):
        asked = ("run.device=cuda", f"run.steps={steps}", f"batch.pack_tokens={pack_tokens}")
        given = arguments(run_dir / str(steps), shards, model, *asked)
        command = [sys.executable, "-W", "always", "-c", program, *given]
        ended = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        counts.append(ended.stderr.count("synchronizing CUDA operation"))
    return (counts[1] - counts[0]) / 4


@pytest.mark.parametrize("model", ["b", "fit_b", "flag_b", "dimr_b_2r", "terdit_b"])
def test_the_host_waits_no_more_often_for_many_packs_than_for_one(tmp_path, latents, model):
    one = synchronisations(tmp_path / "one", latents, model, 4096)
    assert synchronisations(tmp_path / "many", latents, model, 512) == one <= 3


def test_fifty_steps_of_b_on_a_gpu_follow_the_cpu(tmp_path, latents):
    on_gpu = losses(tmp_path / "gpu", latents, "run.device=cuda", "run.steps=50")
    on_cpu = losses(tmp_path / "cpu", latents, "run.device=cpu", "run.steps=3")
    assert len(on_gpu) == 50 and all(np.isfinite(on_gpu))
    assert on_gpu[:3] == pytest.approx(on_cpu, abs=2e-2)
    assert np.mean(on_gpu[-10:]) < np.mean(on_gpu[:10])


def test_precisions_and_stages_agree_on_a_gpu(tmp_path, latents):
    fp32 = losses(tmp_path / "fp32", latents, "run.device=cuda", "run.steps=5", "parallel.precision=fp32")
    for stage in (1, 2, 3):
        overrides = ("run.device=cuda", "run.steps=5", f"parallel.zero_stage={stage}")
        assert losses(tmp_path / f"zero{stage}", latents, *overrides) == pytest.approx(fp32, abs=2e-2)
