"""The command as a user runs it: exit codes, one short message, one JSON document, and no torch where none is needed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import paramlens
from conftest import TINY, until
from paramlens.cli.main import main, parsed
from paramlens.cli.parameters import overrides
from paramlens.config.file import dump_config, field_paths, load_config, make_config
from paramlens.errors import RunInterrupted, SaveError, SiteError, Terminated


def run(*words: str, cwd=None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", "from paramlens.cli.main import entry; entry()", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    return str(file)


def test_alone_it_explains_itself_in_ten_lines(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    for word in ("demo", "decompose CONFIG", "circuit RUN", "report RUN", "paramlens --help"):
        assert word in "\n".join(lines)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    from paramlens.cli.commands import COMMANDS
    from paramlens.registry import ANALYSES

    texts = []
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    named = {line.split()[0] for line in texts[0].splitlines() if re.match(r" {2}[a-z]", line)}
    assert named == {*COMMANDS, *(analysis.name for analysis in ANALYSES), "completion"}
    assert max(map(len, texts[0].splitlines())) <= 80


def test_the_version_is_one_word(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{paramlens.__version__}\n"


def test_python_m_paramlens_is_the_command(tmp_path):
    command = [sys.executable, "-m", "paramlens"]
    done = subprocess.run([*command, "circuit", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "paramlens: nowhere: no such run; give the directory that decompose printed\n"
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{paramlens.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], 'Unknown command "frob". Available commands: demo, train-target, decompose, '),
        (["decompos"], 'Unknown command "decompos". Did you mean "decompose"?'),
        (
            ["decompose", "nope"],
            "no configuration 'nope'. Give a YAML file or one of facts-edit, facts-robust, facts-small, gpt2-facts, induction, ",
        ),
        (["decompose", "CONFIG", "--optim.lrr", "3"], "decompose: Unknown option: --optim.lrr. Did you mean --optim.lr?"),
        (["decompose", "CONFIG", "--C", "0"], "C: 0: give 1 or more"),
        (["decompose", "CONFIG", "--steps", "many"], "steps: 'many': give a whole number"),
        (["decompose", "CONFIG", "--optim.lr", "nan"], "optim.lr: 'nan': give a number"),
        (["decompose", "CONFIG", "--optim.lr=.inf"], "optim.lr: inf: give a finite number"),
        (["decompose", "CONFIG", "--losses.p-start", "0.01"], "losses: p_start 0.01 is below p_final 0.1"),
        (["decompose", "CONFIG", "--losses", "{}"], "no loss is enabled; give at least one of"),
        (["decompose", "CONFIG", "--overwrit"], "decompose: Unknown option: --overwrit. Did you mean --overwrite?"),
        (["decompose", "CONFIG", "--steps=3", "extra"], "decompose: unexpected argument 'extra'; options are written --name value"),
        (["decompose", "CONFIG", "--steps"], "decompose: Parameter --steps requires an argument."),
        (["decompose", "CONFIG", "--device", "cuda"], "device cuda: torch"),
        (["train-target", "CONFIG", "--device", "cuda"], "device cuda: torch"),
        (["decompose", "CONFIG", "--resume", "--overwrite"], "resume and overwrite exclude each other"),
        (["decompose", "CONFIG", "--out", "CONFIG/x"], "tiny.yaml is no writable directory); give another out"),
        (
            ["decompose"],
            "decompose: give CONFIG first, then options; CONFIG: facts-edit, facts-robust, facts-small, gpt2-facts, induction, ",
        ),
        (["decompose", "--sites", "a", "CONFIG"], "decompose: give CONFIG first, then options; CONFIG: facts-edit, "),
        (["circuit"], "circuit: give RUN first, then options; RUN: Run directory."),
        (["circuit", "DIR", "--threshold", "abc"], 'circuit: Invalid value for --threshold: unable to convert "abc" into float.'),
        (["demo", "--seed", "x"], 'demo: Invalid value for --seed: unable to convert "x" into int.'),
        (["decompose", "CONFIG", "extra"], "decompose: unexpected argument 'extra'; options are written --name value"),
        (["decompose", "CONFIG", "--out", "DIR"], "exists; overwrite replaces it, another out leaves it alone"),
        (["decompose", "CONFIG", "--out", "DIR", "--overwrite"], "is no run directory, so overwrite leaves it alone"),
        (["circuit", "DIR"], "not a run directory"),
        (["circuit", "DIR/none"], "no such run; give the directory that decompose printed"),
        (["circuit", "DIR", "--treshold", "1"], "circuit: Unknown option: --treshold. Did you mean --threshold?"),
        (["report", "DIR"], "not a run directory"),
        (["report", "--example", "--out", "x.html"], " There are --example, --budget, --open, --json."),
        (["report", "DIR", "other"], "report: unexpected argument 'other'"),
        (["decompose", "CONFIG", "--C="], "--C: give a value"),
        (["decompose", "CONFIG", "--=3"], "decompose: Unknown option: --."),
        (["decompose", "CONFIG", "--seeds", "x"], 'decompose: Invalid value for --seeds: unable to convert "x" into int'),
        (["circuit", "DIR/a\udcff"], "'DIR/a\\udcff': not valid UTF-8"),
        (["trace", "DIR", "--prompt", "a\udcff", "--subject", "a"], "'a\\udcff': not valid UTF-8"),
        (["bench", "--length", "0"], "bench: task.length: 0: give 1 or more"),
        (
            ["bench", "--importance", "nope"],
            "bench: gamma.kind: 'nope': give 'scalar', 'vector', 'attention', 'attention_shared', 'shared' or 'transformer'",
        ),
        (["bench", "--layerwise-sites", "nope"], "bench: losses.layerwise_sites"),
        (["bench", "--device", "cuda"], "device cuda: torch"),
        (["bench", "--repeats", "0"], "repeats 0, seconds 60: give 1 or more repeats"),
        (["bench", "--seconds", "-1"], "repeats 7, seconds -1: give 1 or more repeats, and seconds above 0"),
        (["bench", "--sites", "0"], "bench: task.blocks: 0: give 1 or more"),
        (["circuit", "DIR", "--out", "x"], "circuit: Unknown option: --out. There are --threshold, --batches, --adversary, --json."),
        (["decompose", "CONFIG", "--gama.kind", "vector"], "decompose: Unknown option: --gama.kind. Did you mean --gamma.kind?"),
        (["train-target", "CONFIG", "--task.kind", "custom"], "task"),
        (["decompose", "CONFIG", "--gamma.kind", "vektor"], 'Invalid value "vektor" for --gamma.kind. Choose from: "scalar", "vector", '),
        (
            ["decompose", "CONFIG", "--last-token-only", "true", "false"],
            "decompose: Parameter --last-token-only accepts at most 1 element.",
        ),
        (["decompose", "CONFIG", "--steps", "3", "--steps", "4"], "decompose: Parameter --steps specified multiple times."),
        (["decompose", "CONFIG", "--frob.x", "1"], "--resume, --extend-steps, --overwrite, --track, --json, and the fields of CONFIG."),
        (["decompose", "nope", "--help"], "no configuration 'nope'. Give a YAML file or one of facts-edit, "),
        (["push", "DIR"], "push: give REPO first, then options; REPO: Repository, user/name; made if it is missing."),
    ],
)
def test_wrong_input_is_one_short_message(words, message, config, tmp_path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "kept.txt").write_text("kept")
    words = [word.replace("CONFIG", config).replace("DIR", str(tmp_path)) for word in words]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message.replace("DIR", str(tmp_path)) in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt", "tiny.yaml"]


@pytest.mark.parametrize(
    ("words", "returned"),
    [
        (["decompose", "induction-quick", "--optim.lrr", "1"], 2),
        (["circuit", "nowhere"], 2),
        (["--help"], 0),
        (["decompose", "induction", "--help"], 0),
        (["completion", "fish"], 0),
    ],
)
def test_what_needs_no_torch_loads_none(words: list[str], returned: int, tmp_path):
    """The reason that such messages come in under a second: the most expensive import never happens."""
    (tmp_path / "something").write_text("")
    code = f"import sys\nfrom paramlens.cli.main import main\ncode = main({words!r})\nassert 'torch' not in sys.modules\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == returned, done.stderr


def test_the_demo_speaks_before_its_expensive_imports(tmp_path):
    """Within a second or two of the command, whatever torch takes to load."""
    code = "import sys\nsys.modules['paramlens.runs.decompose'] = None\nfrom paramlens.cli.main import main\nmain(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[0] == "runs/demo-s0: the induction circuit from nothing, seed 0"
    assert "ModuleNotFoundError" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_import_needs_no_torch():
    code = (
        "import sys, paramlens; assert 'torch' not in sys.modules; assert paramlens.load_config('induction').C == 100; paramlens.decompose"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["decompose", "circuit", "report", "open_run", "Decomposition", "Run", "load_config"])
def test_public_names_are_what_they_say(name: str):
    """Also after the submodules have been imported, which must not shadow them."""
    import paramlens
    import paramlens.analysis.circuit
    import paramlens.page
    import paramlens.runs.decompose

    assert callable(getattr(paramlens, name))
    assert name in dir(paramlens)


def test_help_shows_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal breaks long names
    assert main(["decompose", "induction", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"(?m)^ {{2}}--{re.escape(path.replace('_', '-'))} ", text) for path in field_paths())
    assert "--resume" in text
    assert "Table 4" in text


def test_help_shows_the_values_of_the_configuration(config, capsys: pytest.CaptureFixture[str]):
    def shown(name: str, flag: str) -> str:
        assert main(["decompose", name, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        return text.partition(f" {flag} VALUE")[2].partition("[default: ")[2].partition("]")[0]

    assert shown("induction", "--C") == "100"
    assert shown("gpt2-facts", "--C") == "768"
    assert shown(config, "--steps") == "12"
    assert shown("induction", "--optim.betas") == "0.9 0.999"


@pytest.mark.slow  # and of `make demo`
def test_the_whole_way(config, tmp_path):
    """decompose, circuit, report and doctor in a process each, as scripts use them."""
    place = str(tmp_path / "run")
    done = run("decompose", config, "--out", place, "--json", "--seed", "1", "--optim.lr", "3e-3")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["run"], document["steps"]) == (place, 12)
    assert set(document["losses"]) == {"stochastic_recon", "stochastic_recon_layerwise", "recon", "faithfulness", "minimality"}
    assert "target has NOT converged" in done.stderr
    assert "step 12/12" in done.stderr
    assert load_config(f"{place}/config.yaml").optim.lr == 3e-3

    table = run("circuit", place, "--batches", "2", "--json")
    assert table.returncode == 0, table.stderr
    document = json.loads(table.stdout)
    assert set(document["sites"]["blocks.0.attn.q"]["active"]) == {"s1", "m", "s2", "random"}
    assert json.loads((tmp_path / "run/analysis/circuit.json").read_text()) == document

    shown = run("circuit", place, "--batches", "2")
    assert "blocks.1.attn.v" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())

    page = run("report", place)
    assert page.returncode == 0, page.stderr
    assert (tmp_path / "run/report.html").is_file()

    again = run("decompose", config, "--out", place)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_lists_and_switches_on_the_command_line(config, tmp_path):
    def configuration(*words: str):
        _, bound = parsed(["doctor", *words])
        return load_config(bound.args[0], overrides=overrides(bound.arguments))

    made = configuration(config, "--sites=a", "b", "--optim.betas", "0.9", "0.95", "--last-token-only", "--compile", "--steps=7")
    assert (made.sites, made.optim.betas, made.last_token_only, made.steps) == (("a", "b"), (0.9, 0.95), True, 7)
    assert made.compile
    made = configuration(config, "--sites", "[a, b]", "--optim.betas=[0.8, 0.9]", "--last_token_only", "false")
    assert (made.sites, made.optim.betas, made.last_token_only) == (("a", "b"), (0.8, 0.9), False)
    made = configuration("--optim.lr", "0.5e-3", "--steps", "7", config, "--init.warmup-steps=3", "--threads", "none")
    assert (made.optim.lr, made.steps, made.init.warmup_steps, made.threads) == (5e-4, 7, 3, None)  # options may come first
    made = configuration(config, "--losses.recon", "2", "--losses", "{minimality: 1}")  # a section, then its fields, in whatever order
    assert (made.losses.recon, made.losses.minimality, made.losses.faithfulness) == (2, 1, 0)


def test_a_reader_that_leaves_early(config):
    command = f"{sys.executable} -c 'from paramlens.cli.main import entry; entry()' decompose {config} --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Usage: paramlens decompose")
    assert done.stderr == ""


def test_train_target_then_decompose_it(config, tmp_path, capsys: pytest.CaptureFixture[str]):
    assert main(["train-target", config, "--out", str(tmp_path / "target"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["converged"] is False
    assert document["step"] == 20
    assert main(["decompose", config, "--target", str(tmp_path / "target"), "--out", str(tmp_path / "run"), "--json"]) == 0
    assert "training the target" not in capsys.readouterr().err


def test_doctor_counts_what_is_built(config, capsys: pytest.CaptureFixture[str], tiny_run):
    assert main(["doctor", config, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    factors = sum(parameter.numel() for parameter in tiny_run.decomposition.parameters())
    gamma = sum(parameter.numel() for parameter in tiny_run.importance.parameters())
    assert document["parameters"] == {"U and V": factors, "gamma": gamma, "trained": factors + gamma, "decomposed weights": 6 * 16}
    assert document["bytes"]["optimizer"] == 8 * (factors + gamma)
    parts = {name: count for name, count in document["bytes"].items() if name != "total"}
    assert document["bytes"]["total"] == sum(parts.values())
    assert main(["doctor", config]) == 0
    out = capsys.readouterr().out
    assert "gamma activations" in out
    assert "libraries" in out


@pytest.fixture
def facts(facts_run, tmp_path):
    """A copy of the facts run, whose analyses a command may write."""
    shutil.copytree(facts_run.path, tmp_path / "facts")
    return str(tmp_path / "facts")


KOBE = "Kobe Bryant plays the sport of basketball"


def document(capsys: pytest.CaptureFixture[str], *words: str):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_what_is_active_and_what_one_part_reads(facts, capsys: pytest.CaptureFixture[str], tmp_path):
    found = document(capsys, "inspect", facts)
    assert "".join(found["tokens"]) == found["prompt"] == KOBE
    assert {"site", "subcomponent", "position", "token", "importance"} <= found["active"][0].keys()
    part = document(capsys, "inspect", facts, "--site", "transformer.h.0.mlp.c_fc", "--subcomponent", "3")
    assert part["reads"]
    assert len(part["tokens"]) == 2
    lines = tmp_path / "lines.txt"
    lines.write_text("Snow is cold and white\n\nGrass in spring is green\nHoney is made by bees\n", encoding="utf-8")
    part = document(capsys, "inspect", facts, "--site", "transformer.h.0.mlp.c_fc", "--subcomponent", "3", "--text", str(lines))
    assert len(part["tokens"]) == 3
    for words in ([], ["--prompt", "Tiger Woods plays the sport of golf"], ["--site", "transformer.h.0.mlp.c_fc", "--subcomponent", "3"]):
        assert main(["inspect", facts, *words]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_suppress_edits_evaluates_and_saves(facts, capsys: pytest.CaptureFixture[str], tmp_path):
    file = tmp_path / "facts.yaml"
    file.write_text("- {prompt: Kobe Bryant plays the sport of, answer: basketball, relation: sport}\n- {prompt: Snow is, answer: white}\n")
    words = ["suppress", facts, "--unique-to", KOBE, "--top", "2", "--evaluate", str(file), "--threshold", "0.3"]
    found = document(capsys, *words, "--save", str(tmp_path / "edited"))
    assert len(found["selected"]) == 2
    assert [(fact["kind"], fact["prompt"]) for fact in found["facts"]] == [("target", KOBE[:-11]), ("general", "Snow is")]
    assert set(found["facts"][0]) >= {"prompt", "answer", "kind", "before", "after"}
    assert found["controls"]["random directions"]["kept"].keys() == {"target", "general"}
    assert found["known"].keys() == {"target", "general"}
    assert {"name", "standing", "figure", "text"} <= found["verdicts"][0].keys()
    assert (tmp_path / "edited" / "config.json").is_file()
    kept = json.loads((tmp_path / "facts" / "analysis" / "suppress.json").read_text())
    assert len(kept["edits"]) == 1
    named = ["suppress", facts, "--site", "transformer.h.0.mlp.c_fc", "--subcomponent", "1", "2"]
    assert len(document(capsys, *named, "--evaluate", "none")["selected"]) == 2
    assert main([*words, "--skip-controls"]) == 0
    assert "Probability kept" in capsys.readouterr().out
    assert main(["suppress", facts, "--unique-to", KOBE, "--evaluate", "none", "--threshold", "0.3"]) == 0
    assert "removed" in capsys.readouterr().out


def test_trace_reads_a_run_or_a_folder(facts, capsys: pytest.CaptureFixture[str], tmp_path):
    words = ["--prompt", "Tiger Woods plays the sport of", "--subject", "Tiger Woods", "--answer", "golf", "--samples", "2"]
    found = document(capsys, "trace", facts, *words)
    assert {"positions", "hidden", "mlp", "attention", "zero_mlp"} <= found.keys()
    assert len(found["hidden"][0]) == len(found["positions"]) == 6
    again = document(capsys, "trace", f"{facts}/target", *words)
    assert again["hidden"] == found["hidden"]
    assert len(json.loads((tmp_path / "facts" / "analysis" / "trace.json").read_text())["traces"]) == 1
    assert main(["trace", facts, *words, "--zero-mlp"]) == 0
    assert "One MLP set to zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "RUN", "--site", "x"], "inspect: give --site and --subcomponent together"),
        (["inspect", "RUN", "--site", "x", "--subcomponent", "1"], "site x: not of this run; its sites: transformer.h.0.attn.c_attn"),
        (["inspect", "RUN", "--prompt", "Kobe"], "sentence 'Kobe': 1 token"),
        (["suppress", "RUN"], "suppress: give a sentence whose own subcomponents go, or a site"),
        (["suppress", "RUN", "--unique-to", KOBE, "--threshold", "0"], "no subcomponent is active in it alone (importance > 0)"),
        (
            ["suppress", "RUN", "--unique-to", "Snow is white", "--threshold", "0"],
            "alone (importance > 0). It is not a sentence of this run, and is compared with those that are (Kobe Bryant plays",
        ),
        (["suppress", "RUN", "--site", "transformer.h.0.mlp.c_fc", "--subcomponent", "99"], "no subcomponent 99; there are 16, 0 to 15"),
        (["suppress", "RUN", "--unique-to", KOBE, "--evaluate", "nowhere.yaml"], "facts nowhere.yaml: cannot be read"),
        (["trace", "nobody/nothing", "--prompt", "a b", "--subject", "a"], "model nobody/nothing: no such folder"),
        (["trace", "RUN", "--prompt", "Kobe Bryant is", "--subject", "Tiger"], "'Tiger': not in"),
        (["completion"], "completion: give SHELL first, then options; SHELL: The shell that will read the script."),
        (["trace"], "trace: give MODEL first, then options; MODEL: Run directory, local folder, or id on the Hugging Face Hub."),
        (["train-target", "gpt2-facts"], "gpt2-facts: its target is pretrained, or a model of your own; there is nothing to train"),
        (["decompose", "facts-small", "--task.sentences", "Kobe", "--target", "RUN", "--out", "OUT"], "sentence 'Kobe': 1 token"),
        (["decompose", "facts-small", "--sites", "lm_head", "--out", "OUT"], "site lm_head: its weight is tied"),
        (["decompose", "facts-small", "--sites", "*.c_attn[x]", "--out", "OUT"], "matches no weight matrix"),
        (["decompose", "facts-small", "--target", "nobody/nothing", "--out", "OUT"], "model nobody/nothing: no such folder"),
    ],
)
def test_wrong_questions_about_facts(facts, tmp_path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]):
    places = {"RUN": facts, "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_doctor_tells_gpt2_without_a_network(capsys: pytest.CaptureFixture[str]):
    found = document(capsys, "doctor", "gpt2-facts")
    assert found["sites"] == 48
    assert found["parameters"]["gamma"] == 3_175_649_280
    assert found["parameters"]["U and V"] == 113_246_208
    assert found["parameters"]["decomposed weights"] == 84_934_656
    assert 78e9 < found["bytes"]["total"] < 84e9  # with a copy of the optimizer while a checkpoint is written


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143), (SaveError, 1), (OSError, 1), (SiteError, 2)])
def test_exit_codes_of_what_ends_a_command(raised, code, tiny_run, monkeypatch, capsys: pytest.CaptureFixture[str]):
    error = Terminated(signal.SIGTERM) if raised is Terminated else raised("why")

    def ends(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("paramlens.analysis.circuit.circuit", ends)
    assert main(["circuit", str(tiny_run.path)]) == code
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("paramlens: ")


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("demo --seed 1 --overwrite --json", "demo --seed 1"),
        ("decompose tiny.yaml --overwrite=true --track tensorboard", "decompose tiny.yaml --track tensorboard --resume"),
        ("decompose --steps 7 tiny.yaml --resume --json", "decompose --steps 7 tiny.yaml --resume"),
        ("decompose tiny.yaml --target toy --steps 7", "decompose tiny.yaml --steps 7 --resume"),
        ("decompose tiny.yaml --target=toy", "decompose tiny.yaml --resume"),
        ("decompose tiny.yaml --target toy --seeds 2", "decompose tiny.yaml --target toy --seeds 2 --resume"),
        ("decompose tiny.yaml --target someone/model", "decompose tiny.yaml --target someone/model --resume"),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(words, again, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*_args: object, **_options: object) -> None:
        raise RunInterrupted()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_config(make_config(TINY)), encoding="utf-8")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "target.json").write_text("{}")
    monkeypatch.setattr("paramlens.runs.decompose.decompose_config", interrupted)
    monkeypatch.setattr("paramlens.runs.seeds.decompose_seeds", interrupted)
    assert main(words.split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"paramlens: interrupted; resume with: paramlens {again}"


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_a_run_to_resume(config, tmp_path):
    place = tmp_path / "run"
    command = [sys.executable, "-c", "from paramlens.cli.main import entry; entry()", "decompose", config, "--out", str(place)]
    process = subprocess.Popen([*command, "--steps", "100000", "--log-every", "10"], stderr=subprocess.PIPE, text=True)
    until((place / "metrics.jsonl").is_file, process)  # the loop is under way
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    out = ["--out", str(place), "--steps", "100000", "--log-every", "10"]
    assert f"interrupted; resume with: {shlex.join(['paramlens', 'decompose', config, *out, '--resume'])}\n" in err
    info = json.loads((place / "run.json").read_text())
    assert info["status"] == "interrupted"
    assert (place / "checkpoints" / f"step-{info['steps']:08d}" / "MANIFEST.json").is_file()
