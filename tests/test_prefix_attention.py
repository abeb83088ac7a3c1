"""prefix_attention against dense attention, its gradients, and what no segment may see."""

import numpy as np
import pytest
import torch

from cosmo_fast.ops.prefix_attention import Segments, prefix_attention, prefix_attention_reference


def segments(prompts, responses):
    """Prompt lengths and, for each prompt, its responses' lengths."""
    lengths = np.array([r for group in responses for r in group], dtype=np.int64)
    owner = np.repeat(np.arange(len(prompts)), [len(group) for group in responses])
    prompts = np.array(prompts, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(np.concatenate((prompts, lengths)))[:-1])).astype(np.int64)
    return Segments(starts[: len(prompts)], prompts, starts[len(prompts) :], lengths, owner)


LAYOUTS = {
    "one prompt alone": ([5], [[]]),
    "one token each": ([1], [[1]]),
    "ragged groups": ([7, 3, 12], [[4, 9], [1], [6, 2, 5]]),
    "a prompt without responses between others": ([4, 6, 5], [[3, 3], [], [2]]),
    "an empty response": ([4, 5], [[0, 3], [2]]),
    "eight long responses": ([40], [[17, 20, 33, 16, 25, 31, 18, 40]]),
}


def inputs(layout, heads, shared, size, dtype):
    total = int(layout.prompt_lengths.sum() + layout.response_lengths.sum())
    generator = torch.Generator().manual_seed(0)
    shapes = ((total, heads, size), (total, shared, size), (total, shared, size))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads, shared, size", [(4, 4, 16), (8, 2, 64), (8, 1, 80), (6, 3, 128)])
def test_values_and_gradients_equal_dense_attention_in_fp64(name, heads, shared, size):
    layout = segments(*LAYOUTS[name])
    q, k, v = inputs(layout, heads, shared, size, torch.float64)
    ours, dense = prefix_attention(q, k, v, layout), prefix_attention_reference(q, k, v, layout)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    grad = torch.randn_like(dense)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(dense, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1.5), (torch.bfloat16, 1.25)])
def test_error_stays_near_that_of_dense_attention_in_the_same_dtype(dtype, bound):
    layout = segments(*LAYOUTS["eight long responses"])
    q, k, v = inputs(layout, 8, 2, 64, dtype)
    truth = prefix_attention_reference(*(x.double() for x in (q, k, v)), layout)
    error = (prefix_attention(q, k, v, layout).double() - truth).norm()
    assert error <= bound * (prefix_attention_reference(q, k, v, layout).double() - truth).norm()


@pytest.mark.parametrize("poisoned", ["prompt", "response"])
def test_nan_in_one_segment_reaches_no_other(poisoned):
    layout = segments([7, 3, 12], [[4, 9], [1, 2], [6, 2, 5]])
    q, k, v = inputs(layout, 4, 2, 16, torch.float32)
    clean = prefix_attention(q, k, v, layout).detach()
    start = layout.prompt_starts[1] if poisoned == "prompt" else layout.response_starts[3]
    length = layout.prompt_lengths[1] if poisoned == "prompt" else layout.response_lengths[3]
    touched = torch.zeros(len(q), dtype=torch.bool)
    touched[start : start + length] = True
    if poisoned == "prompt":
        for response in np.flatnonzero(layout.response_prompt == 1):
            begin = layout.response_starts[response]
            touched[begin : begin + layout.response_lengths[response]] = True
    with torch.no_grad():
        for x in (q, k, v):
            x[start : start + length] = float("nan")
    out = prefix_attention(q, k, v, layout)
    torch.testing.assert_close(out[~touched], clean[~touched], rtol=0, atol=0)
    grad = torch.where(touched[:, None, None], 0.0, torch.randn_like(clean))
    for given in torch.autograd.grad(out, (q, k, v), grad):
        # A response's NaN comes back to its own prompt through 0 · NaN; other prompts stay clean.
        rest = ~touched
        if poisoned == "response":
            rest[layout.prompt_starts[1] : layout.prompt_starts[1] + layout.prompt_lengths[1]] = False
        assert given[rest].isfinite().all()


def test_a_head_count_that_is_no_multiple_and_uncovered_rows_are_refused():
    layout = segments([5], [[2]])
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        prefix_attention(torch.zeros(7, 4, 8), torch.zeros(7, 3, 8), torch.zeros(7, 3, 8), layout)
    with pytest.raises(ValueError, match="covers 7 rows, the batch has 9"):
        prefix_attention(torch.zeros(9, 4, 8), torch.zeros(9, 4, 8), torch.zeros(9, 4, 8), layout)
