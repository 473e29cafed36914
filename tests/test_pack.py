"""A bundle brings all that another machine needs: what is in it, what build.sh makes of it, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.engines import CHECKPOINT, IMAGES, MODEL, ROOT, Made, Silent, run_python
from vitedge import pipeline
from vitedge.backends import BACKENDS, load_backend
from vitedge.backends import tensorrt as tensorrt_backend
from vitedge.backends.build import build_engine, read_manifest, read_source
from vitedge.bench.document import load_document, rows_of
from vitedge.datasets import list_dataset
from vitedge.errors import AbsentDeviceError, EngineError, VitEdgeError
from vitedge.images import decode, list_images
from vitedge.pack import ALWAYS, JUDGED, REQUIREMENTS, Bundle, _pictures, pack
from vitedge.runtime.engine import open_engine
from vitedge.specs import Peaks, Recipe, Target, from_dict, to_dict
from vitedge.workspace import load_recipe, load_target, read_json, read_toml, sha256

pytest.importorskip("torch")
pytest.importorskip("openvino")

BOX = Target(name="box")
ORIN = Target("orin", "tensorrt", (1, 1, 4), capability="8.7", peaks=Peaks({"int8": 33.5, "fp16": 16.7}, 102.0, "a sheet"))
RTX = Target("rtx30", "tensorrt-rtx", (1, 1, 4), capability="8.6")
VITEDGE = "import sys; from vitedge.cli import main; sys.argv[0] = 'vitedge'; main()"


@pytest.fixture(scope="module")
def box(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of both graphs for a CPU, as a folder; tests do not change it."""
    output = tmp_path_factory.mktemp("pack") / "a box"
    pack(list(made.graphs.values()), BOX, output, list_images(made.images))
    return output


def build(bundle: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run build.sh with this interpreter and nothing of the repository in reach; a vitedge there would be found by PYTHONPATH."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    settings = {**kept, "PYTHON": sys.executable, "INSTALL": "no", **environment}
    command = ["sh", str(bundle / "build.sh")]
    return subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True, check=False)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_holds_what_its_manifest_says(box: Path, made: Made) -> None:
    bundle = from_dict(Bundle, read_json(box / "manifest.json"))
    assert files_in(box) == {*bundle.files, "manifest.json", "SHA256SUMS"}
    assert {path: sha256(box / path) for path in bundle.files} == bundle.files
    assert [(graph.variant, graph.card.name, graph.float_type) for graph in bundle.graphs] == [
        ("fp32", "fashion-vit", "fp32"),
        ("int8", "fashion-vit", "fp32"),
    ]
    for graph, source in zip(bundle.graphs, made.graphs.values(), strict=True):
        assert (box / graph.file).read_bytes() == source.read_bytes()
        assert graph.recipe == read_source(source).recipe and graph.card == read_source(source).card
    assert bundle.target == BOX and bundle.images == IMAGES
    assert (box / "engines/fashion-vit/labels.txt").read_text().splitlines() == list(bundle.graphs[0].card.labels)


