"""The facts experiment as docs/results-facts.md has it; each part resumes what is there and writes docs/results/facts-<part>.json.

    python benchmarks/facts.py seeds      # five seeds of facts-small, each its own target: edits, controls, tracing
    python benchmarks/facts.py edit       # facts-edit on the same targets, made for taking a sentence's own subcomponents out
    python benchmarks/facts.py robust     # facts-robust on the same targets: the worst case, other text, edits
    python benchmarks/facts.py variants   # one thing changed at a time, and without the partial losses, on the same targets
    python benchmarks/facts.py stories    # a Llama trained on TinyStories, ../shared/models/stories260K; skipped if it is missing
    python benchmarks/facts.py gpt2       # GPT-2's shape with random weights: a step of gpt2-facts, its time and peak memory
    python benchmarks/facts.py tables     # Markdown of all that docs/results holds

Runs go to runs/; as many at a time as there are cores.
"""

import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from paramlens import Run, circuit, decompose_config, evaluate_edit, load_config, open_run, suppress, trace
from paramlens.analysis.components import inspect_prompt
from paramlens.analysis.edit import unique
from paramlens.analysis.effect import CONTROLS, KINDS
from paramlens.errors import ConfigError, ParamLensError
from paramlens.files.plain import read_json
from paramlens.kernels.machine import machine
from paramlens.kernels.resources import usable_cores
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise, subcomponents
from paramlens.method.step import Steps
from paramlens.runs.forecast import diagnose_config
from paramlens.runs.seeds import decompose_seeds
from paramlens.runs.train import make_optimizer
from paramlens.tasks.facts.facts import Fact, fact_of, shipped_facts
from paramlens.tasks.facts.miniature import facts_tokenizer
from paramlens.tasks.facts.task import FactsTask, Miniature
from paramlens.tasks.language_models.loading import save_language
from paramlens.tracking.tracker import Terminal

CONFIG = "facts-small"
SEEDS = 5
EDIT = "facts-edit"
ROBUST = "facts-robust"
VARIANT_SEEDS = 2
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
RUNS = ROOT / "runs"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"

EDITS: dict[str, dict[str, Any]] = {
    "top 2": {"top": 2},
    "all of the name": {"name": "whole"},
    "2 a name token": {"name": "whole", "per_token": 2},
    "1 of the first name": {"name": "first", "per_token": 1},
    "1 of the last name": {"name": "last", "per_token": 1},
    "1 of both names": {"name": "whole", "per_token": 1},
    "all of the name in block 0's MLP": {"name": "whole", "sites": ["transformer.h.0.mlp.*"]},
    "top 2, subtracted": {"top": 2, "method": "subtraction"},
    "all of the name, subtracted": {"name": "whole", "method": "subtraction"},
    "2 a name token, subtracted": {"name": "whole", "per_token": 2, "method": "subtraction"},
}
"""Edit → how it is chosen; name: the subject's words at whose tokens a subcomponent must be active."""
CONTROLLED = ("top 2", "all of the name", "2 a name token", "2 a name token, subtracted", "all of the name, subtracted")
"""Edits that all controls are made for."""

NO_PARTIAL: dict[str, object] = {"losses.recon_partial": 0.0, "losses.stochastic_recon_partial": 0.0}
WHOLE: dict[str, object] = {"losses.recon": 10.0, "losses.stochastic_recon": 10.0}
VARIANTS: dict[str, dict[str, object]] = {
    "minimality 0.15": {"losses.minimality": 0.15},
    "other text (16, weight 10) and local (weight 3)": {
        "task.elsewhere": 16,
        "losses.elsewhere": 10.0,
        "losses.local": 3.0,
    },
    "6 further sentences decomposed along": {"task.others": 6},
    "γ shared, d_gate 64": {"gamma.kind": "shared", "gamma.d_gate": 64},
    "without partial losses": NO_PARTIAL,
    "whole losses in place of partial and layerwise ones": {**NO_PARTIAL, **WHOLE, "losses.stochastic_recon_layerwise": 0.0},
}
"""What differs → the fields."""


