"""demo: the whole path on one machine, from text to a decrypted answer and a report.

Three kinds of process: this one is the client and holds the secret key; the server is `polyformer serve`; training, export
and compilation run in processes that end before any key exists.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from polyformer.commands import compiling, infer, keys, models
from polyformer.commands.console import Failure, bar, out, say, size, warn_insecure
from polyformer.commands.isolated import isolated
from polyformer.commands.options import BACKEND, THREADS, Backend, Threads
from polyformer.commands.server_process import ServerProcess, server_process, terminated_cleanly
from polyformer.reading import Reading

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.noise import Noise

QUICK_LOG_N = 14  # the vocabulary times the tokens must fit the slots
MADE = {"client": {"secret", "evaluation"}, "server": {"keys"}}  # folders that every run makes anew, and their contents
SPARE_DISK = 1 << 30
MOST_GB = 19.5  # the target is a measured peak of 20 GB; predictions are off by some percent


def register(app: typer.Typer) -> None:
    app.command(epilog='Example: polyformer demo --prompt "My fellow Americans, the state of"')(demo)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the demo was asked to run."""

    out: Path
    text: Path | None
    prompt: str | None
    backend: str
    quick: bool
    retrain: bool
    threads: int
    max_memory_gb: float
    seed: int

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def mark(self) -> Path:
        """What the model was made from; where it lies, the folder is a demo's."""
        return self.out / "model.json"


@dataclass(kw_only=True)
class Story:
    """What happened, for the report: seconds of each phase in order, and what the steps returned."""

    phases: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases.append({"name": name, "seconds": time.perf_counter() - start})

    def seconds(self, *names: str) -> float:
        return sum(p["seconds"] for p in self.phases if p["name"] in names)


def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    text: Annotated[Path | None, typer.Option(help="Train on this file or folder of .txt instead.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this instead of held-out text.")] = None,
    backend: Backend = BACKEND,
    quick: Annotated[
        bool, typer.Option(help="A tiny model on a test-size INSECURE ring: the path, not the result.")
    ] = False,
    retrain: Annotated[bool, typer.Option(help="Train again even if a model is there.")] = False,
    threads: Threads = THREADS,
    max_memory_gb: Annotated[
        float | None, typer.Option(help="RAM for client and server; default: 80 % of this machine's, at most 19.5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which held-out window is the prompt.")] = 0,
) -> None:
    """Train, export, compile, encrypt, evaluate on a server, decrypt, report: all of it, here."""
    options = Options(
        out=to,
        text=text,
        prompt=prompt,
        backend=backend,
        quick=quick,
        retrain=retrain,
        threads=threads,
        max_memory_gb=max_memory_gb or min(0.8 * compiling.machine_memory_gb(), MOST_GB),
        seed=seed,
    )
    with terminated_cleanly():
        run(options)


def run(options: Options) -> None:
    """All six steps.

    Raises:
        Failure: a step failed, or the decrypted answer is not what was promised. The report is written all the same.
    """
    from benchmarks import noise

    if options.quick:
        warn_insecure("demo --quick")
    refuse_foreign(options)
    start, story = time.perf_counter(), Story()
    options.out.mkdir(parents=True, exist_ok=True)
    with noise.watch() as seen:
        train(options, story)
        export(options, story)
        compile_(options, story)
        tokens, prompt = choose_prompt(options)
        encrypted = serve_and_ask(options, story, tokens)
        with story.phase("clear"), bar("clear") as advance:
            clear = isolated(clear_logits, options.model / "model.onnx", tokens, progress=advance)
    compare(options, story, prompt, encrypted, clear)
    story.facts["total_s"] = time.perf_counter() - start
    finish(options, story, seen)


# --- Steps ------------------------------------------------------------------------------------------------------------


def train(options: Options, story: Story) -> None:
    """1: train and convert, unless the model of an earlier run is there."""
    folder = options.model
    wanted = {"quick": options.quick, "text": fingerprint(options.text)}
    kept = read_mark(options.mark)
    if kept is not None and folder.exists() and (options.retrain or kept != wanted):
        shutil.rmtree(folder)
    options.mark.write_text(json.dumps(wanted))
    if (folder / "polynomial.safetensors").exists():
        metrics = json.loads((folder / "metrics.json").read_text())
        say(f"[bold]1[/] model of an earlier run kept in {folder} (--retrain makes a new one)")
    else:
        say("[bold]1[/] train on text, then turn the model into polynomials")
        with story.phase("train"), bar("train") as advance:
            isolated(models.train_model, folder, options.text, options.quick, progress=advance)
        with story.phase("convert"), bar("convert") as advance:
            metrics = isolated(models.convert_model, folder, progress=advance)
    story.facts["metrics"] = metrics
    losses = [(name, metrics.get(f"heldout_loss_{name}")) for name in ("softmax", "polynomial")]
    say(
        "  held-out loss, nats a token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
    )


