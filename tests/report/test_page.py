"""The report page, without a browser: what is aggregated, how it is embedded, who writes it, and the live server."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import halfbyte as hb
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.hardware.tracing import trace
from halfbyte.lab import record, tasks
from halfbyte.lab.compare import summarize
from halfbyte.report import page
from halfbyte.report.page import Running, aggregate, as_json, content
from halfbyte.report.page.layers import bins, formats_used, layer_table, layer_view, mean_of
from halfbyte.report.page.live import server
from halfbyte.report.page.modeled import TRACED, modeled
from page_records import BASE, HOSTILE, TABLE, group, history, hostile, large, of


def recipes(found: dict, place: int = 0) -> dict[str, dict]:
    """By name what is shown of the recipes of a group."""
    return {recipe["name"]: recipe for recipe in found["groups"][place]["recipes"]}


def test_the_table_of_layers_is_read_as_it_was_written():
    """From the text of a conversion report come the names, types, recipes, formats, rules and states of its layers."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 8), nn.Linear(8, 3))
    report = hb.summary(hb.convert(model, "ibm2020"))
    found = layer_table(str(report).splitlines())
    assert [row["name"] for row in found] == [layer.fqn for layer in report.layers]
    for row, layer in zip(found, report.layers, strict=True):
        assert (row["type"], row["recipe"], row["why"]) == (layer.kind, layer.recipe, layer.why)
        assert row["state"] == layer.note
        assert row["fprop"] == (" x ".join(v for k, v in layer.formats.items() if k.startswith("fprop")) or "-")


@pytest.mark.parametrize("lines", [[], ["layer"], ["stem fp32", "body int4"], ["a  b", "-  -", "1  2"]])
def test_no_table_no_rows(lines):
    """Lines that are no such table give no rows and no error."""
    assert layer_table(lines) == []


def test_what_follows_the_table_is_no_layer():
    """A sentence about the stash and the table of fine-tuning are left out."""
    more = ["Saved for backward: int4 codes, 12 of 14 tensors of the whole network, and single bits", "fine-tuning:"]
    assert layer_table(TABLE.splitlines() + more + TABLE.splitlines()) == layer_table(TABLE.splitlines())


@pytest.mark.parametrize(("count", "most"), [(0, 4), (3, 4), (4, 4), (10, 4), (1000, 48), (7, 2)])
def test_bins(count, most):
    """Every place is in one bin, there are no more bins than asked, and the last place is alone."""
    found = bins(count, most)
    assert [place for group_ in found for place in group_] == list(range(count))
    assert len(found) <= most
    assert not found or list(found[-1]) == [count - 1]


def test_mean_of_what_is_there():
    """Missing numbers do not count, and nothing has no mean."""
    assert mean_of([1.0, None, 2.0]) == 1.5
    assert mean_of([None]) is None
    assert mean_of([1 / 3]) == 0.3333


def looked(values: list[float | None], seed: int = 0, steps: list[int] | None = None):
    """A record that knows one measure of one layer."""
    codes = [[[100 * seed, 10_000 - 100 * seed]] for _ in values]
    slot = {"formats": ["int4"], "cosine": values, "codes": codes}
    found = {"steps": steps or list(range(len(values))), "layers": {"a": {"fprop.input": slot}}}
    return of("ibm2020", 1.0, seed, history=found)


def test_seeds_are_averaged():
    """A measure and a code's share are means over the seeds; what one seed lacks the others give."""
    view = layer_view([looked([0.25, None]), looked([0.75, 0.5], seed=1)], 10, 10)
    slot = view["rows"][0]["slots"]["fprop.input"]
    assert (view["seeds"], view["steps"], view["pictured"]) == (2, [0, 1], [0, 1])
    assert slot["cosine"] == [0.5, 0.5]
    assert slot["codes"] == [[[50, 9950], [50, 9950]]]


def test_neighbors_are_averaged_and_the_end_is_kept():
    """Nine steps in three points: means of the first four and the next four, and the last as it is."""
    values = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0, 99.0]
    view = layer_view([looked(values)], 3, 2)
    assert view["rows"][0]["slots"]["fprop.input"]["cosine"] == [1.5, 11.5, 99.0]
    assert view["steps"] == [3, 7, 8]
    assert view["pictured"] == [0, 8]


def test_runs_that_were_looked_at_elsewhere_do_not_mix():
    """A history of other steps is left out, and the number of seeds says so."""
    view = layer_view([looked([0.25, 0.5]), looked([0.75, 1.0], seed=1, steps=[5, 9])], 10, 10)
    assert view["seeds"] == 1
    assert view["rows"][0]["slots"]["fprop.input"]["cosine"] == [0.25, 0.5]


