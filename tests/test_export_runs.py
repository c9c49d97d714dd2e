"""Checkpoints of the lab leave the house and come back by the names that their files hold."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte as hb
from export_models import codes, run
from halfbyte.export import runs

pytest.importorskip("safetensors", reason="packed weights need the extra 'export'")
pytest.importorskip("lightning_fabric", reason="checkpoints need the extra 'lab'")

from halfbyte.cli import main
from halfbyte.lab import checkpoint
from halfbyte.lab.run import Run
from halfbyte.lab.trainer import train

DIGITS = (torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8),)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: these networks are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of a finished run with a phase of fine-tuning, and what its network computes."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train("digits", "ibm2020", 0, size="smoke", model="mlp", fine_tune=1, stash="int8", out_dir=folder)
    network = runs.open_checkpoint(folder).network
    return folder, codes(network), run(network, DIGITS)[0]


def test_a_run_comes_back_by_its_names(digits, tmp_path, capsys):
    """halfbyte export and halfbyte.load give a run's network again, though it was fine-tuned and had a stash."""
    folder, expected, y = digits
    assert main(["export", str(folder), "--format", "safetensors", "-o", str(tmp_path / "m.safetensors")]) == 0
    assert "digits, mlp, ibm2020" in capsys.readouterr().out
    network = hb.load(tmp_path / "m.safetensors")
    assert not network.training
    assert codes(network).keys() == expected.keys()
    assert all(torch.equal(codes(network)[name], expected[name]) for name in expected)
    assert torch.equal(run(network, DIGITS)[0], y)


def test_the_checkpoint_is_what_was_trained(digits):
    """The network of a checkpoint holds the checkpoint's tensors: weights, clips, statistics."""
    folder, _, _ = digits
    saved = torch.load(folder / "last.ckpt", weights_only=True)["model"]
    state = runs.open_checkpoint(folder / "last.ckpt").network.state_dict()
    assert all(torch.equal(state[name].nan_to_num(7), saved[name].nan_to_num(7)) for name in state)


def test_a_run_as_onnx(digits, tmp_path):
    """The exported graph of a run gives what its network gives, for a batch of any length."""
    runtime = pytest.importorskip("onnxruntime", reason="graphs need the extra 'export'")
    folder, _, y = digits
    assert main(["export", str(folder), "--format", "onnx", "-o", str(tmp_path / "m.onnx")]) == 0
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    three = torch.cat([DIGITS[0], DIGITS[0][:1]])
    (found,) = session.run(None, {"input_0": three.numpy()})
    assert (torch.from_numpy(found)[:2] - y).abs().max() <= (y.max() - y.min()) / 1500


def test_a_run_as_plain_weights(digits, tmp_path):
    """The plain weights of a run fit the network that torch alone would make."""
    from halfbyte.lab.models.digits import mlp

    folder, _, _ = digits
    assert main(["export", str(folder), "--format", "torch", "-o", str(tmp_path / "m.pt")]) == 0
    mlp().load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))


SEQUENCES = {
    ("ptb", "lstm-32"): {"vocabulary": 11},
    ("multi30k", "smallest"): {"vocabulary": 13},
    ("an4", "bilstm-2x16"): {"bands": 6, "symbols": 5},
}


@pytest.mark.parametrize(("task", "model"), SEQUENCES)
def test_sizes_that_data_gave_are_kept(task, model, tmp_path):
    """A network whose sizes came from its data is built again without data."""
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    one = Run(task=task, recipe="luq", seed=0, size="smoke", model=model)
    about = {"task": task, "network": model, "size": "smoke", "fine_tuned": False, "sizes": SEQUENCES[task, model]}
    network = runs.build({**about, "recipe": "luq"})
    checkpoint.save(fabric, tmp_path, one.identity, {"model": network.state_dict(), "position": {"epoch": 1}})
    assert main(["export", str(tmp_path), "--format", "safetensors", "-o", str(tmp_path / "m.safetensors")]) == 0
    again = hb.load(tmp_path / "m.safetensors")
    assert codes(again).keys() == codes(network).keys()
    assert all(torch.equal(codes(again)[name], c) for name, c in codes(network).items())


