"""What each improvement of the key quantiser is worth on queries that did not build the subspace.

Logit error `||Q dK^T||_F` over plain KIVI's at equal bytes (2-bit codes, groups of 32 tokens), one
improvement at a time, all together, and all but one; for every case, all heads pooled. Cases: the
method's reference vectors, with their own held-out queries; the authors' real tensors, which have
none, so that their queries are split three ways (odd for even, even for odd, first half for
second); and the bundled model's keys and queries of 8 layers together, read while it recalls (512
and 1,024 tokens, the first half being the prompt) and calculates (prompts of 24 tokens of 96).

Then the storage of what later tokens need (`stored`), on the same cases; and generation (`later`):
the bundled model's tokens 256 to 1,024 come one by one through the cache, and the keys that were
coded between 256 and 512, and so on, meet all queries that came after they were coded.

Command: python experiments/quant_ablation.py --out experiments/results/quant_ablation/cpu.json
Hardware: any CPU
Minutes: 15 (nearly all of it compiling); stopped, it goes on with the next row of the table
Expected: heldout_ratio_geomean 0.42 (wanted: at most 0.60), heldout_ratio_max 0.80 (wanted: 1.0)
"""

import argparse
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._harness import ROOT, parts_of, run
from jaxlm.cache.parse import parse_cache
from jaxlm.cache.squat import turn_ahead
from jaxlm.eval import arithmetic, recall
from jaxlm.hf.bundle import Bundle, load
from jaxlm.models.attention import Mask, attention
from jaxlm.models.config import AttentionSpec
from jaxlm.models.layers import apply_rope
from pallas_kernels import quant, squat
from pallas_kernels.quant import QuantFormat
from pallas_kernels.quant_decode_attention.reference import dequantise

PLAIN = (1.0,)
DEFAULT = QuantFormat()
# name -> (format, keyword arguments of compensation or None, guard)
REFERENCE: dict[str, Any] = dict(block=64, lam=0.001, lam_mode="reference", rank=20,
                                 energy_order=False)
ALL: dict[str, Any] = dict(block=16, ahead=512)
PROMPT, TEXT, EVERY = 256, 1024, 8
LATER = ("kivi2:scales=float32,shrinks=1.0", "kivi2", "squat2:ahead=0", "squat2:block=64",
         "squat2:ahead=0,half_life=128", "squat2", "squat2:half_life=64", "squat2:half_life=128",
         "squat2:half_life=256", "squat2:half_life=512")


def settings() -> dict[str, tuple[QuantFormat, dict | None, bool]]:
    """Every row of the table: the reference, one change each, all, all but one, storage."""
    plain = QuantFormat(scales="float32", shrinks=PLAIN)
    shrunk = QuantFormat(scales="float32")
    one = lambda **change: (plain, {**REFERENCE, **change}, False)
    return {
        "kivi": (plain, None, False),
        "squat reference": one(),
        "reference + full Gram": one(rank=None),
        "reference + lambda per query energy": one(lam_mode="energy", lam=10.0),
        "reference + blocks of 16": one(block=16),
        "reference + energy order": one(energy_order=True),
        "reference + turned ahead": one(ahead=512),
        "reference + guard": (plain, REFERENCE, True),
        "reference + shrunk grids": (shrunk, REFERENCE, False),
        "kivi + shrunk grids": (shrunk, None, False),
        "all": (shrunk, ALL, True),
        "all, bfloat16 scales (default)": (DEFAULT, ALL, True),
        "all, float16 scales": (QuantFormat(scales="float16"), ALL, True),
        "all, int8 scales": (QuantFormat(scales="int8"), ALL, True),
        "all but shrunk grids": (plain, ALL, True),
        "all but energy order": (shrunk, {**ALL, "energy_order": False}, True),
        "all but turned ahead": (shrunk, {**ALL, "ahead": 0}, True),
        "all but guard": (shrunk, ALL, False),
        "all but normalised lambda": (shrunk, {**ALL, "lam": 0.001, "lam_mode": "reference"}, True),
        "all, lambda per query 10": (shrunk, {**ALL, "lam_mode": "per_query"}, True),
        "all, lambda 1": (shrunk, {**ALL, "lam": 1.0}, True),
        "all, lambda 100": (shrunk, {**ALL, "lam": 100.0}, True),
        "all, rank 20": (shrunk, {**ALL, "rank": 20}, True),
        "all, blocks of 64": (shrunk, {**ALL, "block": 64}, True),
        "all, blocks of 32": (shrunk, {**ALL, "block": 32}, True),
        "all, blocks of 8": (shrunk, {**ALL, "block": 8}, True),
    }