def export(options: Options, story: Story) -> None:
    """2: an ONNX file that onnxruntime agrees with."""
    say("[bold]2[/] export to ONNX")
    with story.phase("export"), bar("export") as advance:
        try:
            result = isolated(models.export_checked, options.model, progress=advance)
        except Failure as error:
            if not story.seconds("train"):
                raise Failure(f"{error} (the model is of an earlier run; --retrain makes a new one)") from error
            raise
    story.facts["export"] = result
    say(f"  onnxruntime and torch differ by at most {result['max_difference']:.2g}")


def compile_(options: Options, story: Story) -> None:
    """3: certificate, circuit, parameters."""
    say("[bold]3[/] compile to a CKKS circuit")
    with story.phase("compile"), bar("compile") as advance:
        plan = isolated(
            compiling.compile_files,
            options.model / "model.onnx",
            options.model / "calibration.npz",
            options.model / "model.circuit",
            backend=options.backend,
            max_memory_gb=options.max_memory_gb,
            threads=options.threads,
            insecure_log_n=QUICK_LOG_N if options.quick else None,
            progress=advance,
        )
    story.facts["plan"] = plan
    predicted = plan["predicted"]
    say(f"  {plan['certificate']}")
    say(
        f"  {plan['name']}, predicted: {predicted['evaluate_s']:.1f} s, {predicted['memory_gb']:.1f} GB, "
        f"keys {size(predicted['key_bytes'])}, request {size(predicted['input_bytes'])}, error {plan['error_bound']:.2g}"
    )


def choose_prompt(options: Options) -> tuple[np.ndarray, str]:
    """Token ids [T] of the prompt, and its text."""
    import numpy as np

    tokenizer = infer.load_tokenizer(options.model / "model.client", None)
    with np.load(options.model / "calibration.npz", allow_pickle=False) as file:
        heldout = file["heldout"]
    if options.prompt is None:
        tokens = heldout[options.seed % len(heldout)]
    else:
        reading = Reading.of(infer.load_spec(options.model / "model.client").model)
        tokens = np.array(reading.read(tokenizer, options.prompt, heldout.shape[1]), dtype=np.int64)
    return tokens, tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def serve_and_ask(options: Options, story: Story, tokens: np.ndarray) -> Any:
    """4: a server elsewhere, keys here; returns the opened reply."""
    client, secret = options.model / "model.client", options.out / "client"
    evaluation = options.out / "server"
    for folder in (secret, evaluation):
        shutil.rmtree(folder, ignore_errors=True)  # every run makes its own keys
    plan = story.facts["plan"]
    check_disk(options.out, int(plan["predicted"]["key_bytes"]))
    say("[bold]4[/] the server starts as another process; the client makes keys, encrypts, asks, decrypts")
    plaintext_gb = plan["predicted"].get("plaintext_bytes", 4e9) / 1e9 + 0.05
    with server_process(
        options.model / "model.circuit",
        evaluation,
        options.out / "server.log",
        threads=options.threads,
        plaintext_gb=plaintext_gb,
        insecure=options.quick,
    ) as server:
        try:
            return ask(options, story, server, client, secret, tokens)
        except Exception as error:
            raise server.explain(error) from error
        finally:
            for folder in (secret / "evaluation", evaluation / "keys"):
                shutil.rmtree(folder, ignore_errors=True)


def ask(options: Options, story: Story, server: ServerProcess, client: Path, folder: Path, tokens: np.ndarray) -> Any:
    """The client's part, with everything measured."""
    from he_backend import owner
    from he_backend.client import Client
    from he_backend.heap import peak_rss

    with story.phase("keygen"):
        made = keys.make_keys(client, folder, insecure=options.quick)
    spec, who = infer.open_keys(client, folder)
    with Client(server.url) as http:
        http.agree(spec, who.moduli)
        with story.phase("upload"):
            infer.upload(http, folder, discard=True)
        with story.phase("encrypt"):
            request = owner.seal(spec, who, owner.embed(spec, tokens))
        with story.phase("evaluate"), infer.evaluation_bar() as progress:
            reply, timing = http.evaluate(request, max_reply=infer.reply_cap(spec), progress=progress, retries=0)
        status = http.status()
    with story.phase("decrypt"):
        opened = infer.open_reply(spec, who, reply)
    story.facts |= {
        "timing": timing,
        "prepare_s": status["weights"]["seconds"],
        "key_bytes": made["bytes"],
        "input_bytes": len(request),
        "reply_bytes": len(reply),
        "peak_server_gb": max(status["peak_rss_bytes"], timing["peak_rss_bytes"]) / 1e9,
        "peak_client_gb": peak_rss() / 1e9,
        "circuit_sha256": spec.circuit_sha256,
        "moduli": list(who.moduli),
    }
    say(
        f"  evaluated in {timing['wall_s']:.1f} s, sent {size(len(request))}, received {size(len(reply))}; "
        f"peak memory {story.facts['peak_server_gb']:.1f} GB server + {story.facts['peak_client_gb']:.1f} GB client"
    )
    return opened