def test_a_wrong_question_is_refused(digits, tmp_path, capsys):
    """An unknown format, a batch without a graph and a folder without a checkpoint end with status 2 and the cure."""
    folder, _, _ = digits
    out = ["-o", str(tmp_path / "m")]
    assert main(["export", str(folder), "--format", "gguf", *out]) == 2
    assert "Possible: onnx, safetensors, torch." in capsys.readouterr().err
    assert main(["export", str(folder), "--format", "torch", "--batch", "2", *out]) == 2
    assert "Leave it out" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "torch", *out]) == 2
    assert "There is no checkpoint" in capsys.readouterr().err


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_checkpoints_are_refused(digits, tmp_path, data):
    """A checkpoint that is cut off or has a byte changed is refused, or is the one that was written."""
    folder, expected, _ = digits
    whole = (folder / "last.ckpt").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = whole[:at]
    if data.draw(st.booleans()):
        broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path = tmp_path / "last.ckpt"
    path.write_bytes(broken)
    try:
        network = runs.open_checkpoint(path).network
    except checkpoint.CheckpointError:
        return
    assert all(torch.equal(codes(network)[name], expected[name]) for name in expected)


def test_a_file_of_a_task_that_is_gone_is_refused(digits, tmp_path):
    """A file that names a network that this version lacks is refused by that name."""
    from halfbyte.export import safetensors

    folder, _, _ = digits
    path = tmp_path / "m.safetensors"
    main(["export", str(folder), "--format", "safetensors", "-o", str(path)])
    packed = safetensors.read(path)
    safetensors.write(type(packed)(about={**packed.about, "network": "gone"}, tensors=packed.tensors), path)
    with pytest.raises(hb.errors.UnknownNameError, match="'gone'"):
        hb.load(path)


SIZES = [{}, {"vocabulary": "x"}, {"vocabulary": -4}, {"vocabulary": 10**13}, {"vocabulary": 11, "other": 1}, None]


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_are_those_of_the_file(sizes, tmp_path):
    """A file that asks for a network larger than its tensors, or for no possible one, is refused."""
    from halfbyte.export import FileError, Packed, pack_model, safetensors

    about = {"task": "ptb", "network": "lstm-32", "size": "smoke", "fine_tuned": False, "sizes": {"vocabulary": 11}}
    packed = pack_model(runs.build({**about, "recipe": "luq"}), "luq", about)
    safetensors.write(
        Packed(about={**packed.about, "sizes": sizes}, tensors=packed.tensors), tmp_path / "m.safetensors"
    )
    with pytest.raises(FileError, match="gives the sizes"):
        hb.load(tmp_path / "m.safetensors")


def test_a_file_without_the_tensors_of_its_sizes_is_refused(tmp_path):
    """Where neither description nor tensors tell a size, the network cannot be made, and that is said."""
    from halfbyte.export import FileError, Packed, pack_model, safetensors

    about = {"task": "ptb", "network": "lstm-32", "size": "smoke", "fine_tuned": False, "sizes": {}}
    packed = pack_model(torch.nn.Linear(2, 2), "luq", about)
    safetensors.write(Packed(about=packed.about, tensors=packed.tensors), tmp_path / "m.safetensors")
    with pytest.raises(FileError, match="do not make its network"):
        hb.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("pickle", [b"\x80\x02R.", b"\x80\x02.", b"\x80\x02}X\x01\x00\x00\x00as.", b"\x80\x02}.", b""])
def test_forged_pickles_are_refused(pickle, tmp_path):
    """A whole archive around an impossible pickle is an error of ours, whatever torch's reader trips over."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged|but not a"):
        runs.open_checkpoint(tmp_path)


def test_a_checkpoint_without_identity_is_refused(tmp_path):
    """A file that calls itself a checkpoint and does not say of what is refused."""
    torch.save({"format": checkpoint._FORMAT, "model": {}}, tmp_path / "last.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match="but not a"):
        runs.open_checkpoint(tmp_path)


def test_a_layer_that_the_network_lacks_is_refused(digits, tmp_path):
    """A checkpoint of a deeper network is not cut down to the one that is here."""
    folder, _, _ = digits
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["model"]["deeper.weight"] = torch.zeros(2, 2)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match=r"deeper\.weight"):
        runs.open_checkpoint(tmp_path)
