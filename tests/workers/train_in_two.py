"""Two processes train a converted network together; each writes what it ended with. Run by test_distributed.py.

torchrun --nproc-per-node=2 train_in_two.py ddp|fsdp|settled_fsdp RECIPE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import halfbyte as hb
from halfbyte.nn import plans_of


def network(recipe: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return hb.convert(model, recipe, seed=7 if hb.RECIPES[recipe].random else None)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's half: the second rank sees inputs twice as large."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.rand(32, 8, generator=generator) * (1 + dist.get_rank())
    return x, x[:, :4].argmax(1)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(how: str, recipe: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = network(recipe)
    if how == "settled_fsdp":
        model(batch(0)[0]).sum().backward()
        model.zero_grad()
    trained: nn.Module = model
    if how == "ddp":
        trained = DistributedDataParallel(model)
    else:
        fully_shard(model[2])
        fully_shard(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.2)
    losses = []
    for step in range(8):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(trained(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model(batch(0)[0])
    found = {
        "losses": losses,
        "state": {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()},
        "draw": plans_of(model[2])[""].draw(torch.tensor(0), 0).uniform(8),
        "summary": str(hb.summary(model)),
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