def test_layers_of_the_table_and_of_the_probes_meet():
    """A layer that is not quantized has its rule and no numbers; one that is has both."""
    rows = {row["name"]: row for row in content(group())["groups"][0]["layers"]["ibm2020"]["rows"]}
    assert list(rows) == ["stem.conv", "body1.conv", "body2.conv", "head"]
    assert (rows["head"]["why"], rows["head"]["slots"]) == ("first or last layer", {})
    assert rows["body2.conv"]["why"] == "recipe ibm2020"
    assert rows["body2.conv"]["slots"]["dgrad.grad_output"]["log2_scale"][0] == pytest.approx(10 + 5 * 0.3894, abs=0.01)


def test_codes_stand_in_the_order_of_their_values():
    """Of a format the page gets every code once, from the smallest value to the largest."""
    found = formats_used([layer_view(group()[2:3], 4, 4)])
    assert found.keys() == {"int4", "fp4_e3m0_r4", "fp4_e3m0_r4_odd"}
    for entry in found.values():
        assert sorted(entry["order"]) == list(range(16))
        assert entry["values"] == sorted(entry["values"])
    assert found["int4"]["values"] == list(range(-8, 8))


def test_the_table_of_gaps_is_that_of_compare():
    """Mean, deviation, gap, interval and ratios are the numbers of `summarize`, unchanged."""
    records = group()
    shown = recipes(content(records))
    for name, entry in summarize("digits", ["fp32", "bf16", "ibm2020"], records).summary.items():
        own = shown[name]
        assert (own["mean"], own["std"], own["time_ratio"]) == (entry.mean, entry.std, entry.time_ratio)
        assert own["gap"] == (None if name == "fp32" else entry.gap)
        assert own["paired"] == (entry.paired and [entry.paired.mean, entry.paired.low, entry.paired.high])
        assert own["kept_ratio"] == entry.saved_bytes_ratio
    assert shown["ibm2020"]["step_ratio"] == 2.0
    assert shown["ibm2020"]["about"] == "what ibm2020 is"


def test_what_else_was_measured():
    """A second measure has mean, deviation and gap; where a run lacks it there is no gap, and where all do no mean."""
    records = [
        *(of("fp32", 1.0, seed, further={"letters": 10.0 + seed}) for seed in range(2)),
        *(of("luq", 1.0, seed, further={"letters": 12.0 + 2 * seed}) for seed in range(2)),
        *(of("bf16", 1.0, seed, further={"letters": 9.0} if seed else {}) for seed in range(2)),
        of("int8", 1.0),
    ]
    found = content(records)
    assert found["groups"][0]["further"] == ["letters"]
    shown = {name: one["further"][0] for name, one in recipes(found).items()}
    assert shown["fp32"] == {"mean": 10.5, "std": 0.5**0.5, "gap": None, "lacking": 0}
    assert shown["luq"] == {"mean": 13.0, "std": 2**0.5, "gap": 2.5, "lacking": 0}
    assert shown["bf16"] == {"mean": 9.0, "std": None, "gap": None, "lacking": 1}
    assert shown["int8"] == {"mean": None, "std": None, "gap": None, "lacking": 1}
    assert recipes(content(group()))["fp32"]["further"] == []


def test_times_of_other_machines_are_not_compared():
    """Where the baseline ran on another machine there is no ratio of times."""
    records = [of("fp32", 1.0), of("luq", 1.0, machine={"cpu": "another", "threads": 2})]
    assert recipes(content(records))["luq"]["step_ratio"] is None


def test_curves_have_a_band_over_seeds():
    """A curve is the mean of its seeds between the smallest and the largest; one seed has no band."""
    (loss, accuracy) = content(group())["groups"][0]["curves"]
    assert (loss["label"], accuracy["label"]) == ("loss", "accuracy")
    line = loss["data"]["test"]["fp32"]
    assert line == {"epochs": [1, 2, 3], "mean": [2.1, 1.1, 0.6], "low": [2.0, 1.0, 0.5], "high": [2.2, 1.2, 0.7]}
    assert "low" not in content([BASE])["groups"][0]["curves"][0]["data"]["test"]["fp32"]


def test_old_records_say_what_they_lack():
    """A record without a history shows its last batch or nothing, and a plain line says which."""
    probes = {"body1.conv": {"dgrad.grad_output": {"cosine": 0.5, "sqnr_db": None}}}
    lines = TABLE.splitlines()
    third = content([of("ibm2020", 1.0, layers=lines, probes=probes)])["groups"][0]
    assert "hold what probes saw at the last batch only" in " ".join(third["notes"])
    rows = {row["name"]: row for row in third["layers"]["ibm2020"]["rows"]}
    assert rows["body1.conv"]["slots"]["dgrad.grad_output"] == {"formats": [], "cosine": [0.5], "sqnr_db": [None]}
    second = content([of("ibm2020", 1.0, layers=lines, peak_bytes=0)])["groups"][0]
    assert "hold nothing that probes saw" in second["notes"][0]
    assert "Peak memory is missing" in second["notes"][1]
    assert content(group())["groups"][0]["notes"] == []


