"""Packed weights in a file: they come back bit for bit, or the file is refused."""

import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import halfbyte as hb
from export_models import NETWORKS, codes, example, run, trained
from halfbyte import export
from halfbyte.errors import ConversionError, HalfbyteError, UnsupportedError
from halfbyte.export import FileError, safetensors

pytest.importorskip("safetensors", reason="packed weights need the extra 'export'")


def same(a, b):
    """Whether two dictionaries of tensors are equal, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(7), b[n].nan_to_num(7)) for n in a)


def numbers(model, packed):
    """A model's state but for the packed weights, whose floats are others after loading."""
    return {n: t for n, t in model.state_dict().items() if n not in packed and not n.endswith("_extra_state")}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_back(name, tmp_path):
    """A network's codes, all other state and its output in evaluation are equal after a round trip."""
    model, network, inputs = example(name)
    export.save_safetensors(model, tmp_path / "m.safetensors")
    again = hb.load(tmp_path / "m.safetensors", network())
    packed = {weight.parameter for weight in export.weights_in(model)}
    assert packed
    assert same(codes(model), codes(again))
    assert same(numbers(model, packed), numbers(again, packed))
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), run(again, inputs), strict=True))


@pytest.mark.parametrize("recipe", [name for name in hb.RECIPES if name not in ("fp32", "bf16", "mxfp4_backward_only")])
def test_recipes_come_back(recipe, tmp_path):
    """Codes and outputs of every recipe with a rounded weight are equal: zero points, rotations and blocks included."""
    torch.manual_seed(1)
    wide = "1x1" not in recipe
    x = torch.randn(6, 40) if wide else torch.randn(2, 4, 3, 3)
    model = trained(stack(wide), (x,), recipe)
    export.save_safetensors(model, tmp_path / "m.safetensors", recipe=recipe)
    again = hb.load(tmp_path / "m.safetensors", stack(wide))
    assert codes(model)
    assert same(codes(model), codes(again))
    assert torch.equal(run(model, (x,))[0], run(again, (x,))[0])


def stack(wide):
    """Four linear layers of a width that no block divides, or four 1x1 convolutions."""
    return nn.Sequential(*(nn.Linear(40, 40) if wide else nn.Conv2d(4, 4, 1) for _ in range(4)))


def test_an_eighth(tmp_path):
    """Packed weights take an eighth of their FP32 bytes, and a scale of four bytes each."""
    model, _, _ = example("resnet20")
    packed = export.save_safetensors(model, tmp_path / "m.safetensors")
    assert packed.packed_bytes == packed.float_bytes // 8 + 4 * len(packed.about["weights"])
    assert (tmp_path / "m.safetensors").stat().st_size < packed.float_bytes / 2


