"""An engine directory is whole or absent, whatever happens while it is built, and holds what was asked for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.engines import ROOT, Made, edit_manifest, input_rows, run_python, sqnr_db, start_python
from vitedge import backends
from vitedge.backends import build as build_module
from vitedge.backends import onnxruntime as onnxruntime_backend
from vitedge.backends import openvino as openvino_backend
from vitedge.backends.build import build_engine, is_whole, prepare_build, read_manifest, read_source, refit_engine
from vitedge.errors import EngineError, ModelError, VitEdgeError
from vitedge.pack import pack
from vitedge.runtime.engine import open_engine
from vitedge.specs import FloatType, Manifest, Peaks, Recipe, Target

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

GPU = "8.6"  # what TensorRT-RTX builds for without one; nothing to the others
PARTS = {"openvino": {"model.xml", "model.bin"}, "onnxruntime": {"model.onnx"}}
if importlib.util.find_spec("tensorrt_rtx_bindings"):
    PARTS["tensorrt-rtx"] = {"model.engine"}
TARGETS = [Target(backend=backend, capability=GPU) for backend in PARTS]
BUILD = """
import sys
from pathlib import Path
from vitedge.backends.build import build_engine
from vitedge.errors import VitEdgeError
from vitedge.specs import Target
graph, engines, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def build():
    try:
        print(build_engine(graph, Target(backend=backend, capability="8.6"), engines))
    except VitEdgeError as error:
        print(f"{error} | {error.hint}")
"""
# a build that says when the plan is written, and goes on when it is told to
HALTED = """
from vitedge.backends import load_backend
module = load_backend(backend)
module = module if hasattr(module, "__file__") else type(module)
whole = module.build
def build_and_wait(*arguments):
    log = whole(*arguments)
    print("plan written", flush=True)
    sys.stdin.readline()
    return log
module.build = build_and_wait
build()
"""


def variants_in(engines: Path) -> list[str]:
    """The names of all that lies in a folder of engines, but for those of other processes' temporary ones."""
    return sorted(path.name for path in engines.glob("*/*") if not path.name.startswith("."))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.backend)
def test_an_engine_directory_holds_plan_manifest_labels_and_log(made: Made, tmp_path: Path, target: Target) -> None:
    folder = build_engine(made.graphs["int8"], target, tmp_path)
    assert folder == prepare_build(made.graphs["int8"], target, tmp_path).folder and folder.parent == tmp_path / "fashion-vit"
    assert {path.name for path in folder.iterdir()} == PARTS[target.backend] | {"manifest.json", "labels.txt", "build.log"}
    manifest = read_manifest(folder)
    assert (manifest.target, manifest.variant) == (target, "int8")
    assert (folder / "labels.txt").read_text("utf-8").splitlines() == list(manifest.card.labels)
    assert target.backend in (folder / "build.log").read_text("utf-8")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_an_engine_is_whole_only_as_it_was_built(made: Made, tmp_path: Path) -> None:
    damages: list[Callable[[Path], object]] = [
        lambda folder: (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-1]),
        lambda folder: (folder / "model.xml").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: edit_manifest(folder, plan_sha256="0" * 64),
        lambda folder: edit_manifest(folder, backend="abacus"),
        shutil.rmtree,
    ]
    for number, damage in enumerate(damages):
        folder = made.copy("openvino", "int8", tmp_path / str(number))
        assert is_whole(folder)
        damage(folder)
        assert not is_whole(folder)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.backend)
