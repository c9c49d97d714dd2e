"""The audit of what is sound: what it says, what it counts, and that it leaves no trace."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from audits import audited, data, everywhere, network, reasons, run_command
from halfbyte import cli, kernels
from halfbyte.auditing import audit
from halfbyte.lab.data import digits as digits_data
from halfbyte.lab.models import digits
from halfbyte.quantizers import Spec
from halfbyte.recipes import Recipe

run = importlib.import_module("halfbyte.auditing.run")
convert = importlib.import_module("halfbyte.convert")  # The package, whose name the function has too.


@pytest.fixture
def step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the self-test of quantizers, for tests of the step alone."""
    monkeypatch.setattr(run, "self_test", lambda _: [])


@pytest.mark.parametrize("recipe", hb.RECIPES)
@pytest.mark.parametrize("build", [digits.cnn, digits.mlp])
def test_every_recipe_passes_on_the_digits(recipe: str, build: object) -> None:
    """Under every recipe both networks of the digits pass, every product on codes is the float64 one."""
    torch.manual_seed(0)
    train = digits_data.load().train
    model = hb.convert(build(), recipe)  # type: ignore[operator]
    batch = (train.inputs[:16], train.targets[:16])
    report = audit(model, batch, lambda output, both: F.cross_entropy(output, both[1]))
    assert report.reasons == ()
    assert report.ok
    assert all(entry.codes_used <= 16 for entry in report.layers if "8" not in entry.executed)
    under_plans = [entry for entry in report.layers if ":" in entry.executed]
    assert all(entry.equals_float64 for entry in under_plans)
    assert bool(under_plans) == (recipe not in ("fp32", "bf16"))
    assert (report.mac_share_4bit > 0) == (recipe not in ("fp32", "bf16", "fp8", "int8"))


LAYERS = {
    "lstm": (lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True), (5, 3, 6)),
    "gru": (lambda: nn.GRU(6, 8, batch_first=True), (3, 5, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), (2, 5, 16)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 4)),
}


@pytest.mark.usefixtures("step_only")
@pytest.mark.parametrize("recipe", ["article", "ibm2020", "int4_hq_lss", "luq_smp2", "nvfp4", "bf16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_passes(kind: str, recipe: str) -> None:
    """Recurrent layers, attention, convolutions and transposed ones pass under recipes of every kind."""
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    report = audit(everywhere(nn.Sequential(build()), recipe), torch.randn(shape))
    assert report.reasons == ()


class Wrapped(nn.Module):
    """A network that is called in an unusual way."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")


def used_twice() -> nn.Module:
    """One layer in two places, and another that shares its weight."""
    layer, other = nn.Linear(16, 16), nn.Linear(16, 16)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.ReLU(), layer, other)


USES = {
    "autocast": lambda: Wrapped(everywhere(network(), "ibm2020"), "autocast"),
    "reentrant checkpoint": lambda: Wrapped(everywhere(network(), "ibm2020"), "reentrant"),
    "checkpoint": lambda: Wrapped(everywhere(network(), "ibm2020"), "checkpoint"),
    "float64": lambda: everywhere(network(), "ibm2020").double(),
    "bfloat16": lambda: everywhere(network(), "ibm2020").bfloat16(),
    "parametrized": lambda: (m := everywhere(network(), "ibm2020"), weight_norm(m[0]))[0],
    "frozen": lambda: (m := everywhere(network(), "ibm2020"), m[0].weight.requires_grad_(False))[0],
    "used twice": lambda: everywhere(used_twice(), "ibm2020"),
    "fp32 sums": lambda: everywhere(network(), replace(hb.RECIPES["ibm2020"], rules=(), accumulate="fp32")),
    "fp16 sums": lambda: everywhere(network(), replace(hb.RECIPES["ibm2020"], rules=(), accumulate="fp16_chunk64")),
    "inside another": lambda: nn.Sequential(everywhere(network(), "ibm2020"), nn.Linear(8, 2)),
}


@pytest.mark.usefixtures("step_only")
@pytest.mark.parametrize("use", USES)
def test_every_use_passes(use: str) -> None:
    """A sound model passes in other types, under autocast and checkpointing, with shared, frozen or made-up weights."""
    model = USES[use]()
    kind = next(model.parameters()).dtype
    report = audit(model, data().to(kind).requires_grad_())
    assert report.reasons == ()
    assert sum(entry.macs for entry in report.layers) > 0


def test_a_part_keeps_its_promise_inside_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was promised to a part that was converted by itself is asked of it by the name that it has in the whole."""
    monkeypatch.setattr(convert, "adopt", lambda *_: None)
    report = audit(nn.Sequential(nn.Identity(), everywhere(network(), "ibm2020")), data())
    assert "1.0, fprop: recipe ibm2020 was promised, but the layer is not converted" in reasons(report)


@pytest.mark.usefixtures("step_only")
def test_attention_products_pass() -> None:
    """The two products of attention are layers like any other where a rule names them."""

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = hb.convert(
        SelfAttention(), "nvfp4", [hb.Rule(recipe="nvfp4", fqn=f"attention.{name}") for name in ("qk", "pv")]
    )
    report = audit(model, torch.randn(2, 5, 16))
    assert report.reasons == ()
    assert {entry.name for entry in report.layers} >= {"attention.q", "attention.qk_0", "attention.pv_1"}
    assert report.mac_share_4bit == 1.0


def test_an_entry_says_what_ran() -> None:
    """One entry for each GEMM: backend and formats, multiply-accumulates, codes of both operands by slot."""
    report = audited()
    assert [(entry.name, entry.gemm) for entry in report.layers] == [
        ("0", "fprop"),
        ("0", "dgrad"),
        ("0", "wgrad"),
        ("2", "fprop"),
        ("2", "dgrad"),
        ("2", "wgrad"),
    ]
    wgrad = report.layers[5]
    assert wgrad.executed == "reference: fp4_e3m0_r4_odd x uint4"
    assert (wgrad.macs, wgrad.calls, wgrad.equals_float64, wgrad.recipe) == (32 * 24 * 8, 1, True, "ibm2020")
    assert list(wgrad.operands) == ["wgrad.grad_output", "wgrad.input"]
    assert wgrad.codes_used == max(operand.codes_used for operand in wgrad.operands.values())


def test_codes_used_are_those_of_the_tensor() -> None:
    """An input with the values 0, 1, 2 and 9 under a clip of 15 uses four codes; that of 20 is cut off."""
    recipe = Recipe(name="hand", fprop=hb.Fprop(input=hb.Pact(clip=15.0), weight=hb.Sawb()))
    model = everywhere(nn.Linear(4, 3), recipe)
    operand = audit(model, torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.25, 20.0, 9.0, 9.0]])).layers[0].operands
    assert operand["fprop.input"].codes_used == 5
    assert operand["fprop.input"].saturation_rate == 1 / 8
    assert operand["fprop.input"].underflow_rate == 1 / 7


