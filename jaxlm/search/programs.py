"""What searches have compiled, where memory for it is bounded."""

from jaxlm.decode.generate import prefill_jit
from jaxlm.rewards import process, process_text
from jaxlm.search import gibbs, run

PROGRAMS = (
    run.begin_jit, run.loop_jit, run.move_jit, run.absorb_jit, run.give_up_jit, run.view_jit,
    run.final_jit, run.put_jit, gibbs.next_references, prefill_jit, process.fork_jit,
    process_text.extend_jit, process_text.gather_jit, process_text.probability_jit,
)


def forget_programs() -> None:
    """Let go of what searches and their rewards have compiled: the next one of any size compiles
    its own again."""
    for program in PROGRAMS:
        program.clear_cache()  # type: ignore[attr-defined]  # not in the stubs
