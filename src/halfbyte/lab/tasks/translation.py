"""English to German."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import HalfbyteError
from ..data import multi30k
from ..data.multi30k import BOS, EOS, PAD, Pairs
from ..data.source import Batch, Data
from ..models.translation import Transformer
from .contract import Carry, Judgment, Outcome, Settings, Task
from .vision import percent

__all__ = ["TASKS", "bleu", "translate"]

_BEAM = 4
"""How wide Vaswani et al. (Attention Is All You Need, NeurIPS 2017, section 6.1) search."""


def _learn(network: nn.Module, batch: Batch, _carry: Carry, settings: Settings) -> Outcome:
    """Cross-entropy of the next piece, and how many pieces are guessed right."""
    source_NS, _ = batch.inputs
    target_NT, _ = batch.targets
    begun_NT = F.pad(target_NT[:, :-1], (1, 0), value=BOS)
    logits_NTV = network(source_NS, begun_NT)
    smoothing = settings.smoothing if network.training else 0.0
    loss = F.cross_entropy(logits_NTV.flatten(0, 1), target_NT.flatten(), ignore_index=PAD, label_smoothing=smoothing)
    right = (logits_NTV.detach().argmax(dim=2) == target_NT) & (target_NT != PAD)
    return Outcome(loss, float(right.sum()))


def translate(network: Transformer, source_NS: Tensor, *, beam: int = 1) -> list[list[int]]:
    """Translations, searched with a beam: at every step the likeliest ``beam`` beginnings are kept.

    The likelihood of a whole sentence is divided by its length to the power of 0.6 (Wu et al., arXiv 1609.08144, in its
    plainest form), so that long ones are not at a disadvantage.

    Args:
        network: in evaluation mode.
        source_NS: pieces, filled up with `PAD`.
        beam: how many; 1 is greedy.

    Returns:
        For each source the pieces of its translation, without `BOS` and `EOS`.
    """
    count, limit = len(source_NS), _longest(source_NS.shape[1])
    read_NSD = network.encode(source_NS).repeat_interleave(beam, dim=0)
    sources = source_NS.repeat_interleave(beam, dim=0)
    written = torch.full((count * beam, 1), BOS, device=source_NS.device)
    # At first all of a beam's beginnings are the same: only one may be followed up.
    score_NB = torch.full((count, beam), -math.inf, device=source_NS.device)
    score_NB[:, 0] = 0
    done_NB = torch.zeros(count, beam, dtype=torch.bool, device=source_NS.device)
    length_NB = torch.zeros(count, beam, device=source_NS.device)
    first_N1 = beam * torch.arange(count, device=source_NS.device).unsqueeze(1)
    for step in range(1, limit + 1):
        logits = network.decode(read_NSD, sources, written)[:, -1]
        logits[:, [PAD, BOS]] = -math.inf
        more_NBV = logits.log_softmax(dim=1).view(count, beam, -1)
        # What is finished goes on with PAD alone, at no cost.
        more_NBV[done_NB] = -math.inf
        more_NBV[..., PAD] = torch.where(done_NB, 0.0, -math.inf)
        total_NBV = score_NB.unsqueeze(2) + more_NBV
        lengths_NB1 = torch.where(done_NB, length_NB, float(step)).unsqueeze(2)
        best = (total_NBV / lengths_NB1.clamp_min(1) ** 0.6).flatten(1).topk(beam, dim=1).indices
        from_NB, piece_NB = best // more_NBV.shape[2], best % more_NBV.shape[2]
        score_NB = total_NBV.flatten(1).gather(1, best)
        length_NB = lengths_NB1.squeeze(2).gather(1, from_NB)
        written = torch.cat([written[(first_N1 + from_NB).flatten()], piece_NB.view(-1, 1)], dim=1)
        done_NB = done_NB.gather(1, from_NB) | (piece_NB == EOS)
        if bool(done_NB.all()):
            break
    winner_N = first_N1.squeeze(1) + (score_NB / length_NB**0.6).argmax(dim=1)
    return [[p for p in row if p not in (PAD, BOS, EOS)] for row in written[winner_N].tolist()]


def _longest(pieces: int) -> int:
    """How many pieces a translation of that many has at most."""
    return pieces + pieces // 2 + 5


def bleu(found: list[str], expected: list[str]) -> float:
    """Corpus BLEU by sacrebleu, with its own tokenization and smoothing.

    Raises:
        HalfbyteError: if it is not installed.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "BLEU is computed by the package sacrebleu, which is not installed. Install it with: "
            "pip install 'halfbyte[lab]'"
        ) from error
    return float(sacrebleu.corpus_bleu(found, [expected]).score)


