"""The demo's findings as a page, plots and a table."""

import json

from jaxlm.eval import plots, report
from jaxlm.eval.demo import COMPARED, Findings, record
from jaxlm.eval.skills import Attempt, Share

HEAD = ("arithmetic", "greedy", "one sample", "majority", "any right", "steps right")
RECALL_HEAD = ("recall", "greedy")
TAUGHT_HEAD = ("a second skill", "sums before", "sums after", "words before", "words after")
CACHE_HEAD = ("cache", "bytes of a text", "share", f"arithmetic, {COMPARED}", "recall")

SEARCH_HEAD = ("search", "right", "tokens a problem")


def files(findings: Findings) -> dict[str, bytes | str]:
    """Every file of the report by name; the page comes last."""
    drawn = draw(findings)
    out: dict[str, bytes | str] = {}
    for name, plot in drawn.items():
        out |= {f"{name}.png": plot.light, f"{name}-dark.png": plot.dark}
    out["demo.json"] = json.dumps(record(findings), indent=1) + "\n"
    out["index.html"] = page(findings, drawn)
    return out


def percent(share: Share) -> str:
    """A share and its standard error.

    >>> percent(Share(0.5, 0.041))
    '50 ± 4 %'
    """
    return f"{100 * share.value:.0f} ± {100 * share.error:.0f} %"


def arithmetic_rows(findings: Findings) -> list[list[str]]:
    """The table of arithmetic, one row a level, under `HEAD`."""
    return [
        [r.level, *map(percent, (r.greedy, r.sampled, r.majority, r.any_of, r.steps))]
        for r in findings.arithmetic
    ]


def recall_rows(findings: Findings) -> list[list[str]]:
    """The table of recall, one row a length, under `RECALL_HEAD`."""
    return [[f"{r.length} tokens", percent(r.accuracy)] for r in findings.recall]


def cache_rows(findings: Findings) -> list[list[str]]:
    """The table of caches, one row a kind, under `CACHE_HEAD`."""
    whole = findings.caches[0].bytes
    return [[row.name, f"{row.bytes:,}", f"{100 * row.bytes / whole:.0f} %",
             percent(row.arithmetic), percent(row.recall)] for row in findings.caches]


def search_rows(findings: Findings) -> list[list[str]]:
    """The table of searches, one row a method, under `SEARCH_HEAD`."""
    return [[row.name, percent(row.right), f"{row.tokens:,.0f}"] for row in findings.searches]


def taught_rows(findings: Findings) -> list[list[str]]:
    """The table of a second skill, one row a way of tuning, under `TAUGHT_HEAD`."""
    return [[row.way, *map(percent, (*row.first, *row.second))] for row in findings.taught]


def taught_section(findings: Findings) -> str:
    """What is left of the first skill; nothing where none was taught."""
    if not findings.taught:
        return ""
    return f"""<h2>A second skill, and what is left of the first</h2>
<div class="row">{report.table(TAUGHT_HEAD, taught_rows(findings))}</div>
<p class="soft">The model is taught to write words backwards, in {findings.plan.lessons} steps of
AdamW, each way at a rate of its own, and is asked for easy sums again: held-out problems, the whole
worked answer right. OSFT moves each matrix only outside of its leading singular subspaces, and
leaves all else as it is.</p>"""


def draw(findings: Findings) -> dict[str, plots.Plot]:
    """The plots by name."""
    solved, plan, found = findings.arithmetic, findings.plan, findings.surprise
    series = [
        (label, [getattr(r, name).value for r in solved], [getattr(r, name).error for r in solved])
        for label, name in (("greedy", "greedy"), ("one sample", "sampled"),
                            (f"majority of {plan.samples}", "majority"),
                            (f"any of {plan.samples} right", "any_of"))
    ]
    return {
        "arithmetic": plots.plot(
            plots.grouped_bars([r.level for r in solved], series, "share right"),
            "Arithmetic: right answers on held-out problems",
        ),
        "recall": plots.plot(
            plots.line([r.length for r in findings.recall],
                       [r.accuracy.value for r in findings.recall],
                       [r.accuracy.error for r in findings.recall],
                       "context (tokens)", "share right", top=1.08),
            "Recall: right values by context length",
        ),
        "speed": plots.plot(
            plots.line([batch for batch, _ in findings.speed],
                       [rate for _, rate in findings.speed], None, "rows in the batch",
                       "tokens per second"),
            f"Greedy decoding speed ({findings.device['backend']})",
        ),
        "surprise": plots.plot(
            plots.token_strip(found.tokens, (-found.logprobs).tolist(), found.answer_from),
            "Surprise at each token: the problem (grey), the model's own answer (colour)",
            size=(9.6, 2.3),
        ),
    }


