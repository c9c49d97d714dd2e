"""Several processes train one network: who takes which examples, and what all of them must agree on.

Each process, a *rank*, takes its rows of every batch, so that the order of the examples does not depend on how many
there are. A rank's loss counts by its share of the batch and gradients are summed, so every layer sees the same
gradient for an example that one process would see, and scales it the same. What is left to differ is the order of
sums, and what belongs to a rank by its nature: batch norm's statistics, dropout, random rounding, ranges and blocks
that are measured over the examples of a batch.

Each function here does nothing, or the obvious, where one process trains alone.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distributed import most_of_ranks, rank, ranks, sum_of_ranks
from ..errors import HalfbyteError, UnknownNameError
from ..quantizers import GradScaleState, Quantizer
from .data.source import Batch
from .guard import last_words

__all__ = [
    "PATIENCE_S",
    "STRATEGIES",
    "LostRankError",
    "agree",
    "chosen",
    "command",
    "company",
    "dealt",
    "described",
    "first",
    "fold_counts",
    "gathered",
    "joined",
    "load",
    "most",
    "noticing",
    "settle",
    "share",
    "stacked",
    "summed",
    "together",
    "total",
    "whole",
    "wrapped",
]

STRATEGIES = ("ddp", "fsdp2")
"""Every rank holds the whole network (DistributedDataParallel), or a part of each weight (``fully_shard``)."""

PATIENCE_S = 300.0
"""How long a rank waits for another in one exchange before it gives the run up."""

T = TypeVar("T")


class LostRankError(HalfbyteError, RuntimeError):
    """Another process of a run has ended, or does not answer."""


@contextlib.contextmanager
def company(environment: Mapping[str, str], accelerator: str) -> Iterator[bool]:
    """Joins the other processes, see `joined`, where ``torchrun`` has started several.

    Args:
        environment: of this process, which would tell.
        accelerator: see `joined`.

    Yields:
        Whether this process is the one that speaks for all.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        yield True
        return
    with last_words(), joined(accelerator):
        yield rank() == 0