def test_a_whole_engine_is_kept_and_a_damaged_one_built_again(made: Made, tmp_path: Path, target: Target) -> None:
    folder = build_engine(made.graphs["int8"], target, tmp_path)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert build_engine(made.graphs["int8"], target, tmp_path) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (folder / min(PARTS[target.backend])).write_bytes(b"")
    assert build_engine(made.graphs["int8"], target, tmp_path) == folder and is_whole(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_engine_that_this_machine_refuses_is_built_again(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the same on another platform, model of GPU or driver; `check` tells them apart."""
    folder = build_engine(made.graphs["int8"], Target(), tmp_path)
    edit_manifest(folder, platform="Linux riscv64")

    def check(manifest: Manifest) -> None:
        if manifest.platform == "Linux riscv64":
            raise EngineError("it was built on Linux riscv64", hint="build the engine again here")

    monkeypatch.setattr(openvino_backend, "check", check)
    monkeypatch.setattr(openvino_backend, "runs_here", lambda target: False)
    assert build_engine(made.graphs["int8"], Target(), tmp_path) == folder
    assert read_manifest(folder).platform == "Linux riscv64", "nothing that is built here runs here"
    monkeypatch.setattr(openvino_backend, "runs_here", lambda target: True)
    assert build_engine(made.graphs["int8"], Target(), tmp_path) == folder
    assert read_manifest(folder).platform == backends.this_platform()


def test_a_fresh_engine_tells_the_peaks_that_the_target_has_now(made: Made, tmp_path: Path) -> None:
    folder = build_engine(made.graphs["int8"], Target(), tmp_path)
    plan = (folder / "model.bin").stat().st_mtime_ns
    for target in (Target(peaks=Peaks({"int8": 1.0}, 1.0)), Target(peaks=Peaks({"int8": 2.0}, 1.0)), Target()):
        assert build_engine(made.graphs["int8"], target, tmp_path) == folder
        assert read_manifest(folder).target == target
    assert (folder / "model.bin").stat().st_mtime_ns == plan


@pytest.mark.parametrize(("counted", "lost"), [(True, 1), (True, 99), (False, 1), (False, 99)])
def test_a_graph_that_lost_its_quantizing_is_no_int8_engine(made: Made, tmp_path: Path, counted: bool, lost: int) -> None:
    model = onnx.load(made.graphs["int8"])
    makers = {node.output[0]: node for node in model.graph.node}
    origins = [(node, makers[node.input[0]].input[0]) for node in model.graph.node if node.op_type in ("MatMul", "Gemm")
               if node.input[0] in makers and makers[node.input[0]].op_type == "DequantizeLinear"]  # fmt: skip
    quantized = [(node, makers[name].input[0]) for node, name in origins if name in makers]  # but for the patches
    for node, plain in quantized[:lost]:
        node.input[0] = plain
    if not counted:  # as an older vitedge wrote it
        model.metadata_props.remove(next(entry for entry in model.metadata_props if entry.key == "vitedge.int8_products"))
    onnx.save(model, tmp_path / "less.onnx")
    said = f"{len(origins)} of its products compute in INT8, but {len(origins) - min(lost, len(quantized))} do"
    for refuse in (lambda: build_engine(tmp_path / "less.onnx", Target(), tmp_path / "engines"),
                   lambda: pack([tmp_path / "less.onnx"], Target(), tmp_path / "bundle")):  # fmt: skip
        with pytest.raises(
            EngineError,
            match=said,
        ) as caught:
            refuse()
        assert "quantize the model again" in str(caught.value.hint)


def test_a_variant_that_leads_out_of_the_workspace_is_refused(made: Made, tmp_path: Path) -> None:
    model = onnx.load(made.graphs["int8"])
    next(entry for entry in model.metadata_props if entry.key == "vitedge.variant").value = "../../../tmp/esc"
    onnx.save(model, tmp_path / "esc.onnx")
    with pytest.raises(ModelError, match=r"the variant in .*esc\.onnx is no name"):
        build_engine(tmp_path / "esc.onnx", Target(), tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_what_an_engine_is_made_from_decides_its_name(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(graph: str = "int8", **changes: object) -> str:
        return prepare_build(made.graphs[graph], dataclasses.replace(Target(), **changes), tmp_path).folder.name  # type: ignore[arg-type]

    names = [name(), name("fp32"), name(batch=(1, 2, 16)), name(threads=1), name(backend="onnxruntime"), name(name="other")]
    monkeypatch.setattr(openvino_backend, "version", lambda: "1.2.3")
    names.append(name())
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    assert name() == names[0] and names[0].startswith("int8-") and names[1].startswith("fp32-")


def test_the_same_recipe_on_a_device_with_another_float_type_is_another_engine(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace that is carried to a device without bf16 must not take the engine it brought along for a fresh one."""
    graph = with_recipe(made.graphs["fp32"], tmp_path, Recipe(name="auto", method="none"))
    names = []
    for native in (("bf16", "fp32"), ("fp32",)):
        monkeypatch.setattr(openvino_backend, "float_types", lambda target, native=native: native)
        names.append(prepare_build(graph, Target(), tmp_path).folder)
    assert names[0] != names[1]


def with_recipe(graph: Path, folder: Path, recipe: Recipe) -> Path:
    from vitedge.compiler.quantize import leave_float

    path = folder / f"{recipe.name}.onnx"
    leave_float(graph, recipe, path)
    return path


def test_bf16_is_computed_where_it_is_native_and_refused_elsewhere(made: Made, tmp_path: Path) -> None:
    graph = with_recipe(made.graphs["fp32"], tmp_path, Recipe(name="bf16", method="none", float_type="bf16"))
    assert read_source(graph).variant == "bf16"
    if "bf16" not in openvino_backend.float_types(Target()):
        with pytest.raises(EngineError, match="asks for bf16"):
            build_engine(graph, Target(), tmp_path)
        return
    with open_engine(build_engine(graph, Target(), tmp_path)) as engine:
        assert engine.manifest.float_type == "bf16"
        rows = input_rows(engine, made.images, 16)
        answer = engine(rows)
    with open_engine(made.engines["openvino", "fp32"]) as engine:
        quality = sqnr_db(engine(rows), answer)
    assert 30 < quality < 80  # 8 bits of precision: close, and not what FP32 gives


def test_auto_takes_what_the_backend_prefers(made: Made, tmp_path: Path) -> None:
    graph = with_recipe(made.graphs["fp32"], tmp_path, Recipe(name="auto", method="none"))
    for target in TARGETS[:2]:  # the others go by the graph
        wanted = backends.load_backend(target.backend).float_types(target)[0]
        assert read_manifest(build_engine(graph, target, tmp_path)).float_type == wanted
    assert read_manifest(made.engines["openvino", "fp32"]).float_type == "fp32"


def test_a_float_type_that_the_backend_lacks_is_an_error_and_nothing_is_built(made: Made, tmp_path: Path) -> None:
    graph = with_recipe(made.graphs["int8"], tmp_path, Recipe(name="bf16", method="none", float_type="bf16"))
    with pytest.raises(EngineError, match="asks for bf16, which onnxruntime on CPUExecutionProvider does not") as caught:
        build_engine(graph, Target(backend="onnxruntime"), tmp_path / "engines")
    assert "fp32" in str(caught.value.hint)
    assert not (tmp_path / "engines").exists()


def test_labels_of_any_alphabet_are_written_in_utf_8(made: Made, tmp_path: Path) -> None:
    model = onnx.load(made.graphs["fp32"])
    card = json.loads({entry.key: entry.value for entry in model.metadata_props}["vitedge.card"])
    card["labels"][:2] = ["熊", "Füße"]
    onnx.helper.set_model_props(model, {"vitedge.card": json.dumps(card), "vitedge.variant": "fp32"})
    onnx.save(model, tmp_path / "m.onnx")
    done = run_python(
        BUILD + "build()", tmp_path / "m.onnx", tmp_path, "onnxruntime", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert Path(done.stdout.strip()).is_dir(), done
    assert (Path(done.stdout.strip()) / "labels.txt").read_bytes().decode("utf-8").startswith("熊\nFüße\n")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.backend)
def test_an_onnx_file_that_vitedge_did_not_make_is_refused(made: Made, tmp_path: Path, target: Target) -> None:
    model = onnx.load(made.graphs["fp32"])
    properties = {entry.key: entry.value for entry in model.metadata_props}
    for wrong in ({}, {"vitedge.card": properties["vitedge.card"]}, properties | {"vitedge.card": "{"}):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, wrong)
        onnx.save(model, tmp_path / "other.onnx")
        with pytest.raises(ModelError, match=r"other\.onnx was not exported by vitedge") as caught:
            build_engine(tmp_path / "other.onnx", target, tmp_path / "engines")
        assert "vitedge export" in str(caught.value.hint)
    assert not (tmp_path / "engines").exists()


def test_an_onnx_file_cut_short_is_refused(made: Made, tmp_path: Path) -> None:
    data = made.graphs["int8"].read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"cut\.onnx is not a readable ONNX model"):
            build_engine(tmp_path / "cut.onnx", Target(), tmp_path / "engines")
    with pytest.raises(ModelError, match="does not exist"):
        build_engine(tmp_path / "none.onnx", Target(), tmp_path / "engines")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.backend)
