"""A page that shows what an update does to each token: train.py --picture-tokens.

tokens.jsonl has a row for each completion and each time that an update looked at it; tokens.html is
made of it, and needs nothing else: no network, no script.
"""

from html import escape
from itertools import groupby

from engine.errors import printable
from engine.files import read_jsonl, written_aside

MOST_TOKENS = 400  # of a completion that are pictured
MOST_STEPS = 12  # on the page; tokens.jsonl has all

STYLE = """
body { font: 20px/1.4 system-ui, sans-serif; margin: 1.5em; color: #000; background: #fff; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin: 1.6em 0 .3em; }
p { margin: .3em 0; max-width: 60em; }
code, .row { font-family: ui-monospace, monospace; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; margin: .35em 0; }
.row b { width: 9em; font: .8em system-ui, sans-serif; padding-top: .45em; }
.t { display: inline-flex; flex-direction: column; min-width: .7em; margin: 0 1px 3px;
     border: 2px solid transparent; white-space: pre; text-align: center; cursor: help; }
.t i { display: block; height: 16px; position: relative; background: #eee; }
.t i u { position: absolute; left: 0; right: 0; background: #000; }
.M { border: 3px solid #000; }
.clip { text-decoration: line-through 2px; outline: 2px dashed #777; outline-offset: -4px; }
.legend .t { margin-right: .5em; vertical-align: middle; }
.what { margin-right: 1.6em; white-space: nowrap; display: inline-block; }
"""


def choose(groups):
    """The best and the worst completion of the last group in which they differ; or none of them.

    groups: lists of Sample that are trained on. The last ones are in the last mini-batch, which an
    epoch reaches when the policy has moved most.
    """
    for group in reversed(groups):
        by_reward = sorted(group, key=lambda s: s.task_reward)
        if by_reward[0].task_reward < by_reward[-1].task_reward:
            return [by_reward[-1], by_reward[0]]
    return []


def token_rows(tokenizer, step, update, batch, entropy, metrics, chosen):
    """Rows for tokens.jsonl: of the chosen completions that are in a micro-batch.

    update: its number in the rollout, from 1 on; batch: with "samples", "mask", "old_entropy";
    entropy: [B, T] under the policy; metrics: what the loss returned, [B, T] each.
    """
    rows = []
    for i, s in enumerate(batch["samples"]):
        if not any(s is other for other in chosen):
            continue
        shown = batch["mask"][i].nonzero().flatten()[:MOST_TOKENS]

        def values(tensor, i=i, shown=shown):
            return tensor[i, shown].tolist()

        row = {
            "step": step,
            "update": update,
            "prompt": s.problem["prompt"],
            "task_reward": s.task_reward,
            "advantage": s.advantage,
            "length": len(s.completion_ids),
            "tokens": [tokenizer.decode([token]) for token in s.completion_ids[: len(shown)]],
            "entropy": values(entropy),
            "dH": values(entropy - batch["old_entropy"]),
        }
        names = ("ratio", "clip_ratio/low", "clip_ratio/high", "kl", "kl_mask_fraction")
        row |= {name: values(metrics[name]) for name in names if name in metrics}
        rows.append(row)
    return rows


def token_span(row, t, scale):
    """The HTML of a token: its text, shaded by |dH|, over a bar that points up or down with dH."""
    dH = row["dH"][t]
    strength = min(abs(dH) / scale, 1.0) ** 0.5
    color = f"rgba(230, 97, 1, {0.75 * strength:.2f})"  # falls: orange
    if dH > 0:
        color = f"rgba(64, 110, 200, {0.75 * strength:.2f})"  # rises: blue
    edge = "bottom" if dH > 0 else "top"
    bar = f'<u style="{edge}:50%;height:{8 * strength:.1f}px"></u>'
    told = [f"dH {dH:+.2g} nats", f"H {row['entropy'][t]:.3g}"]
    for name, title in (("ratio", "ratio"), ("kl", "KL")):
        if name in row:
            told.append(f"{title} {row[name][t]:.4g}")
    classes = ["t"]
    if any(row.get(name, [False] * (t + 1))[t] for name in ("clip_ratio/low", "clip_ratio/high")):
        classes.append("clip")
        told.append("clipped: no policy gradient")
    if row.get("kl_mask_fraction", [False] * (t + 1))[t]:
        classes.append("M")
        told.append("M = 1: a KL term holds it back")
    text = printable(row["tokens"][t].replace("\n", "⏎").replace(" ", "␣")) or "∅"
    return (
        f'<span class="{" ".join(classes)}" style="background:{color}" '
        f'title="{escape(", ".join(told), quote=True)}">{escape(text)}<i>{bar}</i></span>'
    )


LEGEND = """<p class="legend">
<span class="what"><span class="t" style="background:rgba(230,97,1,.6)">12<i><u
style="top:50%;height:6px"></u></i></span> orange, bar down: entropy fell (dH &lt; 0)</span>
<span class="what"><span class="t" style="background:rgba(64,110,200,.6)">12<i><u
style="bottom:50%;height:6px"></u></i></span> blue, bar up: entropy rose</span>
<span class="what"><span class="t M">12<i></i></span> thick frame: M = 1, held back by KL</span>
<span class="what"><span class="t clip">12<i></i></span> struck through: the ratio is clipped</span>
</p>"""


def write_page(directory, title):
    """Writes tokens.html to a run's directory, from its tokens.jsonl. title: of the page."""
    rows = read_jsonl(directory / "tokens.jsonl")
    steps = sorted({row["step"] for row in rows})
    if len(steps) > MOST_STEPS:  # the first, the last, and evenly between
        last = len(steps) - 1
        steps = [steps[round(i * last / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    rows = [row for row in rows if row["step"] in steps]
    sizes = sorted(abs(dH) for row in rows for dH in row["dH"])
    scale = (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(printable(title))}</title><style>{STYLE}</style>",
        f"<h1>{escape(printable(title))}: what an update does to each token</h1>",
        "<p>A right and a wrong completion of one prompt, as each epoch over the rollout finds "
        "them. dH is the entropy at a token now, minus that under the policy that sampled it. "
        f"The strongest shade is {scale:.2g} nats. Hover for the numbers.</p>",
        LEGEND,
    ]
    rows.sort(key=lambda row: (row["step"], -row["advantage"], row["update"]))
    for (step, prompt), of_prompt in groupby(rows, lambda row: (row["step"], row["prompt"])):
        parts.append(f"<h2>step {step}: <code>{escape(printable(prompt[-300:]))}</code></h2>")
        for A, of_completion in groupby(of_prompt, lambda row: row["advantage"]):
            looks = list(of_completion)
            parts.append(f"<p>reward {looks[0]['task_reward']:g}, A = {A:+.2f}</p>")
            for row in looks:
                spans = [token_span(row, t, scale) for t in range(len(row["tokens"]))]
                left = row["length"] - len(row["tokens"])
                more = f" … and {left} more" if left else ""
                parts.append(
                    f'<div class="row"><b>at update {row["update"]}</b>{"".join(spans)}{more}</div>'
                )
    with written_aside(directory / "tokens.html") as file:
        file.write("\n".join(parts) + "\n</html>\n")