@contextlib.contextmanager
def joined(accelerator: str = "cpu", patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Joins the processes that ``torchrun`` has started, which their environment describes, and leaves them again.

    Args:
        accelerator: ``"cpu"`` for gloo alone; anything else for NCCL too, where there is CUDA, with a device each.
        patience_s: how long to wait for another process in one exchange.

    Raises:
        LostRankError: if not all of them come.
    """
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    wait = timedelta(seconds=patience_s)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise LostRankError(
            f"The processes of this run did not find each other in {patience_s:g} s ({_reason(error)}). Start all of "
            "them with torchrun --nproc-per-node=N -m halfbyte ..."
        ) from error
    if on_gpu:
        torch.cuda.set_device(rank() % torch.cuda.device_count())
    try:
        with warnings.catch_warnings():
            # Nothing of the lab changes a layer's output in place, of which this speaks.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            # Its successor is not in every version of torch that we run under.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def noticing(cure: str) -> Iterator[None]:
    """Turns the failure of an exchange between ranks into an error that says how to go on.

    Args:
        cure: how.

    Raises:
        LostRankError: if another rank has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        of_the_net = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
        if ranks() == 1 or isinstance(error, HalfbyteError) or not of_the_net:
            raise
        raise LostRankError(
            f"Process {rank()} of {ranks()} (counted from 0) has lost another one, which has ended or does not answer "
            f"({_reason(error)}). {cure}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error of torch's, without the place in its source and what gloo says to its developers."""
    line = re.sub(r"\[\S+\.(cc|cpp|h|hpp):\d+\]\s*", "", str(error).splitlines()[0])
    return re.sub(r"\. This is typically caused by .*", "", line)


def chosen(strategy: str | None) -> str | None:
    """How the ranks share the work: as asked for, or ``"ddp"``; None where one process trains alone.

    Raises:
        UnknownNameError: if there is no such strategy.
        HalfbyteError: if one was asked for and there is one process alone.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise UnknownNameError("strategy", strategy, STRATEGIES)
    if dist.is_available() and dist.is_initialized():
        return strategy or "ddp"
    if strategy is not None:
        raise HalfbyteError(
            f"The strategy {strategy!r} was asked for, but this process trains alone, so it would do nothing. Start "
            f"several: torchrun --nproc-per-node=2 -m halfbyte train ... --strategy {strategy}"
        )
    return None


def described(strategy: str | None) -> dict[str, Any]:
    """What a record's ``machine`` says of the ranks; nothing where one process trains alone."""
    return {} if strategy is None else {"world_size": ranks(), "strategy": strategy}


def command(words: Sequence[str], strategy: str | None) -> list[str]:
    """A command line of one process as one of as many as there are now."""
    if strategy is None:
        return list(words)
    named = [] if "--strategy" in words else ["--strategy", strategy]
    return ["torchrun", f"--nproc-per-node={ranks()}", "-m", *words, *named]


def first(value: T) -> T:
    """Rank 0's value, on every rank."""
    if ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _all(value: T) -> list[T]:
    """Every rank's value, in their order."""
    if ranks() == 1:
        return [value]
    held: list[Any] = [None] * ranks()
    dist.all_gather_object(held, value)
    return held


def together() -> None:
    """Waits until every rank is here."""
    if ranks() > 1:
        dist.barrier()


def total(*values: float) -> tuple[float, ...]:
    """The sums over ranks, in float64."""
    return values if ranks() == 1 else tuple(sum_of_ranks(torch.tensor(values, dtype=torch.float64)).tolist())


def most(value: int) -> int:
    """The largest over ranks."""
    return value if ranks() == 1 else int(most_of_ranks(torch.tensor(value)))


def _mine(rows: int) -> slice:
    """This rank's part of so many rows: one run of them, so that parts laid end to end are the whole."""
    each, more = divmod(rows, ranks())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def _never_empty(part: slice) -> slice:
    """The part, or the first row in the place of none: every rank must run every layer."""
    return part if part.stop > part.start else slice(0, 1)


def share(batch: Batch) -> Batch:
    """This rank's rows of a batch.

    Its padding stays that of the whole batch. Where there are fewer rows than ranks, some get a row whose count is 0:
    they compute for the others' sake, and nothing of it counts.

    Args:
        batch: whose loss is a mean over rows, over equally many symbols of each row, or over the lengths that its
            second target holds.
    """
    if ranks() == 1:
        return batch
    rows = len(batch.inputs[0])
    mine = _mine(rows)
    kept = _never_empty(mine)
    lengths = batch.targets[1] if len(batch.targets) > 1 else None
    if lengths is not None and int(lengths.sum()) == batch.count:
        count = int(lengths[mine].sum())
    else:
        count = batch.count // rows * (mine.stop - mine.start)
    return Batch(tuple(t[kept] for t in batch.inputs), tuple(t[kept] for t in batch.targets), count)


def gathered(carry: Sequence[Tensor], rows: int) -> list[Tensor]:
    """What a network carries on for a whole batch, from what every rank carries for its share; on the CPU.

    Args:
        carry: tensors of shape (layers, N, ...), as torch's recurrent layers have them.
        rows: of the whole batch.
    """
    if ranks() == 1:
        return list(carry)
    mine = _mine(rows)
    everyone = _all([t[:, : mine.stop - mine.start].cpu() for t in carry])
    return [torch.cat(parts, dim=1) for parts in zip(*everyone, strict=True)]


def dealt(carry: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """This rank's share of what a network carries on."""
    return tuple(t[:, _never_empty(_mine(t.shape[1]))].contiguous() for t in carry)


def stacked(x: Tensor) -> Tensor:
    """Every rank's tensor: one more dimension, the first, of as many as there are ranks."""
    return torch.stack(_all(x))


def settle(network: nn.Module, tried: nn.Module) -> None:
    """Takes over what a first step decides from a copy that has made it, on the whole batch.

    These are learned clips and steps, signs, and the exponents of gradient scales. Left to the ranks, each would decide
    by its own share, and sharding would lose what was decided.

    Args:
        network: not trained yet.
        tried: a copy of it that has seen a forward and a backward pass.
    """
    for name, theirs in tried.named_modules():
        own = network.get_submodule(name)
        if isinstance(own, Quantizer) and own.learned is not None:
            own.load_state_dict(theirs.state_dict() | {"nonfinite": own.nonfinite.clone()})
        elif isinstance(own, GradScaleState) and isinstance(theirs, GradScaleState):
            own.log2_scale.copy_(theirs.log2_scale)
            own.started.copy_(theirs.started)


def wrapped(network: nn.Module, strategy: str | None, device: torch.device) -> nn.Module:
    """The network as the ranks train it together.

    Sharded are, each as a unit, the members of every `Sequential` and `ModuleList`, and then the network with what is
    left. Sharding works in place and replaces the parameters.

    Args:
        network: with the same weights on every rank.
        strategy: see `chosen`.
        device: of this rank.
    """
    if strategy is None:
        return network
    network.to(device)
    if strategy == "ddp":
        ids = None if device.index is None else [device.index]
        # Buffers are judged and saved as rank 0 has them, see `agree`; training looks at none of another rank's.
        return DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)
    mesh = init_device_mesh(device.type, (ranks(),))
    lists = [m for m in network.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    for member in (m for inner_first in reversed(lists) for m in inner_first):
        callable_ = not isinstance(member, nn.ModuleList | nn.ModuleDict)
        if callable_ and not isinstance(member, FSDPModule) and any(True for _ in member.parameters()):
            fully_shard(member, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def summed(network: nn.Module) -> None:
    """Makes of the ranks' mean gradients their sum, and of what each has seen what all have: after a backward pass.

    The largest gradient of all ranks is that of the whole batch, so each rank votes on a layer's scale as one process
    would, and so does the sum of their votes.
    """
    if ranks() == 1:
        return
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(ranks())
    scales = [m for m in network.modules() if isinstance(m, GradScaleState)]
    if scales:
        for scale, observed in zip(scales, most_of_ranks(torch.stack([s.observed for s in scales])), strict=True):
            scale.observed.copy_(observed)


def fold_counts(network: nn.Module) -> None:
    """Lets rank 0 count every rank's tensors with NaN or infinity, and the others begin again."""
    counters = [b for name, b in network.named_buffers() if name.endswith("nonfinite")]
    if ranks() == 1 or not counters:
        return
    for counter, found in zip(counters, sum_of_ranks(torch.stack(counters)), strict=True):
        counter.copy_(found if rank() == 0 else torch.zeros_like(found))


def agree(network: nn.Module) -> None:
    """Gives every rank rank 0's statistics (of batch norm, of ranges), so that all judge the network that is saved."""
    if ranks() == 1:
        return
    fold_counts(network)
    statistics = [b for name, b in network.named_buffers() if not name.endswith("nonfinite")]
    for own, theirs in zip(statistics, first([b.cpu() for b in statistics]), strict=True):
        own.copy_(theirs)


def whole(state: Any) -> Any:
    """A state dict, of a network or of an optimizer, with whole tensors in the place of sharded ones."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def load(network: nn.Module, optimizer: Optimizer, weights: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
    """Loads whole state, as `whole` gives it, into a network and its optimizer, sharded or not.

    Args:
        network: as `wrapped` left it.
        optimizer: of its parameters.
        weights: the network's state dict; the others leave its counts of broken tensors to rank 0, see `fold_counts`.
        moments: the optimizer's.
    """
    own = network.state_dict()
    network.load_state_dict({name: _spread(value, own.get(name)) for name, value in weights.items()})
    if rank() > 0:
        for name, counter in network.named_buffers():
            if name.endswith("nonfinite"):
                counter.zero_()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        number: {name: _spread(value, parameters[number]) for name, value in entry.items()}
        for number, entry in moments["state"].items()
    }
    optimizer.load_state_dict({**moments, "state": spread})


def _spread(value: Any, like: Any) -> Any:
    """A whole tensor as another is sharded, if that is; the value itself if it has another shape or is no tensor."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