def cases(folder: Path) -> dict[str, tuple]:
    """name -> (q [B, T, N, H], held-out q [B, N, T', H], k [B, K, S, H], valid [B, T] or None, and
    the rotary positions or None)."""
    z = np.load(folder / "squat_keys.npz")
    found = {}
    for case in sorted({key.split("/")[0] for key in z.files} - {"demo"}):
        read = lambda name, case=case: jnp.asarray(z[f"{case}/{name}"], jnp.float32)
        q, q_dec, k = read("q"), read("q_dec"), read("k")
        valid = jnp.asarray(z[f"{case}/valid"]) if f"{case}/valid" in z.files else None
        found[case] = (jnp.swapaxes(q, 1, 2), q_dec, k, valid, None)
    q, k = jnp.asarray(z["demo/q"]), jnp.asarray(z["demo/k"])[None, None]
    for name, seen, held in (("even", q[::2], q[1::2]), ("odd", q[1::2], q[::2]),
                             ("half", q[:16], q[16:])):
        found[f"real {name}"] = (seen[None, :, None], held[None, None], k, None, None)
    return found


def texts(bundle: Bundle) -> dict[str, tuple[list[int], int]]:
    """Held-out texts of the bundled model's kinds: ids and how many of them are the prompt."""
    ids = lambda text, size: list(bundle.tokenizer.encode(text))[:size]
    found = {}
    for size in (512, 1024):
        document = recall.sample(np.random.default_rng(size), size + 1, 60, "test")
        found[f"tiny recall {size}"] = (ids(document.text, size), size // 2)
    draw = np.random.default_rng(0)
    while "tiny arithmetic" not in found:
        problem = arithmetic.sample(draw, "hard", "test")
        tokens = ids(f"Q:{problem.expression}=\n{problem.solution}", 96)
        if len(tokens) == 96:
            found["tiny arithmetic"] = (tokens, 24)
    return found


def heads(bundle: Bundle, ids: list[int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v before rotary positions [L, T, heads, H] of one text."""
    tokens, found = jnp.asarray([ids]), []
    pos = jnp.arange(len(ids))[None]

    def attend(layer, q, k, v):
        spec = bundle.lm.config.attention(layer)
        found.append((q[0], k[0], v[0]))
        q, k = (apply_rope(x, pos, spec.rope) for x in (q, k))
        return attention(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), Mask(), pos, pos,
                         scale=spec.scale)[0]

    bundle.lm.run(bundle.params, tokens, attend)
    stack = lambda part: jnp.stack([layer[part] for layer in found])
    return stack(0), stack(1), stack(2)


def real_cases(bundle: Bundle) -> dict[str, tuple]:
    """The bundled model's texts as `cases`, a row a layer."""
    found, rope = {}, bundle.lm.config.attention(0).rope
    for name, (ids, prompt) in texts(bundle).items():
        q, k, _ = heads(bundle, ids)
        pos = jnp.broadcast_to(jnp.arange(len(ids)), q.shape[:2])
        q, k = apply_rope(q, pos, rope), apply_rope(k, pos, rope)
        size = max(prompt, 96) // 32 * 32  # the prompt's keys, or all of a short text
        found[name] = (q[:, :prompt], q[:, prompt:].swapaxes(1, 2), k[:, :size].swapaxes(1, 2),
                       None, rope)
    return found


def error_of(case, setting) -> float:
    """||Q dK^T||_F of the held-out queries, over all rows and heads."""
    return pooled(case[1], np.asarray(quantised(case, setting)) - np.asarray(case[2]))


def pooled(q_dec, error) -> float:
    """||Q E^T||_F: queries [B, N, T', H], errors of keys [B, K, S, H]."""
    batch, kv_heads, _, head_dim = error.shape
    q = np.asarray(q_dec, np.float64).reshape(batch, kv_heads, -1, head_dim)
    return float(np.linalg.norm(np.einsum("bkqh,bksh->bkqs", q, np.asarray(error, np.float64))))


def quantised(case, setting) -> np.ndarray:
    """The keys as they are read back."""
    q, _, k, valid, _ = case
    fmt, how, guard = setting
    present = jnp.ones((k.shape[0], k.shape[2]), bool) if valid is None else valid
    center = quant.key_center(k, present) if fmt.scales == "int8" else None
    if how is None:
        return quant.quantise_keys(k, fmt, center).value
    gram, turned, rows = grams(case, how.get("ahead", 0))
    how = {name: value for name, value in how.items() if name != "ahead"}
    comp = squat.compensation(turned, rows=rows, **how)._replace(gram=gram)
    return squat.quantise_keys_squat(k, comp, fmt, how["block"], guard, center).value


def grams(case, ahead: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The prompt's Gram, the same turned ahead, and the number of queries."""
    q, _, k, valid, rope = case
    gram = squat.query_gram(q, k.shape[1], valid)
    counted = q.shape[1] if valid is None else jnp.sum(valid, 1)[:, None]
    rows = jnp.asarray(counted) * (q.shape[2] // k.shape[1])
    return gram, gram if rope is None else turn_ahead(gram, rope, ahead), rows


def stored(tests: dict[str, tuple], plain: dict[str, float]) -> dict[str, dict[str, float]]:
    """Error over KIVI's if only so much of the metric is kept, and its bytes a kv head (H 128)."""
    whole = lambda weight: squat.compensation(weight, lam=1.0, lam_mode="reference")
    sketched = lambda part: lambda weight: squat.sketched_compensation(
        squat.sketch(weight, -(-weight.shape[-1] // part)))
    half = lambda weight: squat.compensation(weight, weight.shape[-1] // 2, 1.0, "reference")
    ways = {"all of it, float32": (65536, whole, 16), "two blocks, bfloat16": (8448, half, 0)}
    ways |= {f"sketch of H/{part} rows, 8 bits": (128 * 128 // part + 4 * 128 // part + 256,
                                                  sketched(part), 16) for part in (8, 6, 4, 3)}
    table: dict[str, dict[str, float]] = {}
    for name, (size, make, block) in ways.items():
        row = {}
        for case_name, case in tests.items():
            k = case[2]
            weight = squat.metric(grams(case, 512)[1], 10.0) - jnp.eye(k.shape[-1])
            grid = squat.quantise_keys_squat(k, make(weight), DEFAULT, block or k.shape[-1] // 2,
                                             False)
            row[case_name] = pooled(case[1], grid.value - k) / plain[case_name]
        table[name] = {"bytes": size, **summary(row)}
        print(f"stored: {name:30s}", *(f"{k} {v:.3f}" for k, v in table[name].items()), flush=True)
    return table


def later(bundle: Bundle, names: tuple[str, ...], size: int, seeds: int) -> dict[str, Any]:
    """Error over KIVI's of keys coded while generating, by when: a row a layer and document."""
    documents = [recall.sample(np.random.default_rng(100 + seed), size + 1, size // 20,
                               "test").text
                 for seed in range(seeds)]
    ids = [list(bundle.tokenizer.encode(text))[:size] for text in documents]
    size = min(map(len, ids)) // EVERY * EVERY
    q, k, v = (jnp.concatenate(x) for x in zip(*(heads(bundle, i[:size]) for i in ids),
                                               strict=True))
    spec = bundle.lm.config.attention(0)
    pos = jnp.broadcast_to(jnp.arange(size), q.shape[:2])
    turned_q, turned_k = (np.asarray(apply_rope(x, pos, spec.rope)) for x in (q, k))
    found: dict[str, list[float]] = {}
    for name in names:
        keys, count = coded(spec, parse_cache(name), q, k, v)
        errors = []
        for start in range(PROMPT, count - 31, 256):
            squares = 0.0
            for at in range(start, min(start + 256, count), 32):
                miss = keys[:, :, at:at + 32] - turned_k[:, at:at + 32].swapaxes(1, 2)
                seen = turned_q[:, at + 32 + EVERY:].swapaxes(1, 2)  # when coded, or soon after
                squares += pooled(seen, miss) ** 2
            errors.append(squares ** 0.5)
        found[name] = errors
        over = [x / y for x, y in zip(errors, found[names[0]], strict=True)]
        print(f"later: {name:34s}", *(f"{x:.3f}" for x in over), flush=True)
    first = found[names[0]]
    return {name: [x / y for x, y in zip(errors, first, strict=True)]
            for name, errors in found.items()}


def coded(spec: AttentionSpec, kind, q, k, v) -> tuple[np.ndarray, int]:
    """Keys [B, K, S, H] as a cache holds them that read a prompt, then token by token."""
    batch, size = q.shape[:2]
    pos = jnp.broadcast_to(jnp.arange(PROMPT), (batch, PROMPT))
    state = kind.init(spec, batch, size, jnp.float32)
    *_, state = kind.prefill(spec, state, *(x[:, :PROMPT] for x in (q, k, v)), pos,
                             jnp.full(batch, PROMPT))

    @jax.jit
    def generate(state):
        def steps(state, start):
            for at in [start + i for i in range(EVERY)]:
                at_B = jnp.full(batch, at)
                now = (jax.lax.dynamic_slice_in_dim(x, at, 1, 1) for x in (q, k, v))
                *_, state = kind.step(spec, state, *now, at_B, at_B)
            return kind.flush(spec, state, jnp.asarray(True), jnp.full(batch, start + EVERY)), None

        return jax.lax.scan(steps, state, jnp.arange(PROMPT, size, EVERY))[0]

    state = generate(state)
    keys = np.asarray(dequantise(state["packed"], kind.format)[0])
    return keys, int(state["packed_B"].min())


def summary(row: dict[str, float]) -> dict[str, float]:
    """A row of ratios with its geometric mean and its largest."""
    ratios = np.array(list(row.values()))
    return row | {"geomean": float(np.exp(np.log(ratios).mean())), "max": float(ratios.max())}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The table, and the two figures for the default setting."""
    folder = Path(os.environ.get("JAXLM_GOLDENS", ROOT.parent / "shared" / "goldens"))
    if not (folder / "squat_keys.npz").exists():
        folder = ROOT / "tests" / "data"
    bundle = load("tiny")
    tests = cases(folder) | real_cases(bundle)
    rows = settings()
    if args.smoke:
        rows = {name: rows[name] for name in ("kivi", "squat reference",
                                              "all, bfloat16 scales (default)")}
        tests = {name: tests[name] for name in ("c08", "tiny arithmetic")}
    table: dict[str, dict[str, float]] = {}
    parts = parts_of(args, __file__, smoke=args.smoke)
    row = lambda setting: {name: error_of(case, setting) for name, case in tests.items()}
    plain = parts("plain", lambda: row(rows["kivi"]))
    for name, setting in rows.items():
        errors = parts(name, lambda: row(setting))  # noqa: B023
        table[name] = summary({case: error / plain[case] for case, error in errors.items()})
        print(f"{name:40s}", *(f"{k} {v:.3f}" for k, v in table[name].items()), flush=True)
    default = table["all, bfloat16 scales (default)"]
    names, size, seeds = (LATER[:1], 320, 1) if args.smoke else (LATER, TEXT, 2)
    kept = {} if args.smoke else parts("stored", lambda: stored(tests, plain))
    after = parts("later", lambda: later(bundle, names, size, seeds))
    parts.done()
    return {"heldout_ratio_geomean": default["geomean"], "heldout_ratio_max": default["max"],
            "ratio_over_kivi": table, "stored": kept, "later_ratio_over_kivi": after}


if __name__ == "__main__":
    run(__file__, __doc__, measure)
