"""Probes while a loop trains, the lab's, another library's or your own: for TensorBoard, and for a run's record.

    logger = ProbeLogger("tensorboard", every=100)
    lightning.Trainer(callbacks=[logger.for_lightning()])
    transformers.Trainer(model, callbacks=[logger.for_transformers()])
    halfbyte.lab.trainer.train(..., progress=logger.on_step)

A loop of your own calls `ProbeLogger.before_step` and `ProbeLogger.after_step` around each step of its optimizer. None
of those libraries is imported before it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from ..distributed import rank
from ..errors import HalfbyteError, SpecError, UnsupportedError
from ..probes import Probe, ProbeRow, attach
from ..watching import named_plans
from . import history
from .record import can_forget_peak, forget_peak, peak_bytes

if TYPE_CHECKING:  # It brings the tasks, whose packages a loop outside the lab does without.
    from .run import Step

__all__ = ["MEASURES", "ProbeLogger", "measured", "statistics", "with_probes"]

MEASURES = ("sqnr_db", "underflow_rate", "saturation_rate", "cosine", "log2_scale")
"""What a record keeps of a `halfbyte.probes.ProbeRow`. TensorBoard shows its other two measures as well."""


def statistics(rows: Iterable[ProbeRow]) -> dict[str, dict[str, dict[str, float | None]]]:
    """The latest row of every slot, as JSON can hold it.

    Args:
        rows: of a probe, in its order.

    Returns:
        By layer, by slot, each of `MEASURES`; None for one that is not finite: the SQNR of what lost nothing, and
        whatever has no meaning for a tensor of zeros.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in rows:
        values = {name: getattr(row, name) for name in MEASURES}
        slots = found.setdefault(row.layer, {})
        slots[row.slot] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return found


@contextlib.contextmanager
def measured(
    network: nn.Module, found: dict[str, Any], *, step: int = 0, wanted: bool = True
) -> Iterator[Probe | None]:
    """Looks at the training step inside, for a `Record`. Call it with the same `found` for each step to look at.

    Args:
        network: converted or not.
        found: gets ``peak_bytes``, the most memory outside the steps that are looked at, since a probe takes memory of
            its own; and at the step's end ``probes``, its `statistics`, and one step more of the
            `halfbyte.lab.history`; both are empty for a network in which nothing is quantized.
        step: its number, for the history.
        wanted: False looks at nothing and leaves `found` alone.

    Yields:
        The probe that looks, if one does.
    """
    if not wanted:
        yield None
        return
    # Where a peak cannot be forgotten, every later one may be a probe's: the first stays.
    if "peak_bytes" not in found or can_forget_peak():
        found["peak_bytes"] = max(found.get("peak_bytes", 0), peak_bytes())
    found.setdefault("history", {})
    found["probes"] = {}
    if not named_plans(network):
        yield None
        return
    with attach(network) as probe:
        yield probe
    found["probes"] = statistics(probe.rows)
    history.add(found["history"], step, probe.rows)
    forget_peak()


def with_probes(progress: Callable[[Step], None], folder: str | PathLike[str] | None) -> Callable[[Step], None]:
    """A ``progress`` of the lab and a `ProbeLogger` behind it; as it is where there is no folder."""
    if folder is None:
        return progress
    logger = ProbeLogger(folder)

    def both(step: Step) -> None:
        progress(step)
        logger.on_step(step)

    return both


