"""Names and checkpoints that load, and the sentence for each that does not."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.compiler.families import CROPPED, FAMILIES, MEAN, SMALL, SQUASHED, STD, save_family, write_processor
from tests.models import random_images, tiny_preprocess
from vitedge.compiler.models import load_model, load_weights
from vitedge.errors import MissingPackageError, ModelError, VitEdgeError
from vitedge.preprocess import resize
from vitedge.specs import ModelCard, Preprocess

State = dict[str, Tensor]


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)


def state(prefix: str = "") -> State:
    torch.manual_seed(0)
    return {f"{prefix}{key}": torch.randn_like(value) for key, value in Net().state_dict().items()}


def assert_loaded(module: nn.Module, expected: State | None = None) -> None:
    for key, value in (expected or state()).items():
        assert torch.equal(module.state_dict()[key], value)


# Checkpoints that fit


def test_safetensors_and_pth_files_fill_every_weight(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "net.safetensors")
    torch.save(state(), tmp_path / "net.pth")
    torch.save(state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("net.safetensors", "net.pth", "old.pt"):
        module = Net()
        load_weights(module, tmp_path / name)
        assert_loaded(module)


WRAPPINGS: dict[str, Callable[[], Any]] = {
    "state_dict": lambda: {"state_dict": state(), "epoch": 3, "optimizer": {"lr": 0.1}},
    "model": lambda: {"model": state(), "epoch": 3},
    "model_state_dict": lambda: {"epoch": 3, "model_state_dict": state()},
    "nested twice": lambda: {"model": {"state_dict": state()}},
    "DataParallel": lambda: state("module."),
    "torch.compile": lambda: state("_orig_mod."),
    "Lightning": lambda: {"state_dict": state("model.")},
    "DataParallel of a compiled module": lambda: {"model": state("module._orig_mod.")},
    "a compiled DataParallel": lambda: state("_orig_mod.module."),
    "Lightning of a compiled DataParallel": lambda: {"state_dict": state("model._orig_mod.module.")},
}


@pytest.mark.parametrize("wrapped", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_what_training_scripts_wrap_around_weights_is_taken_off(wrapped: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(wrapped(), tmp_path / "net.pth")
    module = Net()
    load_weights(module, tmp_path / "net.pth")
    assert_loaded(module)


@pytest.mark.parametrize("name", ["model", "module"])
def test_a_prefix_that_the_module_itself_has_is_kept(name: str, tmp_path: Path) -> None:
    module = nn.Module()
    module.add_module(name, Net())
    torch.save(state(f"{name}."), tmp_path / "net.pth")
    load_weights(module, tmp_path / "net.pth")
    assert_loaded(module, state(f"{name}."))


def test_half_precision_weights_are_loaded_as_fp32(tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in state().items()}, tmp_path / "net.pth")
    module = Net()
    load_weights(module, tmp_path / "net.pth")
    assert_loaded(module, {key: value.half().float() for key, value in state().items()})


# Checkpoints that do not


def refusal(checkpoint: Path) -> str:
    """The sentence, after which no weight of the module has changed."""
    module = Net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(module, checkpoint)
    assert_loaded(module, before)
    assert "\n" not in str(caught.value) and checkpoint.name in str(caught.value)
    return f"{caught.value} | {caught.value.hint}"


def test_keys_that_are_missing_and_unexpected_are_named(tmp_path: Path) -> None:
    wrong = state()
    wrong["head.weight"] = wrong.pop("second.weight")
    torch.save(wrong, tmp_path / "net.pth")
    said = refusal(tmp_path / "net.pth")
    assert "does not fit the model: 1 keys are missing (second.weight) and 1 keys are unexpected (head.weight)" in said
    torch.save({**state(), **{f"extra.{i}": torch.zeros(1) for i in range(6)}}, tmp_path / "net.pth")
    assert "6 keys are unexpected (extra.0, extra.1, extra.2, extra.3, ...)" in refusal(tmp_path / "net.pth")


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_file({**state(), "second.weight": torch.zeros(10, 4)}, tmp_path / "net.safetensors")
    assert "'second.weight' is (10, 4) in the file, (2, 4) in the model" in refusal(tmp_path / "net.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_named(bad: float, tmp_path: Path) -> None:
    torch.save({**state(), "first.bias": torch.tensor([1, 2, bad, 4])}, tmp_path / "net.pth")
    assert "the weight 'first.bias' holds NaN or infinite values" in refusal(tmp_path / "net.pth")


def weight_of(change: Callable[[Tensor], Tensor]) -> State:
    return {**state(), "first.weight": change(torch.ones(4, 3))}


OTHER_KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int8": (lambda w: w.to(torch.int8), "is int8 in the file, float32 in the model"),
    "bool": (lambda w: w.bool(), "is bool in the file, float32 in the model"),
    "int64": (lambda w: w.long(), "is int64 in the file, float32 in the model"),
    "complex": (lambda w: w.to(torch.complex64), "is complex64 in the file, float32 in the model"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "is float8_e4m3fn in the file, float32 in the model"),
    "sparse": (lambda w: w.to_sparse(), "is sparse"),
    "sparse rows": (lambda w: w.to_sparse_csr(), "is sparse"),
    "meta": (lambda w: w.to("meta"), "is on the device meta, without values"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_tensor_of_another_kind_is_named_and_never_taken_for_a_weight(kind: str, tmp_path: Path) -> None:
    change, message = OTHER_KINDS[kind]
    torch.save(weight_of(change), tmp_path / "net.pth")
    assert f"the weight 'first.weight' {message}" in refusal(tmp_path / "net.pth")


def test_a_counter_that_is_a_float_is_named_with_both_dtypes(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(2)
    torch.save({**module.state_dict(), "num_batches_tracked": torch.tensor(1.5)}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match="'num_batches_tracked' is float32 in the file, int64 in the model"):
        load_weights(module, tmp_path / "net.pth")


@pytest.mark.parametrize("key", [3, (1, 2), None], ids=str)
def test_keys_that_are_no_strings_are_one_sentence(key: Any, tmp_path: Path) -> None:
    for content in ({key: torch.zeros(1)}, {**state(), key: torch.zeros(1)}):
        torch.save(content, tmp_path / "net.pth")
        assert "holds no state dict of tensors | save model.state_dict(), whose keys are strings" in refusal(tmp_path / "net.pth")


def test_what_a_module_itself_refuses_is_one_sentence(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not\nthese")

    module = Net()
    module.register_load_state_dict_pre_hook(refuse)
    torch.save(state(), tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"net.pth cannot be loaded: not these$"):
        load_weights(module, tmp_path / "net.pth")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_none(archive: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "it ran", tmp_path / "net.pth"
    if archive:
        torch.save({**state(), "extra": Touch(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Touch(marker)}, protocol=2))
    said = refusal(path)
    assert "is refused" in said and "may run code" in said and ".safetensors" in said
    assert not marker.exists()
    torch.load(path, weights_only=False) if archive else pickle.loads(path.read_bytes())
    assert marker.exists()  # it is able to


def test_a_whole_model_pickled_is_refused(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "net.pth")
    assert "is refused" in refusal(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_a_checkpoint_cut_short_anywhere_is_one_sentence(name: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "net.pth")
    save_file(state(), tmp_path / "net.safetensors")
    whole = (tmp_path / name).read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        assert "is not a readable checkpoint: " in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG\r\n"])
def test_a_file_of_something_else_is_one_sentence(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    assert "is not a readable checkpoint: " in refusal(path)


def test_an_archive_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    assert "is not a readable checkpoint" in refusal(tmp_path / "net.pth")


def test_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(tmp_path / "net.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {"first.weight": 3}}, torch.zeros(2)], ids=str)
def test_a_checkpoint_without_weights_is_one_sentence(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"net.pth holds no state dict of tensors"):
        load_weights(Net(), tmp_path / "net.pth")


# path/file.py:factory

CODE = """
from __future__ import annotations
import dataclasses
from torch import nn
from vitedge import ModelCard, Preprocess
from neighbour import WIDTH