def test_nothing_is_promised_under_fp32() -> None:
    """A model under fp32 passes with a share of zero and no entry."""
    report = audit(hb.convert(network(), "fp32"), data())
    assert (report.ok, report.mac_share_4bit, report.layers) == (True, 0.0, ())


def test_bf16_runs_in_bf16() -> None:
    """Under bf16 every GEMM is said to have run in bfloat16."""
    report = audited("bf16")
    assert {(entry.gemm, entry.executed) for entry in report.layers} == {
        (gemm, "bfloat16") for gemm in ("fprop", "dgrad", "wgrad")
    }
    assert report.mac_share_4bit == 0.0


@pytest.mark.usefixtures("step_only")
@pytest.mark.parametrize("recipe", ["article", "ibm2020", "loss_scale", "int4_hq_lss", "luq"])
def test_the_model_is_as_before(recipe: str) -> None:
    """Parameters, gradients, buffers, statistics, mode, hooks and generators are those from before the audit."""
    model = nn.Sequential(network(), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model = everywhere(model, recipe)
    model[1].eval()
    model(data()).square().mean().backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    versions = [p._version for p in model.parameters()]
    generator = torch.get_rng_state()
    audit(model, data())
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor and torch.equal(tensor.detach().nan_to_num(7), before[name].nan_to_num(7))
               for name, tensor in tensors.items())  # fmt: skip
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, values[name])
    assert versions == [p._version for p in model.parameters()]
    assert torch.equal(generator, torch.get_rng_state())
    assert [m.training for m in (model, model[0], model[1], model[2])] == [True, True, False, True]
    assert not any(m._forward_hooks for m in model.modules())
    assert model[0][0].plan.watcher is None


@pytest.mark.usefixtures("step_only")
@pytest.mark.parametrize("recipe", ["article", "ibm2020", "int4_hq_lss"])
def test_what_the_first_batch_decides_stays_undecided(recipe: str) -> None:
    """An audit of a model that has seen no batch leaves clips, signs and scales for the first batch to choose."""
    model = everywhere(network(), recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    audit(model, data())
    assert all(torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)) for name, t in model.state_dict().items())
    plain = everywhere(network(), recipe)
    assert torch.equal(model(3 * data()), plain(3 * data()))


