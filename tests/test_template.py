"""The workspace that `vitedge init` writes is the repository's own, and its two READMEs tell all there is to set."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest

from tests.engines import ROOT
from vitedge.backends import BACKENDS
from vitedge.specs import Recipe, Target, from_dict
from vitedge.workspace import BUILTIN_RECIPES, TEMPLATE, init_workspace, known_targets, load_recipe, load_target, read_toml

FILES = sorted(path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file())
CHOICES = {value for hint in typing.get_type_hints(Recipe).values() for value in typing.get_args(hint) if isinstance(value, str)}
JETSONS = ("orin-nano", "orin-nano-super", "agx-orin", "thor")
TARGETS = ("cpu", "local", *JETSONS, "rtx-3090", "rtx-4090", "rtx-5090", "l4", "a100", "h100")
SPECS = {"calibration": Recipe, "engines": Target}
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def test_the_template_holds_both_folders_with_their_readmes_and_defaults() -> None:
    names = {path.as_posix() for path in FILES}
    recipes = {f"calibration/recipes/{name}.toml" for name in ("int8", "int8-fast", "int8-attention", "int8-mixed")}
    targets = {f"engines/targets/{name}.toml" for name in TARGETS}
    assert names == {"calibration/README.md", "engines/README.md"} | targets | recipes


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_template_file_equals_the_repositorys(path: Path) -> None:
    assert (TEMPLATE / path).read_bytes() == (ROOT / path).read_bytes()


def test_the_repository_keeps_no_other_file_in_the_two_folders_but_scales() -> None:
    done = subprocess.run(["git", "ls-files", "calibration", "engines"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    tracked = {line for line in done.stdout.splitlines() if not line.startswith("calibration/scales/")}
    assert tracked == {path.as_posix() for path in FILES}


def test_init_writes_the_template_and_keeps_what_is_there(tmp_path: Path) -> None:
    assert init_workspace(tmp_path) == {tmp_path / path: True for path in FILES}
    for path in FILES:
        assert (tmp_path / path).read_bytes() == (TEMPLATE / path).read_bytes()
    mine = tmp_path / "calibration" / "recipes" / "int8.toml"
    mine.write_text("skip = ['head']\n")
    (tmp_path / "engines" / "README.md").unlink()
    written = init_workspace(tmp_path)
    assert [path for path, is_new in written.items() if is_new] == [tmp_path / "engines" / "README.md"]
    assert mine.read_text() == "skip = ['head']\n"


@pytest.mark.parametrize("folder", SPECS)
def test_a_readme_names_every_key_with_its_default(folder: str) -> None:
    spec = SPECS[folder]
    rows = {key: default for key, default, _ in ROW.findall((TEMPLATE / folder / "README.md").read_text("utf-8"))}
    fields = {field.name: getattr(spec(), field.name) for field in dataclasses.fields(spec) if field.name != "name"}
    assert list(rows) == list(fields)
    for key, default in fields.items():
        if default is None:
            assert not rows[key].startswith("`"), "nothing that could be written into the file"
        else:
            assert from_toml(spec, key, rows[key].strip("`")) == default


def from_toml(spec: type, key: str, text: str) -> Any:
    """What a TOML file gives that says `key = text`; JSON is TOML for these values."""
    return getattr(from_dict(spec, {key: json.loads(text)}), key)


def test_the_readmes_name_every_value_of_the_choices() -> None:
    calibration, engines = ((TEMPLATE / folder / "README.md").read_text("utf-8") for folder in SPECS)
    for value in CHOICES:
        assert f'`"{value}"`' in calibration
    for backend in BACKENDS:
        assert f'`"{backend}"`' in engines


def test_the_packaged_recipes_and_target_are_the_built_in_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert BUILTIN_RECIPES["int8"] == Recipe()
    packaged = {path.stem: load_recipe(str(path)) for path in (TEMPLATE / "calibration" / "recipes").glob("*.toml")}
    assert packaged == {name: recipe for name, recipe in BUILTIN_RECIPES.items() if recipe.method != "none"}
    assert load_target(str(TEMPLATE / "engines" / "targets" / "cpu.toml")) == Target()
    monkeypatch.chdir(tmp_path)  # without a workspace, and then with one
    for _ in range(2):
        assert (load_recipe("int8"), load_target("cpu")) == (Recipe(), Target())
        assert load_recipe("bf16") == Recipe(name="bf16", method="none", float_type="bf16")
        init_workspace(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_found_with_and_without_a_workspace(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    brought = load_target(name)
    assert brought.name == name and set(known_targets()) == set(TARGETS)
    init_workspace(tmp_path)
    assert load_target(name) == brought
    (tmp_path / "engines" / "targets" / f"{name}.toml").write_text("batch = [2, 3, 4]\n")
    assert load_target(name).batch == (2, 3, 4), "a file in the workspace goes first"


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"cpu", "local"}))
def test_a_gpu_target_says_what_its_device_can_do_and_who_says_so(name: str) -> None:
    target = load_target(name)
    assert target.backend == "tensorrt" and target.capability and target.peaks
    tops = target.peaks.tops
    assert tops["int8"] > tops["fp16"] > tops["fp32"] and "NVIDIA" in target.peaks.source
    assert (target.capability == "8.7") == ("orin" in name)


@pytest.mark.parametrize("folder", SPECS)
def test_every_toml_file_of_the_repository_loads(folder: str) -> None:
    paths = sorted((ROOT / folder).glob("*/*.toml"))
    assert paths
    for path in paths:
        from_dict(SPECS[folder], {"name": path.stem, **read_toml(path)})


@pytest.mark.parametrize("folder", SPECS)
def test_the_first_lines_of_a_readme_say_where_the_code_is(folder: str) -> None:
    head = (TEMPLATE / folder / "README.md").read_text("utf-8")[:400]
    named = re.findall(r"`((?:vitedge/|backends/)?[\w/]+(?:\.py|/))`", head)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "vitedge" / "compiler" / name).exists(), name
