"""Everything the documentation tells a reader to type is run, on fewer scans and with smaller models."""

import contextlib
import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import medgen
from medgen.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data_samples/*.md")])
RECIPES = {
    "brain_anomaly": "--healthy data_samples/heads --new data_samples/heads_ill --minutes 0.01",
    "chest_augment": "--data data_samples/xray --per-class 4 --minutes 0.01",
    "mix_with_monai": "--data data_samples/xray --steps 4",
}
SMALL = ["fit.images=8", "model.width=8", "max_voxels=8000"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


SHOWN = [b for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) for b in blocks(page.read_text(), "bash")]


def commands(block: str) -> list[list[str]]:
    """The commands of a bash block, each as its words."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def made_cheap(words: list[str]) -> list[str]:
    """The same `medgen` command on a small model, for a moment."""
    if words[1] not in ("train", "augment"):
        return words
    if "--minutes" in words:
        at = words.index("--minutes")
        words = words[:at] + words[at + 2 :]
    several = "detector" in words  # models whose sizes are their own presets'
    small = [value for value in SMALL if not (several and value.startswith(("model.", "fit.")))]
    return [*words, "--minutes", "0.01", "-q", *(word for value in small for word in ("--set", value))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the sample scans, where commands are typed."""
    folder = tmp_path_factory.mktemp("bench")
    for kind, most in {"heads": 16, "heads_ill": 9, "ct_oblique": 99, "xray/normal": 99, "xray/opacity": 99}.items():
        (folder / "data_samples" / kind).mkdir(parents=True)
        for file in sorted((ROOT / "data_samples" / kind).iterdir())[:most]:
            shutil.copy(file, folder / "data_samples" / kind)
    return folder


def test_two_commands_do_everything_on_a_fresh_machine():
    first, second = blocks(README, "bash")[:2]
    for block in (first, second):
        # One chain: nothing is left to type in between, and a failure stops it.
        assert len(block.replace("\\\n", " ").splitlines()) == 1
        assert ";" not in block
        assert commands(block)[:2] == [["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]]
        assert commands(block)[2][:4] == ["pip", "install", "-c", "constraints.txt"]
    assert [words[:2] for words in commands(first)[3:]] == [["medgen", "augment"], ["medgen", "score"]]
    assert commands(second)[3:] == [["pytest"]]


def test_continuous_integration_runs_what_the_pages_say():
    shown = subprocess.run(["bash", ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True).stdout
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tests, checks = blocks(contributing, "bash")
    assert tests == blocks(README, "bash")[1]
    assert shown.split("\n") == [*tests.splitlines(), *checks.splitlines(), ""]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert all(" ".join(line.split()[:2]) in hooks for line in checks.splitlines()[:3])


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in SHOWN if "medgen " in b and "pytest" not in b])
def test_every_command_of_the_readme_and_the_docs_works(block, bench, monkeypatch, capsys):
    monkeypatch.chdir(bench)
    for words in commands(block):
        if words[0] != "medgen":
            continue
        monkeypatch.setattr("sys.argv", made_cheap(words))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, f"{shlex.join(words)}\n{out}\n{err}"
        if "-o" in words:
            assert any((bench / words[words.index("-o") + 1]).iterdir())
    for shown in re.findall(r"`(synthetic_heads/\S+|scores/\S+)`", README) if "synthetic_heads" in block else ():
        assert (bench / shown).exists()


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_every_python_block_of_the_readme_runs(block, bench, monkeypatch):
    monkeypatch.chdir(bench)
    cheap, changed = re.subn(r"minutes=\d+", f"minutes=0.01, overrides={SMALL!r}", block)
    assert changed == block.count("medgen.train(") + block.count("medgen.augment(")
    with contextlib.redirect_stdout(None):
        exec(compile(cheap, "README.md", "exec"), {})  # noqa: S102


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
@pytest.mark.parametrize("recipe", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda recipe: recipe.stem)
def test_every_recipe_runs_on_the_sample_scans(recipe, bench, monkeypatch, capsys):
    source = recipe.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    assert "\nclass " not in source
    assert f"python pipelines/{recipe.name}" in source
    monkeypatch.chdir(bench)
    monkeypatch.setattr("sys.argv", [str(recipe), "--out", recipe.stem, *RECIPES[recipe.stem].split()])
    runpy.run_path(str(recipe), run_name="__main__")
    assert "Research use only, not a medical device." in capsys.readouterr().out
    assert any((bench / recipe.stem).iterdir())


@pytest.mark.parametrize("name", ["medgen", *(m.name for m in pkgutil.walk_packages(medgen.__path__, "medgen."))])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