def clear_logits(path: Path, tokens: np.ndarray, *, progress: Any) -> np.ndarray:
    """Logits [T, V] of the ONNX file in onnxruntime."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {session.get_inputs()[0].name: tokens[None]})[0], dtype=np.float64)
    progress(1, 1, "onnxruntime")
    return logits.reshape(-1, logits.shape[-1])


def compare(options: Options, story: Story, prompt: str, encrypted: Any, clear: np.ndarray) -> None:
    """5: both answers side by side."""
    import numpy as np

    say("[bold]5[/] compare")
    exact = next(iter(encrypted.exact.values())).reshape(-1, clear.shape[-1])
    rounded = next(iter(encrypted.tensors.values())).reshape(-1, clear.shape[-1])
    clear = clear[-len(exact) :]
    error = np.abs(exact - clear)
    top2 = np.sort(clear[-1])[-2:]
    tokenizer = infer.load_tokenizer(options.model / "model.client", None)
    rows, reference = (infer.likeliest(logits, infer.spelled(tokenizer), 5) for logits in (rounded, clear))
    story.facts |= {
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "prediction": {
            "prompt": prompt,
            "encrypted": rows,
            "clear": reference,
            "top1_equal": int(exact[-1].argmax()) == int(clear[-1].argmax()),
            "clear_margin": float(top2[1] - top2[0]),
            "agreement": float((exact.argmax(-1) == clear.argmax(-1)).mean()),
            "positions": len(exact),
        },
    }
    table = Table(title=f"…{prompt[-60:]}", title_justify="left")
    for column in ("decrypted", "logit", "probability", "in the clear", "logit", "probability"):
        table.add_column(column, justify="left" if column in ("decrypted", "in the clear") else "right")
    for row, ref in zip(rows, reference, strict=True):
        cells = [[repr(r["token"]), f"{r['logit']:.4f}", f"{r['probability']:.1%}"] for r in (row, ref)]
        table.add_row(*cells[0], *cells[1])
    out.print(table)
    p = story.facts["prediction"]
    say(
        f"  error of the logits: largest {error.max():.2g}, mean {error.mean():.2g}, promised "
        f"{story.facts['plan']['error_bound']:.3g}; likeliest token {'equal' if p['top1_equal'] else 'DIFFERENT'}"
    )


def finish(options: Options, story: Story, seen: Noise) -> None:
    """6: report and record; then fail if the answer is not what was promised."""
    from benchmarks import report
    from polyformer.commands.demo_report import benchmark_record, build_report

    record = benchmark_record(options, story, seen)
    page = report.write(build_report(options, story, record), options.out)
    say(f"[bold]6[/] report: {page}")
    from benchmarks import records

    where = records.write(record, options.out if options.quick else records.RESULTS)
    say(f"  record: {where}")
    if options.quick:
        warn_insecure("demo --quick")
    verdict(story)


def verdict(story: Story) -> None:
    """Raises Failure if an error passes its bound, or a clear decision came out differently."""
    bound, error, p = story.facts["plan"]["error_bound"], story.facts["max_abs_error"], story.facts["prediction"]
    if not error <= bound:
        raise Failure(f"the largest logit error is {error:.4g}, above the promised {bound:.4g}")
    if not p["top1_equal"] and p["clear_margin"] > bound:
        raise Failure(
            f"the likeliest token differs although it leads by {p['clear_margin']:.4g} in the clear, above the promised {bound:.4g}"
        )


# --- Helpers ----------------------------------------------------------------------------------------------------------


def read_mark(path: Path) -> dict[str, Any] | None:
    """The mark of an earlier run, if the file is one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and set(data) == {"quick", "text"} else None


def refuse_foreign(options: Options) -> None:
    """A run deletes and overwrites what an earlier one left, and must not do so to anything else.

    Raises:
        Failure: a name that the demo uses holds what no demo made.
    """
    ours = read_mark(options.mark) is not None
    for name, made in MADE.items():
        folder = options.out / name
        inside = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        foreign = sorted(inside - made if ours else inside)
        if foreign or (folder.exists() and not folder.is_dir()):
            raise Failure(
                f"{folder} holds {', '.join(foreign[:3]) or 'a file'}, which no demo made and this one would delete: "
                "choose another folder with --out"
            )
    trained = (options.model / "polynomial.safetensors").exists() and not options.retrain
    if not ours and (options.mark.exists() or (options.model.exists() and not trained)):
        place = options.mark if options.mark.exists() else options.model
        raise Failure(f"{place} is not of a demo, and this one would overwrite it: choose another folder with --out")


def fingerprint(text: Path | None) -> str:
    """Hash of the training text, empty for the package's own."""
    if text is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(text.rglob("*.txt")) if text.is_dir() else [text]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_disk(folder: Path, key_bytes: int) -> None:
    """Keys are on the client's disk and on the server's, for a moment both here."""
    free, needed = shutil.disk_usage(folder).free, int(1.2 * key_bytes) + SPARE_DISK
    if free < needed:
        raise Failure(f"{folder} has {size(free)} free; the evaluation keys need {size(needed)} for a while")
