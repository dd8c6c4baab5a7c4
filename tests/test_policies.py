"""Several policies answer several episodes at a time, and none of it shows in an answer."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from robofactory import checkpoint
from robofactory.codec.codec import Codec
from robofactory.codec.statistics import DatasetStatistics
from robofactory.config import load_recipe
from robofactory.model import precision
from robofactory.model.lora import mix, trained_tensors
from robofactory.policy import Policies, Policy
from robofactory.shapes import Batch
from tests.published import NUM_IDS, write_published
from tests.test_checkpoint import STATE, observation

NUM_STEPS = 4


def make_codec(recipe, scale: float = 1.0) -> Codec:
    """Agents differ in their statistics."""
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 8)) * ([scale] * 7 + [1.0])
    names = [f"joint{i}" for i in range(1, 8)] + ["gripper"]
    return Codec.create(recipe, {"some": DatasetStatistics.measure(actions, actions, names, "mean_std", {}, 5)})


@pytest.fixture(scope="module")
def tiny():
    """(models, codecs) of two agents, trained from scratch."""
    sizes = {"dino": "{embed_dim: 32, depth: 2, num_heads: 2}", "siglip": "{embed_dim: 32, depth: 2, num_heads: 2}"}
    sizes["language"] = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    overrides = [f"model.architecture.{name}={size}" for name, size in sizes.items()]
    recipe = load_recipe("robot_openvla_tiny", ["model.architecture.image_size=28", *overrides])
    codecs = {agent: make_codec(recipe, 1.0 + agent) for agent in (0, 1)}
    torch.manual_seed(0)
    return {agent: checkpoint.build_model(recipe, codec).eval() for agent, codec in codecs.items()}, codecs


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Checkpoints of two agents: adapters, also in the vision towers, and proprio projectors on one base."""
    directory = tmp_path_factory.mktemp("adapted")
    weights = write_published(directory / "weights")
    overrides = [f"model.model_name={weights}", "model.torch_dtype=float32", "model.lora_rank=4"]
    recipe = load_recipe("robot_openvla", [*overrides, "model.use_proprio=true", "model.lora_vision=true"])
    saved = {}
    for agent in (0, 1):
        codec = make_codec(recipe, 1.0 + agent)
        model = checkpoint.build_model(recipe, codec)
        torch.manual_seed(agent)
        with torch.no_grad():
            for parameter in trained_tensors(model).values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        saved[agent] = checkpoint.save(directory / f"run{agent}", "epoch_1", model, codec, recipe, STATE)
    return saved


def play(policies: Policies, rows_asking: list[set[int]]) -> dict[int, list]:
    """Row -> what its episode was answered; in each step the rows ask that are given."""
    memories = {row: policies.start_episode(row) for row in range(policies.num_rows)}
    answers = {row: [] for row in memories}
    for asking in rows_asking:
        seen = {row: [observation(100 * row + 10 * agent + len(answers[row])) for agent in (0, 1)] for row in asking}
        for row, answer in policies.act({row: (memories[row], seen[row]) for row in asking}).items():
            answers[row].append(({agent: action.tolist() for agent, action in answer[0].items()}, answer[1]))
    return answers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["tiny", "adapted"])
