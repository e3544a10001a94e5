import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY
from paramlens.cli.main import main
from paramlens.config.file import dump_config, field_paths, list_fields, load_config, make_config, parse_value, shipped_configs, switches
from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.runs.decompose import decompose_config
from paramlens.tasks.facts.facts import read_facts


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_load_and_round_trip(name: str, tmp_path):
    config = load_config(name)
    file = tmp_path / "again.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_induction_robust_is_the_variant_that_the_study_measured():
    added = {"C": 24, "delta": True, "merge.every": 50, "losses.adversarial": 0.5, "losses.faithfulness": 0.0, "task.shuffled": 1 / 64}
    weighted = {"losses.recon_layerwise": 8.0, "losses.minimality": 0.3, "name": "induction-robust", "optim.project_from": None}
    assert load_config("induction-robust") == load_config("induction-cpu", overrides=added | weighted)


def test_facts_robust_is_facts_edit_with_what_makes_it_hold():
    added = {"delta": True, "merge.every": 50, "losses.adversarial": 1.0, "losses.faithfulness": 0.0, "losses.elsewhere_masks": "all"}
    assert load_config("facts-robust") == load_config("facts-edit", overrides=added | {"name": "facts-robust"})


def test_induction_is_tables_3_and_4():
    config = load_config("induction")
    training = config.task.training
    assert (training.batch, training.optimizer, training.lr, training.weight_decay) == (1024, "adamw", 1e-3, 0.01)
    assert (training.warmup, training.steps, training.settle) == (1000, 100_000, 0)
    assert (config.task.width, config.task.vocabulary, config.task.length, config.task.added) == (16, 128, 64, "before")
    assert (config.task.blocks, config.task.heads) == (2, 1)
    assert (config.batch, config.optim.name, config.optim.lr, config.optim.schedule) == (1024, "adam", 1e-3, "cosine")
    assert (config.optim.warmup, config.steps, config.C, config.gamma.d_gate, config.gamma.kind) == (0, 100_000, 100, 16, "attention")
    losses = config.losses
    assert (losses.stochastic_recon, losses.stochastic_recon_layerwise, losses.recon) == (1, 1, 0.5)
    assert (losses.faithfulness, losses.minimality, losses.p_start, losses.p_final) == (1000, 0.02, 0.9, 0.1)
    assert config.last_token_only
    assert config.optim.gamma_lr is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("C", 0, "C: 0: give 1 or more"),
        ("C", 2.5, "C: 2.5: give a whole number"),
        ("C", True, "C: True: a number is needed, not true or false"),
        ("steps", "abc", "steps: 'abc': give a whole number"),
        ("optim.lr", float("nan"), "optim.lr: nan: give a finite number"),
        ("optim.lr", float("inf"), "optim.lr: inf: give a finite number"),
        ("optim.lr", 0, "optim.lr: 0: give a number above 0"),
        ("losses.recon", -1, "losses.recon: -1: give 0 or more"),
        ("losses.p_start", 0.05, "losses: p_start 0.05 is below p_final 0.1; p is annealed downwards, so give p_start >= p_final"),
        ("losses.reco", 1, "losses.reco: unknown field; did you mean losses.recon?"),
        ("lr", 1, "lr: unknown field; did you mean optim.lr?"),
        ("zzz", 1, "zzz: unknown field; known here: C, adversary, batch,"),
        ("gama", 3, "gama: unknown field; did you mean gamma?"),
        ("gama.kind", "vector", "gama: unknown field; did you mean gamma?"),
        ("optim.gama_lr", 3, "optim.gama_lr: unknown field; did you mean optim.gamma_lr?"),
        ("task.text", "x", "task.text: unknown field"),
        ("task.sentences", ["x"], "task.sentences: a task of kind induction has no such field"),
        ("task", {"kind": "text"}, "task.source: missing; give it"),
        ("optim.lr", "1e-3", "optim.lr: '1e-3': give a number, without quotes"),
        ("C", "5", "C: '5': give a whole number, without quotes"),
        ("seed", 2**64, "seed: 18446744073709551616: give 1.84467e+19 or less"),
        ("compile", 3, "compile: 3: give true or false"),
        ("optim.betas", [0.9], "optim.betas.1: missing; give it"),
        ("optim.betas", [0.9] * 3, "optim.betas: [0.9, 0.9, 0.9]: give at most 2"),
        ("gamma.kind", "vectr", "gamma.kind: 'vectr': give 'scalar', 'vector', 'attention', 'attention_shared', 'shared' or 'transformer'"),
        ("gamma.max_length", 3, "gamma.max_length 3 is below task.length 8"),
        ("task.kind", "inducton", "task: give 'induction', 'facts', 'text', 'custom'"),
        ("task.heads", 3, "task: width 4 must be a multiple of heads 3"),
        ("task.length", 3, "task.length: 3: give 4 or more"),
        ("task.training.window", 6, "window (6) and window_steps (0) go together"),
        ("task.training.settle", 50, "settle_from 0 and settle 50 do not fit into steps 20"),
        ("sites", [], "sites: []: give at least 1"),
        ("sites", "blocks", "sites: 'blocks': give a list"),
        ("device", "gpu", "device: 'gpu': does not match"),
        ("optim.weight_decay", 0.1, "weight_decay 0.1 is decoupled and needs name adamw"),
        ("optim.betas", [0.9, 1.0], "optim.betas.1: 1.0: give a number below 1"),
        ("last_token_only", "maybe", "last_token_only: 'maybe': give true or false"),
        ("name", "../up", "name: '../up': does not match"),
        ("losses", 3, "losses: 3: give a mapping of fields"),
    ],
)
def test_wrong_value(field: str, value: object, message: str, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides={field: value})
    text = str(error.value)
    assert text.startswith(f"{file}: ")
    assert message in text
    assert "\n" not in text


