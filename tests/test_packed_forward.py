"""The packed forward equals transformers' own on every family, token by token and gradient by gradient."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, IMAGE, WITH_PICTURES, make_prompt, padded_logps, save_pictures, tiny_policy

from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan


@pytest.fixture(params=FAMILIES)
def world(request, tmp_path):
    policy, plain = tiny_policy(family=request.param)
    square, portrait, wide = save_pictures(tmp_path)
    prompts = [
        make_prompt(policy, [7, square, 8, 9]),
        make_prompt(policy, [10, 11, 12, 13, 14]),
        make_prompt(policy, [7, portrait, 15, square, 16, 17]),
        make_prompt(policy, [20, wide]),  # ends in a picture
    ]
    rng = np.random.default_rng(0)
    sizes = ([3, 8, 1], [5], [2, 2, 6, 4], [7, 3])
    responses = [[rng.integers(7, 97, n) for n in group] for group in sizes]
    responses[1][0][2] = IMAGE  # a policy may sample a picture token: it is a token like any other
    return policy, plain, prompts, responses


with_pictures = pytest.mark.parametrize("world", WITH_PICTURES, indirect=True)
one_family = pytest.mark.parametrize("world", ["qwen2_5_vl"], indirect=True)


def packed(policy, prompts, responses):
    plan = Plan(prompts, responses)
    return policy.logprobs(plan, Vision(policy).features(plan.media))[0]


def one_by_one(plain, policy, prompts, responses):
    out = []
    for prompt, group in zip(prompts, responses, strict=True):
        out += [padded_logps(plain, policy, prompt, r) for r in group]
    return torch.cat(out)


@pytest.mark.parametrize("frozen", [False, True], ids=["tower learns", "tower frozen"])
def test_logprobs_and_gradients_equal_the_unpacked_model(world, frozen):
    policy, plain, prompts, responses = world
    responses[1][0][2] = 40  # transformers takes a sampled picture token for a picture
    policy.freeze_vision_tower(frozen)
    assert policy.vision_frozen or policy.vision_parameters
    ours, theirs = packed(policy, prompts, responses), one_by_one(plain, policy, prompts, responses)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weights = torch.randn_like(ours.detach())
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    tower = {id(p) for p in policy.vision_parameters}
    for (name, a), b in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        if frozen and id(a) in tower:
            assert a.grad is None
            continue
        error = (a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: relative error of the gradient {error}"


def test_a_picture_token_that_a_policy_samples_is_a_token_like_any_other(world):
    policy, _, prompts, responses = world
    plan = Plan(prompts, responses)
    assert (plan.targets == IMAGE).any() and len(plan.image_rows) == sum(m.rows for p in prompts for m in p.media)
    embeddings = policy.model.get_input_embeddings()
    sampled = int(np.flatnonzero(plan.tokens[plan.prompt_tokens :] == IMAGE)[0]) + plan.prompt_tokens
    seen = {}
    hook = policy.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    policy.hidden(plan, Vision(policy).features(plan.media))
    hook.remove()
    assert torch.equal(seen["inputs_embeds"][0, sampled], embeddings.weight[IMAGE])


def test_a_photo_stored_on_its_side_is_planned_as_it_is_decoded(tmp_path, small_world):
    from PIL import ExifTags, Image

    from cosmo_fast.data.encode import Encoder
    from cosmo_fast.data.rows import single_row
    from cosmo_fast.models import load_policy

    photo, exif = Image.new("RGB", (112, 56), "red"), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    policy = load_policy(small_world / "model")
    prompt = Encoder(policy).prompt(single_row("What is this?", [tmp_path / "photo.jpg"]))
    assert prompt.media[0].thw == (1, 4, 2)
    assert Vision(policy).features(list(prompt.media)).shape[0] == 8, "the tower's grid is checked against the plan's"


def test_shared_packed_and_alone_agree(world):
    policy, _, prompts, responses = world
    together = packed(policy, prompts, responses)
    alone = [packed(policy, [p], [[r]]) for p, group in zip(prompts, responses, strict=True) for r in group]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_permuting_responses_and_groups_permutes_the_logprobs(world):
    policy, _, prompts, responses = world
    base = packed(policy, prompts, responses).split([len(r) for g in responses for r in g])
    order = [2, 0, 3, 1]
    flipped = [responses[i][::-1] for i in order]
    moved = packed(policy, [prompts[i] for i in order], flipped).split([len(r) for g in flipped for r in g])
    starts = np.cumsum([0] + [len(g) for g in responses])
    wanted = [base[j] for i in order for j in reversed(range(starts[i], starts[i + 1]))]
    for a, b in zip(moved, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@with_pictures
def test_one_picture_in_two_prompts_is_encoded_once_and_learns_from_both(world):
    policy, plain, prompts, responses = world
    plan = Plan([prompts[0], prompts[2]], [responses[0], responses[2]])
    assert len(plan.media) == 2 and len(plan.image_rows) == sum(m.rows for i in (0, 2) for m in prompts[i].media)
    ours = packed(policy, [prompts[0], prompts[2]], [responses[0], responses[2]])
    theirs = one_by_one(plain, policy, [prompts[0], prompts[2]], [responses[0], responses[2]])
    ours.sum().backward()
    theirs.sum().backward()
    name = next(n for n, p in policy.model.named_parameters() if p is policy.vision_parameters[0])
    a, b = (m.get_parameter(name).grad for m in (policy.model, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@with_pictures
def test_a_frozen_tower_runs_once_for_a_picture(world, monkeypatch):
    policy, _, prompts, _ = world
    policy.freeze_vision_tower(True)
    vision, calls = Vision(policy), []
    run = policy.family.vision_features
    monkeypatch.setattr(policy.family, "vision_features", lambda *a: calls.append(1) or run(*a))
    media = Plan(prompts).media
    first, second = vision.features(media), vision.features(media)
    assert len(calls) == 1 and torch.equal(first, second)
    vision.forget()
    vision.features(media)
    assert len(calls) == 2


def test_the_model_without_a_plan_is_refused(world):
    policy, *_ = world
    with pytest.raises(ValueError, match="got no plan"):
        policy.model(input_ids=torch.tensor([[7, 8]]))


def test_an_empty_prompt_is_refused():
    from cosmo_fast.plan import Prompt

    with pytest.raises(ValueError, match=r"rows\.jsonl:3: the prompt has no tokens"):
        Plan([Prompt(np.array([], dtype=np.int64), (), {}, "", "rows.jsonl:3")])


@one_family
def test_equal_plans_have_equal_hashes_and_others_do_not(world):
    _, _, prompts, responses = world
    before = Plan(prompts, responses).hash
    assert before == Plan(prompts, responses).hash
    responses[0][0][0] += 1
    assert before != Plan(prompts, responses).hash
