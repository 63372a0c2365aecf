"""One of several processes of a run, for the tests beside it; not a test itself."""

import json
import sys

import jax


def main(config: str, out: str, coordinator: str, processes: int, process: int) -> None:
    """Train, and say what this process saw."""
    from jaxlm.train import read_config, run
    from jaxlm.train.data import Examples

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)
    read = Examples._read
    lines = []
    Examples._read = lambda self, i: (lines.append(i), read(self, i))[1]
    tokenised = []

    import jaxlm.train.setup as setup
    opened = setup.open_examples

    def counted(*args, **kwargs):
        found = opened(*args, **kwargs)
        tokenised.append(len(lines))
        return found

    setup.open_examples = counted
    fitted = run(read_config(config))
    with open(f"{out}.{process}", "w") as file:
        json.dump({"losses": [row["loss"] for row in fitted.history if "loss" in row],
                   "step": fitted.step, "stopped": fitted.stopped,
                   "evaluation": fitted.evaluation,
                   "tokenised_at_first": tokenised[0]}, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
