"""SQuat against the authors' reference vectors and against independent linear algebra."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quant, squat
from pallas_kernels.quant import QuantFormat

COMPAT = QuantFormat(scales="float32", shrinks=(1.0,))
CASES = [("c02", 64, 0.001), ("c05", 32, 0.1), ("c08", 64, 0.1), ("c11", 64, 0.001)]


def reference_codes(words, bits=2):
    """[..., d, T/f] packed along tokens, LSB first -> [..., T, d]."""
    slots = 32 // bits
    shift = bits * np.arange(slots, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shift) & np.uint32(2**bits - 1)
    return np.swapaxes(codes.reshape(*words.shape[:-1], -1), -1, -2)


def grouped_error(q, error):
    """Norm of logit errors; query head n reads kv head n // G."""
    batch, heads, time, dim = q.shape
    kv = error.shape[1]
    q = np.asarray(q, np.float64).reshape(batch, kv, -1, dim)
    return np.linalg.norm(np.einsum("bkgh,bksh->bkgs", q, np.asarray(error, np.float64)))


def load(z, case):
    q, q_dec, k = (jnp.asarray(z[f"{case}/{name}"], jnp.float32) for name in ("q", "q_dec", "k"))
    valid = jnp.asarray(z[f"{case}/valid"]) if f"{case}/valid" in z.files else None
    return q, q_dec, k, squat.query_gram(jnp.swapaxes(q, 1, 2), k.shape[1], valid)