def test_saved_again_is_the_same_file(tmp_path):
    """What was loaded and saved again is the same file, byte for byte."""
    model, network, _ = example("transformer")
    export.save_safetensors(model, tmp_path / "a.safetensors")
    export.save_safetensors(hb.load(tmp_path / "a.safetensors", network()), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_exporting_changes_nothing(tmp_path):
    """A model in training mode is in training mode after an export, with the state that it had."""
    model, _, _ = example("mlp")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export.save_safetensors(model, tmp_path / "m.safetensors")
    assert all(module.training for module in model.modules())
    assert same(before, model.state_dict())


def test_a_loaded_model_does_not_train(tmp_path):
    """A training forward pass of stored codes is refused, and says how to train on."""
    model, network, inputs = example("mlp")
    export.save_safetensors(model, tmp_path / "m.safetensors")
    again = hb.load(tmp_path / "m.safetensors", network()).train()
    with pytest.raises(UnsupportedError, match=r"halfbyte\.restore\(model\)"):
        again(*inputs)


def test_restore_gives_what_the_codes_stand_for(tmp_path):
    """A loaded model restored to plain layers holds the plain weights that the format torch exports."""
    model, network, _ = example("mlp")
    export.save_safetensors(model, tmp_path / "m.safetensors")
    plain = hb.restore(hb.load(tmp_path / "m.safetensors", network()))
    assert same(dict(plain.state_dict()), export.plain_state(model))


def test_plain_weights_are_code_times_scale(tmp_path):
    """The format torch is a state dict of the plain network, its rounded weights whole multiples of their scale."""
    model, network, _ = example("resnet20")
    export.save_torch(model, tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    network().load_state_dict(state)
    for weight in export.weights_in(model):
        q = weight.encode()
        values = torch.tensor(q.format.integers, dtype=torch.float32)[q.codes().long()]
        assert torch.equal(state[weight.parameter], values * q.scale)


def test_rows_without_codes_stay_floats(tmp_path):
    """Where only the queries of an attention are rounded, keys and values come back as the floats they were."""
    torch.manual_seed(5)
    inputs = (torch.randn(3, 2, 8),) * 3
    rules = [hb.Rule(fqn="q", recipe="luq"), hb.Rule(fqn="*", recipe="fp32")]
    model = trained(nn.MultiheadAttention(8, 2), inputs, "luq", rules=rules)
    export.save_safetensors(model, tmp_path / "m.safetensors")
    again = hb.load(tmp_path / "m.safetensors", hb.convert(nn.MultiheadAttention(8, 2), "luq", rules=rules))
    assert torch.equal(model.in_proj_weight[8:], again.in_proj_weight[8:])
    assert not torch.equal(model.in_proj_weight[:8], again.in_proj_weight[:8])
    assert torch.equal(run(model, inputs)[0], run(again, inputs)[0])


class Tied(nn.Module):
    """An embedding whose matrix is the last layer's, too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.body(self.embedding(words)))


def test_a_tied_embedding_stays_in_floating_point(tmp_path):
    """A matrix that an embedding reads as floats and a layer as codes comes back as both."""
    torch.manual_seed(5)
    words = torch.arange(12)
    model = trained(Tied(), (words,), "article")
    export.save_safetensors(model, tmp_path / "m.safetensors")
    again = hb.load(tmp_path / "m.safetensors", Tied())
    assert torch.equal(model.embedding.weight, again.embedding.weight)
    assert torch.equal(run(model, (words,))[0], run(again, (words,))[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file, and what makes the model that it is of."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("small") / "m.safetensors"
    export.save_safetensors(trained(network(), (torch.randn(4, 6),), "article"), path)
    return path


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused(small, tmp_path, data):
    """A file with a byte changed, cut off or added is refused with an error of ours, whatever the byte."""
    whole = small.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["change", "cut", "add"])):
        case "change":
            broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
        case "cut":
            broken = whole[:at]
        case _:
            broken = whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at:]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(broken)
    with pytest.raises(FileError, match=r"damaged|changed|none of halfbyte's"):
        hb.load(path, network())


def test_every_byte_of_a_tensor_counts(small, tmp_path):
    """A change of any byte behind the header is noticed, though safetensors itself has no checksum."""
    whole = bytearray(small.read_bytes())
    path = tmp_path / "broken.safetensors"
    for at in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(FileError, match="changed after it was written"):
            safetensors.read(path)


FORGED = {
    "codes/0": lambda t: t[:-1],
    "scale/2": lambda t: t.double(),
    "zero_point/0": lambda t: t.expand(3),
    "state/0.bias": lambda t: t[:-1],
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_tensors_are_refused(name, small, tmp_path):
    """A tensor of another length or type, under a checksum that fits, is refused before it is computed with."""
    packed = safetensors.read(small)
    tensors = {**packed.tensors, name: FORGED[name](packed.tensors[name]).clone()}
    path = tmp_path / "forged.safetensors"
    safetensors.write(export.Packed(about=packed.about, tensors=tensors), path)
    with pytest.raises(FileError, match=r"changed by hand|of another model"):
        hb.load(path, network())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path, content):
    """Bytes that are no file of ours are refused with an error of ours."""
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match="damaged"):
        hb.load(path, network())


SCRAPS = st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.text(max_size=4), st.lists(st.integers(-1, 9)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_descriptions_are_refused(small, tmp_path, data):
    """A description that was changed together with its checksum is refused, or means the model that it meant before."""
    packed = safetensors.read(small)
    about = json.loads(json.dumps(packed.about))
    holder = about
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    holder[key] = data.draw(SCRAPS)
    path = tmp_path / "forged.safetensors"
    safetensors.write(export.Packed(about=about, tensors=packed.tensors), path)
    try:
        again = hb.load(path, network())
    except HalfbyteError:
        return
    assert same(codes(again), codes(hb.load(small, network())))


def test_foreign_files_are_refused(tmp_path):
    """A safetensors file of somebody else's, and a missing one, are refused with what they are."""
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    with pytest.raises(FileError, match="none of halfbyte's"):
        hb.load(tmp_path / "theirs.safetensors")
    with pytest.raises(FileError, match="There is no file"):
        hb.load(tmp_path / "nothing.safetensors")


def test_nothing_is_unpickled(tmp_path):
    """A pickle is refused before a byte of it is executed."""
    torch.save({"weight": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="damaged or no safetensors file"):
        hb.load(tmp_path / "m.safetensors", network())


def test_another_model_is_refused(small):
    """A model of another shape, or with other layers, is refused and told what differs."""
    with pytest.raises(FileError, match=r"Build the model that was exported"):
        hb.load(small, nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)))
    with pytest.raises(FileError, match="in only one"):
        hb.load(small, nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3)))