def test_a_large_network_fits():
    """100 layers that were looked at 1,000 times make a page below 6 MB, with every layer in it."""
    found = content(large())
    assert len(found["groups"][0]["layers"]["ibm2020"]["rows"]) == 100
    assert len(as_json(found).encode()) <= aggregate.DATA_BYTES
    assert len(page.render(found).encode()) < 6_000_000


def test_what_cannot_fit_is_left_out_and_said(monkeypatch):
    """Where even two points a curve are too many, a recipe's layers go and a note says so; the rest stays."""
    monkeypatch.setattr(aggregate, "DATA_BYTES", 10)
    shown = content(group())["groups"][0]
    assert shown["layers"] == {}
    assert "The layers of ibm2020 are left out, since the page would be too large." in shown["notes"]
    assert len(shown["recipes"]) == 3


def test_runs_that_go_on_count_in_no_mean():
    """A run without a record has its curve and its epoch, and no place in the table's numbers."""
    so_far = of("luq", 50.0, curves={"test_loss": [3.0]})
    found = content(group(), [Running(record=so_far, epoch=1, epochs=20)])
    assert recipes(found)["luq"]["mean"] is None
    assert recipes(found)["luq"]["running"][0] | {"metric": ""} == {
        "seed": 0, "value": 50.0, "metric": "", "epoch": 1, "epochs": 20,
    }  # fmt: skip
    assert found["groups"][0]["curves"][0]["data"]["test"]["luq"]["mean"] == [3.0]
    alone = content([], [Running(record=so_far, epoch=1, epochs=20)])
    assert alone["groups"][0]["baseline"] == "luq"


def test_going_on_is_what_has_no_record(tmp_path):
    """A folder with progress and no record goes on; with a record it does not; a damaged file is passed over."""
    record.write_partial(BASE, tmp_path / "a" / "progress.json", 1, 3)
    record.write_partial(BASE, tmp_path / "b" / "progress.json", 2, 3)
    record.write(BASE, tmp_path / "b" / "record.json")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "progress.json").write_text("{")
    assert [(r.epoch, r.epochs) for r in page.going_on([tmp_path])] == [(1, 3)]


def test_nothing_in_the_data_can_end_the_script():
    """Embedded JSON holds no angle bracket, ampersand or line separator, and means the same."""
    values = {HOSTILE: "a<!--b&c\u2028\u2029"}
    text = as_json(values)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == values


def test_what_is_put_in_is_not_looked_at_again():
    """A unit that is called like a place of the template stays a unit, and the title is escaped."""
    text = page.render(content(hostile()))
    assert text.count("{{plotly}}") == 1
    assert "<title>halfbyte report · &lt;/script&gt;" in text


def test_the_page_asks_for_nothing():
    """No tag of the page names another place, and its policy lets it connect to nothing unless it is live."""
    found = content([BASE])
    text, live = page.render(found), page.render(found, live=True)
    own = text.replace(page.require_plotly().read_text(encoding="utf-8"), "")
    assert "http" not in own.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "connect-src 'none'" in text
    assert "connect-src 'self'" in live