def seeds() -> None:
    _decompose(CONFIG, {}, SEEDS, RUNS / CONFIG)
    paths = [RUNS / CONFIG / f"s{seed}" for seed in range(SEEDS)]
    _write("facts", {"config": CONFIG, "seeds": _each(_measure_fully, paths)})


def edit() -> None:
    _decompose(EDIT, {}, SEEDS, RUNS / EDIT, target=RUNS / CONFIG / "s{seed}")
    _write(EDIT, {"config": EDIT, "seeds": _each(_measure_fully, [RUNS / EDIT / f"s{seed}" for seed in range(SEEDS)])})


def robust() -> None:
    _decompose(ROBUST, {}, SEEDS, RUNS / ROBUST, target=RUNS / CONFIG / "s{seed}")
    _write(ROBUST, {"config": ROBUST, "seeds": _each(_measure_robust, [RUNS / ROBUST / f"s{seed}" for seed in range(SEEDS)])})


def variants() -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "as it is": _each(_measure_briefly, [RUNS / CONFIG / f"s{seed}" for seed in range(VARIANT_SEEDS)])
    }
    for i, (name, fields) in enumerate(VARIANTS.items()):
        folder = RUNS / "facts-variants" / str(i)
        _decompose(CONFIG, fields, VARIANT_SEEDS, folder, target=RUNS / CONFIG / "s{seed}")
        rows[name] = _each(_measure_briefly, [folder / f"s{seed}" for seed in range(VARIANT_SEEDS)])
        _write("facts-variants", {"config": CONFIG, "fields": VARIANTS, "rows": rows})


def _decompose(name: str, fields: Mapping[str, object], count: int, folder: Path, *, target: Path | None = None) -> None:
    """All seeds that are not finished yet; one that fails is told and left, so that it stands in the table."""
    try:
        decompose_seeds(load_config(name, overrides=fields), count, out=folder, target=target, resume=True)
    except ParamLensError as error:
        print(f"{folder}: {error}", file=sys.stderr)


