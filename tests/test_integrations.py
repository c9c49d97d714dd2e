"""A converted model under other people's loops: Lightning's and Hugging Face's Trainer do what a loop by hand does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import probes

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # of its own use of torch, and of its advice

CONVERTED = ("2", "5")  # The recipes leave the first and the last layer alone.
BATCHES, EACH = 4, 2  # In an epoch; to a step of the optimizer.


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the networks are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(recipe: str = "ibm2020", seed: int = 0) -> nn.Sequential:
    """Two convolutions and two linear layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    return hb.convert(model, recipe, seed=1 if hb.RECIPES[recipe].random else None)


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCHES * 4, 1, 8, 8, generator=generator), torch.arange(BATCHES * 4) % 3


def by_hand(model: nn.Module, epochs: int, *, bf16: bool) -> None:
    """The loop that the others are held against."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = examples()
    for _ in range(epochs):
        for number, rows in enumerate(torch.arange(len(x)).split(4)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x[rows]), y[rows])
            (loss / EACH).backward()
            if (number + 1) % EACH == 0:
                optimizer.step()
                optimizer.zero_grad()


class Trained(NamedTuple):
    """What is left after training: the optimizer, and the checkpoint."""

    optimizer: torch.optim.Optimizer
    checkpoint: Path


def with_lightning(
    model: nn.Module, folder: Path, epochs: int = 2, *, bf16: bool = False, resume: Path | None = None
) -> Trained:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=EACH,
        precision="bf16-mixed" if bf16 else "32-true",
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=4)
    trainer.fit(Module(), data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return Trained(trainer.optimizers[0], folder / "last.ckpt")


class WithLoss(nn.Module):
    """A module that returns its loss, as Hugging Face's Trainer asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), labels)}


