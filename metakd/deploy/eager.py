"""Engines that run PyTorch, see ``engines``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metakd.deploy.engines import Engine, Inputs
from metakd.models.inputs import input_names
from metakd.models.sources import load_trained_classifier


class EagerEngine(Engine):
    """PyTorch, operation by operation."""

    def __init__(self, name: str, folder: Path, device: str, threads: int | None):
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        self.model = load_trained_classifier(folder).to(self._device).eval()
        self.inputs = input_names(self.model.config)

    @torch.inference_mode()
    def __call__(self, batch: Inputs) -> np.ndarray:
        placed = {
            name: torch.from_numpy(batch[name]).to(self._device, non_blocking=True)
            for name in self.inputs
        }
        return self._logits(placed).float().cpu().numpy()

    @torch.inference_mode()
    def plainly(self, batch: Inputs) -> np.ndarray:
        placed = {name: torch.from_numpy(batch[name]).to(self._device) for name in batch}
        return self.model(**placed).logits.float().cpu().numpy()

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).logits


class CompiledEngine(EagerEngine):
    """``torch.compile`` with dynamic shapes: compiled once, at the first batch (a batch of one
    counts as another model)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._logits = torch.compile(super()._logits, dynamic=True)


class GraphEngine(EagerEngine):
    """One CUDA graph per shape, captured when the shape is first met; shapes are rounded up so that
    there are few. Graphs share their memory, so one batch runs at a time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._graphs: dict[tuple[int, int], tuple[Callable, dict[str, Tensor], Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._alone = threading.Lock()

    def padded_shape(self, batch: int, length: int) -> tuple[int, int]:
        longest = getattr(self.model.config, "max_position_embeddings", length)
        return 1 << (batch - 1).bit_length(), min(-(-length // 32) * 32, max(longest, length))

    def texts_at_once(self, tokens: int, length: int) -> int:
        return 1 << (super().texts_at_once(tokens, length).bit_length() - 1)

    @torch.inference_mode()
    def __call__(self, batch: Inputs) -> np.ndarray:
        shape = batch["input_ids"].shape
        with self._alone:
            if shape not in self._graphs:
                self._graphs[shape] = self._capture(shape)
            replay, placed, logits = self._graphs[shape]
            for name, buffer in placed.items():
                buffer.copy_(torch.from_numpy(batch[name]))
            replay()
            return logits.float().cpu().numpy()

    def _capture(self, shape: tuple[int, int]):
        placed = {
            name: torch.ones(shape, dtype=torch.long, device=self._device) for name in self.inputs
        }
        # With padding: without any, transformers warms up attention that takes no mask, and the
        # capture, which cannot look, would be the first to run the other.
        placed["attention_mask"][:, 1:] = 0
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces before the capture
            for _ in range(2):
                self._logits(placed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._logits(placed)
        return graph.replay, placed, logits
