"""The table of architectures in docs/compatibility.md: a tiny random model of each in `tests/architectures.py`, from sites to tracing.

    python benchmarks/compatibility.py runs       docs/results/compatibility.json, a few minutes of one core
    python benchmarks/compatibility.py tables     its Markdown, written between the marks in docs/compatibility.md

`runs [NAME ...]` runs only those architectures and keeps the results of the others.
"""

import json
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from paramlens import Decomposition
from paramlens.analysis.edit import Edit
from paramlens.analysis.trace import trace
from paramlens.baselines.bench import _processor
from paramlens.errors import ParamLensError
from paramlens.method.entry import require_sound
from paramlens.method.generators import generator
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import Site, at_rest, find_sites
from paramlens.method.start import initialise
from paramlens.tasks.language_models.encoding import model_inputs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures  # noqa: E402

RESULTS = ROOT / "docs/results/compatibility.json"
PAGE = ROOT / "docs/compatibility.md"
MARKS = ("<!-- architectures: begin -->", "<!-- architectures: end -->")
LONGEST = 110
"""Letters of a reason that the table shows."""


def main() -> None:
    match sys.argv[1:]:
        case ["runs", *names]:
            runs(names)
        case ["tables"]:
            tables()
        case _:
            print(__doc__)


def runs(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"] if names and RESULTS.exists() else {}
    for name in architectures.names():
        config = architectures.config(name)
        if not names or name in names:
            known[name] = tried(config)
            print(name, known[name], flush=True)
    machine = {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    document = {"command": "python benchmarks/compatibility.py runs", "machine": machine, "architectures": dict(sorted(known.items()))}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def tried(config: PretrainedConfig) -> dict[str, Any]:
    """What one architecture does: sites, exact factors, an edit saved and loaded again, causal tracing."""
    model = architectures.random_model(config)
    inputs = model_inputs(torch.randint(architectures.VOCABULARY, (3, 6), generator=generator("ids")))
    weights = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"]
    sites, left_out = sound_sites(model, inputs, weights)
    found: dict[str, Any] = {"family": type(config).__name__.removesuffix("Config"), "weights": len(weights), "sites": len(sites)}
    if left_out:
        found["left_out"] = left_out
    if sites:
        found["difference"] = largest_difference(model, sites, inputs)
        found["edit"] = outcome(lambda: reloaded(model, sites[-1], inputs))
    found["trace"] = outcome(lambda: traced(model))
    return found


def sound_sites(model: nn.Module, inputs: dict[str, Any], names: list[str]) -> tuple[list[Site], dict[str, int]]:
    """The weights that a run would take, each tried alone, and the reasons of the others with how often each was given."""
    sites: list[Site] = []
    reasons: dict[str, int] = {}
    for name in names:
        try:
            [site] = find_sites(model, [name])
            with at_rest(model):
                require_sound(Decomposition(model, [site], C=1), inputs)
            sites.append(site)
        except ParamLensError as error:
            said = str(error).removeprefix(f"site {name}: ").split(";")[0].split(". Leave it out")[0]
            reason = re.sub(r" \([^()]* = [^()]*\), so .*", "", said)
            reasons[reason] = reasons.get(reason, 0) + 1
    return sites, reasons


def largest_difference(model: nn.Module, sites: list[Site], inputs: dict[str, Any]) -> float:
    """Between the target's logits and those of exact factors with masks of ones at all sites, relative to the largest logit."""
    C = max(min(site.d_in, site.d_out) for site in sites)
    decomposition = Decomposition(model, sites, C=C)
    initialise(decomposition, Init(kind="svd"), generator=generator("start"))
    with at_rest(model), torch.no_grad():
        target = decomposition.target_run(inputs)
        ones = {name: Replacement(torch.ones(*given.shape[:-1], C)) for name, given in target.inputs.items()}
        logits = decomposition(inputs, [ones])[0]
    return float((logits - target.logits).abs().max() / target.logits.abs().max())


def reloaded(model: nn.Module, site: Site, inputs: dict[str, Any]) -> str:
    """Whether an edit's folder gives the very logits of the edit applied, loaded by transformers alone."""
    edit = Edit(model, None, (), "subtraction", {site.name: site.W * 0.5})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        saved = edit.save(Path(folder) / "edited")
        again: Any = AutoModelForCausalLM.from_pretrained(saved).eval()
        with edit.applied() as edited:
            expected: Tensor = edited(**inputs).logits
        return "same logits" if torch.equal(again(**inputs).logits, expected) else "OTHER LOGITS"


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters."""
    level = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .?")}, unk_token="?"))
    level.pre_tokenizer, level.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=level, unk_token="?")


def traced(model: nn.Module) -> str:
    found = trace(model, letters(), "ab cd", "ab", answer="e", samples=2)
    maps = (found.hidden, found.mlp, found.attention)
    everything = [found.clean, found.corrupted, *(value for rows in maps for row in rows for value in row)]
    return "traced" if all(0 <= value <= 1 for value in everything) else "NUMBERS BEYOND 0 TO 1"


def outcome(function: Callable[[], str]) -> str:
    """What a function says, or what the library says instead, in its own words."""
    try:
        return function()
    except ParamLensError as error:
        return f"refused: {str(error).removeprefix('trace: ')}"
    except Exception as error:  # a table of what fails must not fail
        return f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def tables() -> None:
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    begin, end = MARKS
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n{markdown(document)}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def markdown(document: dict[str, Any]) -> str:
    """Everything between the marks."""
    machine, rows = document["machine"], document["architectures"]
    taken = [row for row in rows.values() if row["sites"]]
    where = f"{machine['system']}, {machine['processor']}, one thread, Python {machine['python']}, torch {machine['torch']}"
    lines = [
        f"{len(rows)} configurations, {len(taken)} of which have sites ({where}, transformers {machine['transformers']}).",
        "",
        "| architecture | sites of weights | largest difference | edit, saved and loaded | causal tracing | why the rest cannot be sites |",
        "|---|---:|---:|---|---|---|",
    ]
    for name, row in rows.items():
        difference = f"{row['difference']:.0e}" if "difference" in row else "-"
        reasons = "; ".join(f"{count} × {_short(reason)}" for reason, count in row.get("left_out", {}).items())
        traced = re.sub(r" \([^)]*\)|, so (there is no map|what they add).*", "", row["trace"])
        cells = (name, f"{row['sites']} of {row['weights']}", difference, row.get("edit", "-"), traced)
        lines.append("| " + " | ".join([*(_short(cell) for cell in cells), reasons.replace("|", "\\|") or "-"]) + " |")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1].rstrip()}…"


if __name__ == "__main__":
    main()
