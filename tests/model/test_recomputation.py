"""What training does not keep: activations that are computed again, and graphs of what is frozen."""

import pytest
import torch

from robofactory.model.lora import train_adapters
from robofactory.model.openvla import OpenVLA
from tests.model.test_openvla import make_batch, make_model, with_padding


def with_adapters(dropout: float = 0.0) -> OpenVLA:
    model = make_model()
    train_adapters(model, rank=4, alpha=8, dropout=dropout)
    with torch.no_grad():  # a fresh adapter's B is zero, and its A then gets no gradient
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model.train()


def step(model: OpenVLA, num_recomputed: int | None, padded: bool, autocast: bool) -> dict[str, torch.Tensor]:
    model.num_recomputed_layers = num_recomputed
    batch = with_padding(make_batch(), [6, 3, 5], "right") if padded else make_batch()
    torch.manual_seed(1)  # of the dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, *_ = model(batch, 2.0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients | {"loss": loss.detach()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["whole", "adapters", "adapters with dropout"])
def test_recomputed_activations_give_the_same_loss_and_gradients_bit_for_bit(kind: str, padded: bool):
    model = make_model().train() if kind == "whole" else with_adapters(dropout=0.3 if "dropout" in kind else 0.0)
    for autocast in (False, True):
        kept = step(model, 0, padded, autocast)
        assert kept["loss"] > 0 and len(kept) > 10
        for num_recomputed in (1, 2, None):
            recomputed = step(model, num_recomputed, padded, autocast)
            assert kept.keys() == recomputed.keys()
            wrong = [name for name in kept if not torch.equal(kept[name], recomputed[name])]
            assert not wrong, f"{num_recomputed} layers recomputed: {wrong}"


def test_each_recomputed_layer_keeps_less():
    def kept_bytes(num_recomputed: int | None) -> int:
        model, sizes = with_adapters(), []
        model.num_recomputed_layers = num_recomputed
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(make_batch())
        return sum(sizes)

    kept = [kept_bytes(n) for n in (0, 1, 2, 3)]
    assert kept[0] > kept[1] > kept[2] and kept_bytes(None) == kept[3] < kept[2]


def test_nothing_is_recomputed_where_no_gradient_is_asked_for(monkeypatch):
    """Validation and generation call the layers directly, whatever the recipe says."""
    from robofactory.model import openvla

    model, called = make_model(), []
    model.num_recomputed_layers = None
    monkeypatch.setattr(openvla, "checkpoint", lambda *_, **__: called.append(1))
    with torch.no_grad():
        model(make_batch())
    model.generate(make_batch(), 8)
    assert not called


def test_frozen_towers_and_projector_leave_no_graph_and_get_no_gradient():
    model, batch = with_adapters(), make_batch()
    visual = model.projector(model.vision_backbone(batch.pixel_values))
    assert visual.grad_fn is None, "the towers' activations would be kept for a gradient that nobody uses"
    model(batch)[0].backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("proprio_projector") for name in with_gradient)