class ProbeLogger:
    """Shows TensorBoard what quantization does to each operand of each layer.

    It looks at the first step that it is told of and then at each `every`-th; the others cost nothing. What it shows
    under ``sqnr_db/conv2/dgrad.grad_output``, and so on, is a `halfbyte.probes.ProbeRow`; where one step of the
    optimizer has several batches (gradient accumulation), that of the last. The number of a step is the optimizer's. In
    a distributed run the first process looks and writes.

    Looking changes no bit of the run. A model that is converted anew (fine-tuning) is looked at as it then is.
    """

    def __init__(self, folder: str | PathLike[str], *, every: int = 100) -> None:
        """Prepares to write.

        Args:
            folder: where TensorBoard will find the run.
            every: steps of the optimizer.

        Raises:
            SpecError: if `every` is below 1.
            UnsupportedError: if the package ``tensorboard`` is not installed.
        """
        if every < 1:
            raise SpecError(f"ProbeLogger(every={every}) was asked for; 1 or more is possible.")
        self._open: Any = _demand("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder, self._every, self._due = folder, every, 0
        self._writer: Any = None
        self._probes: list[Probe] | None = None  # None: not looking. Empty: at a model without quantization.

    def before_step(self, model: nn.Module, done: int) -> None:
        """Begins to look, if the coming step is one to look at. May be called before each batch of a step.

        Args:
            model: as it is to be trained.
            done: how many steps the optimizer has done.

        Raises:
            ConversionError: if the model has no converted layer.
        """
        self._begin(model, done, with_probe=True)

    def _begin(self, model: nn.Module, done: int, *, with_probe: bool) -> None:
        if self._probes is None and done + 1 >= self._due and rank() == 0:
            self._probes, self._due = [attach(model)] if with_probe else [], done + 1

    def after_step(self, done: int, **scalars: float) -> None:
        """Writes what was seen, if the step is over and was looked at. May be called after each batch of a step.

        Args:
            done: how many steps the optimizer has done, this one included.
            scalars: what else to show beside it, by name: a loss.
        """
        if self._probes is None or done < self._due:
            return
        self._due = done + self._every
        if self._writer is None:
            self._writer = self._open(self._folder)
        latest = {(row.layer, row.slot): row for row in self._detached()}
        for (layer, slot), row in latest.items():
            for name in (*MEASURES, "bias", "gradient_to_noise"):
                value = getattr(row, name)
                if value is not None:
                    self._writer.add_scalar(f"{name}/{layer or '(model)'}/{slot}", value, done)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, done)
        self._writer.flush()

    def _detached(self) -> list[ProbeRow]:
        """Stops looking; what was seen."""
        looking, self._probes = self._probes or [], None
        for probe in looking:
            probe.detach()
        return [row for probe in looking for row in probe.rows]

    def close(self) -> None:
        """Stops looking and closes the file. A step after that opens another one."""
        self._detached()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_step(self, step: Step) -> None:
        """The lab's ``progress``: probes, loss and score; under a recipe that quantizes nothing only the last two.

        The first batch is over when it is called first, so it looks from the second on.

        Raises:
            HalfbyteError: if the run goes on in another process, where its network is.
        """
        if step.network is None:
            raise HalfbyteError(
                f"Probes of {step.run.name} were asked for, but it runs in another process. Run it in this one."
            )
        self.after_step(step.done, loss=step.loss, score=step.score)
        if step.done < step.total:
            self._begin(step.network, step.done, with_probe=bool(named_plans(step.network)))
        else:
            self.close()

    def for_lightning(self) -> Any:
        """A new callback for ``lightning.Trainer(callbacks=[...])``, which writes through this logger.

        Raises:
            UnsupportedError: if the package ``lightning`` is not installed.
        """
        logger, base = self, _demand("lightning.pytorch", "lightning").Callback

        class _Lightning(base):  # type: ignore[misc, valid-type]
            def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
                logger.before_step(pl_module, trainer.global_step)

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                logger.after_step(trainer.global_step)

            def teardown(self, *_: Any, **__: Any) -> None:
                logger.close()

        return _Lightning()

    def for_transformers(self) -> Any:
        """A new callback for Hugging Face's ``Trainer(callbacks=[...])``, which writes through this logger.

        Raises:
            UnsupportedError: if the package ``transformers`` is not installed.
        """
        logger, base = self, _demand("transformers", "transformers").TrainerCallback

        class _Transformers(base):  # type: ignore[misc, valid-type]
            def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
                logger.before_step(model, state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                logger.after_step(state.global_step)

            def on_train_end(self, *_: Any, **__: Any) -> None:
                logger.close()

        return _Transformers()


def _demand(module: str, package: str) -> Any:
    """A module of a package that not everybody has."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"This needs the package {package!r}, which cannot be imported here ({error}). "
            f"Install it: pip install {package}"
        ) from error
