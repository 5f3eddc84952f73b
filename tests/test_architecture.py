"""The shape of the package: floors, sizes, what is imported when, and tables that must agree with the code."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from validators import tool

import medgen
from medgen import errors, models
from medgen.config import load_preset, preset_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "medgen"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in FILES]
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(NAMES, FILES, strict=True)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SAMPLES = ROOT / "data_samples"
HEAVY = {"torch", "monai", "SimpleITK", "lightning_fabric", "scipy.ndimage", "sklearn", "matplotlib"}
RISKY_CALLS = {"print", "eval", "exec", "__import__", "breakpoint"}
RISKY_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "__future__"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def named(node: ast.expr | None) -> set[str]:
    """The names an except clause catches."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node else {"everything"}


@pytest.fixture(params=NAMES)
def tree(request: pytest.FixtureRequest) -> ast.Module:
    return TREES[request.param]


# -- floors ----------------------------------------------------------------------------------------


def test_imports_run_down_the_floors():
    run = subprocess.run([tool("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_module_of_data_but_the_loader_and_its_parts_is_held_free_of_torch():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    contract = next(one for one in contracts if "torch" in one.get("forbidden_modules", ()))
    modules = {name for name in NAMES if name.startswith("medgen.data.")}
    assert modules - set(contract["source_modules"]) == {
        "medgen.data.classic",
        "medgen.data.dataset",
        "medgen.data.morph",
        "medgen.data.motion",
        "medgen.data.prepare",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        ["--help"],
        ["augment", "--help"],
        ["models"],
        ["info", str(SAMPLES / "xray")],
        ["info", str(SAMPLES / "heads_ill"), "--json"],
        ["convert", str(SAMPLES / "ct_oblique"), "-o", "out", "-q"],
        ["convert", str(SAMPLES / "xray" / "opacity"), "-o", "out", "--format", "dicom", "-q"],
        ["convert", str(SAMPLES / "heads_ill"), "-o", "out", "--format", "dicom", "-q"],
    ],
    ids=lambda arguments: " ".join(Path(a).name for a in arguments) if arguments else "import medgen",
)
def test_nothing_heavy_is_imported_where_nothing_is_learned(arguments, tmp_path):
    body = "import medgen" if arguments is None else "from medgen.cli import main; main()"
    code = (
        f"import sys\nsys.argv = {['medgen', *(arguments or [])]!r}\ntry:\n    {body}\n"
        f"finally:\n    print('HEAVY', sorted({HEAVY!r} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "HEAVY []"


def test_importing_medgen_changes_and_says_nothing():
    code = f"""
import logging, os, random, signal, warnings
import lightning_fabric, monai.data, monai.transforms, nibabel, pydicom, safetensors.torch, scipy.ndimage, torch, yaml
import numpy

def state():
    return {{
        "environment": dict(os.environ),
        "handlers": (list(logging.root.handlers), logging.root.level),
        "random": (random.getstate(), repr(numpy.random.get_state()), torch.random.get_rng_state().tolist()),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (2, 15)],
        "torch": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
        ),
    }}

before = state()
for name in {NAMES!r}:
    __import__(name)
after = state()
assert before == after, [key for key in before if before[key] != after[key]]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


# -- what code may not say ---------------------------------------------------------------------------


def test_no_code_in_data_no_prints_and_no_broad_excepts(tree):
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                assert name not in RISKY_CALLS, f"line {node.lineno}: {name}()"
            case ast.Import(names=names):
                assert not {n.name.split(".")[0] for n in names} & RISKY_MODULES, f"line {node.lineno}"
            case ast.ImportFrom(module=str(module)):
                assert module.split(".")[0] not in RISKY_MODULES, f"line {node.lineno}: {module}"
                assert "Self" not in {n.name for n in node.names}, f"line {node.lineno}: typing.Self"
            case ast.ExceptHandler(type=kind):
                broad = {"everything", "Exception", "BaseException"}
                assert not named(kind) & broad, f"line {node.lineno}: a broad except"
            case ast.keyword(arg="allow_pickle" | "weights_only" as argument, value=ast.Constant(value=value)):
                assert value is (argument == "weights_only"), f"line {node.lineno}: {argument}={value}"
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name)) | ast.Name(id=name)):
                assert name not in {"NotImplementedError", "Exception", "AssertionError"}, f"line {node.lineno}: {name}"
            case ast.Global():
                pytest.fail(f"line {node.lineno}: global state")


def test_yaml_is_read_without_objects(tree):
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in {"load", "unsafe_load"}]
    assert not [node for node in used if isinstance(node.value, ast.Name) and node.value.id in {"yaml", "torch"}]


def test_users_are_answered_with_errors_and_not_with_assert(tree):
    """An assert may state what the code itself guarantees; one with a message speaks to a user."""
    spoken = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.msg is not None]
    assert not spoken, f"lines {spoken}: raise an error of medgen.errors instead"


def test_no_unfinished_marks_and_no_place_of_one_machine():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|/home/|/root/|/Users/|C:\\\\")
    shipped = [*FILES, *(f for glob in ("configs/*", "pipelines/*.py", "*.*", "docs/*.md") for f in ROOT.glob(glob))]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in shipped
        if file.is_file()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert not found
    assert not [file for file in FILES if file.stem in {"utils", "helpers", "misc", "common"}]


# -- sizes ----------------------------------------------------------------------------------------------


def test_files_functions_and_signatures_are_small():
    long_files = [n for n, file in zip(NAMES, FILES, strict=True) if len(file.read_text().splitlines()) > 400]
    assert not long_files
    for name, module in TREES.items():
        for function in functions(module):
            lines = (function.end_lineno or 0) - function.body[0].lineno + 1
            if ast.get_docstring(function) and len(function.body) > 1:
                lines = (function.end_lineno or 0) - function.body[1].lineno + 1
            assert lines <= 70, f"{name}.{function.name}: {lines} lines"
            count = len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
            own = {"self", "cls"} & {a.arg for a in function.args.args[:1]}
            verb = function.name in medgen.__all__ and medgen._HOME[function.name] == name
            # The Python twin of a command takes what the command takes, by name.
            most = 8 + len(own) if not verb else 8 + len(function.args.kwonlyargs)
            assert name.startswith("medgen.cli") or count <= most, f"{name}.{function.name}: {count} arguments"


# -- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, t in TREES.items() if t.body and not n.endswith(".__main__")])
def test_every_module_with_code_lists_its_public_names(name):
    module, tree = importlib.import_module(name), TREES[name]
    defined = {n.name for n in tree.body if isinstance(n, Function | ast.ClassDef)}
    listed = getattr(module, "__all__", None)
    if listed is None:
        assert not {n for n in defined if not n.startswith("_")} or name.startswith("medgen.cli."), "no __all__"
        return
    assert list(listed) == sorted(listed, key=lambda n: (not n.isupper(), not n[0].isupper(), n)), "not sorted"
    assert len(set(listed)) == len(listed)
    assert not [n for n in listed if n.startswith("_") or not hasattr(module, n)]
    used = {n.name for n in tree.body if isinstance(n, Function | ast.ClassDef) and not n.name.startswith("_")}
    assert used <= {*listed}, f"neither private nor listed: {sorted(used - {*listed})}"


def test_public_names_resolve_and_are_all_listed():
    assert sorted(medgen.__all__) == sorted(medgen._HOME)
    for name in medgen.__all__:
        assert getattr(medgen, name).__name__ == name
        assert getattr(medgen, name).__doc__
    assert {*medgen.__all__} <= {*dir(medgen)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        medgen.nonsense  # noqa: B018
    hinted = {
        alias.name: node.module
        for node in ast.walk(TREES["medgen"])
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medgen")
        for alias in node.names
    }
    assert hinted == medgen._HOME


def test_the_error_tree_is_drawn_as_it_is():
    drawn = {}
    above: list[str] = []
    line = r"^( +)(\w+Error|\w+Scan|\w+Series)\b.*?(?:exit (\d))?$"
    for indent, name, code in re.findall(line, errors.__doc__, re.M):
        depth = len(indent) // 2 - 2
        above[depth:] = [name]
        drawn[name] = (above[depth - 1] if depth else "Exception", code)
    for name, (parent, code) in drawn.items():
        kind = getattr(errors, name)
        assert kind.__bases__[0].__name__ == parent
        assert not code or kind.exit_code == int(code)
    assert {*drawn} == {*errors.__all__}
    assert {kind.exit_code for kind in map(errors.__dict__.get, errors.__all__)} == {1, 2, 3}


# -- tables that must agree with the code -----------------------------------------------------------------


def test_families_are_the_files_of_models():
    # A family is a file, or a folder with a file an axis.
    found = {".".join(name.split(".")[:3]) for name in NAMES if name.startswith("medgen.models.")}
    files = found - {
        "medgen.models.abilities",
        "medgen.models.base",
    }
    assert {place.partition(":")[0] for place in models.FAMILIES.values()} == files
    for kind in models.FAMILIES:
        assert models.family(kind).Config.model_fields["kind"].default == kind


@pytest.mark.parametrize("name", [name for name in preset_names() if load_preset(name).model])
def test_a_preset_says_what_its_model_can_do(name):
    preset = load_preset(name)
    kind = models.family(preset.about.family)
    assert preset.model["kind"] == preset.about.family
    # Any shape will do that the model's stride divides; all it can do takes scans with classes.
    shape = (kind.stride(preset.model) * 4,) * preset.about.dims
    config = models.config_of({**preset.model, "shape": shape, "classes": ("calm", "stormy")})
    assert config.dims == preset.about.dims
    assert sorted(preset.about.abilities) == list(preset.about.abilities) == sorted(kind.abilities(config))


def test_dependencies_are_declared_used_and_pinned():
    def distribution(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

    declared = {distribution(requirement) for requirement in PROJECT["project"]["dependencies"]}
    imported = {
        (name if isinstance(name, str) else name.name).split(".")[0]
        for module in TREES.values()
        for node in ast.walk(module)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (node.names if isinstance(node, ast.Import) else [node.module or "medgen"])
    } - {*sys.stdlib_module_names, "medgen"}
    homes = packages_distributions()
    used = {distribution(homes[name][0]) for name in imported if name in homes}
    optional = {distribution(r) for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra}
    plugins = {"pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls"}  # pydicom finds them by itself
    assert used - optional - declared == set()
    assert declared - used - plugins == set()
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {distribution(line) for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line and not line.startswith("#"))
    assert declared | optional <= pins


def test_samples_are_small_and_what_their_checksums_say():
    from hashlib import sha256

    lines = (SAMPLES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = dict(reversed(line.split(maxsplit=1)) for line in lines)
    there = {str(file.relative_to(SAMPLES)) for file in SAMPLES.rglob("*.*") if file.suffix in {".dcm", ".gz", ".png"}}
    assert there <= {*listed}
    assert not [name for name, told in listed.items() if sha256((SAMPLES / name).read_bytes()).hexdigest() != told]
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*")) < 10_000_000


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {PROJECT['project']['version']}\n" in citation
    assert json.dumps(PROJECT["project"]["license"]) == '"Apache-2.0"'


def test_a_wheel_carries_the_presets_and_an_editable_install_finds_them(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    packed = {file.name: file.read_bytes() for file in (tmp_path / "site" / "medgen" / "presets").iterdir()}
    assert packed == {file.name: file.read_bytes() for file in (ROOT / "configs").iterdir()}
    assert (tmp_path / "site" / "medgen" / "py.typed").exists()
    assert not [file for file in (tmp_path / "site").iterdir() if not file.name.startswith("medgen")]
    code = "import medgen.config as c; print(c.__file__, *c.preset_names())"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    place, *names = run.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert names == preset_names() == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
