"""The studies: each runs from end to end, and what their measurements rest on is right."""

import argparse
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.lab import tasks
from lab import mini_language

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
STUDIES = (
    "input_bits",
    "layer_scale",
    "radix",
    "rescaling",
    "rounding_threshold",
    "shrinkage",
    "text_ablations",
    "two_phases",
    "which_layers",
)


@pytest.fixture
def study(monkeypatch):
    """A function that imports a file of the folder as Python does when the file is run."""
    pytest.importorskip("sklearn", reason="the studies need halfbyte[lab]")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


@pytest.fixture
def common(study):
    return study("_common")


@pytest.fixture
def ground(common):
    """The digits at their smallest."""
    return common.grounds(common.Study(script=Path("x.py"), doc="A study.").arguments(["--smallest"]))[0]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(name, study, tmp_path, capsys):
    """At its smallest size a study trains all its arms on digits, prints a verdict and writes its file."""
    assert study(name).main(["--smallest", "--seeds", "1", "--out", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["study"] == name
    assert written["claim"].endswith(").")
    assert written["expected"]
    assert written["checks"]
    assert str(tmp_path) not in json.dumps(written)
    assert f"Verdict: {written['verdict']}" in capsys.readouterr().out
    trained = {one["recipe"] for one in written["runs"]}
    assert trained == set(written["recipes"])
    assert trained or name == "rounding_threshold"


@pytest.mark.parametrize(
    "path", sorted((EXPERIMENTS / "records" / "studies").glob("*.json")), ids=lambda path: path.stem
)
def test_published_studies(path):
    """Claim and expectation of a published study are still those of its docstring, and it has three seeds or more."""
    name, written = path.stem, json.loads(path.read_text())
    assert name in STUDIES
    doc = (EXPERIMENTS / f"{name}.py").read_text().split('"""')[1]
    assert written["claim"] == doc.split("\n\n")[0].replace("\n", " ")
    assert written["expected"] == " ".join(doc.partition("Expected before the first run:")[2].split())
    assert "--smallest" not in written["command"]
    assert len(written["seeds"]) >= 3


def test_index_is_up_to_date(study):
    """The index in README.md is what its script makes of the studies' files."""
    index = study("index")
    _, mark, below = (EXPERIMENTS / "README.md").read_text().partition(index.MARK)
    assert mark
    assert below == index.index(EXPERIMENTS / "records" / "studies")


@pytest.mark.parametrize("name", ["shrinkage", "text_ablations"])
def test_a_study_of_text_needs_its_text(name, study):
    """The digits, whose accuracy is better when it is higher, give no verdict on a loss."""
    with pytest.raises(SystemExit, match="--data-dir DIR"):
        study(name).main([])


def test_the_study_of_ablations_reads_windows_as_long_as_it_says(study, tmp_path, monkeypatch):
    """Both networks see 32 characters at a time, and take a batch of them."""
    mini_language.write(tmp_path, monkeypatch)
    module = study("text_ablations")
    asked = argparse.Namespace(data_dir=tmp_path, smallest=True, epochs=None)
    for ground in module.grounds(asked).values():
        (batch, *_) = ground.data.train.batches(4, seed=0, epoch=0)
        assert batch.inputs[0].shape == (4, module.CONTEXT)
        assert ground.task.learn(ground.network(), batch, (), ground.settings).loss.detach().isfinite()


def test_a_recurrent_network_goes_on_from_its_state_within_bounds(common, tmp_path, monkeypatch):
    """In a study as in a run: a pass begins without a state, goes on from the last one's, and bounds the gradients."""
    mini_language.write(tmp_path, monkeypatch)
    task = tasks.get("ptb")
    settings = replace(task.settings("smoke"), epochs=2, batch_size=4, clip_norm=1e-3, dropout=0.0)
    data = task.load_for(tmp_path, settings)
    states, norms = [], []

    def learn(network, batch, carry, asked):
        gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
        norms.extend([torch.stack(gradients).norm()] if gradients else [])
        found = task.learn(network, batch, carry, asked)
        states.append((carry, found.carry))
        return found

    ground = common.Ground(
        task=replace(task, learn=learn),
        settings=settings,
        data=data,
        network=lambda: task.models["lstm-32"](data, settings),
    )
    common.run(ground, hb.RECIPES["fp32"], 0)
    batches = data.train.count_batches(4)
    assert batches > 1
    for i in range(2 * batches):
        began, before = states[i][0], states[i - 1][1]
        assert len(began) == (len(before) if i % batches else 0)
        assert all(map(torch.equal, began, before))
    assert 0 < max(norms) <= 1e-3 * (1 + 1e-5)


def test_a_difference_needs_its_seeds(common):
    """Three seeds that agree show a difference; two do not; seeds that disagree do not; the sign tells the opposite."""

    def outcome(low, high, by=0.0):
        values = {"low": dict(enumerate(low)), "high": dict(enumerate(high))}
        return common.differs("", values, "low", "high", by=by).outcome

    assert outcome([1, 2, 3], [2, 3.1, 3.9]) == "shown"
    assert outcome([1, 2, 3], [2, 3.1, 3.9], by=5) == "the opposite"
    assert outcome([2, 3.1, 3.9], [1, 2, 3]) == "the opposite"
    assert outcome([1, 2], [2, 3.1]) == "not told apart"
    assert outcome([1, 2, 3], [4, 1, 3]) == "not told apart"
    assert outcome([], [1, 2, 3]) == "not told apart"


def test_interval_by_hand(common):
    """Of 1, 2, 3: deviation 1, Student's 97.5 % quantile of two degrees of freedom 4.3027, over the root of three."""
    assert common.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)


def test_verdict_names_what_failed(common):
    """A verdict is "as expected" only where all was shown, and else says what was not."""
    study = common.Study(script=Path("x.py"), doc="")
    study.checks = [common.Check.of("water is wet", "wet", True)]
    assert study.verdict == "as expected"
    study.checks.append(common.Check.of("fire is cold", "hot", False))
    assert study.verdict == "partly as expected, because the opposite: fire is cold"


def test_best_divisor_is_the_least_of_all(study):
    """The exact search finds no more error than any of 3,001 divisors does, and the error that it claims."""
    threshold = study("rounding_threshold")
    x = threshold.scaled(torch.randn(300, generator=torch.Generator().manual_seed(1)).exp())
    at, least = threshold.best(x)
    tried = [threshold.relative_error(x, 1 + k / 1000) for k in range(3001)]
    assert least <= min(tried) * (1 + 1e-12)
    assert threshold.relative_error(x, at) == pytest.approx(least, rel=1e-12)


def test_quantizer_of_the_threshold_by_hand(study):
    """Up from 4^n / d on: with d = 2 from the middle on the logarithmic axis; the top level has no level above it."""
    threshold = study("rounding_threshold")
    x = torch.tensor([0.0, 0.0078, 0.0079, -1.99, -2.0, 31.9, 32.0, 1e6])
    assert threshold.quantized(x, 2.0).tolist() == [0, 0, 4**-3, -1, -4, 16, 64, 64]
    assert torch.equal(threshold.quantized(x, 1.6), hb.quantize(x, hb.Radix4(), scale=1.0).dequantize().double())


@pytest.mark.parametrize("top", [1.0, 32.0, 33.0, 64.0, 1e-6, 1000.0])
def test_scaled_by_a_power_of_two(top, study):
    """The largest magnitude comes to lie in (32, 64], and the factor is a power of two."""
    x = study("rounding_threshold").scaled(torch.tensor([top, -top / 3]))
    assert 32 < x[0] <= 64
    assert math.frexp(float(x[0]) / torch.tensor(top).item())[0] == 0.5


def test_first_range_is_kept(study):
    """The range of the first training tensor is that of min-max, and every later tensor is rounded in it."""
    rescaling = study("rescaling")
    first, later = torch.linspace(-1, 2, 50), torch.linspace(-8, 8, 50)
    kept, anew = (spec.build() for spec in (rescaling.FirstRange(), hb.MinMax(momentum=0.0)))
    for tensor in (first, first / 10):
        kept.quantize(tensor, observe=True)
    q = kept.quantize(later, observe=True).q
    assert q.dequantize().min() == pytest.approx(-1)
    assert q.dequantize().max() == pytest.approx(2)
    assert torch.equal(
        kept.quantize(first, observe=True).q.dequantize(), anew.quantize(first, observe=True).q.dequantize()
    )


def test_first_scale_is_kept(study):
    """The first gradient sets the scale, and no vote moves it, where the paper's scale would follow."""
    rescaling = study("rescaling")
    for spec, after in ((rescaling.FirstScale(), 6), (hb.LayerGradScale(), 7)):
        scale = spec.build()
        for amax in (1.0, 0.1):
            scale.exponent(torch.tensor(amax), 64.0)
            scale.advance()
        assert int(scale.log2_scale) == after


def test_pixels_by_hand(study):
    """One bit is black and white, two are four even grays, and eight leave bytes as they are."""
    rounded_to = study("input_bits").rounded_to
    pixels = torch.arange(256, dtype=torch.uint8)
    assert rounded_to(1, 255.0)(pixels).unique().tolist() == [0, 255]
    assert rounded_to(2, 255.0)(pixels).unique().tolist() == [0, 85, 170, 255]
    assert torch.equal(rounded_to(8, 255.0)(pixels), pixels.float())
    assert rounded_to(1, 1.0)(torch.tensor([0.49, 0.51])).tolist() == [0, 1]


def test_inputs_are_changed_before_they_are_normalized(ground):
    """A ground with other inputs gives other batches in learning and judging, and its original stays as it is."""
    changed = ground.with_inputs(lambda x: 1 - x)
    for side in ("train", "test"):
        old, new = (next(iter(getattr(where.data, side).batches(8))).inputs[0] for where in (ground, changed))
        assert torch.equal(new, 1 - old)
        before = next(iter(getattr(changed.with_inputs(lambda x: x / 2).data, side).batches(8))).inputs[0]
        assert torch.equal(before, 1 - old / 2)


def test_runs_repeat_and_differ_by_recipe(common, ground):
    """The same seed gives the same bits, and a recipe that quantizes gives others than fp32."""
    curves = [common.run(ground, hb.RECIPES[name], 0).curves["train_loss"] for name in ("ibm2020", "ibm2020", "fp32")]
    assert curves[0] == curves[1] != curves[2]


def test_slope_by_hand(study):
    """Variances of 1, 1/2, 1/4 fall by a half each."""
    assert study("which_layers").slope([[(1.0, 1.0), (0.5, 1.0), (0.25, 1.0)]]) == [pytest.approx(0.5)]


def test_exact_gradients_compare_as_equal(study, ground):
    """Against itself the baseline has variance ratio one and cosine one in every convolution of the main path."""
    layers = study("which_layers")

    def network():
        return layers.bottlenecks(halved=False)

    weights = layers.learned(ground, network, 0)
    found = [layers.gradients(ground, network, weights, "int4_forward_only") for _ in range(2)]
    names = layers._in_order(network, found[0])
    assert len(names) == 13
    assert all(layers._compare(found[0][name], found[1][name]) == pytest.approx((1, 1)) for name in names)
