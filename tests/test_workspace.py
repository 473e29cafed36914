"""Where things are found, and files that are whole or absent whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import ROOT, run_python, start_python
from vitedge.errors import ModelError, VitEdgeError
from vitedge.specs import Recipe, Target
from vitedge.workspace import (
    content_key,
    find_engines,
    find_graph,
    find_root,
    init_workspace,
    load_recipe,
    load_target,
    read_json,
    read_toml,
    sha256,
    staged,
    write_file,
    write_json,
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace, and the current folder."""
    (tmp_path / "calibration" / "recipes").mkdir(parents=True)
    (tmp_path / "engines" / "targets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Finding


def test_the_root_is_the_nearest_folder_with_both_parts(root: Path) -> None:
    deep = root / "a" / "b"
    deep.mkdir(parents=True)
    assert find_root(deep) == find_root(root) == find_root() == root
    (root / "a" / "calibration").mkdir()
    assert find_root(deep) == root  # engines/ is missing there
    (root / "a" / "engines").mkdir()
    assert find_root(deep) == root / "a"


def test_without_a_workspace_the_folder_itself_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_root(tmp_path) != tmp_path:
        pytest.skip("the temporary folder lies in a workspace")
    monkeypatch.chdir(tmp_path)
    assert find_root() == tmp_path


def test_a_new_workspace_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "calibration" / "recipes").mkdir(parents=True)
    mine = tmp_path / "calibration" / "recipes" / "int8.toml"
    mine.write_text("images = 99")
    written = init_workspace(tmp_path)
    assert written.pop(mine) is False and all(written.values()) and mine.read_text() == "images = 99"
    assert find_root(tmp_path) == tmp_path
    assert not any(init_workspace(tmp_path).values())


def test_an_engine_is_found_by_model_and_variant_the_newest_first(root: Path) -> None:
    for age, name in enumerate(["int8-aaa", "int8-bbb", "int8-percentile-ccc", "fp32-ddd", ".int8-eee"]):
        manifest = root / "engines" / "vit" / name / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (1000 + age, 1000 + age))
    assert [folder.name for folder in find_engines(Path("vit/int8"))] == ["int8-bbb", "int8-aaa"]
    assert [folder.name for folder in find_engines(Path("vit/int8-percentile"))] == ["int8-percentile-ccc"]
    assert find_engines(Path("engines/vit/int8-aaa")) == [Path("engines/vit/int8-aaa")]
    with pytest.raises(VitEdgeError, match=r"there is no engine vit/bf16") as caught:
        find_engines(Path("vit/bf16"))
    assert caught.value.hint == "there are vit/fp32, vit/int8, vit/int8-percentile"


def test_an_onnx_file_is_found_by_model_and_variant_and_is_the_newest(root: Path) -> None:
    with pytest.raises(VitEdgeError, match=r"there is no ONNX file vit/int8.onnx") as caught:
        find_graph(Path("vit/int8.onnx"))
    assert caught.value.hint == "`vitedge make` and `vitedge export` make them"
    (root / "engines" / "vit").mkdir(parents=True)
    for age, name in enumerate(["int8-aaa.onnx", "int8-bbb.onnx", "int8-percentile-ccc.onnx", ".int8-ddd.1.partial.onnx"]):
        path = root / "engines" / "vit" / name
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert find_graph(Path("vit/int8.onnx")) == root / "engines" / "vit" / "int8-bbb.onnx"
    assert find_graph(Path("vit/int8-percentile.onnx")).name == "int8-percentile-ccc.onnx"
    assert find_graph(path) == path and find_graph(Path("int8.onnx")) == Path("int8.onnx")
    with pytest.raises(VitEdgeError, match=r"there is no ONNX file vit/fp32.onnx") as caught:
        find_graph(Path("vit/fp32.onnx"))
    assert caught.value.hint == "there are vit/int8-percentile.onnx, vit/int8.onnx"


# Recipes and targets


