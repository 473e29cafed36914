"""A name or a file in, a torch module and its ModelCard out.

    path/file.py:factory    any module; the factory returns (module, ModelCard)
    hf:ORG/NAME             Hugging Face transformers, or a local folder written by save_pretrained
    timm:NAME               PyTorch Image Models
    torchvision:NAME        torchvision

How images are prepared is read from the model's own config and never guessed: where a config does not say, that is an
error which asks for a --preprocess file. Knows nothing of ONNX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitedge.errors import ModelError, VitEdgeError, first_line, import_package
from vitedge.specs import Interpolation, ModelCard, Preprocess, Resize
from vitedge.workspace import read_spec

PILLOW_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
NESTED = ("state_dict", "model_state_dict", "model", "module", "net")  # where training scripts put the weights
WRAPPED = ("module.", "_orig_mod.", "model.")  # prefixes of DataParallel, torch.compile and Lightning
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # those of 8 bits mean nothing without their scales
BYTES = (torch.int8, torch.uint8, torch.bool)


class Only(nn.Module):
    """Calls `model` on images and keeps the one output that `pick` chooses, since an engine has one answer."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.pick = pick

    def forward(self, images: Tensor) -> Tensor:
        """float32[B, C, H, W] -> the chosen output."""
        return self.pick(self.model(images))


def load_model(name: str, checkpoint: Path | None = None, preprocess: Path | None = None) -> tuple[nn.Module, ModelCard]:
    """The module in evaluation mode with its weights, and its card.

    checkpoint: .safetensors, or .pth/.pt/.bin read with weights_only=True; its keys must fit exactly.
    preprocess: a TOML file with the keys of Preprocess, in place of what the model's config says.
    """
    given = read_spec(Preprocess, preprocess) if preprocess else None
    kind, _, rest = name.partition(":")
    loaders = {"hf": _from_transformers, "timm": _from_timm, "torchvision": _from_torchvision}
    if kind in loaders and rest:
        module, card = loaders[kind](rest, checkpoint, given)
    elif ".py:" in name:
        module, card = _from_file(name, given)
    else:
        hint = "give path/file.py:factory, hf:ORG/NAME, timm:NAME or torchvision:NAME; `vitedge models` lists examples"
        raise ModelError(f"{name!r} does not name a model", hint=hint)
    module = module.float()  # transformers keeps a checkpoint of half precision as it is
    if checkpoint is not None and kind != "hf":
        load_weights(module, checkpoint)
    return module.eval().requires_grad_(False), card