def test_training_goes_on_as_without_an_audit() -> None:
    """A run that is audited between two steps ends in the same bits as one that is not."""
    results = []
    for looked_at in (False, True):
        model = everywhere(network(), "luq")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(data()).square().mean().backward()
            optimizer.step()
            if looked_at:
                audit(model, data())
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_model_in_eval_is_audited_in_training() -> None:
    """The step is a training step, whatever mode the model is in; afterwards it is in that mode again."""
    model = everywhere(network(), "ibm2020").eval()
    assert len(audit(model, data()).layers) == 6
    assert not model.training
    assert not model[0].plan.training


class Keywords(nn.Module):
    """A model with two inputs by name and a dict as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.layer(x) * scale
        return {"y": y, "classes": y.argmax(1)}


def test_a_batch_of_keywords_and_an_output_of_several_tensors() -> None:
    """A dict goes in as keyword arguments; the default loss takes the floating tensors of whatever comes out."""
    report = audit(everywhere(Keywords(), "ibm2020"), {"x": data(), "scale": torch.tensor(2.0)})
    assert report.ok
    assert [entry.gemm for entry in report.layers] == ["fprop", "dgrad", "wgrad"]


@pytest.mark.skipif(not kernels.native.available(), reason="no compiled library")
@pytest.mark.parametrize(
    ("weight", "ran_in"), [(hb.Sawb(), "native: "), (hb.Nearest(fmt="fp8_e4m3"), "reference: ")], ids=["int4", "fp8"]
)
def test_what_is_handed_over_is_not_claimed(weight: Spec, ran_in: str) -> None:
    """Under the native backend a product without a kernel (a zero point beside FP8) is reported as the reference's."""
    recipe = Recipe(name="hand", fprop=hb.Fprop(input=hb.MinMax(), weight=weight))
    model = hb.convert(network(), recipe, backend="native")
    assert audit(model, data()).layers[0].executed.startswith(ran_in)


def test_the_loss_gets_output_and_batch() -> None:
    """A loss of one's own is given the output and the whole batch, and its gradient is the one that is quantized."""
    targets = torch.arange(32) % 8
    seen = []

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[1])
        return F.cross_entropy(output, batch[1])

    assert audit(everywhere(network(), "ibm2020"), (data(), targets), loss).ok
    assert seen[0] is targets


def test_a_function_may_make_the_loss() -> None:
    """A function that calls the model itself is watched like a batch; its gradient is the one that is quantized."""
    x = data()
    by_function = audit(everywhere(network(), "ibm2020"), lambda model: model(x).square().mean())
    by_batch = audit(everywhere(network(), "ibm2020"), x)
    assert by_function.ok
    assert by_function.layers == by_batch.layers


@pytest.mark.parametrize("batch", [3, (1, 2, 3), "x"])
def test_an_impossible_batch_is_refused(batch: object) -> None:
    """What is no tensor, pair or dict raises and says what is possible."""
    with pytest.raises(TypeError, match=r"a tensor, a pair \(input, targets\) or a dict"):
        audit(everywhere(network(), "ibm2020"), batch)  # type: ignore[arg-type]


def test_the_json() -> None:
    """The JSON has what programs were promised, and is valid."""
    found = json.loads(audited().to_json(), parse_constant=pytest.fail)
    assert found["ok"] is True
    assert found["mac_share_4bit"] == 1.0
    assert {"name", "gemm", "codes_used", "executed", "operands"} <= set(found["layers"][0])
    assert {"quantizer", "check", "ok", "detail"} == set(found["self_test"][0])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the report, writes the JSON and leaves with status 0."""
    assert run_command(monkeypatch, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{kernels.resolve('auto')}: uint4 x int4" in out
    assert "82.9 % of 15,171,584 multiply-accumulates ran on 4-bit codes." in out
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert content["ok"] is True


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The help of the command ends with command lines that can be copied, and says when it fails."""
    assert cli.main(["audit", "--help"]) == 0
    out = capsys.readouterr().out
    assert "halfbyte audit digits --recipe ibm2020" in out
    assert "The exit status is 1" in " ".join(out.replace("│", " ").split())


def test_the_command_fails_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An audit that fails is status 1, with its reason on the screen and in the JSON."""
    monkeypatch.setattr(convert, "adopt", lambda *_: None)
    assert run_command(monkeypatch, tmp_path) == 1
    assert "* body, fprop: recipe ibm2020 was promised, but the layer is not converted" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "a.json").read_text())["ok"] is False  # type: ignore[operator]


def test_the_command_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown device is a user's error in one line."""
    assert cli.main(["audit", "digits", "--recipe", "fp32", "--device", "tpu"]) == 2
    assert "The device 'tpu' cannot be used here" in capsys.readouterr().err


def test_the_table_says_what_was_tested() -> None:
    """The printed report has a line for each quantizer with the checks that it passed."""
    assert "  Radix4() with Radix4(phase=ODD): two phases" in str(audited()).splitlines()