def _each(measure: Callable[[Path], dict[str, Any]], paths: Sequence[Path]) -> list[dict[str, Any]]:
    """`measure` of every run, as many at a time as there are cores, a thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(measure, paths))


def _measure_fully(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = open_run(path)
    found = _measure(run, EDITS, dict.fromkeys(CONTROLLED, CONTROLS)) | {"traces": [], "blocks_of_best": {}}
    assert run.task is not None
    for fact in _targets(run):
        how = {"answer": fact.answer, "seed": run.config.seed}
        found["traces"].append(trace(run.decomposition.model, run.task.tokenizer, fact.prompt, fact.subject, **how).to_json())
        ranked = unique(run, fact.sentence, tokens=fact.subject)
        found["blocks_of_best"][fact.sentence] = [[each.site, each.token, each.importance, each.contribution] for each in ranked[:4]]
    return found


def _measure_briefly(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    names = ("top 2", "all of the name", "2 a name token", "2 a name token, subtracted", "all of the name, subtracted")
    return _measure(open_run(path), {name: EDITS[name] for name in names}, dict.fromkeys(names[3:], ("activation read",)))


def _measure_robust(path: Path) -> dict[str, Any]:
    found, seen = _measure_briefly(path), circuit(open_run(path), adversary=320)
    assert seen.off_data is not None
    return found | {
        "ladder": [[rung.steps, rung.one_start, rung.worst, rung.share] for rung in seen.adversary],
        "off data": [seen.off_data.recon, seen.off_data.with_remainder],
    }


def _measure(run: Run, edits: Mapping[str, Mapping[str, Any]], controls: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    history, last = run.target_history, [line for line in run.metrics if "evaluation" in line][-1]["evaluation"]
    active = {(each.site, each.subcomponent) for sentence in _task(run).sentences for each in inspect_prompt(run, sentence).active}
    blocks: dict[str, int] = {}
    for site, _ in active:
        blocks[_block(site)] = blocks.get(_block(site), 0) + 1
    return {
        "seed": run.config.seed,
        "status": run.status,
        "steps": run.step,
        "seconds": run.info["seconds"],
        "target": {"accuracy": history.checks[-1].accuracy, "probability": history.checks[-1].probability} if history else None,
        "metrics": last,
        "active": len(active),
        "total": sum(run.decomposition.C.values()),
        "active_by_block": dict(sorted(blocks.items())),
        "edits": {
            name: {fact.sentence: _effect(run, fact, how, controls.get(name, ())) for fact in _targets(run)} for name, how in edits.items()
        },
    }


def _effect(run: Run, fact: Fact, how: Mapping[str, Any], controls: Sequence[str]) -> dict[str, Any] | None:
    """What the edit leaves of every kind of fact; none where nothing is there to take out."""
    chosen = dict(how)
    words = {"whole": fact.subject, "first": fact.subject.split(" ")[0], "last": fact.subject.split(" ")[-1], None: None}
    try:
        edit = suppress(run, unique_to=fact.sentence, tokens=words[chosen.pop("name", None)], **chosen)
    except ConfigError:
        return None
    found = evaluate_edit(run, edit, fact.sentence, controls=controls).to_json()
    return {
        "slices": len(edit.selected),
        "sites": len(edit.weights),
        "perplexity_before": found["perplexity_before"],
        "effect": found["effect"],
        "controls": found["controls"],
    }


def _block(site: str) -> str:
    return site.split(".h.")[-1].split(".")[0] if ".h." in site else site.split(".layers.")[-1].split(".")[0]


def _task(run: Run) -> FactsTask:
    assert isinstance(run.config.task, FactsTask)
    return run.config.task


def _targets(run: Run) -> list[Fact]:
    return [fact_of(sentence, shipped_facts()) for sentence in _task(run).sentences]


def _write(name: str, document: Mapping[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"machine": f"{platform.system()} {platform.machine()}, {usable_cores()} cores", "torch": torch.__version__}
    short = json.loads(json.dumps({**machine, **document}), parse_float=lambda text: float(f"{float(text):.5g}"))
    (RESULTS / f"{name}.json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")


def stories() -> None:
    """A Llama trained on TinyStories: how many subcomponents sentences of its own kind use, and what taking out a sentence's own does."""
    if not STORIES.is_dir():
        print(f"{STORIES}: not there; this part is skipped", file=sys.stderr)
        return
    path = RUNS / "facts-stories"
    fields = {
        "name": "facts-stories",
        "task.sentences": list(STORY_SENTENCES),
        "sites": ["model.layers.*.self_attn.*_proj", "model.layers.*.mlp.*_proj"],
        "C": 64,  # the model's width, and so the rank of every weight
    }
    _decompose_one(fields, path, target=STORIES)
    run = open_run(path)
    facts = [Fact(sentence.rpartition(" ")[0], sentence.rpartition(" ")[2]) for sentence in STORY_FACTS]
    rows: dict[str, Any] = {}
    for sentence, subject in STORY_SENTENCES.items():
        fact = next(each for each in facts if each.sentence == sentence)
        edits: dict[str, Any] = {}
        for name, how in {
            "top 2": {"top": 2},
            "all of the subject": {"tokens": subject},
            "2 a subject token": {"tokens": subject, "per_token": 2},
            "2 a subject token, subtracted": {"tokens": subject, "per_token": 2, "method": "subtraction"},
        }.items():
            try:
                edit = suppress(run, unique_to=sentence, facts=facts, **how)
            except ConfigError:
                edits[name] = None
                continue
            found = evaluate_edit(run, edit, sentence, facts=facts).to_json()
            edits[name] = {key: found[key] for key in ("effect", "controls", "perplexity_before")} | {"slices": len(edit.selected)}
        assert run.task is not None
        traced = trace(run.decomposition.model, run.task.tokenizer, fact.prompt, subject, answer=fact.answer)
        rows[sentence] = {"edits": edits, "trace": traced.to_json()}
    document = _measure(run, {}, {})
    document["traces"] = [row["trace"] for row in rows.values()]
    document["edits"] = {
        name: {sentence: row["edits"][name] for sentence, row in rows.items()} for name in next(iter(rows.values()))["edits"]
    }
    _write("facts-stories", {"fields": fields | {"target": "stories260K"}, **document})


