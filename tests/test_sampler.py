"""Sampling: the log-probs that training would give, greedy tokens that transformers would give, streams of its own."""

import re

import numpy as np
import pytest
import torch
from tiny import END, FAMILIES, IMAGE, VOCAB, make_prompt, padded_logits, save_pictures, tiny_policy
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cosmo_fast.models.vision import Vision
from cosmo_fast.plan import Plan
from cosmo_fast.rollout import Sampler, SamplingParams
from cosmo_fast.rollout.draw import _filtered, sample
from cosmo_fast.rollout.stops import StopStrings
from cosmo_fast.rollout.store import Rows, Store


def make_world(folder, family="qwen2_5_vl"):
    policy, plain = tiny_policy(family=family)
    square, portrait, _ = save_pictures(folder)
    pieces = [7, square, 8, 9], [10, 11], [7, portrait, 15, square, 16], [9, 8, 7, 6]
    return policy, plain, [make_prompt(policy, p) for p in pieces]


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def sampler(policy, batch_size=64):
    return Sampler(policy, Vision(policy), batch_size)


def flat(groups, name="ids"):
    return [getattr(c, name).tolist() for group in groups for c in group]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_and_entropies_equal_the_training_forward_so_the_first_ratio_is_1(tmp_path, family):
    policy, _, prompts = make_world(tmp_path, family)
    groups = sampler(policy, 10).generate(prompts, SamplingParams(24, temperature=1.7), num_generations=5, seed=3)
    assert len({len(c.ids) for g in groups for c in g}) > 3, "the lengths must differ for responses to leave"
    plan = Plan(prompts, [[c.ids for c in g] for g in groups])
    with torch.no_grad():
        logps, entropies = policy.logprobs(plan, Vision(policy).features(plan.media), temperature=1.7)
    recorded = torch.tensor(sum(flat(groups, "logps"), []))
    assert torch.expm1(logps - recorded).abs().max() < 1e-5
    torch.testing.assert_close(torch.tensor(sum(flat(groups, "entropies"), [])), entropies, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(tmp_path, family):
    policy, plain, prompts = make_world(tmp_path, family)
    groups = sampler(policy).generate(prompts, SamplingParams(16, temperature=0))
    for prompt, [completion] in zip(prompts, groups, strict=True):
        if not prompt.media:
            given = torch.from_numpy(prompt.ids)[None]
            out = plain.generate(given, max_new_tokens=16, do_sample=False, eos_token_id=END, pad_token_id=0)
            assert completion.ids.tolist() == out[0, len(prompt.ids) :].tolist()
        elif IMAGE not in completion.ids:
            best = padded_logits(plain, policy, prompt, completion.ids)[:-1].argmax(-1)
            assert completion.ids.tolist() == best.tolist()


def test_features_of_a_frozen_tower_kept_from_sampling_are_ordinary_tensors_that_training_may_save(world):
    policy, _, prompts = world
    policy.freeze_vision_tower(True)
    vision = Vision(policy)
    Sampler(policy, vision).generate(prompts, SamplingParams(2))
    assert vision._features and not any(x.is_inference() for x in [*vision._features.values(), *vision._grids.values()])


def test_a_response_does_not_depend_on_its_batch_mates(world):
    policy, _, prompts = world
    params = SamplingParams(12)
    wide = sampler(policy).generate(prompts, params, num_generations=4, seed=9)
    narrow = sampler(policy, batch_size=4).generate(prompts, params, num_generations=4, seed=9)
    short = Sampler(policy, Vision(policy), max_tokens=12).generate(prompts, params, num_generations=4, seed=9)
    assert flat(wide) == flat(narrow) == flat(short)
    other = sampler(policy).generate(prompts, params, num_generations=4, seed=10)
    assert flat(wide) != flat(other)


def spy(monkeypatch, owner, name):
    """What the method ``name`` is called with and returns, call by call."""
    method, calls = getattr(owner, name), []

    def spied(self, *args, **options):
        calls.append((args, options, method(self, *args, **options)))
        return calls[-1][2]

    monkeypatch.setattr(owner, name, spied)
    return calls


def test_more_groups_than_slots_give_the_tokens_of_one_big_batch_in_reused_rows(world, monkeypatch):
    policy, _, prompts = world
    prompts, params = prompts * 3, SamplingParams(16, temperature=1.3)
    whole = sampler(policy).generate(prompts, params, num_generations=3, seed=2)
    steps, takes = spy(monkeypatch, Store, "begin"), spy(monkeypatch, Rows, "take")
    served = sampler(policy, 7).generate(prompts, params, num_generations=3, seed=2)
    assert flat(served) == flat(whole)
    tables = [args[1] for args, *_ in steps]
    assert any({*(t[:, 5] > 0)} == {True, False} for t in tables), "no step admitted prompts beside live responses"
    assert max((t[:, 5] > 0).sum() for t in tables) <= 7
    taken = [(start, *args) for args, _, start in takes if start is not None]
    assert len(taken) == 12 * 4 and len({*taken}) < len(taken) / 2, "rows must be used again"


def test_a_small_store_admits_fewer_groups_at_once_and_in_order(world, monkeypatch):
    policy, _, prompts = world  # 2 layers × 2 heads × 8 × 4 bytes, keys and values: 4096 tokens in 1 MiB
    prompts, params = prompts * 2, SamplingParams(150, temperature=3.0)
    whole = sampler(policy).generate(prompts, params, num_generations=8, seed=5)
    steps = spy(monkeypatch, Store, "begin")
    made = []
    monkeypatch.setattr("cosmo_fast.rollout.sampler.Rows", lambda size: made.append(Rows(size)) or made[-1])
    small = Sampler(policy, Vision(policy), kv_cache_mib=1)
    served = small.generate(prompts, params, num_generations=8, seed=5)
    assert flat(served) == flat(whole)
    live = max((args[1][:, 5] > 0).sum() for args, *_ in steps)
    assert 24 <= live <= 27, f"{live} responses of 150 tokens in 4096 rows"
    admitted = [n for args, *_ in steps for n in args[1][args[1][:, 5] == 0, 3]]
    assert admitted == [len(p.ids) for p in prompts]
    assert [rows.free for rows in made] == [[(0, 4096)]], "every row is given back"


def test_a_group_that_does_not_fit_the_store_is_refused_before_sampling(world):
    policy, _, prompts = world
    longest = max(len(p.ids) for p in prompts)
    need = (
        rf"num_generations=8 .*max_completion_length=512 to a prompt of {longest} tokens need 1\.0 MiB.*kv_cache_mib=1"
    )
    with pytest.raises(ValueError, match=need):
        Sampler(policy, Vision(policy), kv_cache_mib=1).generate(prompts, SamplingParams(512), num_generations=8)


def test_pictures_are_encoded_alike_whatever_the_batch(world, monkeypatch):
    policy, _, prompts = world
    for max_tokens, lots in ((1000, 1), (14, 3)):
        seen = []
        for batch_size in (64, 3):
            calls = spy(monkeypatch, Vision, "features")
            Sampler(policy, Vision(policy), batch_size, max_tokens).generate(prompts, SamplingParams(4))
            seen.append([[m.key for m in args[0]] for args, *_ in calls])
            monkeypatch.undo()
        assert seen[0] == seen[1] and len(seen[0]) <= lots


def test_rows_given_back_are_found_again():
    rng, rows, held = np.random.default_rng(0), Rows(100), []
    for _ in range(500):
        if held and rng.random() < 0.5:
            rows.give(*held.pop(rng.integers(len(held))))
        length, above = int(rng.integers(1, 20)), bool(rng.random() < 0.5)
        start = rows.take(length, above)
        used = np.zeros(100, dtype=int)
        for a, n in held:
            used[a : a + n] += 1
        fits = [i for i in range(101 - length) if not used[i : i + length].any()]
        assert start == (None if not fits else fits[-1 if above else 0])
        held += [] if start is None else [(start, length)]
    for interval in held:
        rows.give(*interval)
    assert rows.free == [(0, 100)]


def test_an_ended_response_keeps_its_end_token_and_a_cut_one_says_so(world):
    policy, _, prompts = world
    for group in sampler(policy).generate(prompts, SamplingParams(20, temperature=1.5), num_generations=8):
        for c in group:
            assert c.ended == (c.ids[-1] == END) and END not in c.ids[:-1]
            assert len(c.ids) == len(c.logps) and (c.ended or len(c.ids) == 20)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]]).expand(20000, -1)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    tokens, logp, _ = sample(logits, SamplingParams(1, temperature=2.0), uniform)
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=4) / 20000, expected, rtol=0, atol=0.015)
    torch.testing.assert_close(logp, expected.log()[tokens])


