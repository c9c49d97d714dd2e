"""A clip that follows the data for the first passes: `Pact(settle=N)` and who gets it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import halfbyte as hb
from halfbyte import Pact
from halfbyte.errors import NonFiniteWarning, SpecError, UnsupportedError
from halfbyte.quantizers import Quantizer, contract, settling
from halfbyte.recipes import Fprop, Recipe


def squared_error(x: Tensor, clip: float, levels: int, *, signed: bool) -> float:
    """What rounding x under a clip loses."""
    spec = Pact(clip=clip, signed=signed)
    assert levels == (7 if signed else 15)
    return float((hb.quantize(x, spec).dequantize(torch.float64) - x.double()).square().sum())


def passes(spec: Pact, *batches: Tensor) -> list[float]:
    """The clip used for each batch, one training pass each, and what the one after the last would use."""
    quantizer = spec.build()
    clips = []
    for x in batches:
        quantizer.begin_pass()
        clips.append(quantizer.clip.item())
        quantizer.quantize(x, observe=True)
    quantizer.begin_pass()
    return [*clips, quantizer.clip.item()]


@pytest.mark.parametrize("signed", [False, True])
def test_the_next_clip_has_the_least_error_of_those_around_this_one(signed):
    """After a pass the clip is the one of 32, an eighth of an octave apart, that loses least on the pass' tensor."""
    x = torch.randn(1500)
    if not signed:  # What lies below zero is cut to it under any clip and has no say.
        x = torch.where(x < 0, 9 * x, x)
    used, after = passes(Pact(clip=2.0, signed=signed, settle=3), x)
    tried = [2.0 * 2.0 ** (n / 8) for n in range(-16, 16)]
    errors = [squared_error(x, clip, 7 if signed else 15, signed=signed) for clip in tried]
    assert used == 2.0
    assert after == torch.tensor(tried[errors.index(min(errors))]).item()


def test_a_clip_follows_a_tensor_that_grows_tenfold():
    """States that grow from 0.1 to 1 within three passes have their clip at the fourth."""
    states = torch.linspace(-1, 1, 999)
    clips = passes(Pact(clip=1.0, signed=True, settle=9), *(scale * states for scale in (0.1, 0.1, 0.4, 1.0, 1.0)))
    # Evenly spread numbers lose least where the clip lies half a step beyond the largest.
    assert clips[0] == 1.0
    assert clips[2] == pytest.approx(0.1, rel=0.1)
    assert clips[-1] == pytest.approx(1.0, rel=0.1)


def test_errors_of_all_steps_of_a_sequence_count():
    """Tensors of one pass are judged together: two halves, the second much smaller, give the clip of the whole."""
    x = torch.randn(1024) * torch.tensor([1.0, 0.05]).repeat_interleave(512)
    quantizer = Pact(clip=1.0, signed=True, settle=2).build()
    for half in x.split(512):
        quantizer.quantize(half, observe=True)
    quantizer.begin_pass()
    assert quantizer.clip.item() == passes(Pact(clip=1.0, signed=True, settle=2), x)[-1]


def test_a_clip_settles_for_as_many_passes_as_asked():
    """After `settle` passes the data moves the clip no more; it is the optimizer's."""
    quantizer = Pact(clip=1.0, signed=True, settle=2).build()
    moved = []
    for scale in (4.0, 0.5, 9.0, 9.0):
        quantizer.quantize(scale * torch.randn(512), observe=True)
        before = quantizer.clip.item()
        quantizer.begin_pass()
        moved.append(quantizer.clip.item() != before)
    assert moved == [True, True, False, False]


def test_what_the_optimizer_does_meanwhile_is_undone():
    """The next clip is a multiple of the one that was in use, wherever the optimizer has moved the parameter since."""
    x = torch.randn(512)
    quantizer = Pact(clip=1.0, signed=True, settle=2).build()
    quantizer.quantize(x, observe=True)
    with torch.no_grad():
        quantizer.clip.fill_(77.0)
    quantizer.begin_pass()
    assert quantizer.clip.item() == passes(Pact(clip=1.0, signed=True, settle=2), x)[-1]