def test_a_recipe_is_a_file_of_the_workspace_or_any_file_or_built_in(root: Path) -> None:
    assert load_recipe("int8") == Recipe() and load_recipe("bf16") == Recipe("bf16", "none", float_type="bf16")
    (root / "calibration" / "recipes" / "careful.toml").write_text('method = "percentile"\nskip = ["head"]')
    assert load_recipe("careful") == Recipe("careful", "percentile", skip=("head",))
    (root / "other.toml").write_text("images = 32")
    assert load_recipe("other.toml") == load_recipe(str(root / "other.toml")) == Recipe("other", images=32)
    (root / "calibration" / "recipes" / "int8.toml").write_text("images = 64")
    assert load_recipe("int8").images == 64  # the workspace's own comes first


def test_a_target_is_a_file_of_the_workspace_or_built_in(root: Path) -> None:
    assert load_target("cpu") == Target()
    (root / "engines" / "targets" / "pi.toml").write_text('backend = "onnxruntime"\nbatch = [1, 1, 4]\nthreads = 3')
    assert load_target("pi") == Target("pi", "onnxruntime", (1, 1, 4), 3)


def test_a_target_for_gpus_without_a_backend_is_refused(root: Path) -> None:
    path = root / "engines" / "targets" / "box.toml"
    path.write_text('capability = "8.6"\nrefit = true')
    for name in ("box", str(path)):
        with pytest.raises(VitEdgeError, match=r"box\.toml says capability, refit, which are for GPUs, and no backend") as caught:
            load_target(name)
        assert 'backend = "tensorrt"' in str(caught.value.hint)
    assert load_target("box", "tensorrt").backend == "tensorrt"


def test_a_target_names_its_file_in_what_is_wrong_with_it(root: Path) -> None:
    (root / "my target.toml").write_text('backend = "tensorrt"')
    with pytest.raises(VitEdgeError, match=r"my target\.toml") as caught:
        load_target("my target.toml")
    assert "rename it to my-target.toml" in str(caught.value.hint)
    (root / "my target.toml").write_text('name = "mine"')
    assert load_target("my target.toml").name == "mine"
    (root / "engines" / "targets" / "box.toml").write_text("capability = 8.6")
    with pytest.raises(VitEdgeError, match=r'box\.toml: Target\.capability must be str, not 8\.6: put it in quotes, "8\.6"'):
        load_target("box")


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(root: Path) -> None:
    (root / "calibration" / "recipes" / "careful.toml").touch()
    for name in ("int4", "gone.toml", "../int8"):
        with pytest.raises(VitEdgeError, match=f"there is no recipe '{name}'") as caught:
            load_recipe(name)
        known = "bf16, careful, fp16, int8, int8-attention, int8-fast, int8-mixed"
        assert caught.value.hint == f"known: {known}; or give the path of a .toml file"
    with pytest.raises(VitEdgeError, match="there is no target 'gpu'"):
        load_target("gpu")


BAD_TOML = {
    "method = max": r"cannot read .*bad.toml: Invalid value \(at line 1, column 10\)",
    "images = 3\nimages = 4\n\n": r"cannot read .*bad.toml: Cannot overwrite a value \(at line 2",
    "percentil = 99.9": "bad.toml: Recipe has no key 'percentil'",
    'method = "median"': "Recipe.method must be one of",
    "percentile = nan": "percentile must be in",
    "skip = 'head'": "Recipe.skip must be a list",
}


@pytest.mark.parametrize("text", BAD_TOML)
def test_a_recipe_that_is_wrong_says_what_and_where(text: str, root: Path) -> None:
    (root / "calibration" / "recipes" / "bad.toml").write_text(text)
    with pytest.raises(VitEdgeError, match=BAD_TOML[text]):
        load_recipe("bad")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b"[[[[", b'a = "\\u00"'])