@pytest.mark.parametrize(
    "filters, allowed",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.4}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 1, "min_p": 1.0}, {0}),
    ],
)
def test_filters_leave_what_they_promise(filters, allowed):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    tokens, *_ = sample(logits, SamplingParams(1, **filters), torch.linspace(0, 1 - 1e-7, 2000))
    assert set(tokens.tolist()) == allowed


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_k": 7, "top_p": 0.8, "min_p": 0.2}, {"top_p": 0.7}, {"min_p": 0.3}]
)
def test_filters_keep_what_a_full_stable_sort_keeps(filters):
    logits = torch.randn(64, 53, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # with many equals
    p, params = logits.softmax(-1), SamplingParams(1, **filters)
    ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
    drop = (torch.arange(53) >= (params.top_k or 53)) | (ordered < params.min_p * ordered[:, :1])
    left = ordered[:, : params.top_k or 53].sum(-1, keepdim=True)
    drop |= (ordered.cumsum(-1) - ordered >= params.top_p * left) & (params.top_p < 1)
    wanted = torch.zeros_like(p).scatter_(1, order, ordered.masked_fill(drop, 0))
    weights, ids = _filtered(p, params)
    assert torch.equal(weights if ids is None else torch.zeros_like(p).scatter_(1, ids, weights), wanted)


@pytest.mark.parametrize("filters", [{"top_k": 10, "top_p": 0.8}, {"top_k": 10, "top_p": 0.8, "min_p": 0.1}])
def test_filters_together_keep_what_transformers_keeps(filters):
    logits = torch.randn(200, 53, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(filters["top_p"])(None, TopKLogitsWarper(filters["top_k"])(None, logits))
    if "min_p" in filters:
        wanted = MinPLogitsWarper(filters["min_p"])(None, wanted)
    weights, ids = _filtered(logits.softmax(-1), SamplingParams(1, **filters))
    kept = weights if ids is None else torch.zeros_like(logits).scatter_(1, ids, weights)
    assert torch.equal(kept > 0, wanted > -torch.inf)


@pytest.mark.parametrize("width", [1, 2, 31, 97, 1000])
def test_a_draw_is_the_inverse_of_the_distribution_function(width):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(4000, width, generator=generator).mul_(3)
    logits[:, ::3] = -torch.inf if width > 1 else 0  # columns that may never be drawn
    uniform = torch.rand(4000, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0, 1 - 2.0**-53])
    tokens, logps, entropies = sample(logits, SamplingParams(1), uniform)
    running = logits.double().softmax(-1).cumsum(-1)
    below = torch.where(tokens > 0, running.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0)
    above = running.gather(1, tokens[:, None])[:, 0]
    assert ((below - 1e-6 <= uniform) & (uniform <= above + 1e-6)).all()
    assert torch.isfinite(logps).all() and torch.isfinite(entropies).all()


class Pieces:
    """A tokenizer whose token i is a short text; ``special`` ones are skipped."""

    def __init__(self, special=()):
        letters = "abc\u00e9 "
        self.pieces = [letters[i % 5] * (1 + i % 2) + letters[i // 5 % 5] for i in range(VOCAB)]
        self.all_special_ids, self.added_tokens_decoder, self.eos_token_id = list(special), {}, END

    def __len__(self):
        return len(self.pieces)

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(self.pieces[i] for i in row if i not in self.all_special_ids) for row in rows]


def test_ids_that_the_tokenizer_does_not_know_do_not_hide_a_stop():
    tokenizer = Pieces()
    a, b = (tokenizer.pieces.index(text) for text in ("aa", "bb"))
    stops = StopStrings(tokenizer, ["aabb"])
    unknown = [len(tokenizer) + 5] * 6
    tokenizer.batch_decode = lambda rows, skip_special_tokens: ["".join(tokenizer.pieces[i] for i in r) for r in rows]
    assert stops.completed([np.array([a, *unknown, b]), np.array([a, *unknown])]).tolist() == [True, False]


def first_stop(tokenizer, ids, stops):
    """The length after which the text of ``ids`` contains a stop, or None; by decoding every beginning."""
    texts = tokenizer.batch_decode([ids[:n] for n in range(1, len(ids) + 1)], skip_special_tokens=True)
    return next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stops)), None)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(world):
    policy, _, prompts = world
    policy.tokenizer = Pieces(special=[END, IMAGE, 9, 10, 11])
    stops, params = ["cab", "b aa ", "\u00e9\u00e9 "], {"max_completion_length": 24, "temperature": 2.0}
    free = sampler(policy).generate(prompts, SamplingParams(**params), num_generations=12)
    stopped = sampler(policy).generate(prompts, SamplingParams(**params, stop_strings=stops), num_generations=12)
    ends = []
    for whole, cut in zip(sum(free, []), sum(stopped, []), strict=True):
        ends.append(first_stop(policy.tokenizer, whole.ids, stops))
        assert cut.ids.tolist() == whole.ids[: ends[-1]].tolist()
        assert len(cut.logps) == len(cut.entropies) == len(cut.ids)
        assert cut.ended == (ends[-1] is not None or whole.ended)
    assert sum(n is None for n in ends) > 9 and len({*ends}) > 5