@pytest.mark.parametrize("nothing", [torch.zeros(9), torch.full((9,), torch.nan), torch.empty(0)])
@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
def test_a_pass_without_numbers_moves_nothing_and_does_not_count(nothing):
    """All zeros, all NaN and an empty tensor leave the clip and the number of passes that are left."""
    quantizer = Pact(clip=1.0, signed=True, settle=2).build()
    quantizer.quantize(nothing, observe=True)
    quantizer.begin_pass()
    assert quantizer.clip.item() == 1.0
    assert quantizer.settling.left == 2


def test_a_pass_without_observation_is_not_seen():
    """Under evaluation, or where a forward pass is repeated, nothing is added up."""
    quantizer = Pact(clip=1.0, signed=True, settle=2).build()
    quantizer.quantize(torch.randn(64))
    assert not quantizer.settling.errors.any()


def test_a_large_tensor_is_sampled_at_every_place_of_its_rows():
    """Elements are taken an odd number apart: a row of 64 of which only one column is large is seen as it is."""
    x = torch.zeros(2048, 64)
    x[:, 5] = 1.0
    quantizer = Pact(clip=4.0, signed=True, settle=1).build()
    quantizer.quantize(x, observe=True)
    assert quantizer.settling.errors.any()


@pytest.mark.parametrize("count", [2049, 4000, 4096, 100_000])
def test_the_end_of_a_tensor_is_seen(count):
    """Numbers that stand only in the last quarter of a tensor of any length have a say."""
    x = torch.zeros(count)
    x[-count // 4 :] = 1.0
    quantizer = Pact(clip=4.0, signed=True, settle=1).build()
    quantizer.quantize(x, observe=True)
    assert quantizer.settling.errors.any()


def test_ranks_choose_one_clip_from_all_their_errors(monkeypatch):
    """The errors of all ranks are added before the least is looked for."""
    mine, other = 0.2 * torch.randn(512), 3.0 * torch.randn(512)
    far = Pact(clip=1.0, signed=True, settle=2).build()
    far.quantize(other, observe=True)
    theirs = far.settling.errors.clone()
    here = Pact(clip=1.0, signed=True, settle=2).build()
    here.quantize(mine, observe=True)
    monkeypatch.setattr(settling, "sum_of_ranks", lambda errors: errors + theirs)
    here.begin_pass()
    monkeypatch.undo()
    assert here.clip.item() == passes(Pact(clip=1.0, signed=True, settle=2), torch.cat([mine, other]))[-1]


def network() -> nn.Module:
    """An LSTM and a linear layer, converted under a recipe with learned clips."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.lstm, model.head = nn.LSTM(4, 8), nn.Linear(8, 4)
    model.forward = lambda x: model.head(model.lstm(x)[0])
    recipe = Recipe(name="mine", fprop=Fprop(input=Pact(signed=None), weight=hb.Sawb()))
    return hb.convert(model, recipe)


def clips(model: nn.Module) -> list[float]:
    """All learned clips."""
    return [p.item() for name, p in model.named_parameters() if name.endswith("clip")]


def trained(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """The model after a step of Adam for each batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def test_every_clip_of_a_model_with_recurrent_layers_settles():
    """`convert` lets the clips of the LSTM and of the layer after it follow the data for 500 passes."""
    left = [int(m.left) for m in network().modules() if isinstance(m, settling.Settling)]
    assert left == [500, 500, 500]


def test_a_model_without_recurrent_layers_learns_its_clips_at_once():
    """Normalized tensors do not grow: nothing settles in a network of linear layers."""
    model = hb.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "ibm2020")
    assert not [m for m in model.modules() if isinstance(m, settling.Settling)]


@pytest.mark.parametrize(("asked", "left"), [(7, [7, 7, 7]), (0, [])])
def test_what_a_recipe_asks_for_is_kept(asked, left):
    """A recipe's own number of passes, 0 too, stands in a model with recurrent layers."""
    model = nn.Sequential()
    model.lstm, model.head = nn.LSTM(4, 8), nn.Linear(8, 4)
    recipe = Recipe(name="mine", fprop=Fprop(input=Pact(signed=None, settle=asked), weight=hb.Sawb()))
    hb.convert(model, recipe)
    assert [int(m.left) for m in model.modules() if isinstance(m, settling.Settling)] == left


