"""The process behind `answers.Judge`: JSON lines in, JSON lines out; imports nothing of jaxlm."""

import json
import os
import sys


def main() -> None:
    """Answer comparisons until stdin ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    from math_verify import parse, verify

    def read(text: str):
        found = parse(f"${text.strip().strip('$')}$", parsing_timeout=None)
        return found or parse(text, parsing_timeout=None)

    def same(gold: str, answer: str) -> bool:
        try:
            return bool(verify(read(gold), read(answer), timeout_seconds=None))
        except Exception:  # noqa: BLE001 - whatever algebra stumbles over is not equal
            return False

    same(r"\sqrt{12}", r"2\sqrt{3}")  # the first takes longest: it belongs to the start
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"same": same(asked["gold"], asked["answer"])}), file=out, flush=True)


if __name__ == "__main__":
    main()
