"""Tables and figures of the records that `released` and `released_encoder` make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .blocks import COLOURS, Block, Table, legend, logarithmic, look, panels, picture
from .registry import Record


def smollm2_swap(record: Record) -> Sequence[Block]:
    """Held-out perplexity against tokens seen, the arms at their ends, and what each layer's fit left."""
    metrics = record["metrics"]
    drawing, (ax,) = panels()
    swap_curves(ax, record)
    blocks: list[Block] = [
        picture(drawing, f"{metrics['model']}: perplexity on held-out text as training goes on after the swap.")
    ]
    rows = [
        (
            row["arm"],
            *(row["curve"][k]["perplexity"] if row["curve"] else None for k in (0, -1)),
            row.get("gap_first"),
            row.get("gap_last"),
            row["preparation_s"],
            row.get("training_s"),
        )
        for row in metrics["arms"]
    ]
    columns = ("arm", "perplexity at first", "at last", "nats above the control at first", "at last")
    blocks.append(
        Table(
            caption="Held-out perplexity before and after continued training on the same batches",
            columns=(*columns, "preparation, s", "training, s"),
            rows=rows,
        )
    )
    blocks += [_layers(layers, f" ({arm})") for arm, layers in metrics["layers"].items()]
    if metrics["published"]:
        blocks.append(
            Table(
                caption="Perplexity of the released model beside the one that was measured independently",
                columns=("text", "independent", "here", "bits a byte here"),
                rows=[(p["text"], p["published"], p["perplexity"], p["bits_per_byte"]) for p in metrics["published"]],
            )
        )
    return blocks


def swap_curves(ax: Any, record: Record) -> None:
    """Draw the held-out perplexity of every arm against tokens of continued training."""
    for i, row in enumerate(record["metrics"]["arms"]):
        curve = [p for p in row["curve"] if p["perplexity"] is not None]
        tokens, perplexities = [p["tokens"] for p in curve], [p["perplexity"] for p in curve]
        ax.plot(tokens, perplexities, label=row["arm"], markersize=4, **look(i))
    logarithmic(ax, "y")
    ax.set_xlabel("tokens of continued training")
    ax.set_ylabel("held-out perplexity")
    legend(ax)


def minilm_distil(record: Record) -> Sequence[Block]:
    """Each variant beside the original."""
    metrics = record["metrics"]
    rows = [
        (
            v["variant"],
            v["state_error"],
            v["cosine_mean"],
            v["cosine_least"],
            v["accuracy"],
            v.get("outside"),
            v.get("levels"),
            v["seconds"],
        )
        for v in metrics["variants"]
    ]
    columns = ("variant", "state error", "mean cosine", "least cosine", "probe accuracy")
    table = Table(
        caption="On test documents: relative square error of the states, cosine of the sentence embedding to the original's, "
        "accuracy of a probe on the variant's own embeddings; the largest share of one layer's values outside its interval",
        columns=(*columns, "outside", "levels", "made in, s"),
        rows=rows,
    )
    drawing, (ax,) = panels(height=2.6)
    known = [v for v in metrics["variants"] if v["accuracy"] is not None]
    ax.barh([v["variant"] for v in known], [v["accuracy"] for v in known], color=COLOURS[0])
    ax.invert_yaxis()
    ax.set_xlabel("probe accuracy")
    blocks: list[Block] = [picture(drawing, f"{metrics['model']}: accuracy of a probe on the embeddings."), table]
    if metrics["layers"]:
        blocks.append(_layers(metrics["layers"]))
    if metrics["cosines"]:
        blocks.append(
            Table(
                caption="Cosines of the released encoder; beside them a survey's, which does not name its texts",
                columns=("texts", "survey", "here"),
                rows=[(" / ".join(c["texts"]), c["published"], c["cosine"]) for c in metrics["cosines"]],
            )
        )
    return blocks


def _layers(layers: Sequence[Record], whose: str = "") -> Table:
    return Table(
        caption=f"Relative square error of each attention's outputs on windows that it was not fitted to{whose}",
        columns=("layer", "parameters copied", "powers matched", "fitted"),
        rows=[(row["layer"], row["copied"], row["matched"], row["fitted"]) for row in layers],
    )