def with_transformers(
    model: nn.Module, folder: Path, epochs: int = 2, *, bf16: bool = False, resume: Path | None = None
) -> Trained:
    data = [{"x": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    return hugging_face(WithLoss(model), data, folder, epochs, bf16=bf16, resume=resume, optim="sgd", learning_rate=0.1)


def hugging_face(
    model: nn.Module, data: list, folder: Path, epochs: int, *, resume: Path | None = None, **settings: object
) -> Trained:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs it")
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=EACH,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return Trained(trainer.optimizer, folder / f"checkpoint-{trainer.state.global_step}")


Loop = Callable[..., Trained]
both = pytest.mark.parametrize(
    "loop",
    [
        pytest.param(with_lightning, id="lightning"),
        pytest.param(with_transformers, id="transformers"),
    ],
)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Equal weights, clips, statistics, scales and counts."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


@both
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["ibm2020", "luq", "nvfp4", "loss_scale"])
def test_it_trains_as_by_hand(loop: Loop, recipe: str, bf16: bool, tmp_path: Path) -> None:
    """Two epochs of accumulated steps, with autocast or without, end in the bits of the loop by hand, state and all."""
    model, expected = network(recipe), network(recipe)
    loop(model, tmp_path, bf16=bf16)
    by_hand(expected, 2, bf16=bf16)
    assert_same_state(model, expected)


@both
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_every_batch_runs_in_four_bits(loop: Loop, bf16: bool, tmp_path: Path) -> None:
    """Each converted layer counts every batch, and in each its operands are codes of four bits, both directions."""
    model = network()
    with probes.attach(model) as probe:
        loop(model, tmp_path, bf16=bf16)
    steps = range(1, 2 * BATCHES + 1)
    assert [int(model.get_submodule(name).plan.step) for name in CONVERTED] == [len(steps)] * 2
    seen = {(row.layer, row.step, row.slot): row.formats for row in probe.rows}
    four_bits = {
        "fprop.input": {("uint4",), ("int4",)},
        "fprop.weight": {("int4",)},
        "dgrad.grad_output": {("fp4_e3m0_r4",)},
        "wgrad.grad_output": {("fp4_e3m0_r4_odd",)},
    }
    assert seen.keys() == {(layer, step, slot) for layer in CONVERTED for step in steps for slot in four_bits}
    assert all(formats in four_bits[slot] for (_, _, slot), formats in seen.items())


@both
def test_learned_clips_are_trained(loop: Loop, tmp_path: Path) -> None:
    """The loop's optimizer holds every parameter, the learned clips among them, and moves them."""
    model = network()
    first = {name: value.clone() for name, value in model.named_parameters()}
    model(examples()[0][:4])  # The first batch chooses the clips.
    chosen = {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("clip")}
    optimizer = loop(model, tmp_path, epochs=1).optimizer
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert all(id(parameter) in held for parameter in model.parameters())
    assert len(chosen) == len(CONVERTED)
    assert all(not torch.equal(value, model.get_parameter(name)) for name, value in (first | chosen).items())


@both
@pytest.mark.parametrize("recipe", ["ibm2020", "luq", "int4_hq_lss", "loss_scale"])
def test_its_checkpoint_goes_on(loop: Loop, recipe: str, tmp_path: Path) -> None:
    """From the loop's own checkpoint a fresh model goes on to the bits of an unbroken run, quantizers included."""
    whole, half, resumed = network(recipe), network(recipe), network(recipe, seed=7)
    loop(whole, tmp_path / "whole")
    checkpoint = loop(half, tmp_path / "half", epochs=1).checkpoint
    loop(resumed, tmp_path / "resumed", resume=checkpoint)
    assert_same_state(resumed, whole)
    assert all(int(resumed.get_submodule(name).plan.step) == 2 * BATCHES for name in CONVERTED)


def llama(recipe: str, seed: int = 0) -> nn.Module:
    """A Llama of two small layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    return hb.convert(transformers.LlamaForCausalLM(config), recipe, seed=1 if hb.RECIPES[recipe].random else None)


def texts() -> list[dict[str, Tensor]]:
    symbols = torch.randint(32, (BATCHES * 4, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": text, "labels": text} for text in symbols]


@pytest.mark.parametrize("recipe", ["ibm2020", "luq", "loss_scale"])
def test_a_hugging_face_model_goes_on_from_its_checkpoint(recipe: str, tmp_path: Path) -> None:
    """A Llama under fused AdamW trains all its blocks' linear layers, saves them, and goes on to the same bits."""
    whole, half, resumed = llama(recipe), llama(recipe), llama(recipe, seed=7)
    hugging_face(whole, texts(), tmp_path / "whole", 2)
    checkpoint = hugging_face(half, texts(), tmp_path / "half", 1).checkpoint
    hugging_face(resumed, texts(), tmp_path / "resumed", 2, resume=checkpoint)
    assert_same_state(resumed, whole)
    steps = {name: int(module.plan.step) for name, module in resumed.named_modules() if hasattr(module, "plan")}
    assert len(steps) == 14
    assert set(steps.values()) == {2 * BATCHES}


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # its name from version 6 on
@pytest.mark.parametrize("recipe", ["ibm2020", "luq"])
def test_recomputing_activations_changes_no_bit(recipe: str, tmp_path: Path) -> None:
    """Hugging Face's activation checkpointing gives the same weights and counts each batch once."""
    plain, recomputed = llama(recipe), llama(recipe)
    hugging_face(plain, texts(), tmp_path / "plain", 1)
    recomputed.gradient_checkpointing_enable()
    assert recomputed.is_gradient_checkpointing
    hugging_face(recomputed, texts(), tmp_path / "recomputed", 1)
    assert_same_state(recomputed, plain)


@pytest.mark.parametrize("recipe", [name for name, recipe in hb.RECIPES.items() if recipe.grad_scale])
def test_saved_state_shares_no_memory(recipe: str) -> None:
    """No two tensors of a state_dict are one, which safetensors refuses; what layers share is loaded into all."""
    model = network(recipe)
    by_hand(model, 1, bf16=False)
    saved = model.state_dict()
    places = [tensor.data_ptr() for tensor in saved.values() if tensor.numel()]
    assert len(set(places)) == len(places)
    other = network(recipe, seed=7)
    other.load_state_dict(copy.deepcopy(saved))
    assert_same_state(other, model)
