"""The inputs of each linear layer on calibration rows, block by block, behind the blocks quantized before it.

One block is in memory at a time, in fp32, beside the hidden states of all rows. A block's linear layers are quantized
in the order in which they run, and each is replaced by its quantized weight with its first adapter before the inputs of
the next are collected, so that every layer is fitted to the inputs that it will see in training.

Every pass calls the model's own forward function, and only takes out and puts back the hidden states at the block, so
that masks, positions and a family's peculiarities are those of the model class.

Dimensions: B rows of a batch, T tokens, I inputs, N tokens of all rows.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftline.errors import QuantizeError
from graftline.settings.start import Weighting
from graftline.weights.cast import cast
from graftline.weights.model_folder import ModelReader, place_of, skeleton_of
from graftline.weights.quant.weighted import InputMoments, Metric
from graftline.weights.reader import Architecture

_BATCH_TOKENS = 2048
# Tensors of a batch's tokens that a block holds at once: residual, queries, keys, values, gate, up and their product.
_ACTIVATIONS = 8


class _Reached(Exception):  # noqa: N818 # ends a forward pass where what it was for is known; not an error
    pass


class CalibrationInputs:
    """Walks through a dense folder's tensors in the order in which a calibrated start must quantize them.

        for name in inputs.names():
            …                            # for a linear weight: quantize it by ``inputs.metric(name)``, then
            inputs.carry(name, dense)    # replace it, so that later layers see its output

    Args:
        reader: the dense folder.
        rows: token ids of the calibration rows.
        weighting: what is collected of the inputs.
        evened: no token counts more than others (`InputMoments`).

    Raises:
        QuantizeError: the model has experts, whose matrices are quantized one by one.
    """

    def __init__(
        self, reader: ModelReader, rows: Sequence[Sequence[int]], weighting: Weighting, *, evened: bool = False
    ) -> None:
        if reader.architecture.experts == "each":
            raise QuantizeError(
                f"{reader.folder} has experts, each of which reads other rows, so the inputs of some may be unknown; "
                "write `weighting: none`, or `package.rounding: nearest` where a merged model is quantized"
            )
        self._reader, self._weighting, self._evened = reader, weighting, evened
        self._batches = _batches(rows)
        self._hidden: list[Tensor] = []
        self._model = skeleton_of(reader, torch.float32).eval()
        self._root = self._model.get_submodule(reader.architecture.root)
        self._blocks: Any = self._model.get_submodule(reader.architecture.blocks)
        self._shared: dict[str, str] = {}
        self._metric: tuple[str, Metric] | None = None

    @torch.no_grad()
    def names(self) -> Iterator[str]:
        """Every tensor's name once: those outside the blocks, then block by block, linear weights as they run."""
        by_block: dict[int | None, list[str]] = defaultdict(list)
        for name in self._reader.names():
            by_block[self._reader.architecture.block_of(name)].append(name)
        yield from by_block.pop(None)
        self._embed()
        for number in sorted(key for key in by_block if key is not None):
            own = by_block[number]
            self._load(own)
            linears = self._order(number, [name for name in own if self._reader.architecture.is_linear_weight(name)])
            yield from (name for name in own if name not in linears)
            yield from linears
            self._metric = None
            self._hidden = [self._run(at, number) for at in range(len(self._batches))]
            _free(self._blocks[number])

    @torch.no_grad()
    def metric(self, name: str) -> Metric:
        """The error's metric for a linear weight of the current block; layers with the same input share one.

        Raises:
            QuantizeError: the inputs are not finite.
        """
        leader = self._shared[name]
        if self._metric is None or self._metric[0] != leader:
            self._metric = None  # its memory is free before the next one is collected
            self._metric = leader, self._collect(leader).metric(name.removesuffix(".weight"))
        return self._metric[1]

    def carry(self, name: str, dense_OI: Tensor) -> None:
        """Put what a linear weight became, Q + s·BA (O, I) in fp32, into its block."""
        layer = self._layer(name)
        weight = dense_OI.T.contiguous() if self._reader.architecture.conv1d else dense_OI
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def _embed(self) -> None:
        """The hidden states that enter block 0; the embedding's memory is free again afterwards."""
        outside = [name for name in self._reader.names() if self._reader.architecture.block_of(name) is None]
        head = f"{self._reader.architecture.head}.weight"
        self._load([name for name in outside if name != head])
        self._hidden = [self._run(at, 0, embed=True) for at in range(len(self._batches))]
        embedding = self._model.get_submodule(self._reader.architecture.embedding)
        _free(embedding)

    def _load(self, names: Sequence[str]) -> None:
        for name in names:
            owner, last = place_of(self._model, name, self._reader.info(name).shape)
            weight = cast(self._reader.read(name), torch.float32, name)
            owner._parameters[last] = nn.Parameter(weight, requires_grad=False)

    def _run(self, at: int, number: int, *, embed: bool = False) -> Tensor:
        """Batch ``at`` through block ``number``: the hidden states behind it (B, T, H); ``embed``: before it."""
        found: list[Tensor] = []
        block = self._blocks[number]
        forward = block.forward

        def replaced(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if embed:
                found.append(hidden)
            else:
                result = forward(self._hidden[at], *args, **kwargs)
                found.append(result[0] if isinstance(result, tuple) else result)
            raise _Reached

        ids_BT = self._batches[at][0]
        given = {"input_ids": ids_BT} if embed else {"inputs_embeds": self._hidden[at]}
        for earlier in self._blocks[:number]:
            earlier.forward = lambda hidden, *args, **kwargs: hidden
        block.forward = replaced
        try:
            self._root(**given, use_cache=False)
        except _Reached:
            pass
        finally:
            for changed in self._blocks[: number + 1]:
                del changed.forward  # the class's own again
        return found[0] if found else self._hidden[at]

    def _order(self, number: int, names: Sequence[str]) -> list[str]:
        """The block's linear weights in the order in which they run, from one batch; notes which share an input."""
        ran: list[tuple[str, Tensor]] = []

        def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: ran.append((name, args[0]))

        hooks = [self._layer(name).register_forward_pre_hook(noting(name)) for name in names]
        self._run(0, number)
        for hook in hooks:
            hook.remove()
        if unused := sorted(set(names) - {name for name, _ in ran}):
            raise QuantizeError(
                f"{unused[0]} is not used where the model reads a text, so its inputs are not known; write "
                "`weighting: none`, or `package.rounding: nearest` where a merged model is quantized"
            )
        leaders: list[tuple[str, Tensor]] = []
        for name, x in ran:
            leader = next((first for first, same in leaders if same is x), None)
            if leader is None:
                leaders.append((name, x))
            self._shared[name] = leader or name
        # Those that run on the same input one after another, whatever runs between them: their metric is made once.
        order = [leader for leader, _ in leaders]
        return sorted((name for name, _ in ran), key=lambda name: order.index(self._shared[name]))

    def _collect(self, leader: str) -> InputMoments:
        found: list[InputMoments] = []
        kept_BT: Tensor

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_NI = args[0][kept_BT]
            if not found:
                found.append(InputMoments(x_NI.shape[-1], self._weighting, evened=self._evened))
            found[0].add(x_NI)
            raise _Reached

        hook = self._layer(leader).register_forward_pre_hook(take)
        number = self._reader.architecture.block_of(leader)
        assert number is not None
        for at, (_, kept_BT) in enumerate(self._batches):  # noqa: B007 # read by the hook
            self._run(at, number)
        hook.remove()
        return found[0]

    def _layer(self, name: str) -> nn.Module:
        return self._model.get_submodule(name.removesuffix(".weight"))


def calibration_bytes(
    shapes: Mapping[str, tuple[int, ...]], arch: Architecture, rows: Sequence[Sequence[int]], weighting: Weighting
) -> int:
    """Upper bound of what a calibrated start takes beside a plain one.

    One block and three copies of its largest weight in fp32, all rows' hidden states before and behind the block, a
    batch's activations, and with ``full`` three matrices of (I, I) for the widest layer. ``shapes``: of the model's
    tensors, by name.
    """
    bytes_of_blocks = defaultdict[int | None, int](int)
    for name, shape in shapes.items():
        bytes_of_blocks[arch.block_of(name)] += 4 * math.prod(shape)
    del bytes_of_blocks[None]
    linears = [shape for name, shape in shapes.items() if arch.is_linear_weight(name)]
    widest = max(max(shape) for shape in linears)
    hidden = shapes[f"{arch.embedding}.weight"][1]
    sizes = [ids.numel() for ids, _ in _batches(rows)]
    matrices = 3 * widest**2 if weighting == "full" else 0
    numbers = (
        3 * max(math.prod(shape) for shape in linears)
        + 2 * sum(sizes) * hidden
        + _ACTIVATIONS * max(sizes) * widest
        + matrices
    )
    return max(bytes_of_blocks.values()) + 4 * numbers


def _batches(rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Rows by length, at most so many tokens a batch: ids (B, T), and which of them are not padding.

    Padding stands at the end, where a causal model's other tokens do not see it, so no mask is needed.
    """
    batches: list[list[Sequence[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    found = []
    for batch in batches:
        ids_BT = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        kept_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
        for at, row in enumerate(batch):
            ids_BT[at, : len(row)] = torch.tensor(row)
            kept_BT[at, : len(row)] = True
        found.append((ids_BT, kept_BT))
    return found


def _free(module: nn.Module) -> None:
    """Give a module's parameters back their meta state, without memory."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
