"""The command: what it prints, what it writes, and how it says no."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from halfbyte import RECIPES, formats, kernels, picture
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.lab import record, tasks, trainer

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """Every command runs where it writes nothing that stays, in a wide terminal, with one thread like its children."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    yield
    torch.set_num_threads(threads)


def test_import_brings_no_lab():
    """Importing the library brings torch, and nothing that only the lab or the command needs."""
    script = """
        import sys, halfbyte
        lab = ("halfbyte.lab", "halfbyte.cli", "lightning_fabric", "typer", "rich", "sklearn", "scipy", "PIL")
        print([name for name in lab if name in sys.modules], "torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[] True\n"


def test_missing_extra_names_the_cure():
    """Without Typer the command says in one line which extra to install, and leaves with status 2."""
    script = "import sys; sys.modules['typer'] = None; from halfbyte.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "halfbyte: the command needs typer. Install it with: pip install 'halfbyte[lab]'\n"


def test_version(capsys):
    """--version prints the version of the package."""
    from halfbyte import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"halfbyte {__version__}\n"


@pytest.mark.parametrize("command", ["compare", "train", "formats", "recipes", "quantize"])
def test_help_has_an_example(command, capsys):
    """The help of every command ends with a command line that can be copied."""
    assert main([command, "--help"]) == 0
    assert f"Examples:\n \n halfbyte {command}" in "\n".join(
        line.rstrip() or " " for line in capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["formats", "int5"], "There is no format named 'int5'. Did you mean 'int"),
        (["recipes", "ibm202"], "There is no recipe named 'ibm202'. Did you mean 'ibm2020'?"),
        (["train", "digit", "--recipe", "fp32"], "There is no task named 'digit'. Did you mean 'digits'?"),
        (["train", "digits", "--recipe", "fp33"], "There is no recipe named 'fp33'. Did you mean 'fp32'?"),
        (["compare", "digits", "--recipes", "fp32,bf61"], "There is no recipe named 'bf61'. Did you mean 'bf16'?"),
        (["compare", "digits", "--recipes", "fp32", "--size", "cpuu"], "Did you mean 'cpu'?"),
        (["compare", "digits", "--recipes", "fp32,fp32"], "each only once; got ['fp32', 'fp32']"),
        (["train", "digits", "--recipe", "fp32", "--resume", "gone"], "There is no checkpoint to resume in gone"),
        (["quantize", "gone.png", "--out", "a.png"], "gone.png cannot be read as an image"),
        (["quantize", "gone.png", "--out", "a.jpg"], "--out a.jpg is no PNG"),
    ],
)
def test_wrong_question(arguments, text, capsys):
    """What cannot be done is one line on the error stream with the cure, status 2 and no traceback."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_wrong_option_is_status_2(capsys):
    """An option that does not exist is refused with status 2."""
    assert main(["formats", "--colour"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_formats_lists_all(capsys):
    """Without a name every format is listed."""
    assert main(["formats"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in formats.FORMATS)


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_formats_json_is_the_table(name, capsys):
    """The JSON of a format holds every value at the index of its code; NaN and infinities are strings."""
    assert main(["formats", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    fmt = formats.get(name)
    assert [str(float(value)) for value in found["values"]] == [str(value) for value in fmt.values]
    assert (found["name"], found["bits"], found["radix"]) == (name, fmt.bits, fmt.radix)
    assert found["saturate"] == list(fmt.saturate)


def test_formats_table_shows_every_code(capsys):
    """The table of a format has a row of code, bits and value for each code, and says where it saturates."""
    assert main(["formats", "fp4_e3m0_r4_odd"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    values = formats.fp4_e3m0_r4_odd.values
    assert [(int(code), bits, float(value)) for code, bits, value in rows] == [
        (code, f"{code:04b}", value) for code, value in enumerate(values)
    ]
    assert "radix 4" in out
    assert "odd phase" in out
    assert "saturates at -32 and 32" in out


def test_recipes(capsys):
    """All recipes are listed; one in full is exactly what the recipe says of itself."""
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert main(["recipes", "ibm2020"]) == 0
    assert capsys.readouterr().out == f"{RECIPES['ibm2020']}\n"


@pytest.mark.parametrize("backend", ["reference", kernels.resolve("auto")])
def test_compare_says_who_computed(backend, capsys):
    """Below the table stands the backend: emulation says so, and so do compiled kernels."""
    arguments = ["compare", "digits", "--recipes", "ibm2020", "--seeds", "1", "--size", "smoke", "--model", "mlp"]
    assert main([*arguments, "--backend", backend]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert ("Four bits are emulated" in words) == (backend == "reference")
    assert f"backend {kernels.describe(backend)}" in words


def test_compare_prints_and_writes(capsys, tmp_path):
    """The comparison prints a row for each recipe and writes the promised JSON."""
    arguments = ["compare", "digits", "--recipes", "fp32,ibm2020", "--seeds", "1", "--size", "smoke", "--model", "mlp"]
    assert main([*arguments, "--out", "r", "--json", "new/c.json"]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "new" / "c.json").read_text())
    assert list(content) == ["task", "metric", "runs", "summary"]
    assert [(r["recipe"], r["seed"]) for r in content["runs"]] == [("fp32", 0), ("ibm2020", 0)]
    for name, entry in content["summary"].items():
        assert any(name in line and f"{entry['mean']:.2f} ± 0.00" in line for line in out.splitlines())
    assert (
        record.read(tmp_path / "r" / "digits-mlp-smoke-fp32-seed0" / "record.json").value == content["runs"][0]["value"]
    )


def test_train_tells_every_measure(capsys, monkeypatch):
    """The last line of a training has the metric and the further measures, each with its unit."""
    digits = dataclasses.replace(tasks.get("digits"), judge=lambda *_: tasks.Judgment(12, {"another": 0.5}))
    monkeypatch.setattr(tasks, "TASKS", {"digits": digits})
    assert main(["train", "digits", "--recipe", "fp32", "--size", "smoke", "--model", "mlp", "--no-report"]) == 0
    assert "digits-mlp-smoke-fp32-seed0: accuracy 12.00 %, another 0.50 % in " in capsys.readouterr().out


def test_compare_all_means_every_recipe(monkeypatch):
    """`--recipes all` asks for every recipe there is, and one's own can stand beside it."""
    from halfbyte.lab import compare

    asked = []

    def note(task, names, seeds, **_):
        asked.append((task, list(names), list(seeds)))
        raise HalfbyteError("enough")

    monkeypatch.setattr(compare, "compare", note)
    for names in ("all", "all, mine:recipe"):
        assert main(["compare", "digits", "--recipes", names, "--seeds", "2"]) == 2
    assert asked == [("digits", list(RECIPES), [0, 1]), ("digits", [*RECIPES, "mine:recipe"], [0, 1])]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training_prints_the_command_that_goes_on(number, status, tmp_path):
    """A signal ends the command with its status after it printed how to go on; that very command finishes the run."""
    start = [sys.executable, "-c", "import sys; from halfbyte.cli import main; sys.exit(main())"]
    arguments = ["train", "digits", "--recipe", "fp32", "--size", "full", "--model", "mlp", "--out", "my run"]
    child = subprocess.Popen([*start, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "my run" / "last.ckpt").exists():  # It exists as soon as the run is ready for signals.
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == status
    command = error.decode().splitlines()[-1].strip()
    assert command == ("halfbyte train digits --recipe fp32 --seed 0 --size full --model mlp --resume 'my run'")
    assert not (tmp_path / "my run" / "record.json").exists()
    assert main(["train", "digits", "--recipe", "fp32", "--size", "full", "--model", "mlp", "--resume", "my run"]) == 0
    assert record.read(tmp_path / "my run" / "record.json").size == "full"


def test_the_command_that_goes_on_keeps_its_options(tmp_path, capsys, monkeypatch):
    """What was chosen beside the run itself, where it writes probes and who computes, is in the printed command."""
    real = trainer.train

    def stopped(*args, progress, **how):
        def watch(step):
            os.kill(os.getpid(), signal.SIGINT)

        return real(*args, progress=watch, **how)

    monkeypatch.setattr(trainer, "train", stopped)
    arguments = ["train", "digits", "--recipe", "fp32", "--size", "smoke", "--model", "mlp", "--out", "run"]
    assert main([*arguments, "--backend", "reference", "--tensorboard", "a board"]) == 130
    command = capsys.readouterr().err.splitlines()[-1].strip()
    assert command.endswith("--backend reference --resume run --tensorboard 'a board'")


def gradient(mode: str, path) -> Image.Image:
    """A picture with every gray from 0 to 255, or its colors, and an alpha that varies."""
    gray = Image.frombytes("L", (16, 16), bytes(range(256)))
    bands = {"L": [gray], "LA": [gray, gray], "RGB": [gray] * 3, "RGBA": [gray] * 4}[mode]
    image = Image.merge(mode, bands) if len(bands) > 1 else gray
    image.save(path)
    return image


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_picture_panels(mode, tmp_path, capsys):
    """Three panels of the picture's mode: the first is the original, pixel by pixel; alpha is kept in all."""
    image = gradient(mode, tmp_path / "in.png")
    assert main(["quantize", "in.png", "--out", "new/out.png"]) == 0
    out = Image.open(tmp_path / "new" / "out.png")
    assert (out.mode, out.size) == (mode, (3 * 16 + 2 * 8, 16))
    assert out.crop((0, 0, 16, 16)).tobytes() == image.tobytes()
    middle = out.crop((24, 0, 40, 16))
    assert len(set(middle.getchannel(0).tobytes())) == 16
    if mode.endswith("A"):
        assert middle.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert "int4: 16 of 16 levels used, scale 17" in capsys.readouterr().out


@pytest.mark.parametrize("bits", range(1, 9))
def test_picture_of_every_width(bits):
    """0...255 in b bits: all 2^b levels are used, the ends are exact, and no pixel is off by more than half a step."""
    pixels = torch.arange(256.0)
    q = picture.quantize_pixels(pixels, formats.integer(bits))
    x_hat = q.dequantize()
    assert q.codes().unique().numel() == 2**bits
    assert (x_hat[0], x_hat[-1].round()) == (0, 255)
    # The step is 255 / (2^b - 1) rounded to float32, so all of them together may miss 255 by a few of its last bits.
    assert (x_hat - pixels).abs().max() <= 255 / (2**bits - 1) / 2 * (1 + 2**-20)


def test_eight_bits_lose_nothing(tmp_path, capsys):
    """At 8 bits a picture of 8 bits comes back unchanged, and the command says so."""
    image = gradient("L", tmp_path / "in.png")
    assert main(["quantize", "in.png", "--format", "int8", "--out", "out.png"]) == 0
    out = Image.open("out.png")
    assert out.crop((24, 0, 40, 16)).tobytes() == image.tobytes()
    assert out.crop((48, 0, 64, 16)).tobytes() == bytes(256)
    assert "SQNR inf dB, largest error 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, fmt in formats.FORMATS.items() if fmt.kind in ("log", "float")])
def test_picture_of_other_formats(name):
    """Any other format gets the smallest power of two that brings 255 into range, and each pixel a value of it."""
    fmt = formats.get(name)
    q = picture.quantize_pixels(torch.arange(256.0), fmt)
    scale = float(q.scale)
    assert scale.hex().startswith("0x1.0000000000000p")
    assert scale * fmt.max >= 255 > scale / 2 * fmt.max
    assert set((q.dequantize().double() / scale).tolist()) <= set(fmt.values)


def test_sqnr_by_hand():
    """Pixels 0, 85, 170, 255 in one bit become 0, 0 or 255 twice: errors 0, 85, 85, 0."""
    result = picture.picture(Image.frombytes("L", (4, 1), bytes([0, 85, 170, 255])), "int4", bits=1)
    # Signal 85^2 (0 + 1 + 4 + 9), noise 85^2 (1 + 1): 10 log10(14 / 2).
    assert result.sqnr_db == pytest.approx(8.45098, abs=1e-5)
    assert (result.levels_used, result.levels, result.largest_error) == (2, 2, 85)


@pytest.mark.parametrize(("value", "fmt"), [(0, "int4"), (0, "fp4_e2m1"), (77, "int4")])
def test_picture_of_one_gray(value, fmt):
    """A picture of one gray, black too, comes back unchanged by every integer format, and black by any."""
    result = picture.picture(Image.new("L", (3, 3), value), fmt)
    assert (result.levels_used, result.largest_error) == (1, 0)


def test_sixteen_bits_of_gray_are_not_cut_off(tmp_path):
    """A 16-bit gray picture keeps its range: 65535 is white and half of it is middle gray."""
    Image.frombytes("I;16", (2, 1), bytes([0xFF, 0xFF, 0xFF, 0x7F])).save(tmp_path / "in.png")
    assert list(picture.open_image(tmp_path / "in.png").tobytes()) == [255, 127]


def test_palette_with_transparency(tmp_path):
    """A palette picture with a transparent color becomes RGBA."""
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "in.png", transparency=0)
    found = picture.open_image(tmp_path / "in.png")
    assert (found.mode, found.tobytes()) == ("RGBA", bytes([255, 0, 0, 0, 0, 255, 0, 255]))


def test_width_of_a_format_that_has_its_own(tmp_path, capsys):
    """--bits with a format that is no integer is refused, not ignored; so are 0 and 9 bits, and scales."""
    gradient("L", tmp_path / "in.png")
    arguments = ["quantize", "in.png", "--out", "out.png"]
    assert main([*arguments, "--format", "fp4_e2m1", "--bits", "4"]) == 2
    assert "bits=4 was asked for with fp4_e2m1, whose width is 4" in capsys.readouterr().err
    assert main([*arguments, "--format", "e8m0"]) == 2
    assert "e8m0 holds scales and has no zero" in capsys.readouterr().err
    for bits in ("0", "9"):
        assert main([*arguments, "--bits", bits]) == 2
        assert "1 to 8 bits are possible" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_no_image(tmp_path, capsys):
    """A file that is no image is refused by name."""
    (tmp_path / "in.png").write_text("no picture")
    assert main(["quantize", "in.png", "--out", "out.png"]) == 2
    assert "in.png is no image that Pillow can read" in capsys.readouterr().err


def test_an_unsigned_format_is_not_replaced_by_the_signed_one():
    """uint4 divides [0, 255] into fifteen steps from zero: its codes are the steps, and its name is its own."""
    q = picture.quantize_pixels(torch.arange(100.0, 256.0), formats.uint4)
    assert q.format is formats.uint4
    assert (int(q.codes().min()), int(q.codes().max())) == (6, 15)  # 100 / 17 = 5.9


@pytest.mark.parametrize("name", ["foo", "tpu"])
def test_an_accelerator_that_is_not_there(name, capsys):
    """A device that does not exist is a user's error in one line, not a traceback and not a diverged run."""
    assert main(["train", "digits", "--recipe", "fp32", "--size", "smoke", "--accelerator", name]) == 2
    assert f"The accelerator {name!r} cannot be used here" in capsys.readouterr().err
