"""Pushing runs to the Hub and opening them from there, against a stand-in for it (hub.py)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

import paramlens
from conftest import TINY
from hub import Hub
from paramlens.cli.main import main
from paramlens.config.file import make_config
from paramlens.errors import ConfigError, RunDirError
from paramlens.files.lock import locked
from paramlens.files.plain import read_json
from paramlens.runs.checkpoint import FILES, RESUMED
from paramlens.runs.decompose import decompose_config
from paramlens.runs.hub import fetch
from paramlens.runs.layout import checkpoints, find_checkpoint
from paramlens.runs.rundir import Run, open_run
from paramlens.runs.sharing import MARK, push_to_hub
from paramlens.runs.verification import verify

REPO = "ada/tiny-run"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own way of uploading a file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that the library talks to, with a cache of its own and no token."""
    made = Hub()
    for name, value in {"ENDPOINT": made.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf/hub")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf/token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the finished tiny run, with a circuit."""
    shutil.copytree(tiny_run.path, tmp_path / "mine")
    opened = open_run(tmp_path / "mine")
    opened.save_analysis("circuit", paramlens.circuit(opened, batches=1, adversary=0).to_json())
    return opened


def require_same(found: Run, expected: Run) -> None:
    for name in expected.decomposition.names:
        assert found.decomposition.U[name].equal(expected.decomposition.U[name])
        assert found.decomposition.V[name].equal(expected.decomposition.V[name])


def test_round_trip(hub, run):
    """What is opened by branch and by commit is what was pushed: U, V and the circuit; nothing else was uploaded."""
    (run.path / "tracking/wandb").mkdir(parents=True)
    (run.path / "tracking/wandb/secret.log").write_text("mine")
    (run.path / "checkpoints/step-00000099.part").mkdir()
    (run.path / "notes.txt").write_text("mine")
    url = run.push_to_hub(REPO, message="first")
    commit = url.rsplit("/", 1)[1]
    assert url == f"{hub.endpoint}/{REPO}/commit/{commit}"
    assert hub.repos[REPO].messages == ["initial commit", "first"]
    assert not hub.repos[REPO].private
    expected = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    expected -= {".lock", "notes.txt", "tracking/wandb/secret.log"}
    expected -= {f"checkpoints/{folder.name}/{name}" for folder in checkpoints(run.path) for name in RESUMED}
    assert set(hub.files(REPO)) == expected | {"README.md", ".gitattributes"}
    by_branch, by_commit = open_run(REPO), open_run(REPO, revision=commit)
    assert by_branch.path == by_commit.path == Path(constants.HF_HOME) / "paramlens/ada--tiny-run" / commit
    require_same(by_branch, run)
    ours, theirs = (paramlens.circuit(each, batches=1, adversary=0).to_json() for each in (run, by_branch))
    assert ours | {"run": ""} == theirs | {"run": ""}
    assert not any(path.is_symlink() for path in by_branch.path.rglob("*"))


def test_a_second_push_is_a_new_commit_and_the_first_still_opens(hub, run, tmp_path):
    first = run.push_to_hub(REPO).rsplit("/", 1)[1]
    other = decompose_config(make_config(TINY | {"seed": 5, "steps": 7}), out=tmp_path / "other")
    second = push_to_hub(other.path, REPO).rsplit("/", 1)[1]
    assert second != first
    require_same(open_run(REPO), other)
    require_same(open_run(REPO, revision=first), run)
    names = set(hub.files(REPO))
    assert not any(name.startswith("checkpoints/step-00000012") for name in names), "of the run before"
    assert "analysis/circuit.json" not in names
    assert push_to_hub(other, REPO).rsplit("/", 1)[1] == second, "nothing has changed, so there is no third"


def test_the_copy_for_reading_says_so_and_cannot_be_resumed(hub, run):
    run.push_to_hub(REPO)
    copy = fetch(REPO)
    found = verify(copy)
    assert (found.whole, found.resumable, verify(run.path).resumable) == (True, False, True)
    assert set(read_json(find_checkpoint(copy, None) / "MANIFEST.json")) == set(FILES) - set(RESUMED)
    with pytest.raises(RunDirError, match="a copy for reading, pushed without optimizer and generators"):
        decompose_config(make_config(TINY), out=copy, resume=True)
    with pytest.raises(RunDirError, match="leave resumable out"):
        push_to_hub(copy, "ada/again", resumable=True)
    push_to_hub(copy, "ada/again")
    require_same(open_run("ada/again"), run)
    assert "cannot be resumed" in hub.files(REPO)["README.md"].decode()


def test_damage_to_a_copy_for_reading_is_found(hub, run):
    run.push_to_hub(REPO)
    copy = fetch(REPO)
    folder = find_checkpoint(copy, None)
    entries = read_json(folder / "MANIFEST.json")
    (folder / "MANIFEST.json").write_text(json.dumps({name: entries[name] for name in entries if name != "importance.safetensors"}))
    assert not verify(copy).whole
    with pytest.raises(RunDirError, match="an entry for importance.safetensors expected"):
        open_run(REPO)


@pytest.mark.slow
def test_with_resumable_the_run_goes_on_elsewhere(hub, tmp_path):
    """To the bytes of a run that never stopped; a fetched file that resuming writes to is no link to the cache."""
    constant = TINY | {
        "optim": {"schedule": "constant", "warmup": 0},
        "losses": {"recon": 1.0, "minimality": 0.1, "p_start": 1.0, "p_final": 1.0},
    }
    whole = decompose_config(make_config(constant | {"steps": 16}), out=tmp_path / "whole")
    short = decompose_config(make_config(constant), out=tmp_path / "short")
    short.push_to_hub(REPO, resumable=True)
    copy = fetch(REPO)
    assert verify(copy).resumable
    before = {path: path.read_bytes() for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()}
    resumed = decompose_config(make_config(constant), out=copy, resume=True, extend_steps=16)
    require_same(resumed, whole)
    assert before == {path: path.read_bytes() for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()}


def test_analyses_of_a_fetched_run_stay_in_its_own_folder(hub, run):
    commit = run.push_to_hub(REPO).rsplit("/", 1)[1]
    cache = Path(constants.HF_HUB_CACHE)
    opened = open_run(REPO)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    opened.save_analysis("mine", {"mine": True})
    page = paramlens.report(opened.path)
    assert page == Path(constants.HF_HOME) / "paramlens/ada--tiny-run" / commit / "report.html"
    assert before == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert read_json(open_run(REPO).path / "analysis/mine.json") == {"mine": True}


def test_the_card(hub, run, facts_run):
    run.push_to_hub(REPO)
    card = hub.files(REPO)["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "paramlens", "tags": ["paramlens", "parameter-decomposition", "interpretability"]}
    recon = read_json(run.path / "analysis/circuit.json")["metrics"]["recon"]
    assert f"| recon | {recon:.3g} |" in text
    assert f'paramlens.open_run("{REPO}")' in text
    assert run.info["target"]["sha256"] in text
    push_to_hub(facts_run.path, "ada/facts")
    assert "| recon |" not in hub.files("ada/facts")["README.md"].decode()
    assert open_run("ada/facts").task is not None, "its target came along"
    mine = card.replace(MARK, "").encode() + b"\nMy own words.\n"
    commit = hub.repos[REPO].resolve("main")
    hub.repos[REPO].commit("main", hub.repos[REPO].commits[commit] | {"README.md": hub.store(mine)}, "edited")
    run.save_analysis("svd", {"ranks": {}})
    run.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == mine
    assert "analysis/svd.json" in hub.files(REPO)


def test_the_card_names_the_base_model_and_its_commit(hub, run):
    """Of a target from the Hub; a local folder's name is nobody else's business there."""
    for name in ("model.json", "run.json"):
        document = read_json(run.path / name)
        document["target"] |= {"id": "openai-community/gpt2", "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}
        (run.path / name).write_text(json.dumps(document))
    from paramlens.runs.sharing import card

    text = card(run.path, REPO, resumable=False)
    assert yaml.safe_load(text.split("---\n", 2)[1])["base_model"] == "openai-community/gpt2"
    assert "607a30d783dfa663caf39e06633721c8d4cfcd7e" in text


def test_branches_and_private_repositories(hub, run):
    run.push_to_hub(REPO, private=True, revision="draft")
    assert hub.repos[REPO].private
    assert "config.yaml" in hub.files(REPO, "draft")
    assert "config.yaml" not in hub.files(REPO)
    require_same(open_run(REPO, revision="draft"), run)
    with pytest.raises(RunDirError, match=f"{REPO} at main: holds no run"):
        open_run(REPO)


def test_a_damaged_run_is_not_pushed(hub, run, tmp_path):
    file = find_checkpoint(run.path, None) / "optimizer.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunDirError, match=r"damaged, so nothing was pushed: .*optimizer.safetensors: sha256"):
        run.push_to_hub(REPO)
    file.write_bytes(content)
    with locked(run.path), pytest.raises(RunDirError, match="has been writing to it"):
        run.push_to_hub(REPO)
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(RunDirError, match="no finished checkpoint, so there is nothing to push"):
        run.push_to_hub(REPO)
    with pytest.raises(ConfigError, match="no id of a repository"):
        push_to_hub(run, "tiny")
    with pytest.raises(RunDirError, match="no such run"):
        push_to_hub(tmp_path / "none", REPO)
    assert hub.paths == []


@pytest.mark.parametrize("name", ["components.safetensors", "model.json", "target.safetensors"])
def test_a_flipped_byte_on_the_hub_is_refused(hub, run, name):
    run.push_to_hub(REPO)
    files = hub.repos[REPO].commits[hub.repos[REPO].resolve("main") or ""]
    digest = next(digest for path, digest in files.items() if path.endswith(name))
    content = hub.blobs[digest]
    hub.blobs[digest] = content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]
    with pytest.raises(RunDirError, match=rf"{REPO} at .*{name}: sha256 .* expected.*Remove .*models--ada--tiny-run to fetch it again"):
        open_run(REPO)
    assert not (Path(constants.HF_HOME) / "paramlens/ada--tiny-run").exists() or not any(
        (Path(constants.HF_HOME) / "paramlens/ada--tiny-run").iterdir()
    )
    hub.blobs[digest] = content
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--ada--tiny-run")
    require_same(open_run(REPO), run)


def test_what_is_not_there(hub, run):
    with pytest.raises(RunDirError, match=f"^{REPO} at main: {hub.endpoint} has no such repository.*hf auth login`$"):
        open_run(REPO)
    run.push_to_hub(REPO)
    with pytest.raises(RunDirError, match=f"^{REPO} at v2: the repository has no such revision; give a branch, a tag or a commit of it$"):
        open_run(REPO, revision="v2")
    hub.repos[REPO].gated = True
    with pytest.raises(RunDirError, match=f"^{REPO} at v3: .* asks for access to be granted"):
        open_run(REPO, revision="v3")


def test_without_a_network_the_cache_serves(hub, run, monkeypatch):
    run.push_to_hub(REPO)
    open_run(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    require_same(open_run(REPO), run)
    with pytest.raises(RunDirError, match="^ada/other at main: http://127.0.0.1:9 cannot be reached, and the cache does not hold it"):
        open_run("ada/other")
    with pytest.raises(RunDirError, match=f"^{REPO} at main: http://127.0.0.1:9 cannot be reached"):
        run.push_to_hub(REPO)


def test_a_path_here_comes_first(hub, run, monkeypatch):
    """The Hub is asked neither about a path that exists nor about one in a folder that does."""
    (Path("ada")).mkdir()
    shutil.copytree(run.path, REPO)
    require_same(open_run(REPO), run)
    with pytest.raises(RunDirError, match="ada/mistyped: no such run"):
        open_run("ada/mistyped")
    with pytest.raises(RunDirError, match="no such run"):
        open_run(Path("grace/run"))
    with pytest.raises(ConfigError, match=f"revision v1: {REPO} is a path here"):
        open_run(REPO, revision="v1")
    assert hub.paths == []


def test_the_command(hub, run, capsys):
    assert main(["push", str(run.path), REPO, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["commit"].startswith(f"{hub.endpoint}/{REPO}/commit/")
    commit = document["commit"].rsplit("/", 1)[1]
    assert main(["verify", f"{REPO}@{commit}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumable"] is False
    assert main(["circuit", REPO, "--batches", "1", "--adversary", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"]
    assert main(["agreement", REPO, f"{REPO}@{commit}", "--batches", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert main(["verify", REPO]) == 0
    assert "a copy for reading" in capsys.readouterr().out
    assert main(["circuit", f"{REPO}@v9"]) == 2
    assert "no such revision" in capsys.readouterr().err
    assert main(["push", str(run.path)]) == 2
    assert main(["push", "nowhere", REPO]) == 2


@pytest.mark.slow
def test_by_environment_as_a_user_sets_it(hub, run, tmp_path):
    """HF_ENDPOINT and HF_HOME, in a process of its own, with Xet as it is installed: reading needs no account."""
    run.push_to_hub(REPO)
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "theirs"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = f"import paramlens; run = paramlens.open_run({REPO!r}); print(run.path, run.step)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith(str(tmp_path / "theirs/paramlens/ada--tiny-run"))
    assert done.stdout.split()[1] == "12"