def test_a_damaged_toml_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_bytes(content)
    with pytest.raises(VitEdgeError, match=r"^cannot read .*f.toml: \S") as caught:
        read_toml(tmp_path / "f.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1}}', b"nul"])
def test_a_damaged_json_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(VitEdgeError, match=r"^cannot read .*f.json: \S"):
        read_json(tmp_path / "f.json")


@pytest.mark.parametrize("read", [read_toml, read_json, sha256])
def test_a_missing_file_and_a_folder_are_one_sentence(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(VitEdgeError, match=r"cannot read .*gone: .*No such file"):
        read(tmp_path / "gone")
    with pytest.raises(VitEdgeError, match=r"cannot read .*: .*[Ii]s a directory"):
        read(tmp_path)


# Keys


def test_a_hash_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "f").write_bytes(bytes(range(256)) * 10000)  # of more than one block
    done = subprocess.run(["sha256sum", tmp_path / "f"], capture_output=True, text=True, check=True)
    assert sha256(tmp_path / "f") == done.stdout.split()[0]


def test_a_key_changes_with_its_parts_and_not_with_their_order() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1}) != content_key({"a": 1, "b": 3})
    assert content_key("ab", "c") != content_key("a", "bc")
    assert len(content_key()) == 12 and int(content_key(), 16) >= 0


# Writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_with_their_folders_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "f.json"
    write_json(path, {"x": [1, 2]})
    assert read_json(path) == {"x": [1, 2]}
    write_file(path, "é")
    assert path.read_bytes() == "é".encode()
    write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(path.parent) == ["f.json"]


