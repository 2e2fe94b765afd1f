"""The demo: converts the embedded pair, measures base and tiers on held-out text, and writes."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from textwrap import fill

import mlx.nn as nn

import outlier_mlx
from outlier_mlx.engine.generate import Options, generate_text
from outlier_mlx.engine.loading import load, load_model
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutputExistsError
from outlier_mlx.measure.perplexity import compare
from outlier_mlx.storage.paths import entries
from outlier_mlx.terminal import Progress, print_columns, progress_bar, size, stdout
from outlier_mlx.tiers.convert import convert_tier
from outlier_mlx.tiers.presets import RECIPES
from outlier_mlx.writing.folders import check_free

FOLDER = Path(outlier_mlx.__file__).parent / "demo"
#: The domain that the base was trained on; all others only the experts have seen.
OLD_DOMAIN = "old"
#: Beginnings of held-out texts, which base and tier continue: two of new domains, one of the old.
BEGINNINGS = (
    "To make a good potato soup,",
    "The astronomer pointed the telescope at",
    "Arthur wanted to grow a yellow sunflower",
)
# What `put_files` copies, and the names that it gives.
COPIES = {"overlay": "my-overlay"} | {
    name: name
    for name in (
        *("base", "base-q4_0.gguf", "kitchen", "sea", "sea-awq", "heldout", "tasks"),
        *("ternary-mlx2", "ternary-rotated", "ternary-bitnet"),
        *("ternary-pq2_0.gguf", "ternary-tq2_0.gguf", "ternary-ptq1_0.gguf"),
    )
}
# Documents of each domain that are measured unless all are asked for: some seconds on two cores.
FEW = 4


def heldout(most: int | None = None) -> dict[str, list[str]]:
    """Held-out documents by domain, at most this many of each; the old domain first."""
    files = entries(FOLDER / "heldout", "*.txt")
    files.sort(key=lambda path: (path.stem != OLD_DOMAIN, path.stem))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[:most] for file in files}


def load_base() -> nn.Module:
    """The embedded base alone, by mlx-lm's own Qwen2, in float32."""
    return load_model(FOLDER / "base", dtype="float32")[0]