def test_without_plotly_there_is_a_cure(monkeypatch, tmp_path, capsys):
    """Where Plotly is missing the command says what to install and writes nothing."""
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda _: None)
    record.write(BASE, tmp_path / "record.json")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert "pip install 'halfbyte[report]'" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_the_command_writes_a_page(tmp_path, capsys):
    """halfbyte report -o FILE.html writes one file that holds the recipes, and nothing beside it."""
    for place, one in enumerate(r for r in group() if r.recipe != "ibm2020"):
        record.write(one, tmp_path / "runs" / f"{place}.json")
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(tmp_path / "runs"), "-o", str(out)]) == 0
    assert f"Report: {out}" in capsys.readouterr().out.replace("\n", "")
    assert '"name":"bf16"' in out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "Give one of the two"),
        (["-o", "x.html", "--live"], "Give one of the two"),
        (["-o", "x.html", "--port", "80"], "without --live"),
        (["-o", "x.pdf"], "name a file *.html for the page, or *.md"),
    ],
)
def test_what_does_not_go_together(more, text, tmp_path, capsys):
    """Neither a file nor --live, both, a port for a file, or another ending is refused with the cure."""
    record.write(BASE, tmp_path / "record.json")
    assert main(["report", str(tmp_path), *more]) == 2
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "breaks", "page_there", "said"),
    [
        ([], False, True, "Report: "),
        (["--no-report"], False, False, "Record: "),
        ([], True, False, "No report page: the disk is gone"),
    ],
)
def test_a_run_writes_its_page_and_is_never_lost_for_it(more, breaks, page_there, said, tmp_path, monkeypatch, capsys):
    """halfbyte train writes report.html unless told not to; if that fails the record is there and the status is 0."""
    monkeypatch.chdir(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is gone")

    if breaks:
        monkeypatch.setattr(page, "write", broken)
    command = ["train", "digits", "--recipe", "fp32", "--size", "smoke", "--model", "mlp", "--out", "run", *more]
    assert main(command) == 0
    assert record.read(Path("run/record.json")).recipe == "fp32"
    assert Path("run/report.html").exists() is page_there
    assert said in capsys.readouterr().out


@pytest.fixture
def live(tmp_path) -> Iterator[tuple[Path, int]]:
    """A folder and the port of a server that shows it."""
    with server([tmp_path]) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield tmp_path, running.server_port
        running.shutdown()
        thread.join()


def get(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, body and tag of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.headers.get("ETag", "")
    connection.close()
    return found


def test_news_come_when_a_file_changes(live):
    """The data are sent once, then 304 until a record is written or a run goes on; other JSON is passed over."""
    folder, port = live
    status, text, tag = get(port, "/data.json")
    assert (status, json.loads(text)["groups"]) == (200, [])
    assert get(port, "/data.json", If_None_Match=tag)[0] == 304
    (folder / "other.json").write_text("[]")
    record.write_partial(of("luq", 5.0), folder / "run" / "progress.json", 1, 2)
    status, text, new = get(port, "/data.json", If_None_Match=tag)
    assert (status, new != tag) == (200, True)
    assert recipes(json.loads(text))["luq"]["running"][0]["epoch"] == 1
    record.write(of("luq", 6.0), folder / "run" / "record.json")
    assert recipes(json.loads(get(port, "/data.json")[1]))["luq"]["mean"] == 6.0


def test_the_server_answers_its_own_page_alone(live):
    """It has two addresses; a request that names another host is refused, so that no other site can read runs."""
    _, port = live
    assert 'data-live="live"' in get(port, "/")[1]
    assert get(port, "/../secret")[0] == 404
    assert get(port, "/data.json", Host=f"evil.example:{port}")[0] == 403
    assert get(port, "/data.json", Host="127.0.0.1:1")[0] == 403
    assert get(port, "/data.json", Host=f"localhost:{port}")[0] == 200


def test_what_cannot_be_served(live, tmp_path):
    """A port that is taken and a folder that does not exist are errors with a cure."""
    _, port = live
    with pytest.raises(HalfbyteError, match=rf"--port {port} was asked for.*a free one is taken"):
        server([tmp_path], port)
    with pytest.raises(HalfbyteError, match=r"does not exist\. Name a record or a folder of runs"):
        server([tmp_path / "nowhere"])


@pytest.mark.parametrize(("task", "model"), TRACED)
def test_the_modeled_network_is_the_trained_one(task, model):
    """What is traced has the layers of what the task trains, name by name and shape by shape."""
    from halfbyte.hardware.networks import NETWORKS

    trained = tasks.get(task).models[model](None, None)
    traced = NETWORKS[TRACED[task, model]].network()
    assert {n: p.shape for n, p in trained.named_parameters()} == {n: p.shape for n, p in traced.named_parameters()}


def test_modeled_against_sixteen_bits(monkeypatch):
    """A 4-bit recipe takes fewer cycles than 16 bits; what cannot be modeled is named; floating point is not traced."""

    def some(network: nn.Module, inputs: object, recipe: str, **more: object) -> object:
        if recipe == "int8":
            raise HalfbyteError("no array for it")
        return trace(network, inputs, recipe, **more)

    monkeypatch.setattr("halfbyte.report.page.modeled.trace", some)
    found = modeled("digits", "cnn", ["fp32", "ibm2020", "int8", "no_such_recipe"])
    assert [row["recipe"] for row in found["rows"]] == ["fp16", "ibm2020"]
    assert found["left_out"] == ["int8"]
    assert found["rows"][1]["faster"] == found["rows"][0]["cycles"] / found["rows"][1]["cycles"] > 1
    assert modeled("ptb", "lstm-200", ["ibm2020"]) is None
    assert modeled("digits", "cnn", ["fp32"]) is None


def test_groups_of_unknown_tasks_are_shown():
    """A task that this version does not know is shown from its records alone."""
    (shown,) = content([dataclasses.replace(BASE, task="mine")])["groups"]
    assert (shown["task"], shown["description"], shown["metric"]) == ("mine", "", "accuracy")


def test_history_helper_is_a_history():
    """The made-up history has the fields of a real one, so that these tests tell of real pages."""
    from halfbyte.lab.history import MEASURES

    slot = history(["a"], [1, 2])["layers"]["a"]["dgrad.grad_output"]
    assert slot.keys() == {"formats", "codes", *MEASURES}
