"""`jaxlm fit`: does a job fit a chip? Asked of the chip's own compiler, without the chip."""

import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from jaxlm.cache.policy import open_cache
from jaxlm.cli.options import Dtype, Names, columns, note
from jaxlm.eval.fit import Fit, fit
from jaxlm.hf.bundle import BUNDLED, resolve
from jaxlm.hf.config import from_hf, read_json
from jaxlm.hf.hub import fetch
from jaxlm.models.config import ModelConfig
from jaxlm.models.presets import preset
from jaxlm.train.osft import Osft

Target = Annotated[str, tyro.conf.arg(metavar="TARGET")]
GIB = 2**30


def run(
    model: str, target: Target, job: Literal["decode", "prefill", "train", "osft"] = "decode",
    batch: int = 1, context: int | None = None, cache: str = "dense", dtype: Dtype | None = None,
    data: int | None = None, fsdp: int | None = None, tensor: int | None = None,
    revision: str | None = None,
    unfreeze_ratio: float | None = None,
    form: Literal["update", "factored", "coordinates"] | None = None,
    ignore_fields: Names = (),
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compile a job's real program for a chip that need not be here; print what it takes.

    Args:
      model: a preset such as llama-3.1-8b, a folder with a config.json, a hub id such as
        org/name (its config.json alone is fetched), or "tiny", the bundled model.
      target: v5e:2x2, v5p:4x4x4, v6e:1x1, h100, h100:8, a100, a100-80g, t4, and the like.
      job: the decode loop over a full cache, the prefill of a prompt, an AdamW step, or one that
        protects the leading singular directions (docs/osft.md).
      batch: rows in all.
      context: tokens a row, at most those that the model reads; default 4096, or fewer.
      cache: dense, squat2, kivi4, ..., or a file of `jaxlm tune-cache`; for decode and prefill.
      dtype: of the parameters, and of a train step's compute; default bfloat16, on a T4, which
        has none, float16 (float32 for Gemma and to train).
      data: mesh axis over the batch.
      fsdp: mesh axis over batch and parameters.
      tensor: mesh axis over heads and the feed-forward.
      revision: of a hub id.
      unfreeze_ratio: for osft, the share of singular directions that may change; default 0.5.
      form: for osft, how the constraint is kept; default update.
      ignore_fields: of config.json, unknown to jaxlm, that you know not to change the maths.
      json: print JSON instead of a table.
    """
    config = open_config(model, revision, ignore_fields)
    note(f"compiling {job} for {target} ...")
    start = time.perf_counter()
    given: dict[str, Any] = {"form": form, "unfreeze_ratio": unfreeze_ratio}
    given = {name: value for name, value in given.items() if value is not None}
    tuning = Osft(**given) if given or job == "osft" else None
    found = fit(config, job, target, batch=batch, context=context,
                cache=open_cache(cache, config), dtype=dtype, data=data, fsdp=fsdp, tensor=tensor,
                tuning=tuning)
    record = summary(found) | {"seconds": time.perf_counter() - start}
    text = as_table(found)
    if tuning and found.dtype != "float16":  # which the trainer does not compute in
        record["train"] = train_settings(tuning, found.mesh, batch, found.context, found.dtype)
        text += f"\nthe settings of `jaxlm train` that give this step:\n{one_line(record['train'])}"
    print(json.dumps(record, indent=1) if json_ else text)


def open_config(
    model: str, revision: str | None = None, ignore_fields: Sequence[str] = ()
) -> ModelConfig:
    """A folder's or hub id's config.json, the bundled model's, or a preset by name."""
    folder = pathlib.Path(model).expanduser()
    if "/" not in model and model not in BUNDLED and not folder.is_dir():
        return preset(model)
    hub_id = not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    found = fetch(model, revision, only="config.json") if hub_id else resolve(model)
    return from_hf(read_json(found / "config.json"), ignore_fields)


def summary(found: Fit) -> dict[str, Any]:
    """Everything measured, as plain values; bytes are those of one device."""
    program = found.program
    return {
        "target": found.target.name, "job": found.job, "context": found.context,
        "dtype": found.dtype, "mesh": found.mesh, "fits": found.fits,
        "device_bytes": found.target.bytes_per_device, "total_bytes": program.total,
        "argument_bytes": program.arguments, "temporary_bytes": program.temporaries,
        "parameter_bytes_all": found.param_bytes, "cache_bytes_all": found.cache_bytes,
        "flops": program.flops, "bytes_accessed": program.bytes_accessed,
        "flops_source": program.flops_source, "collective_bytes": program.collective_bytes,
        "kernels": program.kernels,
        "compile_seconds": program.compile_seconds, "refused": program.refused,
    }


def train_settings(
    tuning: Osft, mesh: dict[str, int], batch: int, context: int, dtype: str
) -> dict[str, Any]:
    """What a config of `jaxlm train` must say, so that its step is the one of `--job osft`."""
    return {"stack": True, "remat": True, "dtype": dtype, "batch": batch,
            "data": {"window": context}, "mesh": mesh,
            "tuning": {"kind": "osft", "form": tuning.form,
                       "unfreeze_ratio": tuning.unfreeze_ratio}}


def one_line(settings: dict[str, Any]) -> str:
    """Plain words and numbers as one line of YAML.

    >>> one_line({"stack": True, "mesh": {"fsdp": 4}})
    '{stack: true, mesh: {fsdp: 4}}'
    """
    return json.dumps(settings).replace('"', "")


def as_table(found: Fit) -> str:
    """The summary for people."""
    program, limit = found.program, found.target.bytes_per_device
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    gib = lambda value: "unknown" if value is None else f"{value / GIB:.2f} GiB"
    source = {"compiler": "by the compiler's estimate"}.get(
        program.flops_source, "matrix products, counted before optimisation")
    rows: list[list[Any]] = [
        ["a device", "of", f"{found.target.name}, in {found.dtype}, {found.context} tokens a row"],
        ["arguments", gib(program.arguments), "parameters, caches and inputs"],
        ["temporaries", gib(program.temporaries), "what the program needs besides"],
        ["total", gib(program.total), f"of {gib(limit)}"],
        ["FLOPs", f"{program.flops:.3g}", f"a step; {source}"],
        ["bytes moved", gib(program.bytes_accessed), source],
        ["collectives", gib(program.collective_bytes), mesh],
        ["kernels", "unknown" if program.kernels is None else program.kernels,
         "of jaxlm's own (Pallas) in the program"],
        ["all devices", gib(found.param_bytes + found.cache_bytes),
         f"parameters {gib(found.param_bytes)}, caches {gib(found.cache_bytes)}"],
        ["compile", f"{program.compile_seconds:.1f} s", "here, on this machine's CPU"],
    ]
    verdict = "fits" if found.fits else "does not fit"
    if program.refused:
        verdict += f": the compiler refuses it: {program.refused}"
    return f"{columns(rows)}\n{verdict}"