def test_a_graph_that_the_backend_cannot_read_is_one_sentence_and_leaves_nothing(
    made: Made, tmp_path: Path, target: Target
) -> None:
    model = onnx.load(made.graphs["fp32"])
    model.graph.node[5].op_type = "NoSuchOperation"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=r"odd\.onnx") as caught:
        build_engine(tmp_path / "odd.onnx", target, tmp_path / "engines")
    assert "NoSuchOperation" in str(caught.value) and "\n" not in str(caught.value)
    left = [path.name for path in (tmp_path / "engines").rglob("*.*")]
    assert all(name.endswith(".failed.log") and name in str(caught.value.hint) for name in left), left


@pytest.mark.parametrize("backend", PARTS)
def test_a_build_killed_half_way_leaves_no_engine_and_the_next_one_succeeds(made: Made, tmp_path: Path, backend: str) -> None:
    graph, target = made.graphs["int8"], Target(backend=backend, capability=GPU)
    killed = start_python(BUILD + HALTED, graph, tmp_path, backend)
    assert killed.stdout is not None and killed.stdout.readline() == "plan written\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    folder = prepare_build(graph, target, tmp_path).folder
    assert any(folder.parent.iterdir())  # it had begun to write
    assert variants_in(tmp_path) == []
    with pytest.raises(EngineError, match="not an engine"):
        open_engine(folder)
    assert build_engine(graph, target, tmp_path) == folder and is_whole(folder)


