"""What a record of encrypted requests shows: the figures of the whole request, then its tables by node and by primitive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .blocks import Block, Table
from .registry import Record
from .two_tables import of_record

GB = 1e9
# (what, measured, promised or predicted beside it); figures that a record lacks, as an older one may, are left out.
FIGURES = (
    ("encrypt, evaluate and decrypt, s", "total_s", None),
    ("evaluation, s (median)", "evaluate_s", "predicted_evaluate_s"),
    ("longest less shortest evaluation, s", "evaluate_spread_s", None),
    ("warm-ups before those that count", "warm_ups", None),
    ("largest error against the clear", "max_abs_error", "promised_error"),
    ("agreement of the likeliest output", "agreement", None),
    ("predictions compared", "predictions", None),
    ("held-out prompts", "prompts", None),
    ("mean square error of the logits", "mse", None),
    ("root mean square of the logits in the clear", "clear_rms", None),
    ("two likeliest tokens in the clear differ by at least", "closest_margin", None),
    ("evaluation of one block, s", "block_evaluate_s", None),
    ("evaluation of all blocks, PROJECTED from that one, s", None, "projected_evaluate_s"),
    ("refreshes of one block", "block_refreshes", None),
    ("refreshes of all blocks, PROJECTED from that one", None, "projected_refreshes"),
    ("efficiency, bound over measured", "efficiency", None),
    ("peak memory of client and server in one process, GB", "peak_gb", "predicted_memory_gb"),
    ("evaluation keys, GB", "key_gb", None),
    ("keys and request sent, GB", "upload_bytes", None),
    ("request alone, GB", "request_bytes", None),
    ("reply, GB", "reply_bytes", None),
    ("compilation, s", "compile_s", None),
    ("keys made, s", "keygen_s", None),
    ("weights encoded ahead, s", "prepare_s", None),
    ("encodings left to the request, thread-s", "encode_s", None),
    ("weights encoded ahead, GB", "encoded_gb", None),
    ("refreshes", "refreshes", None),
    ("log2 QP (limit for 128 bits beside it)", "logqp", "logqp_limit"),
)


def request(record: Record) -> Sequence[Block]:
    """A summary of the request or of one of its blocks, and the two tables where it has them."""
    tables = of_record(record) if "operators" in record["metrics"] else ()
    return [summary(record), *tables]


def summary(record: Record) -> Table:
    """Figures of the whole request beside what was promised or predicted."""
    m = {**record["metrics"], **({} if record["repeats"] > 1 else {"evaluate_spread_s": None})}  # one run has none
    rows = [
        (what, _cell(m, name), _cell(m, beside))
        for what, name, beside in FIGURES
        if m.get(name) is not None or m.get(beside or name) is not None
    ]
    caption = "One block of the request" if "block_refreshes" in m else "The whole request"
    return Table(caption=caption, columns=("figure", "measured", "promised, predicted or PROJECTED"), rows=rows)


def _cell(metrics: Record, name: str | None) -> Any:
    value = metrics.get(name) if name else None
    return value / GB if value is not None and name is not None and name.endswith("_bytes") else value