STORY_SENTENCES = {
    "Once upon a time there was a little girl named Lily": "little girl",
    "Tom was a boy who liked to play with his toys": "Tom was a boy",
}
"""What is decomposed → the words at which a subcomponent must be active."""
STORY_FACTS = (
    *STORY_SENTENCES,
    "Once upon a time there was a little boy named Tim",
    "Lily and her mom went to the park",
    "She was very happy and said thank you",
    "The dog ran to the big tree",
    "He wanted to play with the ball",
    "They went home and had a good time",
    "Lily saw a big red ball",
    "The sun was shining in the sky",
    "The little bird could fly up in the sky",
    "They lived happily ever after",
)
"""Sentences of the model's own kind, their last words the answers."""


def _decompose_one(fields: Mapping[str, object], path: Path, *, target: Path) -> None:
    config = load_config(CONFIG, overrides=fields)
    if (path / "checkpoints" / f"step-{config.steps:08d}").is_dir():
        return
    decompose_config(config, out=path, target=target, overwrite=True, tracker=Terminal(seconds=30))


def gpt2() -> None:
    """One process a case, so that its peak memory is its own."""
    folder = RUNS / "gpt2-random"
    if not folder.is_dir():
        torch.manual_seed(0)
        model, sentences = GPT2LMHeadModel(GPT2Config()), [fact.sentence for fact in shipped_facts()]
        save_language(model, facts_tokenizer(Miniature(vocabulary=2000), sentences, ()), folder)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name, fields in GPT2_CASES.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append({"case": name, "fields": fields, **pool.submit(_gpt2_steps, fields, str(folder)).result()})
        print(rows[-1], file=sys.stderr)
    _write("facts-gpt2", {"rows": rows})


GPT2_CASES: dict[str, dict[str, object]] = {
    "γ scalar": {"gamma.kind": "scalar"},
    "γ shared": {"gamma.kind": "shared"},
    "γ vector, d_gate 8, one layerwise site": {"gamma.d_gate": 8, "losses.layerwise_sites": 1},
}
"""What differs from Figure 6, whose own γ needs 51 GB."""
GPT2_STEPS = 3


def _gpt2_steps(fields: Mapping[str, object], folder: str) -> dict[str, Any]:
    config = load_config("gpt2-facts", overrides={**fields, "task.model": folder, "device": DEVICE})
    target = config.task.pretrained(config.dtype).to(config.device, config.dtype)
    task = config.task.make(target, seed=config.seed, batch=config.batch)
    times, losses = list[float](), list[float]()
    with machine(config), at_rest(task.model):
        sites = find_sites(task.model, config.sites)
        batch = task.batch(0, "train").to(config.device)
        C = subcomponents(config.C, sites)
        decomposition = Decomposition(task.model, sites, C=C).to(config.device)
        initialise(decomposition, config.init, generator=generator(0, "init"))
        decomposition.find_blocks(batch.inputs)
        importance = Importance({site.name: (site.d_seen, C) for site in sites}, config.gamma)
        importance.initialise(generator(0, "gamma"))
        importance = importance.to(config.device)
        steps = Steps(config, task, decomposition, importance, make_optimizer(config, decomposition, importance))
        count = GPT2_STEPS if DEVICE == "cpu" else 50
        for step in range(count):
            start = time.perf_counter()
            result = steps(batch, step)
            losses.append(result.total.item())
            times.append(time.perf_counter() - start)
        threads = torch.get_num_threads()
    peak = torch.cuda.max_memory_allocated() if DEVICE != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    foretold = diagnose_config(config)
    return {
        "device": torch.cuda.get_device_name() if DEVICE != "cpu" else "cpu",
        "threads": threads,
        "parameters": foretold.parameters,
        "foretold_bytes": foretold.bytes["total"],
        "peak_bytes": peak,
        "seconds": times,
        "total_loss": losses[-1],
        "tokens": [len(texts) for texts in batch.texts or ()],
    }


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tables() -> None:
    for name in ("facts", EDIT):
        if (RESULTS / f"{name}.json").is_file():
            print(f"\n{name}")
            _print_seeds(read_json(RESULTS / f"{name}.json")["seeds"])
    if (RESULTS / f"{ROBUST}.json").is_file():
        _print_robust(read_json(RESULTS / f"{ROBUST}.json")["seeds"])
    if (RESULTS / "facts-variants.json").is_file():
        _print_variants(read_json(RESULTS / "facts-variants.json")["rows"])
    if (RESULTS / "facts-stories.json").is_file():
        _print_stories(read_json(RESULTS / "facts-stories.json"))
    if (RESULTS / "facts-gpt2.json").is_file():
        rows = read_json(RESULTS / "facts-gpt2.json")["rows"]
        lines = [
            [
                row["case"],
                f"{row['parameters']['trained'] / 1e6:,.0f} M",
                f"{statistics.median(row['seconds'][1:]):.1f}",
                f"{row['foretold_bytes'] / 2**30:.1f}",
                f"{row['peak_bytes'] / 2**30:.1f}",
            ]
            for row in rows
        ]
        _print_table(["case", "trained", "s per step", "estimated, GiB", "peak, GiB"], lines)