class Refitted:
    """OpenVINO with weights that can be replaced, in so far as a copy of the plan stands for that, once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(openvino_backend, name)

    def refit(self, engine: Path, target: Target, onnx: Path, folder: Path) -> str:
        for part in openvino_backend.PLAN:
            shutil.copyfile(engine / part, folder / part)
        return "refitted"

    def refits_again(self) -> bool:
        return False


def test_a_refitted_engine_says_whether_it_can_be_refitted_and_is_made_of_a_whole_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "load_backend", lambda name: Refitted())
    engine = build_engine(made.graphs["int8"], Target(refit=True), tmp_path)
    folder = refit_engine(engine, made.graphs["int8"], tmp_path)
    assert folder != engine and not read_manifest(folder).target.refit and read_manifest(engine).target.refit
    with pytest.raises(EngineError, match="its target did not ask for that"):
        refit_engine(folder, made.graphs["int8"], tmp_path)
    with (engine / "model.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(EngineError, match="is damaged: its plan is not the one") as caught:
        refit_engine(engine, made.graphs["int8"], tmp_path)
    assert "copy it again" in str(caught.value.hint)


def test_a_plan_that_does_not_run_is_closed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def fail(session: object, count: int) -> None:
        raise EngineError("it does not run")

    monkeypatch.setattr(openvino_backend.OpenVinoSession, "run", fail)
    monkeypatch.setattr(openvino_backend.OpenVinoSession, "close", lambda session: closed.append(True))
    with pytest.raises(EngineError, match="it does not run"):
        build_engine(made.graphs["int8"], Target(), tmp_path)
    assert closed


@pytest.mark.parametrize("backend", PARTS)
def test_two_builds_at_once_both_end_well_with_one_engine(made: Made, tmp_path: Path, backend: str) -> None:
    builds = [start_python(BUILD + HALTED, made.graphs["int8"], tmp_path, backend) for _ in range(2)]
    for build in builds:
        assert build.stdout is not None and build.stdout.readline() == "plan written\n"
    for build in builds:  # both have written all of their plan; now both put it in place
        assert build.stdin is not None
        build.stdin.write("go on\n")
        build.stdin.flush()
    said = [build.communicate(timeout=120) for build in builds]
    folder = prepare_build(made.graphs["int8"], Target(backend=backend, capability=GPU), tmp_path).folder
    assert [(build.returncode, out.strip()) for build, (out, _) in zip(builds, said, strict=True)] == [(0, str(folder))] * 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert is_whole(folder)


def test_a_folder_that_processes_replace_at_the_same_time_is_always_one_of_theirs(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from vitedge.workspace import staged
path = Path(sys.argv[1])
for round in range(300):
    with staged(path) as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text(sys.argv[2])
"""
    writers = [start_python(code, tmp_path / "folder", number) for number in range(3)]
    said = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert len({(tmp_path / "folder" / name).read_text() for name in "ab"}) == 1


