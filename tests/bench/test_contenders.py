"""What names mean, and that what they open answers like the engine of the same model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engines import CHECKPOINT, MODEL, Made, sqnr_db
from vitedge.bench import contenders
from vitedge.bench.contenders import Contender, Setting, open_contenders, split_runtime
from vitedge.errors import EngineError, MissingPackageError, VitEdgeError
from vitedge.images import decode, list_images

pytest.importorskip("torch")
pytest.importorskip("openvino")


def names_of(made: Made) -> dict[str, str]:
    """One of each kind, by the name that it gets."""
    return {
        "fashion-vit/fp32@onnxruntime": str(made.engines["onnxruntime", "fp32"]),
        "fashion-vit/int8@openvino": str(made.engines["openvino", "int8"]),
        "fashion-vit/int8@onnxruntime": str(made.graphs["int8"]),
        "fashion-vit/fp32@openvino": f"{made.graphs['fp32']}@openvino",
        "fashion-vit/fp32@torch": MODEL,
    }


def answers(contender: Contender, made: Made, count: int = 8) -> np.ndarray:
    for row, file in enumerate(list_images(made.images)[:count]):
        contender.write(row, decode(file))
    return contender.run(count).copy()


def test_all_kinds_answer_like_the_reference_and_close(made: Made) -> None:
    wanted = names_of(made)
    with open_contenders(list(wanted.values()), CHECKPOINT) as found:
        assert [one.name for one in found] == list(wanted)
        reference, *others = [answers(one, made) for one in found]
        for one, other in zip(found[1:], others, strict=True):
            assert other.shape == reference.shape == (8, 10)
            assert sqnr_db(reference, other) > (25 if "int8" in one.name else 50), one.name
            assert one.card.name == one.facts.model == "fashion-vit" and one.facts.image == (28, 28)
            assert one.facts.size_mib > 0.3 and one.facts.version and one.facts.device, one.facts
        built = found[3]
        assert built.manifest is not None and built.folder is not None and built.folder.is_dir()
        assert built.ready_made.given == str(built.folder) and found[1].ready_made == found[1].origin
    assert not built.folder.exists(), "it was built for this run alone"


def test_threads_streams_and_forks_give_the_same_answers(made: Made) -> None:
    names = names_of(made)
    kinds = ("int8@openvino", "int8@onnxruntime", "fp32@torch")
    with open_contenders([names[f"fashion-vit/{kind}"] for kind in kinds], CHECKPOINT) as found:
        for one in found:
            expected = answers(one, made)
            one.open(Setting(threads=1, streams=2))
            forked = one.fork()
            one.input[:8] = forked.input[:8] = rows(one, made)
            assert sqnr_db(expected, one.run(8)) > 50 and sqnr_db(expected, np.array(forked.run(8))) > 50
            forked.close()
            one.close()
            one.close()
            assert answers(one, made).shape == (8, 10), "it opens again where it is used again"


def rows(contender: Contender, made: Made) -> np.ndarray:
    answers(contender, made)
    return np.array(contender.input[:8])


def test_threads_reach_the_runtime(made: Made) -> None:
    import torch

    names = names_of(made)
    with open_contenders([names["fashion-vit/int8@openvino"], MODEL]) as (engine, model):
        engine.open(Setting(threads=1))
        assert engine._session.manifest.target.threads == 1  # type: ignore[union-attr]
        model.open(Setting(threads=1))
        assert torch.get_num_threads() == 1
        model.open(Setting())
        assert torch.get_num_threads() >= 1


def opened(*names: object) -> Sequence[Contender]:
    with open_contenders(list(map(str, names))) as found:
        return found


def test_one_thing_given_twice_is_refused(made: Made, tmp_path: Path) -> None:
    engine = made.engines["openvino", "int8"]
    link = tmp_path / "link"
    link.symlink_to(engine)
    for names in ([engine, engine], [engine, link], [MODEL, f"{MODEL}@torch"]):
        with pytest.raises(VitEdgeError, match="is given twice") as caught:
            opened(*names)
        assert caught.value.hint
    graph = made.graphs["int8"]
    assert len({one.name for one in opened(graph, f"{graph}@openvino", MODEL, f"{MODEL}@torch.compile")}) == 4


def test_those_that_would_be_called_alike_are_told_apart(made: Made, tmp_path: Path) -> None:
    engine = made.engines["openvino", "int8"]
    twin = Path(shutil.copytree(engine, tmp_path / "int8-of-yesterday"))
    names = [one.name for one in opened(engine, twin, made.engines["openvino", "fp32"])]
    assert names == [f"fashion-vit/{engine.name}@openvino", "fashion-vit/int8-of-yesterday@openvino", "fashion-vit/fp32@openvino"]
    same = Path(shutil.copytree(engine, tmp_path / "other" / "int8-of-yesterday"))
    assert len({one.name for one in opened(twin, same)}) == 2


def test_what_means_nothing_is_said_with_what_would(made: Made, tmp_path: Path) -> None:
    engine, graph = made.engines["openvino", "int8"], made.graphs["int8"]
    for name, sentence in (
        (f"{graph}@caffe", "there is no runtime 'caffe'"),
        (f"{engine}@onnxruntime", "is an engine of openvino, and runs on nothing else"),
        (f"{graph}@torch", "torch does not run the ONNX file"),
        (f"{MODEL}@openvino", "is a torch model, which openvino does not run"),
        (str(tmp_path), "is not an engine"),
        (str(tmp_path / "none.onnx"), "none.onnx does not exist"),
        (f"{MODEL}x", "has no function 'vitx'"),
    ):
        with pytest.raises(VitEdgeError, match=sentence):
            opened(name)
    with (
        pytest.raises(VitEdgeError, match=r"--checkpoint x.pth is for a torch model, and none is given"),
        open_contenders([str(graph)], Path("x.pth")),
    ):
        pass


def test_an_at_in_a_path_that_exists_is_no_runtime(tmp_path: Path) -> None:
    path = tmp_path / "vit@home"
    path.mkdir()
    assert split_runtime(str(path)) == (str(path), "")
    assert split_runtime("a@b.onnx@openvino") == ("a@b.onnx", "openvino")


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match="'tensorrt' is not installed") as caught:
        opened(f"{made.graphs['int8']}@tensorrt")
    assert "[gpu]" in str(caught.value.hint)
    monkeypatch.setattr(contenders, "_has_compiler", lambda: False)
    with pytest.raises(VitEdgeError, match="came in a bundle"):
        opened(MODEL)


def test_a_damaged_engine_is_found_where_it_is_first_used(made: Made, tmp_path: Path) -> None:
    folder = made.copy("openvino", "int8", tmp_path)
    (folder / "model.bin").write_bytes(b"")
    with open_contenders([str(folder)]) as (one,), pytest.raises(EngineError, match="damaged"):
        one.run(1)