def test_no_loss_enabled():
    with pytest.raises(ConfigError, match="no loss is enabled; give at least one of stochastic_recon,"):
        make_config(TINY | {"losses": {}})


def test_several_problems_are_counted():
    with pytest.raises(ConfigError, match=r"steps: 0: give 1 or more \(and 1 more\)"):
        make_config(TINY | {"C": 0, "steps": 0})


def test_scientific_notation_is_a_number(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optim: {lr: 1e-3}\nlosses: {faithfulness: 1e6}\n", encoding="utf-8")
    config = load_config(file)
    assert config.optim.lr == 1e-3
    assert config.losses.faithfulness == 1e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "a mapping of fields is needed, not list"),
        ("a: [1\n", "line 2: not YAML"),
        ("C: 1\nC: 2\n", "C is given twice"),
        ("seed: 2024-99-99\n", "not YAML"),
        ("", "a mapping of fields is needed, not an empty file"),
        ("optim:\n\tlr: 1\n", "line 2: not YAML .*; indent with spaces"),
        ("1: 2\n", "1: keys are names of fields"),
        ("optim.lr: 0.1\n", r"optim.lr: keys with dots are for flags; in a mapping write optim: \{lr: 0.1\}"),
        ("task: {kind: facts, miniature.steps: 3}\n", r"in a mapping write miniature: \{steps: 3\}"),
    ],
)
def test_file_that_is_no_mapping(text: str, message: str, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_file_that_is_no_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(file)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"no configuration 'induction-quik', did you mean induction-quick\?"):
        load_config("induction-quik")


@pytest.mark.parametrize(("text", "value"), [("3e-3", 3e-3), ("true", True), ("none", None), ("12", 12), ("[", "["), ("a b", "a b")])
def test_values_on_the_command_line(text: str, value: object):
    assert parse_value(text) == value


def test_overrides_reach_absent_sections(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: a\n", encoding="utf-8")
    assert load_config(file, overrides={"optim.lr": 0.5, "seed": 3}).optim.lr == 0.5


def test_switches_and_lists_are_what_their_types_say():
    assert set(switches()) == {"last_token_only", "compile", "cuda_graph", "delta"}
    assert set(list_fields()) == {"sites", "optim.betas", "task.training.undecayed", "task.sentences"}


def test_every_field_is_documented():
    undocumented = []

    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            inner = [kind for kind in getattr(field.annotation, "__args__", (field.annotation,)) if hasattr(kind, "model_fields")]
            if not inner and not field.description and name != "kind":
                undocumented.append(prefix + name)
            for kind in inner:
                walk(kind, f"{prefix}{name}.")

    walk(Config)
    assert undocumented == []
    assert {"seed", "steps", "C", "sites", "optim.lr", "checkpoint.every", "device"} <= set(field_paths())


def test_the_home_directory_is_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    task = make_config({"task": {"kind": "text", "model": "~/model", "source": "~/text.jsonl"}}).task
    assert (task.model, task.source) == (str(tmp_path / "model"), str(tmp_path / "text.jsonl"))
    assert make_config({"task": {"kind": "facts", "model": "user/model"}}).task.model == "user/model"
    (tmp_path / "tiny.yaml").write_text(dump_config(make_config(TINY)), encoding="utf-8")
    assert main(["train-target", str(tmp_path / "tiny.yaml"), "--out=~/target"]) == 0
    assert main(["decompose", str(tmp_path / "tiny.yaml"), "--target=~/target", "--out=~/commanded"]) == 0
    assert (tmp_path / "commanded/run.json").is_file()
    (tmp_path / "facts.yaml").write_text("- {prompt: The sky is, answer: blue}", encoding="utf-8")
    assert read_facts(Path("~/facts.yaml"))[0].answer == "blue"
    run = decompose_config(make_config(TINY), out="~/run")
    assert run.path == tmp_path / "run"


def test_tasks_are_read_without_torch():
    code = "import sys; from paramlens.tasks.registry import TASKS; print(*(each.__name__ for each in TASKS), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["InductionTask", "FactsTask", "TextTask", "CustomTask", "False"]


def test_the_attention_table_holds_pieces_of_text_too():
    task = {"kind": "text", "source": "a.txt", "length": 64}
    with pytest.raises(ConfigError, match=r"gamma.max_length 32 is below task.length 64; .*give at least 64"):
        make_config({"task": task, "gamma": {"kind": "attention", "max_length": 32}})