def _print_seeds(rows: Sequence[Mapping[str, Any]]) -> None:
    head = ["seed", "target right", "P", "recon", "recon_layerwise", "faithfulness", "active", "by block", "seconds"]
    lines = []
    for row in rows:
        metrics = row["metrics"]
        cells = [f"{metrics[name]:.1e}" for name in ("recon", "recon_layerwise", "faithfulness")]
        blocks = " ".join(str(count) for count in row["active_by_block"].values())
        target = row["target"]
        lines.append(
            [
                str(row["seed"]),
                f"{target['accuracy']:.3f}",
                f"{target['probability']:.2f}",
                *cells,
                f"{row['active']} of {row['total']}",
                blocks,
                f"{row['seconds']:.0f}",
            ]
        )
    _print_table(head, lines)
    _print_table(["edit", "sentence", "slices", *KINDS], _edit_lines(rows, EDITS))
    lines = []
    for name in CONTROLLED:
        lines += [[f"{name}: {control}", *cells] for control, cells in _control_lines(rows, name)]
    _print_table(["control of", *KINDS], lines)
    lines = []
    for row in rows:
        for traced in row["traces"]:
            best = max(
                ((value, block, position) for block, line in enumerate(traced["mlp"]) for position, value in enumerate(line)),
            )
            zero = " ".join(f"{value / traced['clean']:.2f}" for value in traced["zero_mlp"])
            found = row["blocks_of_best"][f"{traced['prompt']} {traced['answer']}"]
            lines.append(
                [
                    str(row["seed"]),
                    traced["answer"],
                    f"{traced['clean']:.2f}",
                    f"{traced['corrupted']:.2f}",
                    f"block {best[1]}, “{traced['positions'][best[2]].strip()}”: {best[0]:.2f}",
                    zero,
                    ", ".join(site.removeprefix("transformer.h.") for site, *_ in found),
                ]
            )
    _print_table(["seed", "answer", "P", "corrupted", "MLPs restored, best", "one MLP zero, share kept", "best own slices"], lines)