def load_weights(module: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint into `module`; every key and every shape must fit, or a ModelError names those that do not."""
    wanted = module.state_dict()
    state = _read_state(checkpoint, wanted)
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    _check_fit(str(checkpoint), missing, [], unexpected)
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(wanted[key].shape)} in the model"
            raise ModelError(f"{checkpoint} does not fit the model: {key!r} is {shapes}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # a hook or a parameter of the module's own kind
        raise ModelError(f"{checkpoint} cannot be loaded: {' '.join(str(error).split())}") from error


def _from_file(name: str, given: Preprocess | None) -> tuple[nn.Module, ModelCard]:
    """path/file.py:factory, where factory() returns (module, ModelCard), or a module alone beside a --preprocess file."""
    file, _, factory = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {file}", hint="MODEL is path/file.py:factory")
    with _importing(path) as imported:
        make = getattr(imported, factory, None)
        if not callable(make):
            raise ModelError(f"{file} has no function {factory!r}")
        made = make()
    module, card = made if isinstance(made, tuple) else (made, None)
    if card is None and given is not None:
        card = ModelCard(factory, "classify", given)
    if not isinstance(module, nn.Module) or not isinstance(card, ModelCard):
        raise ModelError(
            f"{name} must return (nn.Module, ModelCard), not {type(made).__name__}",
            hint="see examples/fashion_mnist/model.py, or pass --preprocess FILE.toml with size, mean, std",
        )
    return module, dataclasses.replace(card, preprocess=given or card.preprocess)


def _from_transformers(name: str, checkpoint: Path | None, given: Preprocess | None) -> tuple[nn.Module, ModelCard]:
    transformers = import_package("transformers", "hf")
    with _one_sentence(f"cannot load hf:{name}", "check the name, or give a folder from save_pretrained"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        classify = any("ForImageClassification" in n for n in config.architectures or [])
        spec = given or _hf_preprocess(_hf_processor(transformers, name), name)
        if classify:
            auto = transformers.AutoModelForImageClassification
        else:
            config = getattr(config, "vision_config", config)  # the vision tower of CLIP and SigLIP
            auto = _tower(transformers, config)
        module, pooled = _hf_weights(auto, name, config, checkpoint)
    short = _card_name(name)
    if classify:
        labels = tuple(config.id2label[i] for i in sorted(config.id2label))
        return Only(module, lambda out: out.logits), ModelCard(short, "classify", spec, labels=labels)
    return Only(module, _embedding if pooled else _first_token), ModelCard(short, "embed", spec)


def _hf_weights(auto: Any, name: str, config: Any, checkpoint: Path | None) -> tuple[nn.Module, bool]:
    """The module with its weights, and whether those of its pooler, if it has one, are among them: DINO's are not.

    Other weights that are missing or of another shape are a ModelError: transformers would make them up.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if checkpoint is None:
        module, report = auto.from_pretrained(name, trust_remote_code=False, **options)
    else:  # by transformers too, which renames the keys of files that it wrote itself
        blank = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
        state = _read_state(checkpoint, blank.state_dict())
        module, report = type(blank).from_pretrained(None, config=config, state_dict=state, **options)
    unpooled = {key for key in report["missing_keys"] if "pooler." in key}
    missing = set(report["missing_keys"]) - unpooled
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    if missing or mismatched:
        _check_fit(str(checkpoint or f"hf:{name}"), missing, mismatched, report["unexpected_keys"])
    return module, not unpooled


def _tower(transformers: ModuleType, config: Any) -> Any:
    """The class that loads a vision tower alone out of a two-tower checkpoint, else AutoModel."""
    towers = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
    return getattr(transformers, towers.get(config.model_type, "AutoModel"))


def _embedding(output: Any) -> Tensor:
    """One vector an image: the pooled output, or the first token where a model has no pooler."""
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    return _first_token(output) if pooled is None else pooled


def _first_token(output: Any) -> Tensor:
    token: Tensor = output.last_hidden_state[:, 0]
    return token


def _hf_processor(transformers: ModuleType, name: str) -> Mapping[str, Any]:
    """The image processor's settings; what differs from model to model must be in its config, the rest its class knows."""
    try:
        written = transformers.ImageProcessingMixin.get_image_processor_dict(name)[0]
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            settings: Mapping[str, Any] = processor.to_dict()
        except ImportError:  # a class that exists for torchvision alone; those write all of their settings
            settings = written
    except (OSError, ValueError) as error:
        raise _cannot_prepare(f"hf:{name}", first_line(error)) from error
    needed = ["size", "resample", "image_mean", "image_std", *(["crop_size"] if settings.get("do_center_crop") else [])]
    missing = [key for key in needed if written.get(key) is None]
    if missing:
        raise _cannot_prepare(f"hf:{name}", f"{', '.join(map(repr, missing))} is missing")
    return settings


def _hf_preprocess(config: Mapping[str, Any], name: str) -> Preprocess:
    """Preprocess from an image processor's config; what it leaves out or vitedge cannot reproduce is an error."""
    try:
        shorter_side = "shortest_edge" in config["size"]
        before = _sides(config["size"])
        size = _sides(config["crop_size"]) if config.get("do_center_crop") else before
        interpolation = PILLOW_FILTERS.get(config["resample"])
        usual = config["do_resize"] and config["do_normalize"] and config["do_rescale"] and not config.get("do_pad")
        usual = usual and abs(config["rescale_factor"] * 255 - 1) < 1e-6 and not config.get("do_flip_channel_order")
        mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    except KeyError as error:
        raise _cannot_prepare(f"hf:{name}", f"{error} is missing") from error
    except TypeError as error:
        raise _cannot_prepare(f"hf:{name}", f"a value is missing or unusual: {error}") from error
    if not usual or (shorter_side and not config.get("do_center_crop")):
        raise _cannot_prepare(f"hf:{name}", "it is not resize, center crop, value / 255, normalise")
    if interpolation is None:
        raise _cannot_prepare(f"hf:{name}", f"the resample filter {config['resample']} is neither bilinear (2) nor bicubic (3)")
    if size[0] * before[1] != size[1] * before[0]:
        raise _cannot_prepare(f"hf:{name}", f"the crop {size} has another aspect ratio than the {before} that it is cut from")
    return Preprocess(size, mean, std, "crop" if shorter_side else "squash", size[0] / before[0], interpolation)


def _sides(size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) of a size as image processors write it."""
    return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])


def _from_timm(name: str, checkpoint: Path | None, given: Preprocess | None) -> tuple[nn.Module, ModelCard]:
    timm = import_package("timm", "timm")
    try:
        module = timm.create_model(name, pretrained=checkpoint is None)
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(f"cannot load timm:{name}: {error}", hint="`vitedge models --filter vit` lists the names") from error
    preprocess = given or _timm_preprocess(timm.data.resolve_model_data_config(module), name)
    return module, _timm_card(timm, module, name.rpartition("/")[2], preprocess)  # hf_hub:ORG/NAME is a name too


def _timm_card(timm: Any, module: Any, name: str, preprocess: Preprocess) -> ModelCard:
    short = _card_name(name)
    if module.num_classes == 0:
        return ModelCard(short, "embed", preprocess)
    subset = timm.data.infer_imagenet_subset(module)
    info = timm.data.ImageNetInfo(subset) if subset else None
    labels = tuple(info.index_to_description(i) for i in range(module.num_classes)) if info else ()
    return ModelCard(short, "classify", preprocess, labels=labels)


def _timm_preprocess(config: Mapping[str, Any], name: str) -> Preprocess:
    try:
        channels, height, width = config["input_size"]
        modes: dict[str, Resize] = {"center": "crop", "squash": "squash"}
        return Preprocess(
            size=(height, width), resize=modes[config["crop_mode"]], crop_pct=config["crop_pct"],
            interpolation=config["interpolation"], mean=tuple(config["mean"]), std=tuple(config["std"]), channels=channels,
        )  # fmt: skip
    except KeyError as error:
        raise _cannot_prepare(f"timm:{name}", f"{error} is missing or unusual") from error


def _from_torchvision(name: str, checkpoint: Path | None, given: Preprocess | None) -> tuple[nn.Module, ModelCard]:
    torchvision = import_package("torchvision", "torchvision")
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:
        raise ModelError(f"torchvision has no model {name!r}", hint="`vitedge models --filter vit` lists the names") from error
    module = torchvision.models.get_model(name, weights=None if checkpoint else weights)
    transform = weights.transforms()
    spec = given or Preprocess(
        size=(transform.crop_size[0],) * 2, resize="crop", crop_pct=transform.crop_size[0] / transform.resize_size[0],
        interpolation=transform.interpolation.value, mean=tuple(transform.mean), std=tuple(transform.std),
    )  # fmt: skip
    return module, ModelCard(name, "classify", spec, labels=tuple(weights.meta["categories"]))


def _card_name(name: str) -> str:
    """The last part of a hub's name or of a folder, with - for what has no place in the names of files."""
    last = Path(name).resolve().name if Path(name).is_dir() else name.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", last).lstrip(".+-") or "model"


def _cannot_prepare(name: str, reason: str) -> ModelError:
    return ModelError(
        f"the config of {name} does not say how its images are prepared in a way that vitedge reproduces: {reason}",
        hint="say it with --preprocess FILE.toml (size, resize, crop_pct, interpolation, mean, std)",
    )


def _check_fit(where: str, missing: Collection[str], mismatched: Collection[str], unexpected: Collection[str]) -> None:
    """Raise a ModelError that names the keys that do not fit, if there are any."""
    kinds = {"missing": missing, "of another shape": mismatched, "unexpected": unexpected}
    parts = [f"{len(keys)} keys are {what} ({_few(sorted(keys))})" for what, keys in kinds.items() if keys]
    if parts:
        raise ModelError(
            f"{where} does not fit the model: {' and '.join(parts)}",
            hint="is it the checkpoint of this architecture, with the same number of classes?",
        )


def _read_state(checkpoint: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without what was wrapped around it.

    A NaN, an infinity, and a tensor of another kind than the one in `wanted`, such as a quantized one, are ModelErrors.
    """
    state = _unwrap(_read_checkpoint(checkpoint), wanted.keys())
    if state is None:
        raise ModelError(f"{checkpoint} holds no state dict of tensors", hint="save model.state_dict(), whose keys are strings")
    for key, value in state.items():
        _check_kind(f"{checkpoint}: the weight {key!r}", value, wanted.get(key))
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{checkpoint}: the weight {key!r} holds NaN or infinite values", hint="use an earlier checkpoint")
    return state


def _check_kind(what: str, value: Tensor, wanted: Tensor | None) -> None:
    """Raise a ModelError if `value` is no array of plain numbers, or is of integers where `wanted` is not, or the reverse.

    wanted: None where a key has no like in the model, which for transformers may be an older name of one.
    """
    hint = "save the model's float32 state dict, neither quantized nor sparse"
    if value.is_nested or value.is_quantized or value.is_meta or value.layout != torch.strided:
        kinds = {"nested": value.is_nested, "quantized": value.is_quantized, "on the device meta, without values": value.is_meta}
        raise ModelError(f"{what} is {next((kind for kind, so in kinds.items() if so), 'sparse')}", hint=hint)
    floating = value.is_floating_point()
    odd = value.is_complex() or (floating and value.dtype not in FLOATS)
    other = value.dtype in BYTES if wanted is None else floating != wanted.is_floating_point()
    if odd or other:
        dtype = "no such weight" if wanted is None else _dtype(wanted)
        raise ModelError(f"{what} is {_dtype(value)} in the file, {dtype} in the model", hint=hint)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint; never runs code from it."""
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, torch and the operating system each raise their own
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            raise ModelError(
                f"{path} is refused: it is not a plain file of tensors and may run code when it is loaded",
                hint="save model.state_dict() instead of the model, best as .safetensors",
            ) from error
        unpickled = isinstance(error, pickle.UnpicklingError)  # torch then advises to run whatever code the file holds
        why = "it is neither safetensors nor a state dict of torch" if unpickled else first_line(error)
        raise ModelError(f"{path} is not a readable checkpoint: {why}", hint="is it complete?") from error


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as pickles and torch's archives do; a text file, such as a web page saved in its place, does not."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def _unwrap(state: Any, wanted: Collection[str]) -> dict[str, Tensor] | None:
    """The state dict, if any, in what a training script saved, without prefixes of wrappers that the `wanted` keys lack."""
    while isinstance(state, Mapping) and (key := next((k for k in NESTED if isinstance(state.get(k), Mapping)), None)):
        state = state[key]
    if not isinstance(state, Mapping) or not state:
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        return None
    strange = [prefix for prefix in WRAPPED if not all(key.startswith(prefix) for key in wanted)]
    while prefix := next((p for p in strange if all(key.startswith(p) for key in state)), None):  # in any order
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


@contextmanager
def _one_sentence(what: str, hint: str) -> Iterator[None]:
    """Make one ModelError of what transformers and safetensors raise for names and files that do not fit."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{what}: {first_line(error)}", hint=hint) from error


@contextmanager
def _importing(path: Path) -> Iterator[ModuleType]:
    """Import a Python file by path, with its own folder importable meanwhile, as `python file.py` would have it.

    Whatever its code raises, in the block too, is a VitEdgeError that says where.
    """
    spec = importlib.util.spec_from_file_location(f"vitedge_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look their own module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        yield module
    except VitEdgeError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise ModelError(f"{path} fails: {type(error).__name__}: {first_line(error)}{where}") from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
