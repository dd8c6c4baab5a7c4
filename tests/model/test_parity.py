"""Equality with the official OpenVLA code on its recorded outputs."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robofactory.model.openvla import OpenVLA
from robofactory.model.weights import load_openvla
from robofactory.shapes import Batch
from tests.official import FIXTURES

TOLERANCE = 1e-5  # float32; a larger difference is a bug, not noise


@dataclass
class Official:
    model: OpenVLA
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]

    @property
    def pixel_values(self) -> Tensor:
        return self.tensors["pixel_values"][:, None]  # [b, v=1, 6, h, w]

    def batch(self, input_ids: Tensor, action_tokens: Tensor | None = None) -> Batch:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        return Batch(self.pixel_values, input_ids, mask, action_tokens=action_tokens)


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda directory: directory.name)
def official(request: pytest.FixtureRequest) -> Official:
    scalars = json.loads((request.param / "expected.json").read_text())
    model = load_openvla(request.param, global_token=False, timm_overrides=scalars["timm_overrides"])
    return Official(model, load_file(request.param / "expected.safetensors"), scalars)


@torch.no_grad()
def test_patch_features_and_projection_equal_the_official_ones(official: Official):
    features = official.model.vision_backbone(official.pixel_values)
    torch.testing.assert_close(features, official.tensors["patch_features"], atol=TOLERANCE, rtol=0)
    projected = official.model.projector(features)
    torch.testing.assert_close(projected, official.tensors["projected"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_logits_after_the_prompt_equal_the_official_ones(official: Official):
    any_token = torch.tensor([[31744]])
    logits = official.model.action_logits(official.batch(official.tensors["input_ids"], any_token))
    expected = official.tensors["prompt_logits_last"]
    torch.testing.assert_close(logits[:, 0], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_training_logits_and_loss_equal_the_official_ones(official: Official):
    ids, labels = official.tensors["train_input_ids"], official.tensors["train_labels"]
    num_prompt = int((labels == -100).sum())
    batch = official.batch(ids[:, :num_prompt], ids[:, num_prompt:])
    logits = official.model.action_logits(batch)
    torch.testing.assert_close(logits, official.tensors["train_action_logits"], atol=TOLERANCE, rtol=0)
    loss, *_ = official.model(batch)
    torch.testing.assert_close(loss, official.tensors["train_loss"][0], atol=TOLERANCE, rtol=0)


def test_greedy_tokens_equal_the_official_ones(official: Official):
    tokens = official.model.generate(official.batch(official.tensors["input_ids"]), num_tokens=8)
    assert tokens.tolist() == [official.scalars["greedy_action_tokens"]]