@dataclasses.dataclass
class Config:
    width: int = WIDTH

def make():
    import second_neighbour
    return nn.Linear(3, Config().width).half(), ModelCard("mine", "embed", Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3))

def bare():
    return nn.Linear(3, 4)

def nothing():
    return None

def swapped():
    return tuple(reversed(make()))

def broken():
    return {}["missing"]

def leaves():
    import sys
    sys.exit(0)

value = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5")
    (tmp_path / "second_neighbour.py").write_text("")
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


def test_a_factory_gives_the_module_in_evaluation_mode_and_fp32(file: Path) -> None:
    module, card = load_model(f"{file}:make")
    assert (module.out_features, card.name, module.training) == (5, "mine", False)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    assert str(file.parent) not in __import__("sys").path


def test_a_checkpoint_and_a_preprocess_file_take_the_place_of_what_the_factory_says(file: Path) -> None:
    weights = {"weight": torch.randn(5, 3), "bias": torch.randn(5)}
    save_file(weights, file.with_name("w.safetensors"))
    file.with_name("p.toml").write_text(
        'size = [32, 24]\nmean = [0.2, 0.5, 0.7]\nstd = [0.2, 0.25, 0.4]\ninterpolation = "bilinear"'
    )
    module, card = load_model(f"{file}:make", file.with_name("w.safetensors"), file.with_name("p.toml"))
    assert_loaded(module, weights)
    assert card.preprocess == tiny_preprocess() and card.name == "mine"
    module, card = load_model(f"{file}:bare", preprocess=file.with_name("p.toml"))
    assert (card.name, card.task, card.preprocess) == ("bare", "classify", tiny_preprocess())