def _judge(network: nn.Module, data: Data, settings: Settings) -> Judgment:
    """BLEU as the settings search, and beside it BLEU of the other search: greedy, or with a beam."""
    value = _searched(network, data, settings, settings.beam)
    if settings.beam > 1:
        return Judgment(value, {"greedy BLEU": _searched(network, data, settings, 1)})
    return Judgment(value, {f"BLEU with a beam of {_BEAM}": _searched(network, data, settings, _BEAM)})


def _searched(network: nn.Module, data: Data, settings: Settings, beam: int) -> float:
    """BLEU of the translations of all sources to judge by."""
    pairs = cast(Pairs, data)
    model = cast(Transformer, network)
    device = next(network.parameters()).device
    found: list[str] = []
    expected: list[str] = []
    for batch in pairs.test.batches(settings.test_batch_size):
        pieces = translate(model, batch.inputs[0].to(device), beam=beam)
        found += [pairs.text(row) for row in pieces]
        expected += [pairs.text([p for p in row if p not in (PAD, EOS)]) for row in batch.targets[0].tolist()]
    return bleu(found, expected)


def _transformer(data: Data, settings: Settings, *, width: int, layers: int, heads: int, inner: int) -> nn.Module:
    pieces = cast(Pairs, data).vocabulary
    return Transformer(pieces, pad=PAD, width=width, layers=layers, heads=heads, inner=inner, dropout=settings.dropout)


_TINY = Settings(
    epochs=12,
    batch_size=64,
    optimizer="adam",
    learning_rate=2e-3,
    model="tiny",
    betas=(0.9, 0.98),
    schedule="cosine",
    warmup=800,
    clip_norm=1.0,
    smoothing=0.1,
    dropout=0.1,
    test_batch_size=100,
)
"""For the shapes of the Transformer-tiny of Wu et al. (ACL 2021) for this data: 4 layers, 128 wide, 4 heads.

The rest is ours. Theirs had a rate of 5e-3, 2,000 steps of warming up, a dropout of 0.3, batches of 4,096 pieces and
8,000 steps at most, and ended at 41.0 BLEU.
"""

_BASE = Settings(
    epochs=30,
    batch_size=64,
    optimizer="adam",
    learning_rate=512**-0.5 * 4000**-0.5,
    model="base",
    betas=(0.9, 0.98),
    schedule="inverse_sqrt",
    warmup=4000,
    smoothing=0.1,
    dropout=0.1,
    beam=_BEAM,
    test_batch_size=100,
)
"""The base model's of Vaswani et al., sections 5.3, 5.4 and 6.1, which Sun et al. trained in four bits, on WMT.

Its rates: step n has ``512^-0.5 min(n^-0.5, n 4000^-1.5)``, at most 7.0e-4. Ours are: 30 passes of 454 batches of 64
sentences, 13,620 steps, where 100,000 of 25,000 pieces would be thousands of passes over this data; Adam's epsilon of
1e-8, there 1e-9; the last epoch in the place of a mean of checkpoints; a search of 1.5 times the source's length and 5,
there that and 50.
"""

TASKS = (
    Task(
        name="multi30k",
        description="Captions of pictures from English to German (Multi30k, test of 2016).",
        metric="BLEU",
        unit="",
        higher_is_better=True,
        load=partial(multi30k.load, pieces=5000),
        models=MappingProxyType(
            {
                "smallest": partial(_transformer, width=32, layers=2, heads=2, inner=64),
                "tiny": partial(_transformer, width=128, layers=4, heads=4, inner=256),
                "base": partial(_transformer, width=512, layers=6, heads=8, inner=2048),
            }
        ),
        default_model="tiny",
        sizes=MappingProxyType(
            {
                "smoke": replace(
                    _TINY, epochs=1, model="smallest", warmup=1, batch_size=8, examples=24, test_examples=4
                ),
                "cpu": replace(_TINY, epochs=6, warmup=400),
                "full": _BASE,
            }
        ),
        learn=_learn,
        summarize=percent,
        judge=_judge,
        progress_metric="piece accuracy",
        packages=("sacrebleu", "tokenizers"),
    ),
)