@pytest.mark.parametrize("case, block, lam", CASES)
def test_reference_settings_reproduce_the_goldens(squat_keys, case, block, lam):
    z = squat_keys
    q, q_dec, k, gram = load(z, case)
    plain = quant.quantise_keys(k, COMPAT)
    np.testing.assert_array_equal(plain.codes, reference_codes(z[f"{case}/kivi_code"]))
    np.testing.assert_array_equal(np.swapaxes(plain.scale, -1, -2), z[f"{case}/kivi_scale"])
    np.testing.assert_array_equal(np.swapaxes(plain.minimum, -1, -2), z[f"{case}/kivi_mn"])

    comp = squat.compensation(gram, block, lam, "reference", rank=20, energy_order=False)
    grid = squat.quantise_keys_squat(k, comp, COMPAT, block, guard=False)
    want = reference_codes(z[f"{case}/k_code"])
    np.testing.assert_array_equal(np.asarray(grid.codes)[..., :block], want[..., :block])
    assert (np.asarray(grid.codes) != want).mean() <= 0.01
    if block >= k.shape[-1]:
        np.testing.assert_array_equal(grid.codes, plain.codes)
    original = np.asarray(k)
    ours = grouped_error(q_dec, grid.value - original)
    theirs = grouped_error(q_dec, z[f"{case}/k_deq"] - original)
    assert abs(ours / theirs - 1) < 0.01

    values = quant.quantise_values(jnp.asarray(z[f"{case}/v"], jnp.float32), COMPAT)
    words = z[f"{case}/v_code"].view(np.uint32)
    codes = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & np.uint32(3)
    np.testing.assert_array_equal(values.codes, codes.reshape(values.codes.shape))
    np.testing.assert_allclose(values.value, z[f"{case}/v_deq"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case, block, lam", CASES)
def test_subspace_and_metric_equal_the_references(squat_keys, case, block, lam):
    z = squat_keys
    *_, gram = load(z, case)
    a = squat.metric(gram, lam, "reference", rank=20)
    basis = z[f"{case}/Qhat"].astype(np.float64)
    want = np.eye(a.shape[-1]) + lam * np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(a, want, rtol=1e-3, atol=2e-4 * np.abs(want).max())
    np.testing.assert_allclose(np.linalg.inv(np.asarray(a, np.float64)), z[f"{case}/P"], atol=5e-4)


@pytest.mark.parametrize("rank, block, lam, printed", [(None, 128, 0.0, 5.1405296),
                                                       (30, 2, 0.1, 1.5488429)])
def test_the_authors_demo_figures(squat_keys, rank, block, lam, printed):
    """Sum over causal entries of |softmax(q k / sqrt d) - softmax(q k^ / sqrt d)|."""
    q, k = (jnp.asarray(squat_keys[f"demo/{name}"]) for name in "qk")
    gram = squat.query_gram(q[None, :, None], 1)
    comp = squat.compensation(gram, block, lam, "reference", rank=rank, energy_order=False)
    value = squat.quantise_keys_squat(k[None, None], comp, COMPAT, block, guard=False).value[0, 0]

    def softmax(keys):
        logits = np.asarray(q, np.float64) @ np.asarray(keys, np.float64).T / np.sqrt(128)
        logits = np.where(np.tril(np.ones((32, 32), bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    gap = np.abs(softmax(k) - softmax(value)).sum()
    assert abs(gap / printed - 1) < 0.01


@pytest.mark.parametrize("block", [1, 5, 16, 40])
@pytest.mark.parametrize("energy_order", [False, True])
def test_update_matrix_is_the_block_optimum(block, energy_order):
    """Every block of the one-Cholesky matrix equals -A_RR^{-1} A_RF in float64."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((60, 24)) * np.linspace(0.3, 3, 24)
    gram = (q.T @ q).astype(np.float32)
    comp = squat.compensation(jnp.asarray(gram), block, 0.5, energy_order=energy_order)
    order = np.asarray(comp.order)
    if energy_order:
        assert (np.diff(np.diag(gram)[order]) <= 0).all()
    a = np.asarray(squat.metric(jnp.asarray(gram), 0.5), np.float64)[np.ix_(order, order)]
    want = np.zeros_like(a)
    for start in range(0, 24, block):
        end = min(start + block, 24)
        want[start:end, end:] = -np.linalg.solve(a[end:, end:], a[end:, start:end]).T
    got = np.asarray(comp.matrix)[np.ix_(order, order)]
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("block", [5, 16, 40])
@pytest.mark.parametrize("rank", [4, 24])
def test_a_sketch_gives_the_block_optimum_of_its_metric(block, rank):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 60, 24)) * np.linspace(0.3, 3, 24)
    weight = np.einsum("bth,bti->bhi", q, q) / 10
    found = squat.sketch(jnp.asarray(weight, jnp.float32), rank)
    held = np.asarray(squat.sketched_weight(found), np.float64)
    diagonal = lambda x: np.einsum("bhh->bh", x)
    np.testing.assert_allclose(diagonal(held), diagonal(weight), rtol=0.02)
    error = np.linalg.norm(held - weight) / np.linalg.norm(weight)
    assert error < (0.02 if rank == 24 else 0.7)
    comp = squat.sketched_compensation(found, block)
    for b in range(2):
        order = np.asarray(comp.order[b])
        assert sorted(order) == list(range(24))
        a = np.eye(24) + held[b][np.ix_(order, order)]
        want = np.zeros_like(a)
        for start in range(0, 24, block):
            end = min(start + block, 24)
            want[start:end, end:] = -np.linalg.solve(a[end:, end:], a[end:, start:end]).T
        np.testing.assert_allclose(np.asarray(comp.matrix[b])[np.ix_(order, order)], want,
                                   atol=5e-5)


def test_a_sketch_of_few_queries_holds_all_of_them():
    """Fewer queries than rows: nothing is left out but the 8-bit rounding; none: nothing moves."""
    q = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 2, 16)), jnp.float32)
    gram = squat.query_gram(q, 2)
    held = squat.sketched_weight(squat.sketch(gram, 4))
    np.testing.assert_allclose(held, gram, atol=0.02 * float(gram.max()))
    nothing = squat.sketched_compensation(squat.sketch(jnp.zeros((2, 16, 16)), 4))
    assert not nothing.matrix.any() and bool(jnp.isfinite(nothing.matrix).all())


def test_lambda_zero_and_one_block_are_plain():
    rng = np.random.default_rng(1)
    k = jnp.asarray(rng.standard_normal((1, 2, 64, 40)), jnp.float32)
    gram = squat.query_gram(jnp.asarray(rng.standard_normal((1, 30, 4, 40)), jnp.float32), 2)
    plain = quant.quantise_keys(k, COMPAT)
    for block, lam in ((16, 0.0), (40, 10.0), (64, 10.0)):
        comp = squat.compensation(gram, block, lam)
        grid = squat.quantise_keys_squat(k, comp, COMPAT, block, guard=False)
        np.testing.assert_array_equal(grid.codes, plain.codes)


def test_padding_neither_enters_the_gram_nor_neighbouring_rows():
    rng = np.random.default_rng(2)
    q = rng.standard_normal((2, 20, 4, 16)).astype(np.float32)
    valid = np.ones((2, 20), bool)
    valid[0, :7] = False
    poisoned = q.copy()
    poisoned[0, :7] = 1e4
    got = squat.query_gram(jnp.asarray(poisoned), 2, jnp.asarray(valid))
    alone = squat.query_gram(jnp.asarray(q[:1, 7:]), 2)
    np.testing.assert_allclose(got[:1], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1:], squat.query_gram(jnp.asarray(q[1:]), 2), rtol=1e-5,
                               atol=1e-5)


@pytest.mark.parametrize("case", ["c02", "c08", "c11"])
@pytest.mark.parametrize("lam, fmt", [(10.0, COMPAT), (1e4, COMPAT), (10.0, QuantFormat()),
                                      (1e4, QuantFormat())],
                         ids=lambda x: getattr(x, "scales", x))
def test_guard_is_never_worse_than_plain_on_the_calibration_queries(squat_keys, case, lam, fmt):
    """Plain: min-max, and the shrunk grids of least key error, which may raise the logits'."""
    _, _, k, gram = load(squat_keys, case)
    comp = squat.compensation(gram, 16, lam)
    grouped = lambda x: x.reshape(*x.shape[:2], -1, fmt.group, x.shape[-1])
    error = lambda grid: squat.logit_error(grouped(grid.value - k), gram)
    guarded = error(squat.quantise_keys_squat(k, comp, fmt, 16))
    for shrinks in {fmt.shrinks, (1.0,)}:
        plain = error(quant.quantise_keys(k, replace(fmt, shrinks=shrinks)))
        assert bool((guarded <= plain * (1 + 1e-5)).all())


def test_guard_falls_back_to_min_max_where_shrunk_grids_raise_the_logits_error():
    """Queries of one direction, and a harmful update matrix: groups take each of the two grids."""
    rng, fmt = np.random.default_rng(5), QuantFormat()
    k = jnp.asarray(rng.standard_normal((1, 1, 64 * 32, 32)), jnp.float32)
    gram = squat.query_gram(jnp.asarray(rng.standard_normal((1, 1, 1, 32)), jnp.float32), 1)
    comp = squat.compensation(gram, 8)
    error = lambda grid: np.asarray(squat.logit_error((grid.value - k).reshape(64, 32, 32),
                                                      gram[0, 0]))
    found = error(squat.quantise_keys_squat(k, comp._replace(matrix=-comp.matrix * 9), fmt, 8))
    shrunk, wide = (error(quant.quantise_keys(k, replace(fmt, shrinks=shrinks)))
                    for shrinks in (fmt.shrinks, (1.0,)))
    np.testing.assert_allclose(found, np.minimum(shrunk, wide), rtol=1e-4)
    assert 0 < (wide < 0.99 * shrunk).sum() < len(wide)


def test_guard_rejects_a_harmful_compensation():
    """Power check: with a wrong update matrix the guard must fall back to plain codes."""
    rng = np.random.default_rng(3)
    k = jnp.asarray(rng.standard_normal((1, 1, 64, 32)), jnp.float32)
    gram = squat.query_gram(jnp.asarray(rng.standard_normal((1, 50, 1, 32)), jnp.float32), 1)
    comp = squat.compensation(gram, 8)
    wrong = comp._replace(matrix=-comp.matrix * 4)
    plain = quant.quantise_keys(k, COMPAT)
    off = squat.quantise_keys_squat(k, wrong, COMPAT, 8, guard=False)
    assert float(squat.logit_error(off.value - k, gram).sum()) > float(
        squat.logit_error(plain.value - k, gram).sum())
    on = squat.quantise_keys_squat(k, wrong, COMPAT, 8, guard=True)
    np.testing.assert_array_equal(on.codes, plain.codes)


def test_prompt_length_does_not_change_the_method():
    """A Gram of the same queries seen ten times gives the same update matrix."""
    q = jnp.asarray(np.random.default_rng(4).standard_normal((1, 30, 2, 24)), jnp.float32)
    once, ten = squat.query_gram(q, 1), squat.query_gram(jnp.tile(q, (1, 10, 1, 1)), 1)
    rows = jnp.array([[60.0]])
    for mode, same in (("energy", True), ("per_query", True), ("reference", False)):
        a = squat.compensation(once, 8, 1.0, mode, rows=rows).matrix
        b = squat.compensation(ten, 8, 1.0, mode, rows=rows * 10).matrix
        assert bool(jnp.allclose(a, b, atol=1e-4)) == same


def test_bad_settings_are_refused():
    gram = jnp.eye(8)
    with pytest.raises(ValueError, match="block"):
        squat.compensation(gram, block=0)
    with pytest.raises(ValueError, match="lam_mode"):
        squat.compensation(gram, lam_mode="other")
    with pytest.raises(ValueError, match="rows"):
        squat.compensation(gram, lam_mode="per_query")