def test_a_bundle_is_a_workspace_with_its_target_and_recipe(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack([made.graphs["int8"]], ORIN, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path / "bundle")
    assert load_target("orin") == ORIN
    assert load_recipe("int8") == Recipe(float_type="fp32")
    text = Path("engines/targets/orin.toml").read_text()
    assert "\n[peaks]\n" in text and "\n[peaks.tops]\nint8 = 33.5\n" in text
    assert not Path("images").exists()


def test_a_recipe_and_a_target_survive_as_toml(tmp_path: Path) -> None:
    from vitedge.pack import _toml

    strange = Recipe(name="x", skip=('a "quoted"\\name', "café*"), int4=("head",), percentile=99.5, min_sqnr_db=1e-7)
    for spec in (strange, ORIN, Target(), RTX):
        (tmp_path / "spec.toml").write_bytes(_toml(spec))
        assert from_dict(type(spec), {"name": spec.name, **read_toml(tmp_path / "spec.toml")}) == spec


def test_the_code_goes_along_without_its_compiler(box: Path) -> None:
    package = {path for path in files_in(box) if path.startswith("vitedge/")}
    assert {"vitedge/cli.py", "vitedge/doctor.onnx", "vitedge/py.typed", "vitedge/bundle/build.sh"} <= package
    compiler = {path for path in package if path.startswith("vitedge/compiler/")}
    assert compiler == {"vitedge/compiler/__init__.py", "vitedge/compiler/catalogue.py"}
    assert not [path for path in package if "__pycache__" in path]


def test_images_are_drawn_evenly_and_keep_their_labels(made: Made, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    for index in range(JUDGED + 10):
        shutil.copy(list_images(made.images)[0].path, tmp_path / "loose" / f"{index}.png")
    bundle = pack([made.graphs["int8"]], BOX, tmp_path / "out", list_images(tmp_path / "loose"))
    assert bundle.images == JUDGED == len(list_images(tmp_path / "out" / "images"))
    assert {file.label for file in list_images(tmp_path / "out" / "images")} == {None}


def test_build_sh_builds_and_measures_from_the_bundle_alone(box: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(box, tmp_path / "on the device"))
    done = build(bundle)
    assert done.returncode == 0, done.stderr
    assert "PASS  openvino" in done.stdout and "to run one: " in done.stdout
    built = [bundle / line.removeprefix("engine: ") for line in done.stdout.splitlines() if line.startswith("engine: ")]
    assert [read_manifest(folder).variant for folder in built] == ["fp32", "int8"]
    assert [read_manifest(folder).target for folder in built] == [BOX, BOX]
    for folder in built:
        open_engine(folder).close()
    rows = rows_of(load_document(bundle / "bench.json"))
    assert [(row.variant, row.images) for row in rows] == [("fp32", IMAGES), ("int8", IMAGES)]
    assert rows[1].top1 > 80 and rows[1].agreement > 90 and (bundle / "report.html").is_file()

    before = {folder: (folder / "build.log").stat().st_mtime_ns for folder in built}
    again = build(bundle)
    assert again.returncode == 0 and again.stderr.count("is fresh") == 2, again.stderr
    assert {folder: (folder / "build.log").stat().st_mtime_ns for folder in built} == before


def test_the_vitedge_that_runs_is_the_one_in_the_bundle(box: Path, tmp_path: Path) -> None:
    """Another in the interpreter's environment must not be taken: this one says another version."""
    bundle = Path(shutil.copytree(box, tmp_path / "bundle"))
    init = bundle / "vitedge" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.9.'))
    repair(bundle, "vitedge/__init__.py")
    code = "import sys; sys.argv = ['vitedge', '--version']; from vitedge.cli import main; main()"
    script = (bundle / "build.sh").read_text()
    (bundle / "build.sh").write_text(script.replace("-m vitedge doctor", f'-c "{code}"'))
    repair(bundle, "build.sh")
    done = build(bundle)
    assert done.returncode == 0 and "vitedge 9.9.0" in done.stdout, done


def repair(bundle: Path, name: str) -> None:
    """Write the sum of a changed file."""
    lines = (bundle / "SHA256SUMS").read_text().splitlines()
    lines = [f"{sha256(bundle / name)}  {name}" if line.endswith(f"  {name}") else line for line in lines]
    (bundle / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("name", ["engines/targets/box.toml", "manifest.json", "build.sh", "vitedge/specs.py", "images"])
def test_a_changed_or_missing_file_is_refused_before_anything_runs(box: Path, tmp_path: Path, name: str) -> None:
    bundle = Path(shutil.copytree(box, tmp_path / "bundle"))
    path = bundle / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    done = build(bundle)
    assert done.returncode == 1 and done.stdout == ""
    assert f"error: this bundle is not as it was packed, look at {name}" in done.stderr
    assert "hint:  copy it to this machine again" in done.stderr
    assert not list(bundle.glob("engines/*/*/"))


def test_build_sh_says_what_is_missing(box: Path, made: Made, tmp_path: Path) -> None:
    assert "error: there is no /no/python here" in build(box, PYTHON="/no/python").stderr
    (tmp_path / "old").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old").chmod(0o755)
    assert "old is older than 3.10" in build(box, PYTHON=str(tmp_path / "old")).stderr
    pack([made.graphs["fp32"]], ORIN, tmp_path / "orin")
    done = build(tmp_path / "orin")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        assert done.returncode == 1 and "does not find tensorrt" in done.stderr and "nvidia-jetpack" in done.stderr


def test_build_sh_builds_for_tensorrt_rtx_without_a_gpu(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    pack([made.graphs["int8"]], RTX, tmp_path / "bundle", list_images(made.images))
    done = build(tmp_path / "bundle")
    (folder,) = [path.parent for path in (tmp_path / "bundle").glob("engines/fashion-vit/*/manifest.json")]
    assert read_manifest(folder).target == RTX and (folder / "model.engine").stat().st_size > 100_000
    if not load_backend("tensorrt-rtx").runs_here(RTX):
        assert done.returncode == 1
        assert "error: the engines are built, but were not measured: see above" in done.stderr


def test_an_archive_holds_the_same_in_one_folder_and_names_nobody(box: Path, made: Made, tmp_path: Path) -> None:
    pack(list(made.graphs.values()), BOX, tmp_path / "a box.tar.gz", list_images(made.images))
    with tarfile.open(tmp_path / "a box.tar.gz") as archive:
        members = archive.getmembers()
        archive.extractall(tmp_path / "out", filter="data")
    assert members[0].name == "a box/manifest.json"
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    unpacked = tmp_path / "out" / "a box"
    assert {name: sha256(unpacked / name) for name in files_in(unpacked)} == {name: sha256(box / name) for name in files_in(box)}


def test_labels_that_a_shell_would_trip_over_are_kept(made: Made, tmp_path: Path) -> None:
    label = "a b\\c 'd\" $e\nf"
    (tmp_path / "photos" / label).mkdir(parents=True)
    shutil.copy(list_images(made.images)[0].path, tmp_path / "photos" / label / "x.PNG")
    pack([made.graphs["int8"]], BOX, tmp_path / "bundle", list_images(tmp_path / "photos"))
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "bundle", capture_output=True, check=False)
    assert done.returncode == 0, done
    assert [file.label for file in list_images(tmp_path / "bundle" / "images")] == [label]


@pytest.mark.parametrize("name", ["bundle", "bundle.tar.gz"])
def test_an_older_bundle_is_replaced_and_nothing_else(made: Made, tmp_path: Path, name: str) -> None:
    output, graphs = tmp_path / name, [made.graphs["int8"]]
    pack([made.graphs["fp32"]], BOX, output)
    pack(graphs, BOX, output)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    mine = tmp_path / f"mine{'.tar.gz' if '.' in name else ''}"
    if "." in name:
        mine.write_bytes(b"my own archive")
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("my own")
    with pytest.raises(VitEdgeError, match="exists") as refused:
        pack(graphs, BOX, mine)
    assert "give another --output" in str(refused.value.hint)
    assert "my own" in (mine if mine.is_file() else mine / "thesis.txt").read_text()


def test_a_bundle_in_which_engines_were_built_is_not_thrown_away(made: Made, tmp_path: Path) -> None:
    pack([made.graphs["int8"]], BOX, tmp_path / "bundle")
    engine = build_engine(made.graphs["int8"], BOX, tmp_path / "bundle" / "engines")
    with pytest.raises(VitEdgeError, match=f"holds what no bundle brought, such as engines/fashion-vit/{engine.name}"):
        pack([made.graphs["int8"]], BOX, tmp_path / "bundle")
    assert (engine / "manifest.json").is_file()


@pytest.mark.parametrize(("name", "kind"), [("folder.tar.gz", "archive"), ("file", "folder")])
def test_an_output_of_the_other_kind_is_refused(made: Made, tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "folder.tar.gz").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VitEdgeError, match=f"exists, and is no {kind}"):
        pack([made.graphs["int8"]], BOX, tmp_path / name)
    for nameless in (Path(), Path(".."), tmp_path / ".."):
        with pytest.raises(VitEdgeError, match="no name for a bundle"):
            pack([made.graphs["int8"]], BOX, nameless)


def test_what_cannot_be_packed_leaves_nothing_behind(made: Made, tmp_path: Path) -> None:
    recipes = (Recipe(method="none", name="same", float_type="fp32"), Recipe(method="none", name="same", float_type="bf16"))
    differ = []
    from vitedge.compiler.quantize import leave_float

    for index, recipe in enumerate(recipes):
        differ.append(tmp_path / f"{index}.onnx")
        leave_float(made.graphs["fp32"], recipe, differ[-1])
    (tmp_path / "not.onnx").write_bytes(b"nothing")
    wrong: list[tuple[list[Path], Target, str]] = [
        ([tmp_path / "none.onnx"], BOX, "does not exist"),
        ([tmp_path / "not.onnx"], BOX, "is not a readable ONNX model"),
        (differ, BOX, "different recipes that are both called same"),
        ([made.graphs["int8"]], dataclasses.replace(ORIN, capability=None), "does not say which GPU it is"),
        ([made.graphs["int8"]], dataclasses.replace(ORIN, backend="abacus"), "there is no backend 'abacus'"),
    ]
    for graphs, target, message in wrong:
        for name in ("bundle", "bundle.tar.gz"):
            with pytest.raises(VitEdgeError, match=message):
                pack(graphs, target, tmp_path / name)
    assert not [path.name for path in tmp_path.iterdir() if "bundle" in path.name]


FULL = """
import resource, signal, sys
from pathlib import Path
from vitedge.errors import VitEdgeError
from vitedge.pack import pack
from vitedge.specs import Target
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    pack([Path(sys.argv[1])], Target(), Path(sys.argv[2]))
except VitEdgeError as error:
    print(error, "|", error.hint)
"""


@pytest.mark.parametrize("name", ["bundle", "bundle.tar.gz"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(made: Made, tmp_path: Path, name: str) -> None:
    done = run_python(FULL, made.graphs["int8"], tmp_path / name)
    assert done.returncode == 0 and done.stdout.startswith("cannot write "), done
    assert "free some space" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_graph_in_the_wrong_float_type_is_refused_and_with_images_converted(made: Made, tmp_path: Path) -> None:
    """As `prepare_build` would on the device: the recipe says auto, which is fp16 on a GPU, and the graph is in fp32."""
    graph = pipeline.quantize_step(
        Path(shutil.copy(made.graphs["fp32"], tmp_path / "fp32.onnx")), list_images(made.images), Recipe(), tmp_path, Silent()
    )
    with pytest.raises(EngineError, match="which are fp32, but the recipe wants fp16") as refused:
        pack([graph], ORIN, tmp_path / "bundle")
    assert "give real images with --images" in str(refused.value.hint)
    assert not (tmp_path / "bundle").exists()
    converted = pipeline.precision_step(graph, ORIN, list_images(made.images), Silent())
    assert pack([converted], ORIN, tmp_path / "bundle").graphs[0].float_type == "fp16"
    with pytest.raises(EngineError, match="is in fp16, for GPUs"):
        pack([converted], BOX, tmp_path / "box")


def test_a_build_for_a_gpu_that_is_not_here_says_what_can_be_done(made: Made, tmp_path: Path) -> None:
    elsewhere = [dataclasses.replace(ORIN, capability=capability) for capability in ("8.7", "8.6")]
    hints = []
    for target in elsewhere:
        if load_backend("tensorrt").device(target).startswith("compute capability"):
            with pytest.raises(AbsentDeviceError) as refused:
                build_engine(made.graphs["int8"], target, tmp_path)
            hints.append(str(refused.value.hint))
    assert all("vitedge pack ONNX --target orin" in hint and "sh build.sh" in hint for hint in hints)
    assert ["--backend tensorrt-rtx" in hint for hint in hints] == [False, True][: len(hints)]
    assert list(tmp_path.iterdir()) == []


def test_the_capabilities_in_the_hint_are_those_of_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    assert set(tensorrt_backend.RTX_CAPABILITIES) == set(tensorrt_backend.Release(trt).capabilities)


def test_make_for_a_gpu_that_is_not_here_ends_in_a_bundle(made: Made, tmp_path: Path) -> None:
    root, watcher = tmp_path / "workspace", Silent()
    (root / "engines" / "targets").mkdir(parents=True)
    (root / "calibration").mkdir()
    target = root / "engines" / "targets" / "orin.toml"
    target.write_text('backend = "tensorrt"\ncapability = "8.7"\n')
    job = pipeline.Job(pipeline.ModelSource(MODEL, CHECKPOINT), made.images, root, recipes=("int8-fast",), target=str(target))
    result = pipeline.make(job, watcher)
    assert (result.engines, result.rows, result.report) == ((), (), None)
    assert result.bundle == root / "bundles" / "fashion-vit-orin.tar.gz" and result.bundle.is_file()
    assert [line.split(":")[0] for line in watcher.lines] == ["export", "calibrate", "quantize", "precision", "pack"]
    assert any("nothing was measured" in note for note in result.notes)
    with pytest.raises(VitEdgeError, match="are held against engines"):
        pipeline.make(dataclasses.replace(job, bound=pipeline.Bound(max_drop=1.0)), watcher)

    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    target.write_text('backend = "tensorrt"\ncapability = "8.6"\n')
    result = pipeline.make(dataclasses.replace(job, backend="tensorrt-rtx"), watcher)
    assert result.bundle is None and result.report is None
    assert [read_manifest(folder).backend for folder in result.engines] == ["tensorrt-rtx"] * 2


def test_the_command_packs_and_says_what_to_do_next(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.root, tmp_path / "workspace"))
    (folder / "engines" / "targets").mkdir(exist_ok=True)
    (folder / "engines" / "targets" / "orin.toml").write_text('backend = "tensorrt"\ncapability = "8.7"\n')
    names = ["fashion-vit/fp32.onnx", "fashion-vit/int8.onnx"]
    done = run_python(VITEDGE, "pack", *names, "--target", "orin", "--images", "images", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "bundles/fashion-vit-orin.tar.gz\n" and (folder / done.stdout.strip()).is_file()
    assert "tar xzf fashion-vit-orin.tar.gz && sh fashion-vit-orin/build.sh" in done.stderr
    done = run_python(VITEDGE, "pack", names[0], "--target", "orin", "-o", "somewhere", folder=folder)
    assert done.returncode == 0 and "sh somewhere/build.sh" in done.stderr and "tar" not in done.stderr.split("next:")[1]
    done = run_python(VITEDGE, "pack", names[0], "--target", "orin", "-o", "my box", folder=folder)
    assert "there: sh 'my box/build.sh'\n" in done.stderr
    done = run_python(VITEDGE, "pack", "fashion-vit/int4.onnx", "--target", "orin", folder=folder)
    assert done.returncode == 1 and "error: there is no ONNX file fashion-vit/int4.onnx" in done.stderr


def test_commands_that_need_the_compiler_say_that_it_did_not_come_along(box: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(box), "PYTHONDONTWRITEBYTECODE": "1"}
    for arguments, code, said in (
        (["export", MODEL], 1, "this vitedge came in a bundle, without its compiler"),
        (["models"], 0, "hf:facebook/dinov2-small"),
    ):
        command = [sys.executable, "-m", "vitedge", *arguments]
        done = subprocess.run(command, cwd=box, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code and said in done.stdout + done.stderr, done
        assert "Traceback" not in done.stderr


def test_every_backend_has_requirements_which_are_those_of_the_package() -> None:
    """Not more than pyproject.toml asks for, in the same words; JetPack's Python bindings want NumPy 1."""
    project = read_toml(ROOT / "pyproject.toml")["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    words = {line.partition(";")[0].strip() for line in (*project["dependencies"], *extras)}
    assert set(REQUIREMENTS) == set(BACKENDS)
    for line in (*ALWAYS, *(line for lines in REQUIREMENTS.values() for line in lines)):
        name = line.partition(";")[0].strip()
        assert name in words or name.startswith("numpy"), line
    assert json.loads(json.dumps(to_dict(ORIN)))["capability"] == "8.7"


def test_pictures_come_out_of_archives_and_labels_that_are_no_folder_names_go_in_a_table(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for index, label in enumerate(("T-shirt/top", "../../etc", "cat")):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (index, 0, 0)).save(picture, "PNG")
            for name, content in ((f"{index}.PNG", picture.getvalue()), (f"{index}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    found = list_dataset(tmp_path / "set.tar")
    contents = _pictures(found)
    assert set(contents) == {"images/00.png", "images/01.png", "images/02.png", "images/labels.json"}
    (tmp_path / "images").mkdir()
    for name, content in contents.items():
        assert isinstance(content, bytes)
        (tmp_path / name).write_bytes(content)
    again = list_dataset(tmp_path / "images")
    assert {file.label: int(decode(file)[0, 0, 0]) for file in again} == {"T-shirt/top": 0, "../../etc": 1, "cat": 2}
