"""What only a CUDA device can show: training, generation and 4 bits there. Small models; skipped where there is none."""

import pytest
import torch

from benchmarks import small_runs
from robofactory.config import ArchitectureConfig, LanguageConfig, ModelConfig, TowerConfig
from robofactory.errors import EXIT_STOPPED
from robofactory.model.lora import load_untrained, trained_tensors
from robofactory.model.openvla import OpenVLA, build_from_scratch
from robofactory.model.precision import autocast
from robofactory.model.weights import load_openvla
from robofactory.shapes import Batch
from tests.published import NUM_IDS, write_published
from tests.training.conftest import signals, stop_during  # noqa: F401  (signals is a fixture)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
CUDA = torch.device("cuda", 0)
NUM_TOKENS = 8


def make_batch(proprio_dim: int | None = None) -> Batch:
    """For a look-alike, and for a model from scratch with as many ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, NUM_IDS - 256, (4, 6), generator=generator)
    actions = torch.randint(NUM_IDS - 256, NUM_IDS, (4, NUM_TOKENS), generator=generator)
    pixels = torch.randn(4, 3, 6, 28, 28, generator=generator)
    proprio = None if proprio_dim is None else torch.randn(4, proprio_dim, generator=generator)
    return Batch(pixels, ids, torch.ones_like(ids, dtype=torch.bool), proprio, actions).to(CUDA)


def losses(metrics: list[dict]) -> list[float]:
    return [line[name] for line in metrics for name in ("train_loss", "val_loss") if name in line]


def test_a_training_on_cuda_learns_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Sums on a GPU are not in a fixed order, so the losses are near those of the run that was never stopped."""
    overrides = ["training.num_epochs=6", "training.learning_rate=3e-3"]
    with small_runs.home(tmp_path) as run:
        small_runs.start(*overrides)
        undisturbed = losses(small_runs.everything(run)["metrics"])
        run.rename(tmp_path / "undisturbed")
        with monkeypatch.context() as during:
            stop_during(during, update=9)
            with pytest.raises(SystemExit) as stopped:
                small_runs.start(*overrides)
        assert stopped.value.code == EXIT_STOPPED
        small_runs.start(*overrides, resume=True)
        resumed = losses(small_runs.everything(run)["metrics"])
    assert torch.cuda.max_memory_allocated(CUDA) > 0, "it was trained somewhere else"
    assert undisturbed[-1] < undisturbed[0] - 0.3
    assert resumed == pytest.approx(undisturbed, rel=0.03)


@pytest.mark.parametrize("in_float32", [False, True])
@torch.no_grad()
def test_no_draft_changes_a_token_on_cuda(in_float32):
    torch.manual_seed(0)
    tower, language = TowerConfig(32, 3, 2), LanguageConfig(64, 96, 3, 4)
    model: OpenVLA = build_from_scratch(ArchitectureConfig(28, tower, tower, language), NUM_IDS, 8, True).eval()
    for parameter in model.parameters():  # so that a token depends on those before it
        parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(CUDA).in_float32 = in_float32
    batch = make_batch(proprio_dim=8)
    anything = torch.randint(NUM_IDS - 256, NUM_IDS, (4, NUM_TOKENS), device=CUDA)
    with autocast(model):
        expected = model.generate(batch, NUM_TOKENS)
        half = torch.cat([expected[:, :4], anything[:, 4:]], dim=1)
        for draft in (expected, anything, half):
            assert torch.equal(model.generate(batch, NUM_TOKENS, draft=draft), expected)


def test_the_look_alike_in_4_bits_is_near_the_base_and_learns_on_cuda(tmp_path):
    pytest.importorskip("bitsandbytes")
    weights = write_published(tmp_path / "openvla")
    model = load_untrained(ModelConfig(quantize="nf4"), weights, None, CUDA)
    base, batch = load_openvla(weights, True, None, torch.bfloat16, CUDA), make_batch()
    with torch.no_grad(), autocast(model):
        expected = base.action_logits(batch).float()
        difference = (model.action_logits(batch).float() - expected).abs().max()
    assert 0 < difference < expected.abs().max(), "4 bits are near the base, and not the base"
    with torch.no_grad():  # as after training: a fresh adapter's B is zero, and so is the gradient of its A
        for parameter in trained_tensors(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with autocast(model):
        loss, *_ = model(batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained_tensors(model).values())