def perplexities(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: dict[str, list[str]],
    measured: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Perplexity of a model on the documents of each domain, and of all new domains together.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        texts: documents by domain.
        measured: called with the number of documents after each domain.
    """
    found = {}
    for name, documents in texts.items():
        found[name] = compare(model, [tokenizer.encode(document) for document in documents])
        measured(len(documents))
    new = [domain for name, domain in found.items() if name != OLD_DOMAIN]
    loss = sum(domain.loss * domain.tokens for domain in new) / sum(d.tokens for d in new)
    return {name: domain.perplexity for name, domain in found.items()} | {"all new": math.exp(loss)}


def run(
    out: Path | None = None, *, full: bool = False, force: bool = False, quiet: bool = False
) -> None:
    """Do all that `outlier-mlx demo` does; results go to stdout.

    Args:
        out: keep the int4 tier in this folder.
        full: measure on all held-out documents, not on a few of each domain.
        force: replace `out` if it exists.
        quiet: show no progress.
    """
    if out is not None:
        check_free(out, force=force)
    console = stdout()
    with _folder(out) as (folder, shown):
        console.print("Converting the embedded overlay and its base ...", soft_wrap=True)
        with progress_bar("converting", quiet=quiet) as progress:
            small = convert_tier(
                FOLDER / "overlay", FOLDER / "base", folder, force=force, progress=progress
            )
        with tempfile.TemporaryDirectory() as scratch:
            whole = convert_tier(
                FOLDER / "overlay", FOLDER / "base", Path(scratch) / "f16", recipe=RECIPES["f16"]
            )
            whole_model, _ = load(whole.path, dtype="float32")
        small_model, tokenizer = load(small.path)
        models = {"base": load_base(), "tier, unquantized": whole_model, "tier, int4": small_model}
        sizes = {
            "base": _tensor_bytes(FOLDER / "base"),
            "tier, unquantized": whole.rows[-1].nbytes,
            "tier, int4": small.rows[-1].nbytes,
        }
        texts = heldout(None if full else FEW)
        count = sum(len(documents) for documents in texts.values())
        console.print(f"Measuring on {count} documents that neither was trained on ...\n")
        with progress_bar("measuring", "documents", quiet=quiet) as progress:
            rows = _measure(models, sizes, tokenizer, texts, progress)
        title = "Perplexity on held-out text (lower is better)"
        heads = [name.replace(", ", ",\n") for name in models]
        print_columns(console, ["", *heads], rows, title=title)
        console.print("\nHow each goes on with the beginning of a text that neither has seen:\n")
        for beginning in BEGINNINGS:
            print(f"{beginning} ...")
            for name in ("base", "tier, int4"):
                text = f"  {name}: {_continued(models[name], tokenizer, beginning)}"
                print(fill(text, min(console.width, 100), subsequent_indent="    "))
            print()
        if shown:
            console.print(
                f"Kept in {shown}. Next: outlier-mlx chat {quote(str(shown))}", soft_wrap=True
            )
        else:
            print("Next, to try these models: outlier-mlx demo --files FOLDER")


def put_files(folder: Path) -> list[str]:
    """Copy the embedded pair and its texts into `folder`; the names there.

    The base also comes as a GGUF file. There are two small dense models of one shape, and one of
    them in AutoAWQ's format; and small ternary models in the forms in which such models are
    published. The texts come in `heldout`, and as training data for mlx-lm
    with a folder for each domain in `data`.

    Raises:
        OutputExistsError: a file or folder of one of these names exists.
    """
    names = [*COPIES.values(), "data"]
    for name in names:
        if (folder / name).exists():
            raise OutputExistsError(f"{folder / name}: exists; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".demo.") as scratch:
        whole = Path(scratch)
        for name, copy in COPIES.items():
            place = shutil.copytree if (FOLDER / name).is_dir() else shutil.copyfile
            place(FOLDER / name, whole / copy)
        for domain, texts in heldout().items():
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (whole / "data" / domain).mkdir(parents=True)
            for name, part in (("valid", lines[:4]), ("train", lines[4:])):
                file = whole / "data" / domain / f"{name}.jsonl"
                file.write_text("".join(part), encoding="utf-8")
        for name in names:
            (whole / name).rename(folder / name)
    return names


def _continued(model: nn.Module, tokenizer: Tokenizer, beginning: str) -> str:
    """How a model goes on with a text, up to the last sentence that is complete."""
    options = Options(max_tokens=44, ignore_chat_template=True)
    text = "".join(each.text for each in generate_text(model, tokenizer, beginning, options))
    return text[: text.rfind(".") + 1].strip() or text.strip()


@contextmanager
def _folder(out: Path | None) -> Iterator[tuple[Path, Path | None]]:
    if out is not None:
        yield out, out
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / "q4", None


def _tensor_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in entries(folder, "*.safetensors"))


def _measure(
    models: dict[str, nn.Module],
    sizes: dict[str, int],
    tokenizer: Tokenizer,
    texts: dict[str, list[str]],
    progress: Progress,
) -> list[tuple[str, ...]]:
    """Table rows of sizes and held-out perplexities, with a column for each model."""
    done, total = 0, len(models) * sum(map(len, texts.values()))

    def measured(documents: int) -> None:
        nonlocal done
        done += documents
        progress(done, total)

    found = [perplexities(model, tokenizer, texts, measured) for model in models.values()]
    empty = ("",) * (1 + len(models))
    rows = [("size of weights", *(size(sizes[name]) for name in models)), empty]
    for domain in texts:
        known = "known to the base" if domain == OLD_DOMAIN else "new"
        rows.append((f"{domain} ({known})", *(f"{each[domain]:.2f}" for each in found)))
    return [*rows, empty, ("all new domains", *(f"{each['all new']:.2f}" for each in found))]
