"""Every task runs from its files to its record under every recipe, on data in miniature."""

import importlib.metadata
import math

import pytest

from halfbyte import RECIPES
from halfbyte.errors import HalfbyteError
from halfbyte.lab import record, tasks
from halfbyte.lab.compare import compare
from halfbyte.lab.trainer import train
from lab import mini_language, mini_speech, mini_translation, mini_vision

FILES = {
    "fashion": mini_vision,
    "cifar10": mini_vision,
    "ptb": mini_language,
    "shakespeare": mini_language,
    "sst2": mini_language,
    "multi30k": mini_translation,
    "an4": mini_speech,
    "fsdd": mini_speech,
}


def test_no_task_is_forgotten():
    """Every task has data in miniature, but for the digits, which need no file."""
    assert set(FILES) | {"digits"} == set(tasks.TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("task", FILES)
def test_all_recipes_end_to_end(task, tmp_path, monkeypatch):
    """At size smoke each recipe trains, is judged, and leaves a record with a finite result; none diverges."""
    FILES[task].write(tmp_path, monkeypatch)
    result = compare(task, list(RECIPES), [0], size="smoke", data_dir=tmp_path)
    assert result.failures == ()
    assert [done.recipe for done in result.records] == list(RECIPES)
    for done in result.records:
        assert math.isfinite(done.value)
        assert (done.task, done.size, done.metric) == (task, "smoke", tasks.get(task).metric)
        assert any(done.recipe in line for line in done.layers), done.recipe


@pytest.mark.parametrize(
    ("task", "packages", "further"),
    [
        ("an4", ["jiwer"], ["character error rate"]),
        ("multi30k", ["sacrebleu", "tokenizers"], ["BLEU with a beam of 4"]),
        ("ptb", [], []),
    ],
)
def test_the_record_says_what_else_counted(task, packages, further, tmp_path, monkeypatch):
    """A record has the versions of the packages that its data and metric are computed by, and the second metric."""
    FILES[task].write(tmp_path, monkeypatch)
    done = train(task, "fp32", 0, size="smoke", data_dir=tmp_path)
    named = {name: importlib.metadata.version(name) for name in packages}
    assert done.versions == record.versions() | named
    assert list(done.further) == further
    assert all(math.isfinite(number) for number in done.further.values())


@pytest.mark.parametrize("task", FILES)
def test_missing_data_is_a_clear_error(task, tmp_path):
    """Without its files a task says which, how much there must be, its digest, and where they are published."""
    whole = r"[\d,]+ (bytes|recordings).*(SHA-256 [0-9a-f]{64}|MD5 [0-9a-f]{32} \(no SHA-256 of it is published\))"
    with pytest.raises(HalfbyteError, match=rf"is missing; expected: {whole}.*published at https://"):
        train(task, "fp32", 0, size="smoke", data_dir=tmp_path)


@pytest.mark.parametrize("task", [*FILES, "digits"])
def test_sizes(task):
    """Every task has all three sizes, and each names a network that the task has."""
    chosen = tasks.get(task)
    assert set(chosen.sizes) == set(tasks.SIZES)
    for size in chosen.sizes:
        assert chosen.model_named(None, size) in chosen.models