@pytest.mark.parametrize("backend", PARTS)
@pytest.mark.parametrize("limit", [300, 100_000, 400_000])
def test_a_limit_on_file_sizes_is_one_sentence_and_leaves_nothing(made: Made, tmp_path: Path, backend: str, limit: int) -> None:
    code = f"import openvino, onnxruntime, resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
    done = run_python(code + BUILD + "build()", made.graphs["int8"], tmp_path / "engines", backend)
    assert done.returncode == 0, done.stderr
    sentence, hint = done.stdout.strip().split(" | ")
    assert sentence.startswith(f"cannot write {tmp_path / 'engines'}") and "free some space" in hint
    assert list((tmp_path / "engines" / "fashion-vit").iterdir()) == []


@pytest.mark.parametrize("backend", PARTS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(made: Made, tmp_path: Path, backend: str) -> None:
    """On a file system of 400 KiB, mounted in a name space of its own."""
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=400k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*own, "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small file system of their own")
    python = f"{sys.executable} - {made.graphs['int8']} {tmp_path} {backend}"
    done = subprocess.run(
        [*own, "sh", "-c", f"{mount} && {python} && find {tmp_path} -type f"],
        input=BUILD + "build()", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # no file is left
    assert line.startswith(f"cannot write {tmp_path}") and "free some space" in line


def test_a_place_that_cannot_be_written_to_is_one_sentence(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(VitEdgeError, match="cannot write"):
        build_engine(made.graphs["int8"], Target(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    """`--json results`, where results/ is a folder full of other things, must not delete it."""
    from vitedge.workspace import write_json

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "precious").write_text("kept")
    with pytest.raises(VitEdgeError, match=r"cannot write .*results: Is a directory"):
        write_json(tmp_path / "results", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["results", "precious"]


def test_there_is_no_backend_of_another_name() -> None:
    with pytest.raises(VitEdgeError, match="no backend 'abacus'") as caught:
        backends.load_backend("abacus")
    assert "openvino" in str(caught.value.hint) and "onnxruntime" in str(caught.value.hint)


@pytest.mark.parametrize("name", PARTS)
def test_every_backend_offers_what_the_others_do(name: str) -> None:
    module = backends.load_backend(name)
    target = Target(backend=name, capability=GPU)
    assert module.version()[0].isdigit() and module.device(target)
    assert module.resolve(target) == target and module.runs_here(target) in (True, module.driver() != "")
    types = module.float_types(target)
    assert types and set(types) <= set(get_args(FloatType)) and "fp32" in types
    assert module.PLAN and all(Path(part).name == part for part in module.PLAN)


@pytest.mark.parametrize(("module", "extra"), [(openvino_backend, "cpu"), (onnxruntime_backend, "compile")])
def test_a_backend_that_is_not_installed_names_its_extra(module: object, extra: str) -> None:
    code = f"""
import sys
sys.modules[{module.PACKAGE!r}] = None
from vitedge.backends import load_backend
from vitedge.errors import MissingPackageError
try:
    load_backend({module.PACKAGE!r}).version()
except MissingPackageError as error:
    print(error, error.hint)
"""
    assert f"'.[{extra}]'" in run_python(code).stdout