def _print_robust(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{ROBUST}")
    losses = ("recon", "recon_layerwise", "stochastic_recon", "recon_rounded")
    lines = [
        [
            str(row["seed"]),
            f"{row['ladder'][-1][2]:.2f}",
            f"{row['ladder'][-1][3]:.3f}",
            f"{row['ladder'][0][1]:.2f}",
            *(f"{row['metrics'][name]:.1e}" for name in losses),
            *(f"{value:.3f}" for value in row["off data"]),
            f"{row['active']} of {row['total']}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    heads = ["seed", "worst of 8, 320 steps, nats", "share of all off", "one start, 20 steps", *losses]
    _print_table([*heads, "off the data", "with Δ on", "active", "seconds"], lines)
    _print_table(["edit", "sentence", "slices", *KINDS], _edit_lines(rows, rows[0]["edits"]))


def _edit_lines(rows: Sequence[Mapping[str, Any]], edits: Mapping[str, Any]) -> list[list[str]]:
    """Mean over seeds of what a kind keeps (the median over its facts), the worst seed's in brackets."""
    lines = []
    for name in edits:
        for sentence in rows[0]["edits"][name]:
            found = [each for row in rows if (each := row["edits"][name][sentence])]
            slices = " ".join(str(each["slices"]) for each in found) or "none"
            short = " ".join(sentence.split(" ")[:2])
            lines.append([name, short, slices, *_kept([each["effect"] for each in found])])
    return lines


def _kept(effects: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for kind in KINDS:
        values = [value for effect in effects if (value := effect["kept"].get(kind)) is not None]
        worst = max if kind in ("target", "paraphrase") else min
        cells.append(f"{statistics.mean(values):.3f} ({worst(values):.3f})" if values else "-")
    return cells


def _control_lines(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, list[str]]]:
    found = [each for row in rows for each in row["edits"][name].values() if each]
    return [(control, _kept([each["controls"][control] for each in found])) for control in (found[0]["controls"] if found else ())]


def _print_variants(variants: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    lines = []
    for name, rows in variants.items():
        metrics = [f"{statistics.mean(row['metrics'][key] for row in rows):.1e}" for key in ("recon", "recon_layerwise")]
        counts: dict[str, list[int]] = {}
        for row in rows:
            for block in "0123":
                counts.setdefault(block, []).append(row["active_by_block"].get(block, 0))
        blocks = " ".join(f"{statistics.mean(values):.0f}" for values in counts.values())
        active = f"{statistics.mean(row['active'] for row in rows):.0f}"
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}"
        cells = []
        for edit in ("top 2", "all of the name", "2 a name token, subtracted", "all of the name, subtracted"):
            found = [each for row in rows for each in row["edits"][edit].values() if each]
            cells.append(_four([each["effect"] for each in found]))
            if edit.endswith("subtracted"):
                cells.append(_four([each["controls"]["activation read"] for each in found]))
        lines.append([name, *metrics, active, blocks, seconds, *cells])
    head = ["variant", "recon", "layerwise", "active", "by block", "s", "top 2", "all of the name"]
    _print_table([*head, "2 a token, subtracted", "read there", "all of the name, subtracted", "read there"], lines)


def _four(effects: Sequence[Mapping[str, Any]]) -> str:
    """Target, same sport, other sport, general: mean of what they keep."""
    kinds = ("target", "same-sport", "other-sport", "general")
    return " / ".join(f"{statistics.mean(effect['kept'][kind] for effect in effects):.2f}" for kind in kinds) if effects else "-"


def _print_stories(found: Mapping[str, Any]) -> None:
    metrics = {name: f"{value:.1e}" for name, value in found["metrics"].items()}
    print(f"\nstories260K: {found['active']} of {found['total']} active, by block {found['active_by_block']}, {metrics}\n")
    lines = _edit_lines([found], found["edits"])
    for name in found["edits"]:
        lines += [[f"{name}: {control}", "", "", *cells] for control, cells in _control_lines([found], name)]
    _print_table(["edit", "sentence", "slices", *KINDS], lines)
    print()
    for traced in found["traces"]:
        zero = " ".join(f"{value / traced['clean']:.2f}" for value in traced["zero_mlp"])
        probability = f"P {traced['clean']:.2f}, corrupted {traced['corrupted']:.2f}, one MLP zero {zero}"
        print(f"* {traced['prompt']} → {traced['answer']}: {probability}")


def _print_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    parts = {"seeds": seeds, "edit": edit, "variants": variants, "stories": stories, "gpt2": gpt2, "tables": tables}
    parts[sys.argv[1]]()
