"""A torch module in, something that answers the rows of an engine's input out: what one would run without an engine.

    (module, ModelCard)  ->  TorchSession  ->  uint8 pixels in, normalised in torch, float32 answers out

As it is, or compiled by torch.compile (TorchInductor, which needs a C++ compiler). Knows nothing of ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitedge.compiler.models import load_model
from vitedge.errors import ModelError, VitEdgeError, first_line
from vitedge.preprocess import write_input
from vitedge.specs import ModelCard, PixelFormat

ALL_THREADS = torch.get_num_threads()  # of which torch takes half the processors where two of them share a core


class TorchSession:
    """A module with an input buffer of uint8[max_batch, h, w, C]. The number of threads is torch's own and of the process."""

    def __init__(self, module: Callable[[torch.Tensor], Any], card: ModelCard, max_batch: int, streams: int) -> None:
        spec = card.preprocess
        self.input: NDArray[np.uint8] = np.zeros((max_batch, *spec.size, spec.channels), np.uint8)
        self.streams = streams
        self._module: Callable[[torch.Tensor], Any] | None = module
        self._card, self._max_batch = card, max_batch
        self._pixels = torch.from_numpy(self.input)  # the same memory
        self._shift = 255 * torch.tensor(spec.mean).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(spec.std).view(-1, 1, 1))

    def write(self, row: int, picture: NDArray[np.uint8], pixels: PixelFormat = "rgb") -> None:
        """Preprocess a picture into a row of `input`."""
        write_input(picture, self._card, self.input[row], pixels)

    def run(self, count: int) -> NDArray[np.float32]:
        """The first output for the first `count` rows, float32[count, ...]."""
        if self._module is None:
            raise ModelError(f"{self._card.name} is closed")
        try:
            with torch.inference_mode():
                images = (self._pixels[:count].permute(0, 3, 1, 2).float() - self._shift) * self._scale
                answer = self._module(images.contiguous())
        except VitEdgeError:
            raise
        except Exception as error:  # of the user's code, or of the compiler behind torch.compile
            raise ModelError(f"torch cannot run {self._card.name}: {first_line(error)}") from error
        first = answer if isinstance(answer, torch.Tensor) else answer[0]
        result: NDArray[np.float32] = first.float().numpy()
        return result

    def fork(self) -> TorchSession:
        """The same module with an input buffer of its own."""
        if self._module is None:
            raise ModelError(f"{self._card.name} is closed")
        return TorchSession(self._module, self._card, self._max_batch, self.streams)

    def close(self) -> None:
        """Drop the module."""
        self._module = None


def open_torch(
    name: str,
    checkpoint: Path | None = None,
    preprocess: Path | None = None,
    *,
    compiled: bool = False,
    max_batch: int = 16,
    threads: int | None = None,
    streams: int = 1,
) -> TorchSession:
    """The model `name` (see `load_model`) in evaluation mode.

    threads: of the processor, for all streams together. compiled: by torch.compile, at the first call of each batch size.
    """
    module, card = load_model(name, checkpoint, preprocess)
    torch.set_num_threads(max(1, (threads or ALL_THREADS) // streams))
    called: Callable[[torch.Tensor], Any] = torch.compile(module, dynamic=False) if compiled else module
    return TorchSession(called, card, max_batch, streams)


def look(name: str, checkpoint: Path | None = None, preprocess: Path | None = None) -> tuple[ModelCard, float]:
    """The card of the model `name`, and the MiB of its weights."""
    module, card = load_model(name, checkpoint, preprocess)
    return card, sum(tensor.nbytes for tensor in module.state_dict().values()) / 2**20


def version() -> str:
    """The release of torch."""
    return str(torch.__version__)
