"""Made-up records for the tests of the report page: small groups, a large network, old schemas, hostile names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from halfbyte.lab.record import Record

TABLE = """\
layer       type    recipe   fprop        dgrad                wgrad                    why                  state
----------  ------  -------  -----------  -------------------  -----------------------  -------------------  -----
stem.conv   Conv2d  fp32     -            -                    -                        first or last layer
body1.conv  Conv2d  ibm2020  int4 x int4  fp4_e3m0_r4 x reuse  fp4_e3m0_r4_odd x reuse  recipe ibm2020       clip 2
body2.conv  Conv2d  ibm2020  int4 x int4  fp4_e3m0_r4 x reuse  fp4_e3m0_r4_odd x reuse  recipe ibm2020
head        Linear  fp32     -            -                    -                        first or last layer"""

SLOTS = {
    "fprop.input": "int4",
    "fprop.weight": "int4",
    "dgrad.grad_output": "fp4_e3m0_r4",
    "wgrad.grad_output": "fp4_e3m0_r4_odd",
}

BASE = Record(
    task="digits", recipe="fp32", seed=0, size="cpu", model="cnn", metric="accuracy", value=99.0,
    higher_is_better=True, unit="%", settings={"epochs": 3, "batch_size": 64}, recipe_text="fp32: plain floating point",
    command=["halfbyte", "train", "digits"], seconds=10.0, samples_per_s=1000.0,
    curves={name: [2.0, 1.0, 0.5] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")},
    saved_bytes=1000, peak_bytes=5_000_000, layers=[], sources_sha256=["a"],
    commit={"revision": "0123456789", "dirty": False}, versions={"halfbyte": "0.1.0", "torch": "2.13.0"},
    machine={"cpu": "one", "threads": 1, "backend": "native (avx512)"},
)  # fmt: skip


def of(recipe: str, value: float, seed: int = 0, **changes: Any) -> Record:
    """A record of another recipe, value and seed."""
    text = changes.pop("recipe_text", f"{recipe}: what {recipe} is")
    return dataclasses.replace(BASE, recipe=recipe, value=value, seed=seed, recipe_text=text, **changes)


def history(layers: list[str], steps: list[int], shift: float = 0.0) -> dict[str, Any]:
    """A history whose numbers are told apart: waves over the steps, another phase for each layer."""
    codes = [[[500 + (13 * code + step) % 200 for code in range(16)]] for step in steps]

    def slot(name: str, place: int) -> dict[str, Any]:
        wave = [math.sin(0.3 * place + 3 * step / steps[-1]) + shift for step in steps]
        found: dict[str, Any] = {
            "formats": [SLOTS[name]],
            "sqnr_db": [12 + 4 * w for w in wave],
            "underflow_rate": [0.2 + 0.1 * w for w in wave],
            "saturation_rate": [0.01 + 0.01 * abs(w) for w in wave],
            "cosine": [0.95 + 0.04 * w for w in wave],
            "log2_scale": [10 + 5 * w for w in wave],
            "codes": codes,
        }
        if name.endswith("grad_output"):
            found["gradient_to_noise"] = [2 + w for w in wave]
        return found

    return {"steps": steps, "layers": {n: {s: slot(s, i) for s in SLOTS} for i, n in enumerate(layers)}}


def group() -> list[Record]:
    """Three recipes with three seeds each; ibm2020 was looked at in eight batches."""
    steps = [2, 3, 6, 12, 20, 31, 44, 60]
    looked = {"layers": TABLE.splitlines(), "history": history(["body1.conv", "body2.conv"], steps)}
    records = []
    for seed in range(3):
        curves = {name: [x + 0.1 * seed for x in values] for name, values in BASE.curves.items()}
        records += [
            of("fp32", 99.0 + 0.1 * seed, seed, curves=curves),
            of("bf16", 99.1 + 0.2 * seed, seed, saved_bytes=900, samples_per_s=900.0),
            of("ibm2020", 97.0 + 0.1 * seed, seed, saved_bytes=400, samples_per_s=500.0, **looked),
        ]
    return records


def large(layers: int = 100, steps: int = 1000) -> list[Record]:
    """A baseline, and one run of a network of many layers that was looked at very often."""
    names = [f"stage{place // 10}.block{place % 10}.convolution" for place in range(layers)]
    head, dashes, *_ = TABLE.splitlines()
    wide = len(max(names, key=len)) - len("body1.conv")
    row = "  Conv2d  ibm2020  int4 x int4  fp4_e3m0_r4 x reuse  fp4_e3m0_r4_odd x reuse  recipe ibm2020"
    table = [head.replace("layer  ", "layer  " + " " * wide), "-" * wide + dashes, *(n + row for n in names)]
    curves = {name: [1 / (1 + epoch) for epoch in range(steps)] for name in BASE.curves}
    seen = history(names, list(range(0, 100 * steps, 100)))
    return [
        of("fp32", 99.0, task="cifar10", model="resnet101", curves=curves),
        of("ibm2020", 98.0, task="cifar10", model="resnet101", curves=curves, layers=table, history=seen),
    ]


HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def hostile() -> list[Record]:
    """Names that are markup, in every place that takes a name."""
    seen = history([HOSTILE], [1, 2, 3])
    curves = BASE.curves | {f"test_{HOSTILE}": [1.0, 2.0]}
    names = {"task": HOSTILE, "model": HOSTILE, "metric": HOSTILE, "unit": "{{plotly}}"}
    return [
        of("fp32", 1.0, **names, curves=curves),
        of(HOSTILE, 2.0, **names, curves=curves, layers=[HOSTILE], history=seen, settings={HOSTILE: HOSTILE}),
    ]
