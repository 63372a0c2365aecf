"""Every family against transformers, on tiny random twins: the parts, the whole, padded, cached,
with labels, and exported. Committed reference numbers by default; live where marked `torch`."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import twins
from jaxlm.cache.dense import Dense
from jaxlm.core.tree import flatten
from jaxlm.decode.generate import prefill_jit
from jaxlm.decode.state import compact
from jaxlm.hf.config import from_hf
from jaxlm.hf.families import family_of, tensor_name
from jaxlm.hf.weights import to_ours
from jaxlm.models.attention import Mask, visible

NAMES = sorted(twins.CONFIGS)
CLASSIFIERS = ("SequenceClassification", "TokenClassification")
LABELLED = [(name, head) for name in NAMES for head in CLASSIFIERS
            if twins.config_of(name, head)["architectures"][0]]
TOLERANCE = {"atol": 1e-4, "rtol": 0}
# transformers' sub-module of a layer -> ours
PARTS = {"input_layernorm": "attn_norm", "self_attn": "attn", "mlp": "mlp"}
OTHERS = {"post_attention_layernorm": "mlp_norm"}
GEMMA = {"post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "mlp_norm"}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    made = {}

    def make(name, head="CausalLM"):
        if (name, head) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{head}")
            made[name, head] = jaxlm.load(twins.write(twins.config_of(name, head), folder))
        return made[name, head]

    return make


@pytest.fixture(scope="module")
def golden_of(golden_subset):
    return lambda name: np.load(golden_subset / "parity" / f"{name}.npz")


@partial(jax.jit, static_argnums=0)
def forward(lm, params, tokens, lengths=None):
    return lm.apply(params, tokens, lengths_B=lengths).logits


def logits_of(bundle, tokens, lengths=None):
    return forward(bundle.lm, bundle.params, jnp.asarray(tokens), lengths)


def modules_of(bundle, tokens):
    """What every module of the decoder is given and gives, by its path among the parameters."""
    def run(params, tokens):
        seen = {}

        def keep(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.method_name == "__call__":
                seen["/".join(context.module.path)] = (args[0] if args else None, output)
            return output

        with nn.intercept_methods(keep):
            bundle.lm.apply(params, tokens)
        return seen

    return jax.jit(run)(bundle.params, jnp.asarray(tokens))


def start(bundle, tokens, lengths):
    """A state with room for the twins' whole text."""
    keys = jax.random.split(jax.random.key(0), len(lengths))
    return prefill_jit(bundle.lm, bundle.params, jaxlm.Greedy(), tokens, jnp.array(lengths),
                       Dense(), twins.TOKENS, keys)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model(name, bundle_of, golden_of):
    golden = golden_of(name)
    assert json.loads(str(golden["config"])) == twins.config_of(name), "make the goldens again"
    found = logits_of(bundle_of(name), golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_left_padded(name, bundle_of, golden_of):
    golden, bundle = golden_of(name), bundle_of(name)
    mask = golden["mask"].astype(bool)
    assert not mask.all()
    tokens, lengths = compact(jnp.asarray(golden["tokens"]), jnp.asarray(mask))
    found = logits_of(bundle, tokens, lengths)
    assert mask[0].all() and not mask[1, 0]
    np.testing.assert_allclose(found[0], golden["logits"][0], **TOLERANCE)
    np.testing.assert_allclose(
        found[1, : mask[1].sum()], golden["padded_logits"][mask[1]], **TOLERANCE
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_sub_module(name, bundle_of, golden_of):
    """All that the goldens hold of them, which is the first row's."""
    golden, bundle = golden_of(name), bundle_of(name)
    ours = PARTS | (GEMMA if "gemma" in name else OTHERS)
    held = {part for part in golden.files if part.startswith("layers_")}
    assert held == {f"layers_{i}/{part}" for i in range(bundle.lm.config.num_layers)
                    for part in ours}
    found = modules_of(bundle, golden["tokens"][:1])
    for part in sorted(held):
        layer, theirs = part.split("/")
        output = found[f"{layer}/{ours[theirs]}"][1]
        np.testing.assert_allclose(output[0], golden[part], **TOLERANCE, err_msg=part)


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_and_the_embedding(name, bundle_of):
    """Both rows, by the families' published equations in float64, from the tensors on disk."""
    raw, bundle, tokens = twins.config_of(name), bundle_of(name), twins.tokens_of()
    family, stored = family_of(raw["model_type"]), twins.weights_of(raw)
    found = modules_of(bundle, tokens)
    norms = [path.removesuffix("/scale") for path in flatten(bundle.params)
             if path.endswith("/scale")]
    kinds = {path.split("/")[-1] for path in norms}
    assert kinds == {"attn_norm", "mlp_norm", "final_norm"} | (
        {"q_norm", "k_norm"} if name in ("qwen3", "gemma3_text") else set()
    ) | ({"attn_post_norm", "mlp_post_norm"} if "gemma" in name else set())
    for path in norms:
        x, y = (np.asarray(value, np.float64) for value in found[path])
        scale = stored[tensor_name(f"{path}/scale", family)] + float("gemma" in name)
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + raw["rms_norm_eps"])
        assert len(x) == 2
        np.testing.assert_allclose(y, x / rms * scale, rtol=0, atol=1e-5, err_msg=path)
    times = raw["hidden_size"] ** 0.5 if "gemma" in name else raw.get("embedding_multiplier", 1.0)
    rows = stored["model.embed_tokens.weight"].astype(np.float64)[tokens] * times
    np.testing.assert_allclose(found["embed"][1], rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_the_full_forward(name, bundle_of, golden_of):
    """Prompts of 4 and 2 tokens, extended one token at a time past the window."""
    golden, bundle = golden_of(name), bundle_of(name)
    lm, params, tokens = bundle.lm, bundle.params, jnp.asarray(golden["tokens"])
    starts = jnp.array([4, 2])
    state = start(bundle, tokens[:, :4], [4, 2])
    extend = jax.jit(jaxlm.extend, static_argnums=0)
    rows = jnp.arange(2)
    for step in range(twins.TOKENS - 4):
        at = starts + step
        expected = golden["logits"][rows, at - 1]
        np.testing.assert_allclose(state.logits_BV, expected, **TOLERANCE)
        state, _ = extend(lm, params, state, tokens[rows, at][:, None], jnp.ones(2, jnp.int32))


@pytest.mark.parametrize("name", NAMES)
def test_decode_step_equals_the_full_forward(name, bundle_of, golden_of):
    bundle = bundle_of(name)
    state = start(bundle, jnp.asarray(golden_of(name)["tokens"][:, :3]), [3, 3])
    step = jax.jit(jaxlm.decode_step, static_argnums=0)
    for _ in range(twins.TOKENS - 4):
        state = step(bundle.lm, bundle.params, jaxlm.Greedy(), state)
    full = logits_of(bundle, state.tokens_BS)
    np.testing.assert_allclose(state.logits_BV, full[:, twins.TOKENS - 2], **TOLERANCE)


SWITCHES = {
    "windows": (), "attention_softcap": None, "logit_softcap": None, "norm_offset": 0.5,
    "embed_scale": 1.0, "residual_scale": 1.0, "logit_divisor": 1.0, "attention_scale": None,
    "local_rope": None, "activation": "gelu",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_would_show_a_switch_that_is_not_honoured(name, bundle_of, golden_of):
    """Each setting that the family uses, dropped, moves the logits far beyond the tolerance."""
    golden, bundle = golden_of(name), bundle_of(name)
    config = bundle.lm.config
    used = {key: off for key, off in SWITCHES.items() if getattr(config, key) != off
            and (key != "norm_offset" or config.norm_offset)}
    changes = [{key: off} for key, off in used.items()]
    if config.rope.kind != "default":
        changes.append({"rope": jaxlm.Rope(config.rope.theta)})
    for change in changes:
        tolerance = 3e-4 if change == {"activation": "gelu"} and "gemma" in name else 1e-2
        lm = jaxlm.LM(config.replace(**change))
        found = forward(lm, bundle.params, jnp.asarray(golden["tokens"]))
        assert np.abs(found - golden["logits"]).max() > tolerance, change


@pytest.mark.parametrize("name", NAMES)
def test_export_and_reload_is_bit_exact(name, bundle_of, tmp_path):
    bundle = bundle_of(name)
    again = jaxlm.load(jaxlm.save(bundle, tmp_path / "out"))
    assert again.lm == bundle.lm and hash(again.lm) == hash(bundle.lm)
    old, new = flatten(bundle.params), flatten(again.params)
    assert old.keys() == new.keys()
    assert all(old[path].dtype == new[path].dtype for path in old)
    assert all((np.asarray(old[path]) == np.asarray(new[path])).all() for path in old)


@pytest.mark.parametrize(("name", "head"), LABELLED)
def test_labels(name, head, bundle_of, golden_of, tmp_path):
    golden, bundle = golden_of(name), bundle_of(name, head)
    mask = golden["mask"].astype(bool)
    tokens, lengths = compact(jnp.asarray(golden["tokens"]), jnp.asarray(mask))
    found = bundle.lm.classify(bundle.params, tokens, lengths)
    for row, valid in enumerate(mask):
        ours, theirs = found[row], golden[head][row]
        if head == "TokenClassification":
            ours, theirs = ours[: valid.sum()], theirs[valid]
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    again = jaxlm.load(jaxlm.save(bundle, tmp_path / "out"))
    assert again.lm == bundle.lm and again.extra["id2label"] == bundle.extra["id2label"]
    assert (again.params["score"]["table"] == bundle.params["score"]["table"]).all()


def test_projections_are_transposed_and_tables_are_not():
    stored = np.arange(6.0).reshape(3, 2)
    assert (to_ours(stored, "x.q_proj.weight", (2, 3)) == stored.T).all()
    assert (to_ours(stored, "lm_head.weight", (3, 2)) == stored).all()


def test_a_window_counts_the_token_itself():
    pos = jnp.arange(8)[None]
    assert visible(Mask(window=5), pos, pos)[0].sum(-1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5]


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_live(name, bundle_of, golden_of, tmp_path):
    """The goldens are what transformers computes here, and it reads what we export."""
    import torch
    from transformers import AutoModelForCausalLM

    golden, raw = golden_of(name), twins.config_of(name)
    logits, _ = twins.torch_forward(twins.torch_model(raw), golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    out = jaxlm.save(bundle_of(name), tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys",
                                               "mismatched_keys"))
    logits, _ = twins.torch_forward(model.eval(), golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert from_hf(theirs) == bundle_of(name).lm.config


@pytest.mark.torch
@pytest.mark.parametrize(("name", "head"), LABELLED)
def test_live_labels(name, head, bundle_of, golden_of, tmp_path):
    import transformers

    out = jaxlm.save(bundle_of(name, head), tmp_path / "out")
    cls = getattr(transformers, twins.config_of(name, head)["architectures"][0])
    model, report = cls.from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    golden = golden_of(name)
    padded = np.where(golden["mask"], golden["tokens"], twins.PAD)
    logits, _ = twins.torch_forward(model.eval(), padded, golden["mask"])
    valid = golden["mask"].astype(bool) if head == "TokenClassification" else ...
    np.testing.assert_allclose(logits[valid], golden[head][valid], atol=1e-5)