def test_a_run_that_is_resumed_while_it_settles_ends_in_the_same_bits():
    """State between two passes, the errors too, is in the state dict."""
    batches = [scale * torch.randn(5, 3, 4) for scale in (0.1, 0.3, 1.0, 3.0)]
    whole = trained(network(), batches)
    first = trained(network(), batches[:2])
    second = network()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model in (first, second):
        trained(model, batches[2:])
    assert clips(first) == clips(second)
    assert clips(whole) != clips(network())


def test_activation_checkpointing_settles_in_the_same_bits():
    """A forward pass that is run again in backward sees nothing twice and ends no pass."""
    batches = [(scale * torch.randn(5, 3, 4)).requires_grad_() for scale in (0.1, 0.3, 1.0)]
    plain, again = trained(network(), batches), network()
    forward = again.forward
    again.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    trained(again, batches)
    assert clips(plain) == clips(again)


def test_a_settling_clip_of_a_broken_tensor_stays_a_number():
    """A NaN among numbers has no say in the next clip."""
    x = torch.randn(512)
    broken = x.clone()
    broken[3] = torch.nan
    with pytest.warns(NonFiniteWarning):
        found = passes(Pact(clip=1.0, signed=True, settle=2), broken)[-1]
    x[3] = 0.0
    assert found == passes(Pact(clip=1.0, signed=True, settle=2), x)[-1]


@pytest.mark.parametrize("settle", [-1, 2.5])
def test_what_is_no_number_of_passes_is_refused(settle):
    """A negative number and a broken one raise, with what is possible."""
    with pytest.raises(SpecError, match=rf"settle={settle}.*0 or more passes"):
        Pact(settle=settle)


def test_a_converted_layers_clips_move_without_an_optimizer():
    """Each training forward pass of a model begins with the clips that the one before called for."""
    model, x = network(), torch.randn(5, 3, 4)
    model(0.05 * x)
    first = clips(model)
    model(0.1 * x)
    model(x)
    assert all(new != old for new, old in zip(clips(model), first, strict=True))


def test_a_recipe_without_settling_has_the_conventions_that_it_had_before():
    """Checkpoints from before there was `settle` are read on: their text of conventions is that of a clip without."""
    assert repr(Pact(clip=2.0)) == "Pact(clip=2.0, signed=False, bits=4, plus=False)"
    assert repr(Pact(settle=0)) == "Pact(clip=None, signed=False, bits=4, plus=False, settle=0)"


def lost(monkeypatch, first: float, *after: float) -> Quantizer:
    """A clip of one process of two, set to `first`, after optimizer's steps and passes that set it again."""
    monkeypatch.setattr(contract, "ranks", lambda: 2)
    quantizer = Pact(clip=1.0, signed=True, settle=9).build()
    quantizer.set_first(torch.tensor(first))
    for value in after:
        quantizer.learned.data.fill_(value)
        quantizer.check_first()
        quantizer.set_first(torch.tensor(first))
    return quantizer


@pytest.mark.parametrize(("first", "after"), [(1.02, (1.001,)), (0.5, (0.51, 0.99))])
def test_an_optimizers_step_is_no_loss(monkeypatch, first, after):
    """A clip that steps across 1, from near it or once it was seen to be kept, is not taken for a sharded one."""
    assert lost(monkeypatch, first, *after).learned.item() == torch.tensor(first).item()


def test_a_clip_that_comes_near_1_is_still_watched(monkeypatch):
    """Clips near 1 show nothing, and the first that lies elsewhere and is lost is found."""
    quantizer = lost(monkeypatch, 1.0, 1.0)
    quantizer.set_first(torch.tensor(0.5))
    quantizer.learned.data.fill_(1.0)
    with pytest.raises(UnsupportedError, match="Are the parameters sharded"):
        quantizer.check_first()