def test_another_recipe_is_refused(small):
    """A model that was converted by another recipe than the file's is refused with both conventions."""
    with pytest.raises(ConversionError, match="other conventions"):
        hb.load(small, hb.convert(network(), "luq", rules=[hb.Rule(recipe="luq")]))


def test_a_model_of_yours_must_be_given(small):
    """A file that names no network of the lab needs the model, and says so."""
    with pytest.raises(FileError, match=r"halfbyte\.load\(path, model\)"):
        hb.load(small)


def test_a_recipe_without_a_name_needs_the_converted_model(tmp_path):
    """A plain model cannot be converted by a recipe that only its owner knows, and the error says what to give."""
    mine = hb.Recipe(name="mine", fprop=hb.Fprop(input=hb.MinMax(), weight=hb.MinMax()))
    x = torch.randn(4, 6)
    model = trained(network(), (x,), mine)
    export.save_safetensors(model, tmp_path / "m.safetensors")
    with pytest.raises(ConversionError, match="'mine'"):
        hb.load(tmp_path / "m.safetensors", network())
    again = hb.load(tmp_path / "m.safetensors", hb.convert(network(), mine))
    assert torch.equal(run(model, (x,))[0], run(again, (x,))[0])


def test_broken_weights_are_not_exported(tmp_path):
    """A weight with NaN is refused by its name, and no file is left."""
    model = trained(network(), (torch.randn(4, 6),), "article")
    model[0].weight.data[0, 0] = torch.nan
    with pytest.warns(hb.errors.NonFiniteWarning), pytest.raises(UnsupportedError, match="0: a weight with NaN"):
        export.save_safetensors(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, small):
    """Without safetensors both ways say which package is missing and how to install it."""
    for name in [n for n in sys.modules if n.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(HalfbyteError, match=r"pip install 'halfbyte\[export\]'"):
        hb.load(small, network())


CHANGES = {
    "a plan's name": lambda about: about["conventions"][0]["plans"].__setitem__(0, [1]),
    "no scale format": lambda about: about["weights"]["0"].update(view=[5, 6], sizes=[5, 6]),
    "a length beyond 63 bits": lambda about: about["weights"]["0"].update(shape=[2**70]),
    "a layer's number beyond 63 bits": lambda about: about["plans"]["0"].update(layer=2**70),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_description_of_absurd_parts_is_refused(what, small, tmp_path):
    """A name that is a list, blocks without a scale format, numbers that no memory holds: all are errors of ours."""
    packed = safetensors.read(small)
    about = json.loads(json.dumps(packed.about))
    CHANGES[what](about)
    safetensors.write(export.Packed(about=about, tensors=packed.tensors), tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="does not say what a packed model must say"):
        hb.load(tmp_path / "m.safetensors", network())


@pytest.mark.parametrize("name", ["rows/x/0.weight", "rows/0/gone", "rows/0/0.weight", "codes/gone", "gone"])
def test_a_tensor_of_no_use_is_refused(name, small, tmp_path):
    """Rows that the model has codes for, or that it lacks, and names that mean nothing are refused, not passed over."""
    packed = safetensors.read(small)
    tensors = {**packed.tensors, name: torch.zeros(2, 6)}
    safetensors.write(export.Packed(about=packed.about, tensors=tensors), tmp_path / "m.safetensors")
    with pytest.raises(FileError, match=f"{name} differs"):
        hb.load(tmp_path / "m.safetensors", network())


def test_missing_rows_are_refused(tmp_path):
    """A file without the floating rows of an attention does not leave those that the model was made with."""
    rules = [hb.Rule(fqn="q", recipe="luq"), hb.Rule(fqn="*", recipe="fp32")]
    inputs = (torch.randn(3, 2, 8),) * 3
    model = trained(nn.MultiheadAttention(8, 2), inputs, "luq", rules=rules)
    packed = export.pack_model(model)
    tensors = {n: t for n, t in packed.tensors.items() if not n.startswith("rows/")}
    assert len(tensors) < len(packed.tensors)
    safetensors.write(export.Packed(about=packed.about, tensors=tensors), tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="rows/8/in_proj_weight differs"):
        hb.load(tmp_path / "m.safetensors", hb.convert(nn.MultiheadAttention(8, 2), "luq", rules=rules))


def test_codes_of_block_scales_beyond_their_format_are_refused(tmp_path):
    """A block scale whose code its format lacks is refused before it is looked up."""
    model = trained(stack(True), (torch.randn(6, 40),), "mxfp4")
    packed = export.pack_model(model)
    about = json.loads(json.dumps(packed.about))
    about["weights"]["1"]["scale_format"] = "int4"
    safetensors.write(export.Packed(about=about, tensors=packed.tensors), tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="codes that int4 lacks"):
        hb.load(tmp_path / "m.safetensors", stack(True))


def test_a_loaded_model_takes_no_other_weights(small):
    """A loaded model would go on with its codes, so another state or file is refused until it is plain again."""
    again = hb.load(small, network())
    with pytest.raises(UnsupportedError, match=r"halfbyte\.restore\(model\)"):
        again.load_state_dict(again.state_dict())
    with pytest.raises(UnsupportedError, match="packed weights already"):
        hb.load(small, again)
    assert same(codes(hb.load(small, hb.restore(again))), codes(hb.load(small, network())))


def test_a_weight_quantizer_of_several_modules_is_kept(tmp_path):
    """What a weight's quantizer holds in modules of its own is in the loaded model's state, too."""
    spec = hb.Pact(clip=1.0, signed=True, settle=5)
    mine = hb.Recipe(name="mine", fprop=hb.Fprop(input=hb.MinMax(), weight=spec))
    model = trained(network(), (torch.randn(4, 6),), mine)
    export.save_safetensors(model, tmp_path / "m.safetensors")
    again = hb.load(tmp_path / "m.safetensors", hb.convert(network(), mine))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_file_that_cannot_be_written_is_said(small, tmp_path):
    """A folder that cannot be made is an error of ours, with the cure."""
    (tmp_path / "file").touch()
    with pytest.raises(HalfbyteError, match="name another place"):
        export.save_safetensors(hb.load(small, network()), tmp_path / "file" / "m.safetensors")