REFUSED = {
    "missing": "mine.py has no function 'missing'",
    "value": "mine.py has no function 'value'",
    "bare": r"mine.py:bare must return \(nn.Module, ModelCard\), not Linear",
    "nothing": r"mine.py:nothing must return \(nn.Module, ModelCard\), not NoneType",
    "swapped": r"mine.py:swapped must return \(nn.Module, ModelCard\), not tuple",
    "leaves": r"mine.py fails: SystemExit: 0 \(mine.py, line \d+\)",
    "broken": r"mine.py fails: KeyError: 'missing' \(mine.py, line \d+\)",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_a_factory_that_does_not_do_is_one_sentence(factory: str, file: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED[factory]):
        load_model(f"{file}:{factory}")


BROKEN = {
    "def make(:": r"SyntaxError: .*\(mine.py, line 1\)",
    "import no_such_package": r"ModuleNotFoundError: No module named 'no_such_package' \(mine.py, line 1\)",
    "\n\n1 / 0": r"ZeroDivisionError: division by zero \(mine.py, line 3\)",
    "raise SystemExit": r"SystemExit: SystemExit \(mine.py, line 1\)",
    "raise RuntimeError('of its own')": r"RuntimeError: of its own \(mine.py, line 1\)",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_file_that_cannot_be_imported_is_one_sentence_with_the_line(code: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(VitEdgeError, match=f"mine.py fails: {BROKEN[code]}"):
        load_model(f"{tmp_path}/mine.py:make")


@pytest.mark.parametrize("name", ["resnet", "", "unknown:model", "hf:", "timm:", "model.py", "file.txt:make", ":make"])
def test_a_name_of_no_known_form_says_which_there_are(name: str) -> None:
    with pytest.raises(ModelError, match="does not name a model") as caught:
        load_model(name)
    assert "path/file.py:factory, hf:ORG/NAME, timm:NAME or torchvision:NAME" in str(caught.value.hint)


def test_no_such_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file .*gone.py"):
        load_model(f"{tmp_path}/gone.py:make")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(MissingPackageError, match=f"the package '{package}' is not installed") as caught:
        load_model(f"{package}:vit_b_16")
    assert str(caught.value.hint).endswith(f"pip install '.[{package}]'")


# hf: folders of save_pretrained

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT classifier; tests change copies."""
    return save_family("vit", tmp_path_factory.mktemp("hf") / "my-vit")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "my-vit"))


def test_a_folder_gives_weights_labels_and_a_card(folder: Path) -> None:
    module, card = load_model(f"hf:{folder}")
    expected = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert_loaded(module.model, expected.state_dict())
    assert (card.name, card.task, card.labels) == ("my-vit", "classify", tuple(f"LABEL_{i}" for i in range(7)))
    assert card.preprocess == Preprocess((32, 32), tuple(MEAN), tuple(STD), "squash", 1.0, "bicubic")


@pytest.mark.parametrize(
    ("name", "expected"), [("my model (2)", "my-model-2-"), (".hidden", "hidden"), ("größe", "gr-e"), ("中", "model")]
)
def test_a_folder_of_any_name_gives_a_name_fit_for_files(name: str, expected: str, folder: Path) -> None:
    folder = folder.rename(folder.with_name(name))
    assert load_model(f"hf:{folder}/")[1].name == expected


def test_the_current_folder_has_a_name_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_model("hf:.")[1].name == "my-vit"


def test_a_checkpoint_takes_the_place_of_the_folders_weights(folder: Path) -> None:
    tuned = transformers.AutoModelForImageClassification.from_pretrained(folder)
    for parameter in tuned.parameters():
        torch.nn.init.normal_(parameter)
    tuned.save_pretrained(folder.parent / "tuned")  # under the names that files have had for years, not those of the module
    torch.save({"model": tuned.state_dict()}, folder.parent / "tuned.pth")
    (folder / "model.safetensors").unlink()
    for checkpoint in (folder.parent / "tuned" / "model.safetensors", folder.parent / "tuned.pth"):
        module, _ = load_model(f"hf:{folder}", checkpoint)
        assert_loaded(module.model, tuned.state_dict())


def test_a_checkpoint_that_does_not_fit_the_folder_names_its_keys(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    without = {key: value for key, value in whole.items() if key != "classifier.bias"}
    save_file({**without, "classifier.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}, folder.parent / "w.safetensors")
    with pytest.raises(
        ModelError, match=r"w.safetensors does not fit the model: 1 keys are missing \(classifier.bias\)"
    ) as caught:
        load_model(f"hf:{folder}", folder.parent / "w.safetensors")
    assert "1 keys are of another shape (classifier.weight) and 1 keys are unexpected (head.bias)" in str(caught.value)
    name = next(key for key in whole if key.endswith("query.weight") or key.endswith("q_proj.weight"))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file({**whole, name: whole[name].to(dtype)}, folder.parent / "w.safetensors")
        with pytest.raises(ModelError, match=f"the weight '{name}' is {str(dtype)[6:]} in the file"):
            load_model(f"hf:{folder}", folder.parent / "w.safetensors")
    save_file({**whole, "classifier.bias": torch.full([7], torch.nan)}, folder.parent / "w.safetensors")
    with pytest.raises(ModelError, match=r"w.safetensors: the weight 'classifier.bias' holds NaN"):
        load_model(f"hf:{folder}", folder.parent / "w.safetensors")


def test_half_precision_folders_are_loaded_as_fp32(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    transformers.ViTForImageClassification(config).half().save_pretrained(tmp_path)
    write_processor(tmp_path, {"image_processor_type": "ViTImageProcessor", **SQUASHED})
    module, _ = load_model(f"hf:{tmp_path}")
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_of_two_towers_the_vision_tower_is_loaded_or_filled_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    folder = save_family(name, tmp_path / name)
    module, card = load_model(f"hf:{folder}")
    assert (card.task, card.labels) == ("embed", ())
    whole = load_file(folder / "model.safetensors")
    for key, value in module.model.state_dict().items():
        (stored,) = [v for k, v in whole.items() if k.startswith("vision") and k.endswith(key.removeprefix("vision_model."))]
        assert torch.equal(value, stored)
    save_file(module.model.state_dict(), tmp_path / "tower.safetensors")
    again, _ = load_model(f"hf:{folder}", tmp_path / "tower.safetensors")
    assert_loaded(again.model, module.model.state_dict())


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_classifier_on_a_vision_tower_is_a_classifier(name: str, tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config={**SMALL, "vocab_size": 9}, num_labels=4)
    getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(tmp_path)
    write_processor(tmp_path, {"image_processor_type": f"{name}ImageProcessor", **CROPPED})
    module, card = load_model(f"hf:{tmp_path}")
    assert (card.task, len(card.labels)) == ("classify", 4)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_a_distilled_deit_is_a_classifier(tmp_path: Path) -> None:
    config = transformers.DeiTConfig(image_size=32, patch_size=8, num_labels=4, **SMALL)
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, {"image_processor_type": "DeiTImageProcessor", **CROPPED})
    module, card = load_model(f"hf:{tmp_path}")
    image = torch.randn(2, 3, 32, 32)
    assert card.task == "classify" and torch.equal(module(image), model(image).logits)


def test_without_weights_of_a_pooler_the_first_token_is_the_embedding(tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()  # as DINO's are on the hub
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, {"image_processor_type": "ViTImageProcessor", **SQUASHED})
    image = torch.randn(2, 3, 32, 32)
    module, _ = load_model(f"hf:{tmp_path}")
    assert torch.equal(module(image), model(image).last_hidden_state[:, 0])


def test_weights_that_the_folder_lacks_are_named_and_never_made_up(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in whole.items() if k != "classifier.weight"}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"hf:.* does not fit the model: 1 keys are missing \(classifier.weight\)"):
        load_model(f"hf:{folder}")
    save_file({**whole, "classifier.weight": torch.zeros(9, 32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 keys are of another shape \(classifier.weight\)"):
        load_model(f"hf:{folder}")


def damage(name: str, content: bytes | None) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (cut, "cannot load hf:.*my-vit: "),
    "no weights": (damage("model.safetensors", None), "cannot load hf:.*my-vit: .*no file named model.safetensors"),
    "no config": (damage("config.json", None), "cannot load hf:.*my-vit: "),
    "a config that is no JSON": (damage("config.json", b"{"), "cannot load hf:.*not a valid JSON"),
    "a config of an unknown model": (damage("config.json", b'{"model_type": "resnext9000"}'), "cannot load hf:.*"),
    "no image processor": (damage("preprocessor_config.json", None), "the config of hf:.*my-vit does not say how its images"),
    "an image processor that is no JSON": (damage("preprocessor_config.json", b"{"), "does not say .*not a valid JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_one_sentence(case: str, folder: Path) -> None:
    change, message = DAMAGED[case]
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(f"hf:{folder}")
    assert "\n" not in str(caught.value) and caught.value.hint


def test_no_such_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load hf:.*gone: "):
        load_model(f"hf:{tmp_path}/gone")


def test_code_in_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model", "AutoImageProcessor": "own.Processor"}
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(folder / 'it ran')!r}).touch()\n")
    for kind in ("my_own_model", config["model_type"]):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": own}))
        if kind == "my_own_model":
            with pytest.raises(ModelError, match=r"cannot load hf:.*custom code"):
                load_model(f"hf:{folder}")
        else:
            load_model(f"hf:{folder}")  # the class of that name in transformers
        assert not (folder / "it ran").exists()


# Image processors

BICUBIC, BILINEAR = 3, 2
PROCESSORS: dict[str, tuple[dict[str, Any], Preprocess]] = {
    "squash": (
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 24}, "resample": BILINEAR},
        Preprocess((32, 24), tuple(MEAN), tuple(STD), "squash", 1.0, "bilinear"),
    ),
    "squash and crop": (
        {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": 40, "width": 40},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
        },
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "squash", 0.8, "bicubic"),
    ),
    "shorter side and crop": (
        {"image_processor_type": "BitImageProcessor", **CROPPED, "size": {"shortest_edge": 40}},
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "crop", 0.8, "bicubic"),
    ),
    # as openai/clip-vit-base-patch32, facebook/deit-base-patch16-224, microsoft/swin-tiny and beit-base have it on the hub
    "CLIP of 2021": (
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 32,
            "crop_size": 32,
            "do_center_crop": True,
            "do_rescale": None,
        }
        | {"rescale_factor": None},
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "crop", 1.0, "bicubic"),
    ),
    "DeiT of 2021": (
        {
            "feature_extractor_type": "DeiTFeatureExtractor",
            "size": 40,
            "crop_size": 32,
            "do_center_crop": True,
            "do_rescale": None,
        }
        | {"rescale_factor": None},
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "squash", 0.8, "bicubic"),
    ),
    "Swin of 2022": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_rescale": None, "rescale_factor": None},
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "squash", 1.0, "bicubic"),
    ),
    "BEiT of 2021": (
        {
            "feature_extractor_type": "BeitFeatureExtractor",
            "size": 32,
            "crop_size": 32,
            "do_center_crop": False,
            "resample": BILINEAR,
        }
        | {"do_rescale": None, "rescale_factor": None},
        Preprocess((32, 32), tuple(MEAN), tuple(STD), "squash", 1.0, "bilinear"),
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_an_image_processor_is_read_as_transformers_reads_it(case: str, folder: Path) -> None:
    settings, expected = PROCESSORS[case]
    write_processor(folder, settings)
    _, card = load_model(f"hf:{folder}")
    assert card.preprocess == expected
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for height, width in ((96, 64), (64, 96), (64, 64), (33, 198)):  # an odd rest is cut off as torchvision does it
        y, x = np.mgrid[0:height, 0:width] * 255
        image = np.stack([y // height, x // width, 255 - y // height], axis=-1).astype(np.uint8)
        theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        ours = (resize(image, card.preprocess) / 255 - np.array(MEAN)) / np.array(STD)
        levels = np.abs(theirs.transpose(1, 2, 0) - ours) * np.array(STD) * 255
        assert levels.max() < 1.5, f"{(height, width)}: {levels.max()}"


UNUSUAL: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"size": None}, "'size' is missing"),
    "no mean": ({"image_mean": None}, "'image_mean' is missing"),
    "no deviation": ({"image_std": None}, "'image_std' is missing"),
    "no filter": ({"resample": None}, "'resample' is missing"),
    "no crop size": ({**CROPPED, "image_processor_type": "CLIPImageProcessor", "crop_size": None}, "'crop_size' is missing"),
    "nearest neighbour": ({"resample": 0}, "the resample filter 0 is neither"),
    "Lanczos": ({"resample": 1}, "the resample filter 1 is neither"),
    "the shorter side without crop": (
        {"size": {"shortest_edge": 32}, "image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
        "it is not resize, center crop",
    ),
    "the longer side": ({"size": {"longest_edge": 32}}, "does not say how"),
    "no division by 255": ({"do_rescale": False}, "it is not resize, center crop"),
    "another division": ({"rescale_factor": 1 / 127.5}, "it is not resize, center crop"),
    "no resize": ({"do_resize": False}, "it is not resize, center crop"),
    "no normalisation": ({"do_normalize": False}, "it is not resize, center crop"),
    "BGR": ({"do_flip_channel_order": True}, "it is not resize, center crop"),
    "padding": ({"do_pad": True}, "it is not resize, center crop"),
    "an oblong crop of the shorter side": (
        {**CROPPED, "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 32, "width": 24}},
        r"the crop \(32, 24\) has another aspect ratio than the \(36, 36\)",
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_image_processor_that_cannot_be_reproduced_is_refused_and_never_guessed(case: str, folder: Path) -> None:
    settings, message = UNUSUAL[case]
    write_processor(folder, {"image_processor_type": "ViTImageProcessor", **SQUASHED, **settings})
    with pytest.raises(VitEdgeError, match=message) as caught:
        load_model(f"hf:{folder}")
    assert "\n" not in str(caught.value) and "--preprocess FILE.toml" in str(caught.value.hint)


def test_a_preprocess_file_takes_the_place_of_the_image_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    (folder / "p.toml").write_text("size = [32, 32]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]")
    module, card = load_model(f"hf:{folder}", preprocess=folder / "p.toml")
    assert isinstance(card, ModelCard) and card.preprocess == Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert module(torch.from_numpy(random_images(2, card.preprocess)).permute(0, 3, 1, 2).float()).shape == (2, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_its_processor(name: str, tmp_path: Path) -> None:
    _, card = load_model(f"hf:{save_family(name, tmp_path / name)}")
    cropped = FAMILIES[name].sizes is CROPPED
    assert card.preprocess.size == (32, 32) and card.preprocess.crop_pct == (32 / 36 if cropped else 1)
    assert card.task == FAMILIES[name].task