def page(findings: Findings, drawn: dict[str, plots.Plot]) -> str:
    """The self-contained page."""
    plan, card, device = findings.plan, findings.card, findings.device
    show = lambda name, caption: report.picture(drawn[name].light, name, drawn[name].dark, caption)
    attempts = [r.attempts[i] for r in findings.arithmetic for i in range(min(2, plan.problems))]
    made = " · ".join(f"{name} {version}" for name, version in device["versions"].items())
    body = f"""<h1>jaxlm demo</h1>
<p class="soft">Generated, scored and timed in {findings.seconds:.0f} s by
<code>jaxlm demo</code> with seed {findings.seed} on {report.text(device["system"])}
({report.text(device["backend"])}).</p>
<p><b>{report.text(card["model"])}</b>: {report.text(card["family"])},
{card["parameters"] / 1e6:.2f} million parameters, {card["layers"]} layers,
{card["query heads"]} query heads over {card["kv heads"]} key-value heads of {card["head dim"]},
context {card["context"]:,}; a cached token takes {card["kv bytes per token"]:,} bytes
({report.text(card["dtype"])}, dense).</p>
<h2>Accuracy on problems never seen in training</h2>
<div class="row">{report.table(HEAD, arithmetic_rows(findings))}
{report.table(RECALL_HEAD, recall_rows(findings))}</div>
<p class="soft">± one standard error. {plan.problems} problems a level; besides the greedy answer,
{plan.samples} answers to each at temperature {plan.temperature}: the share right of one, of their
most frequent answer, and of problems with any right one, which is what a perfect judge would pick.
Steps: worked lines of the greedy answers that follow from what stands above them.
Recall: {plan.documents} documents a length, one query each.</p>
<div class="grid">{show("arithmetic", "Bars: one standard error.")}
{show("recall", "One query in each document, answered greedily.")}</div>
<h2>More answers, better answers</h2>
<div class="row">{report.table(SEARCH_HEAD, search_rows(findings))}</div>
<p class="soft">{plan.searched} hard problems, {plan.budget} answers each at temperature
{plan.temperature}. Self-consistency takes the most frequent of them, best-of-n the one that an
exact checker of steps likes best; the particle filter asks the checker after every line, and goes
on from the answers that are right so far.</p>
<h2>The same problems through a 2-bit cache</h2>
<div class="row">{report.table(CACHE_HEAD, cache_rows(findings))}</div>
<p class="soft">Greedy. Bytes of one text's keys and values in all layers with room for
{findings.caches[0].length:,} tokens, everything counted: codes, scales, the newest tokens in full
precision. Recall over {findings.caches[0].length:,} tokens; the prompt attends to itself in full
precision and is then coded.</p>
{show("surprise", "−log p of each token given all before it, by jaxlm.score. The digits of the "
      "question cannot be guessed; those of a step can be worked out.")}
{taught_section(findings)}
<h2>Answers</h2>
<p class="soft">Greedy, the first of each level, each step checked by a program:
<span class="good">✓</span> follows, <span class="bad">✗</span> does not.</p>
<div class="cards">{"".join(map(transcript, attempts))}</div>
<h2>Speed</h2>
<div class="grid">{show("speed", f"Median of 3 runs of {plan.tokens} tokens a row, compilation and "
                        "prefill left out; other work on the machine shows.")}</div>
<p class="soft">{report.text(made)}</p>"""
    return report.page("jaxlm demo", body)


def transcript(attempt: Attempt) -> str:
    """One problem and the model's answer, each line marked."""
    verdict = attempt.verdict
    lines = [f'<b>{report.text(attempt.problem.prompt.strip())}</b>']
    marks = list(verdict.steps)
    for written in attempt.answer.text.rstrip("\n").split("\n"):
        answer = verdict.answered and not marks
        right = verdict.correct if answer else bool(marks) and marks.pop(0)
        kind, sign = ("good", "✓") if right else ("bad", "✗")
        lines.append(f'<span class="{kind}">{sign}</span> {report.text(written)}')
        if answer:
            break
    if not verdict.correct:
        lines.append(f'<span class="soft">expected A:{attempt.problem.answer}</span>')
    return f'<div class="card"><pre>{"<br>".join(lines)}</pre></div>'
