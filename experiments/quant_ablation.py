"""What each improvement of the key quantiser is worth on queries that did not build the subspace.

Logit error `||Q dK^T||_F` over plain KIVI's at equal bytes (2-bit codes, groups of 32 tokens), one
improvement at a time, all together, and all but one; for every reference case, every head pooled.
The held-out queries are the reference's own; the authors' real tensors have none, so their queries
are split three ways (odd for even, even for odd, first half for second) and count as three cases.

Command: python experiments/quant_ablation.py --out experiments/results/quant_ablation/cpu.json
Hardware: any CPU
Minutes: 5 (nearly all of it compiling)
Expected: heldout_ratio_geomean 0.33 (at most 0.60), heldout_ratio_max 0.39 (at most 1.0)
"""

import argparse
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments._harness import ROOT, run
from pallas_kernels import quant, squat
from pallas_kernels.quant import QuantFormat

PLAIN = (1.0,)
DEFAULT = QuantFormat()
# name -> (format, keyword arguments of compensation or None, guard)
REFERENCE: dict[str, Any] = dict(block=64, lam=0.001, lam_mode="reference", rank=20,
                                 energy_order=False)
ALL: dict[str, Any] = dict(block=16)


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
        "reference + guard": (plain, REFERENCE, True),
        "reference + shrunk grids": (shrunk, REFERENCE, False),
        "kivi + shrunk grids": (shrunk, None, False),
        "all": (shrunk, ALL, True),
        "all, bfloat16 scales (default)": (DEFAULT, ALL, True),
        "all, float16 scales": (QuantFormat(scales="float16"), ALL, True),
        "all, int8 scales": (QuantFormat(scales="int8"), ALL, True),
        "all but shrunk grids": (plain, ALL, True),
        "all but energy order": (shrunk, {**ALL, "energy_order": False}, True),
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
    """name -> (q [B, T, N, H], held-out q [B, N, T', H], k [B, K, S, H], valid [B, T] or None)."""
    z = np.load(folder / "squat_keys.npz")
    found = {}
    for case in sorted({key.split("/")[0] for key in z.files} - {"demo"}):
        read = lambda name, case=case: jnp.asarray(z[f"{case}/{name}"], jnp.float32)
        q, q_dec, k = read("q"), read("q_dec"), read("k")
        valid = jnp.asarray(z[f"{case}/valid"]) if f"{case}/valid" in z.files else None
        found[case] = (jnp.swapaxes(q, 1, 2), q_dec, k, valid)
    q, k = jnp.asarray(z["demo/q"]), jnp.asarray(z["demo/k"])[None, None]
    for name, seen, held in (("even", q[::2], q[1::2]), ("odd", q[1::2], q[::2]),
                             ("half", q[:16], q[16:])):
        found[f"real {name}"] = (seen[None, :, None], held[None, None], k, None)
    return found


def error_of(case, setting) -> float:
    """||Q dK^T||_F of the held-out queries, over all rows and heads."""
    q_dec, error = case[1], np.asarray(quantised(case, setting)) - np.asarray(case[2])
    batch, kv_heads, _, head_dim = error.shape
    q = np.asarray(q_dec, np.float64).reshape(batch, kv_heads, -1, head_dim)
    return float(np.linalg.norm(np.einsum("bkqh,bksh->bkqs", q, np.asarray(error, np.float64))))


def quantised(case, setting) -> np.ndarray:
    """The keys as they are read back."""
    q, _, k, valid = case
    fmt, how, guard = setting
    present = jnp.ones((k.shape[0], k.shape[2]), bool) if valid is None else valid
    center = quant.key_center(k, present) if fmt.scales == "int8" else None
    if how is None:
        return quant.quantise_keys(k, fmt, center).value
    gram = squat.query_gram(q, k.shape[1], valid)
    counted = q.shape[1] if valid is None else jnp.sum(valid, 1)[:, None]
    rows = jnp.asarray(counted) * (q.shape[2] // k.shape[1])
    comp = squat.compensation(gram, rows=rows, **how)
    return squat.quantise_keys_squat(k, comp, fmt, how["block"], guard, center).value


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The table, and the two figures for the default setting."""
    folder = Path(os.environ.get("JAXLM_GOLDENS", ROOT.parent / "shared" / "goldens"))
    if not (folder / "squat_keys.npz").exists():
        folder = ROOT / "tests" / "data"
    tests = cases(folder)
    rows = settings()
    if args.smoke:
        rows = {name: rows[name] for name in ("kivi", "squat reference",
                                              "all, bfloat16 scales (default)")}
        tests = {name: tests[name] for name in ("c08", "real even")}
    table: dict[str, dict[str, float]] = {}
    plain = {name: error_of(case, rows["kivi"]) for name, case in tests.items()}
    for name, setting in rows.items():
        table[name] = {}
        for case_name, case in tests.items():
            table[name][case_name] = error_of(case, setting) / plain[case_name]
        ratios = np.array(list(table[name].values()))
        table[name] |= {"geomean": float(np.exp(np.log(ratios).mean())), "max": float(ratios.max())}
        print(f"{name:40s}", *(f"{k} {v:.3f}" for k, v in table[name].items()), flush=True)
    default = table["all, bfloat16 scales (default)"]
    return {"heldout_ratio_geomean": default["geomean"], "heldout_ratio_max": default["max"],
            "ratio_over_kivi": table}


if __name__ == "__main__":
    run(__file__, __doc__, measure)