@pytest.mark.parametrize("error", [ModelError("of its own"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_in_the_middle_keeps_the_old_file_and_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    write_file(path, "old")

    def fail() -> None:
        with staged(path) as temporary:
            assert temporary.suffix == ".onnx" and temporary.parent == tmp_path
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert path.read_text() == "old" and names(tmp_path) == ["f.onnx"]


def fill(folder: Path, *files: str) -> None:
    folder.mkdir()
    for name in files:
        (folder / name).write_text(name)


def test_a_folder_is_staged_and_replaced_as_a_whole(tmp_path: Path) -> None:
    engine = tmp_path / "int8-0.5"
    for files in (["model.bin", "manifest.json"], ["plan", "labels.txt"], []):
        with staged(engine) as temporary:
            fill(temporary, *files)
        assert names(engine) == sorted(files) and names(tmp_path) == ["int8-0.5"]


def test_a_failure_in_the_middle_keeps_the_old_folder(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    fill(engine, "model.bin")

    def fail() -> None:
        with staged(engine) as temporary:
            fill(temporary, "half")
            raise ModelError("of its own")

    with pytest.raises(ModelError, match="of its own"):
        fail()
    assert names(engine) == ["model.bin"] and names(tmp_path) == ["engine"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_what_was_there(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    fill(engine, "model.bin")
    with pytest.raises(VitEdgeError, match=r"cannot write .*engine: No such file"), staged(engine):
        pass
    assert names(engine) == ["model.bin"] and names(tmp_path) == ["engine"]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "engine", "model.bin")
    with pytest.raises(VitEdgeError, match=r"cannot write .*engine: Is a directory"):
        write_file(tmp_path / "engine", "text")
    assert names(tmp_path / "engine") == ["model.bin"] and names(tmp_path) == ["engine"]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "file")
    write_file(link, "new")
    assert link.is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, "all")
    assert os.read(reader, 10) == b"all" and pipe.is_fifo()
    os.close(reader)


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VitEdgeError, match=r"^cannot write .*file/f.txt: (Not a directory|File exists)$") as caught:
        write_file(tmp_path / "file" / "f.txt", "text")
    assert caught.value.hint is None
    with pytest.raises(VitEdgeError, match=r"cannot write .*: File name too long"):
        write_file(tmp_path / ("x" * 300), "text")
    assert names(tmp_path) == ["file"]


# A full disk

WRITE = """
import sys
from pathlib import Path
from vitedge.errors import VitEdgeError
from vitedge.workspace import staged, write_file
path, size = Path(sys.argv[1]), int(sys.argv[2])
try:
    if sys.argv[3] == "file":
        write_file(path, bytes(size))
    else:
        with staged(path) as folder:
            folder.mkdir()
            (folder / "plan").write_bytes(bytes(size))
    print("written")
except VitEdgeError as error:
    print(error, error.hint, sep="|")
print(*sorted(p.name for p in path.parent.iterdir()), sep=",")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_one_sentence_and_keeps_the_old_content(kind: str, tmp_path: Path) -> None:
    """On a real file system of 256 KiB, mounted for the child process alone."""
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting needs a user namespace; the limit on file sizes is tested all the same")
    small, large = (f"{sys.executable} -c '{WRITE}' {tmp_path}/engine {size} {kind}" for size in (50_000, 400_000))
    show = f"wc -c < {tmp_path}/engine" if kind == "file" else f"wc -c < {tmp_path}/engine/plan"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {small} && {large} && {show} && {small}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "written",
        "engine",
        f"cannot write {tmp_path}/engine: No space left on device|"
        "free some space; nothing that was there before has been touched",
        "engine",
        "50000",
        "written",
        "engine",
    ]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_that_grows_too_large_is_one_sentence_and_keeps_the_old_content(kind: str, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    assert run_python(WRITE, tmp_path / "engine", 50_000, kind).stdout == "written\nengine\n"
    done = run_python(f"{limit}\n{WRITE}", tmp_path / "engine", 400_000, kind)
    message, left = done.stdout.splitlines()
    assert message.startswith(f"cannot write {tmp_path}/engine: File too large|free some space")
    assert left == "engine" and done.stderr == ""
    assert (tmp_path / "engine" if kind == "file" else tmp_path / "engine" / "plan").stat().st_size == 50_000


# A process that is killed

HALF = """
import sys
from pathlib import Path
from vitedge.workspace import staged
with staged(Path(sys.argv[1])) as temporary:
    if sys.argv[2] == "folder":
        temporary.mkdir()
        (temporary / "plan").write_text("half")
    else:
        temporary.write_text("half")
    print("half", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("there", [False, True], ids=["anew", "over old content"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_half_way_does_no_harm(kind: str, there: bool, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    if there:
        fill(path, "old") if kind == "folder" else path.write_text("old")
    process = start_python(HALF, path, kind)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.exists() == there  # nothing, or all of the old content, under the final name
    if there:
        assert (names(path) if kind == "folder" else [path.read_text()]) == ["old"]
    assert len(names(tmp_path)) == 1 + there
    for leftover in tmp_path.glob(".engine*"):
        os.utime(leftover, (0, 0))  # as if it had lain there for long
    with staged(path) as temporary:
        fill(temporary, "new") if kind == "folder" else temporary.write_text("new")
    assert (names(path) if kind == "folder" else [path.read_text()]) == ["new"]
    assert names(tmp_path) == ["engine"]  # what was left behind is gone


def test_what_a_killed_process_of_the_same_number_moved_aside_does_no_harm(tmp_path: Path) -> None:
    fill(tmp_path / "engine", "old")
    fill(tmp_path / f".engine.{os.getpid()}.old", "older")  # in a container, every run may have the same number
    fill(tmp_path / f".engine.{os.getpid()}.partial", "half")
    with staged(tmp_path / "engine") as temporary:
        fill(temporary, "new")
    assert names(tmp_path / "engine") == ["new"] and names(tmp_path) == ["engine"]


def test_what_was_moved_aside_long_ago_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / ".int8-0.5.1.old", "older")
    os.utime(tmp_path / ".int8-0.5.1.old", (0, 0))
    with staged(tmp_path / "int8-0.5") as temporary:
        fill(temporary, "new")
    assert names(tmp_path) == ["int8-0.5"]


def test_what_a_running_process_writes_is_left_to_it(tmp_path: Path) -> None:
    process = start_python(HALF, tmp_path / "f.txt", "file")
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    write_file(tmp_path / "f.txt", "first")
    assert (tmp_path / "f.txt").read_text() == "first" and len(names(tmp_path)) == 2
    process.communicate("go on\n")
    assert process.returncode == 0
    assert (tmp_path / "f.txt").read_text() == "half" and names(tmp_path) == ["f.txt"]  # the last one wins


def test_readers_see_the_old_folder_or_the_new_one_while_many_write(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from vitedge.workspace import staged
for turn in range(40):
    with staged(Path(sys.argv[1])) as folder:
        folder.mkdir()
        for part in ("a", "b"):
            (folder / part).write_text(f"{sys.argv[2]} {turn}")
"""
    writers = [start_python(code, tmp_path / "engine", number) for number in range(3)]
    assert [writer.communicate()[1] for writer in writers] == [""] * 3
    assert (tmp_path / "engine" / "a").read_text() == (tmp_path / "engine" / "b").read_text()
    assert names(tmp_path) == ["engine"]