def test_stops_are_found_in_the_bytes_of_a_real_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "</answer> the end. \U0001f600 na\u00efve </ans swer> \n\n yes"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    stops, rng, found = ["swer>", "\U0001f600", "e\n\n", " the"], np.random.default_rng(0), []
    pieces = [tokenizer.encode(p) for p in ("<", "/", "answer", "s", "wer", ">", "\U0001f600", "e", "\n", " th")]
    choices = sorted({i for p in pieces for i in p} | {tokenizer.eos_token_id})
    finder = StopStrings(tokenizer, stops)
    for _ in range(150):
        ids = rng.choice(choices, 25)
        wanted = first_stop(tokenizer, ids, stops)
        got = next((n for n in range(1, 26) if finder.completed([ids[:n]])[0]), None)
        assert got == wanted
        found.append(wanted)
    assert len({*found}) > 10


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"max_completion_length": 0}]
    + [{"stop_strings": "x"}, {"stop_strings": [""]}],
)
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(bad))}={next(iter(bad.values()))!r}")):
        SamplingParams(**bad)


def test_more_generations_than_the_batch_holds_is_refused(world):
    policy, _, prompts = world
    with pytest.raises(ValueError, match="num_generations=8 is over sampling_batch_size=4"):
        sampler(policy, 4).generate(prompts, SamplingParams(4), num_generations=8)
