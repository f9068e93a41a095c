"""Pictures of what the tools measure."""

from engine.files import new_figure, save_figure


def draw_map(content, skipped, path):
    """Heat maps of O, S and C, layers down and heads across, as a PNG.

    content: what conflict_map.json holds: "O", "S" and "C" as [layers][H] numbers, "model" and
    "sensitivity" for the titles; skipped: the (layer, head) that are outlined; path: of the PNG.
    """
    from matplotlib import colors, patches

    O, S, C = content["O"], content["S"], content["C"]
    layers = len(C)
    H = len(C[0])
    width = 3 * min(max(0.45 * H, 3.4), 9) + 2.4
    height = min(max(0.45 * layers, 1.8), 11) + 1.4
    figure, axes = new_figure(1, 3, figsize=(width, height), layout="constrained")
    farthest = max(abs(value - 1) for row in O for value in row) or 1
    around_one = colors.Normalize(1 - farthest, 1 + farthest)
    # A few heads tower over the others. So the colours of S and C are stretched.
    panels = [
        ("O = 1 - cos: above 1 the gradients conflict", O, "RdBu_r", around_one),
        (
            f"S: sensitivity of utility, by {content['sensitivity']}",
            S,
            "viridis",
            colors.PowerNorm(0.4),
        ),
        ("C = minmax(O) minmax(S)", C, "viridis", colors.PowerNorm(0.4)),
    ]
    for axis, (title, values, cmap, norm) in zip(axes, panels):
        image = axis.imshow(values, aspect="auto", cmap=cmap, norm=norm)
        figure.colorbar(image, ax=axis, fraction=0.05)
        for layer, head in skipped:
            corner = (head - 0.44, layer - 0.44)
            outline = patches.Rectangle(corner, 0.88, 0.88, fill=False, edgecolor="orangered", lw=2)
            axis.add_patch(outline)
        axis.set(title=title, xlabel="head", ylabel="layer")
        axis.set_xticks(range(0, H, 1 + H // 16))
        axis.set_yticks(range(0, layers, 1 + layers // 16))
    model = content["model"].replace("$", r"\$")  # which would begin a formula
    figure.suptitle(
        f"Conflict map of {model}: the {len(skipped)} heads of highest C, "
        "which tuning skips, are outlined"
    )
    save_figure(figure, path)


def plot_curves(rows, path):
    """Draws the rows of metrics.jsonl over the steps as a PNG."""
    panels = {
        "reward": ["reward", "task_reward"],
        "entropy (nats a token)": ["entropy"],
        "share of tokens": ["clip_ratio/low", "clip_ratio/high", "kl_mask_fraction"],
        "completion length (tokens)": ["completions/mean_length"],
    }
    figure, axes = new_figure(1, 4, figsize=(16, 3.4))
    # Fixed margins: a layout that is computed draws everything twice, at every checkpoint.
    figure.subplots_adjust(left=0.03, right=0.99, bottom=0.15, top=0.9, wspace=0.16)
    for axis, (title, keys) in zip(axes, panels.items()):
        shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
        for key, style in zip(shown, ("-", "--", ":")):
            values = [row.get(key) for row in rows]
            axis.plot([row["step"] for row in rows], values, style, label=key)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        axis.set_ylim(bottom=min(low, 0), top=max(high, 0.01))
        if len(shown) > 1:
            axis.legend()
    save_figure(figure, path)