def test_an_episode_does_not_depend_to_the_bit_on_who_else_asks(kind, temperature, request):
    """Actions and the count of passes, whatever the number format; an episode may even wait while others go on."""
    if kind == "tiny":
        policies = Policies(*request.getfixturevalue("tiny"), num_rows=3, temperature=temperature)
    else:
        policies = Policies.load(request.getfixturevalue("adapted"), num_rows=3, temperature=temperature)
    together = play(policies, [{0, 1}, {0, 1, 2}, {0, 2}, {0, 1, 2}, {1, 2}])
    assert all(len(answers) == NUM_STEPS for answers in together.values())
    for row in range(3):
        assert play(policies, [{row}] * NUM_STEPS)[row] == together[row]
    assert together[0] != together[1] != together[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_a_batch_of_one_they_are_the_policies_one_by_one(tiny, temperature):
    answers = play(Policies(*tiny, num_rows=1, temperature=temperature), [{0}] * NUM_STEPS)[0]
    models, codecs = tiny
    policies = [Policy(models[agent], codecs[agent], temperature) for agent in models]
    for step, (actions, num_passes) in enumerate(answers):
        before = sum(policy.num_passes for policy in policies)
        alone = {
            agent: policy.act([observation(10 * agent + step)])[0].tolist() for agent, policy in enumerate(policies)
        }
        assert (actions, num_passes) == (alone, sum(policy.num_passes for policy in policies) - before)


def test_agents_share_the_memory_of_their_base_and_nothing_else(adapted):
    (first, *_), (second, *_) = checkpoint.load_models(list(adapted.values()))
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    trained = set(trained_tensors(first))
    assert len(trained) > 50 and trained == set(trained_tensors(second))
    assert {name for name in ours if ours[name] is theirs[name]} == ours.keys() - trained
    mixed = {id(parameter) for parameter in mix([first, second]).parameters()}
    assert mixed <= {id(parameter) for parameter in [*ours.values(), *theirs.values()]}, "mixing copied weights"


@torch.no_grad()
def test_in_a_mixed_batch_each_agent_has_the_logits_of_its_own_adapter(adapted):
    models = [model for model, *_ in checkpoint.load_models(list(adapted.values()))]
    alone_on_its_base = [checkpoint.load_model(path)[0] for path in adapted.values()]
    generator = torch.Generator().manual_seed(0)
    ids, actions = (torch.randint(low, high, (4, n), generator=generator) for low, high, n in ((3, NUM_IDS - 256, 6), (NUM_IDS - 256, NUM_IDS, 8)))  # fmt: skip
    pixels, proprio = torch.randn(4, 3, 6, 28, 28, generator=generator), torch.randn(4, 8, generator=generator)
    mixed = mix(models).action_logits(Batch(pixels, ids, torch.ones_like(ids, dtype=torch.bool), proprio, actions))
    for part, model in zip((slice(0, 2), slice(2, 4)), alone_on_its_base, strict=True):
        mask = torch.ones_like(ids[part], dtype=torch.bool)
        alone = model.action_logits(Batch(pixels[part], ids[part], mask, proprio[part], actions[part]))
        torch.testing.assert_close(mixed[part], alone, atol=1e-4, rtol=1e-5)
        assert (mixed[[2, 3, 0, 1]][part] - alone).abs().max() > 0.05, "adapters that do nothing would prove nothing"


def test_mixed_policies_act_as_each_does_by_itself(adapted, monkeypatch):
    """In float32, where two likeliest tokens are never as close as rounding."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    answers = play(Policies.load(adapted, num_rows=2), [{0, 1}] * NUM_STEPS)
    for agent, path in adapted.items():
        policy = Policy.load(path)
        for row in (0, 1):
            policy.start_episode(row)
            for step, (actions, _) in enumerate(answers[row]):
                assert actions[agent] == policy.act([observation(100 * row + 10 * agent + step)])[0].tolist()


# -------------------------------------------------------------------------------------------------------------- look


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_look_is_at_the_action_that_the_policy_takes(tiny, temperature, monkeypatch):
    """In float32, where two likeliest tokens are never as close as rounding."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    models, codecs = tiny
    policy, seen = Policy(models[1], codecs[1], temperature), [observation(3), observation(4)]
    looks = policy.look(seen)
    policy.start_episode(0)
    for look, action in zip(looks, policy.act(seen), strict=True):
        np.testing.assert_array_equal(look.action, action)
        assert (np.diff(look.values[:, :-1]) > 0).all(), "bins ascend; the last two decode alike"
        np.testing.assert_allclose(look.probabilities.sum(axis=1), 1.0, atol=1e-5)
        is_likeliest = look.chosen == look.probabilities.argmax(axis=1)
        assert is_likeliest.all() if temperature == 0.0 else not is_likeliest.all()


@torch.no_grad()
def test_a_look_has_the_softmax_of_the_logits_and_the_attention_to_each_part(tiny, monkeypatch):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    model, codec = tiny[0][0], tiny[1][0]
    policy, seen = Policy(model, codec), observation(3)
    (look,) = policy.look([seen])
    batch = codec.encode_observations([seen])
    batch = Batch(batch.pixel_values, batch.input_ids, batch.text_mask, batch.proprio, policy.last_tokens)
    weights: list[torch.Tensor] = []
    logits = model.action_logits(batch, weights)[0, :, -256:]
    np.testing.assert_allclose(look.probabilities, logits.softmax(dim=-1).flip(-1), atol=1e-6)
    assert look.chosen.tolist() == (codec.vocab_size - 1 - batch.action_tokens[0]).tolist()

    assert look.parts == ("start", "side", "overhead", "wrist", "proprio", "text", "actions before")
    np.testing.assert_allclose(look.attention.sum(axis=-1), 1.0, atol=1e-5)
    layers = torch.stack(weights)[:, 0]  # [layers, a, n]; 4 patches of 14 px and the global token a view
    starts = [0, 1, 6, 11, 16, 17, 17 + batch.input_ids.shape[1] - 1, layers.shape[-1]]
    for part, (start, end) in enumerate(pairwise(starts)):
        np.testing.assert_allclose(look.attention[..., part], layers[..., start:end].sum(dim=-1), atol=1e-6)
    for view, start in enumerate((2, 7, 12)):
        patches = layers[..., start : start + 4].mean(dim=(0, 1))
        np.testing.assert_allclose(look.heat[view], patches.reshape(2, 2), atol=1e-6)
    assert (look.attention[:, 0, -1] == 0).all() and (look.attention[:, 1:, -1] > 0).all(), "actions before the first"
    np.testing.assert_array_equal(look.pictures, codec.encode_observation(seen).pixel_values.permute(0, 2, 3, 1))


def test_every_agent_is_looked_at_through_its_own_adapter_and_remembers_nothing_of_it(adapted, monkeypatch):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    policies, seen = Policies.load(adapted, num_rows=2), [observation(0), observation(1)]
    memory = policies.start_episode(0)
    policies.act({1: (memory, seen)})
    before = {agent: (each.last_tokens.tolist(), each.generator.get_state().tolist()) for agent, each in memory.items()}
    looks = policies.look(memory, seen)
    assert before == {
        agent: (each.last_tokens.tolist(), each.generator.get_state().tolist()) for agent, each in memory.items()
    }
    for agent, path in adapted.items():
        (alone,) = Policy.load(path).look([seen[agent]])
        np.testing.assert_array_equal(looks[agent].chosen, alone.chosen)
        np.testing.assert_allclose(looks[agent].probabilities, alone.probabilities, atol=1e-4)
        np.testing.assert_allclose(looks[agent].attention, alone.attention, atol=1e-4)
    assert np.abs(looks[0].attention - looks[1].attention).max() > 1e-3, "equal adapters would prove nothing"


def test_a_policy_in_bfloat16_and_without_proprio_has_no_such_part_and_is_looked_at(tmp_path):
    weights = write_published(tmp_path / "weights")
    recipe = load_recipe("robot_openvla", [f"model.model_name={weights}"])
    codec = make_codec(recipe)
    (look,) = Policy(checkpoint.build_model(recipe, codec).eval(), codec).look([observation(0)])
    assert look.parts == ("start", "side", "overhead", "wrist", "text", "actions before")
    assert look.attention.shape[-1] == 6 and look.heat.shape == (3, 2, 2)
    np.testing.assert_allclose(look.attention.sum(axis=-1), 1.0, atol=1e-2)
    np.testing.assert_allclose(look.probabilities.sum(axis=-1), 1.0, atol=1e-5)
