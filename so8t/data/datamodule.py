"""The LightningDataModule: sources -> splits -> tokens -> batches of similar length."""

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import lightning as L
import torch
from annotated_types import MinLen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from so8t.data.coded import coded
from so8t.data.framing import framed
from so8t.data.records import OnBadRow, Record, read_jsonl
from so8t.data.sources import SourceSpec, load_sources, report_skipped
from so8t.data.splits import apart_from, split_by_group, without_twins
from so8t.data.tokenise import EncodedTarget, Template, pad_rows
from so8t.data.weights import row_weights
from so8t.errors import DataError
from so8t.labels import LABELS
from so8t.losses import IGNORE
from so8t.specs import Count, Fraction, NotNegative, PositiveInt, ProperFraction, spec

log = logging.getLogger(__name__)


@spec
class DataSpec:
    """What `conf/data` says.

    `holdout_sources` are never trained on: they are the unseen test. Of the training rows, those of `train_labels` are trained
    on; no other split changes. A share `framed` of the training rows stands in another shape (`framing.py`), and
    `coded` of them join them in a code (`coded.py`). With `reweigh_languages` a row's language says nothing of its label
    (`weights.py`). The head reads a request behind `decision_prompt`, the base answers it behind `system_prompt`.
    `task_rows` language-model sequences go with each batch on average (0.125: one with every eighth).
    """

    sources: dict[str, SourceSpec]
    holdout_sources: tuple[str, ...] = ()
    train_labels: Annotated[tuple[Literal["ALLOW", "ESCALATE", "REFUSE"], ...], MinLen(1)] = ("ALLOW", "ESCALATE", "REFUSE")
    framed: Fraction = 0.0
    coded: Fraction = 0.0
    reweigh_languages: bool = False
    path: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    on_bad_row: OnBadRow = "error"
    val_fraction: ProperFraction = 0.1
    test_fraction: ProperFraction = 0.15
    split_seed: Count = 0
    system_prompt: str | None = None
    decision_prompt: str | None = None
    max_length: PositiveInt = 160
    batch_size: PositiveInt = 16
    eval_batch_size: PositiveInt = 32
    task_rows: NotNegative = 0.125


@dataclass
class TaskBatch:
    """Language-model sequences: `tokens`, `mask` and shifted `targets`, each `[M, T]`."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor


@dataclass
class Batch:
    """Right-padded prompts. `path` marks the tokens PET runs over, `position` the decision; `rows` are row numbers."""

    tokens: Tensor
    mask: Tensor
    path: Tensor
    position: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor
    task: TaskBatch | None = None


class RecordDataset(Dataset[Batch]):
    """Encoded records; indexed by a list of row numbers it gives a whole batch."""

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        *,
        weights: Sequence[float] | None = None,
        task_rows: float = 0.0,
        answer_in_path: bool = False,
    ):
        self.records = list(records)
        self.template = template
        self.task_rows = task_rows
        self.weights = [1.0] * len(self.records) if weights is None else list(weights)
        self.encoded = [template.encode(r.user_request, r.context) for r in self.records]
        self.sequences: list[tuple[int, ...]] = []
        self.paths: list[list[tuple[int, int]]] = []
        for record, prompt in zip(self.records, self.encoded, strict=True):
            answer: tuple[int, ...] = ()
            if answer_in_path and record.task_output:
                target = template.encode_target(record, record.task_output, rationale=False)
                answer = target.tokens[target.start : -1]
            end = len(prompt.tokens)
            self.sequences.append(prompt.tokens + answer)
            self.paths.append([prompt.span, (end, end + len(answer))])

    def __len__(self) -> int:
        return len(self.records)

    def length(self, row: int) -> int:
        """Tokens of a row's sequence."""
        return len(self.sequences[row])

    def __getitem__(self, rows: list[int]) -> Batch:  # type: ignore[override]
        tokens, mask = pad_rows([self.sequences[i] for i in rows], self._pad)
        path = torch.zeros_like(mask, dtype=torch.bool)
        for k, i in enumerate(rows):
            for begin, end in self.paths[i]:
                path[k, begin:end] = True
        records = [self.records[i] for i in rows]
        return Batch(
            tokens=tokens,
            mask=mask,
            path=path,
            position=torch.tensor([len(self.encoded[i].tokens) - 1 for i in rows]),
            labels=torch.tensor([int(r.safety_label) for r in records]),
            weights=torch.tensor([self.weights[i] for i in rows]),
            rows=torch.tensor(rows),
            task=self._task(rows),
        )

    @property
    def _pad(self) -> int:
        return int(self.template.tokenizer.pad_token_id or 0)

    def _task(self, rows: list[int]) -> TaskBatch | None:
        """A few answers and rationales of this batch's rows, drawn by the batch itself: no shared random state."""
        targets = [(i, False) for i in rows if self.records[i].task_output]
        targets += [(i, True) for i in rows if self.records[i].safety_rationale]
        if not targets or not self.task_rows:
            return None
        draw = random.Random(str(rows))  # noqa: S311  (a string seeds through SHA-512: the same in every process)
        count = int(self.task_rows) + (draw.random() < self.task_rows % 1)
        if not count:
            return None
        chosen = draw.sample(targets, min(count, len(targets)))
        encoded = []
        for i, rationale in chosen:
            record = self.records[i]
            text = record.safety_rationale if rationale else record.task_output
            encoded.append(self.template.encode_target(record, text or "", rationale=rationale))
        return task_batch(encoded, self._pad)


def no_longer(records: Sequence[Record], template: Template, most: int | None) -> list[Record]:
    """The records whose request has at most that many tokens; `None`: all."""
    if most is None:
        return list(records)
    spans = (template.encode(record.user_request, record.context).span for record in records)
    return [record for record, (begin, end) in zip(records, spans, strict=True) if end - begin <= most]


def task_batch(encoded: Sequence[EncodedTarget], pad: int) -> TaskBatch:
    """Right-padded sequences, whose targets are the text behind the prompt and the end of the turn."""
    tokens, mask = pad_rows([e.tokens for e in encoded], pad)
    shifted = torch.full_like(tokens, IGNORE)
    for k, e in enumerate(encoded):
        shifted[k, e.start - 1 : len(e.tokens) - 1] = tokens[k, e.start : len(e.tokens)]
    return TaskBatch(tokens, mask, shifted)


class LengthSampler(Sampler[list[int]]):
    """Batches of rows of similar length in random order, the same on every machine for a seed and an epoch.

    With several processes each takes every `world`-th batch, and all get the same number. `done` says how many of this
    epoch's batches were had before: a resumed run goes on with the next one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world: int = 1,
        done: Callable[[], int] = lambda: 0,
    ):
        self.lengths, self.size, self.seed, self.shuffle = list(lengths), size, seed, shuffle
        self.rank, self.world, self.done, self.epoch = rank, world, done, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def _batches(self) -> list[list[int]]:
        rows = list(range(len(self.lengths)))
        rng = random.Random(f"{self.seed}-{self.epoch}")  # noqa: S311
        if self.shuffle:
            rng.shuffle(rows)
            pool = self.size * 16  # sort within pools: similar lengths, still random company
            rows = [i for k in range(0, len(rows), pool) for i in sorted(rows[k : k + pool], key=self.lengths.__getitem__)]
        else:
            rows.sort(key=self.lengths.__getitem__)
        batches = [rows[k : k + self.size] for k in range(0, len(rows), self.size)]
        if self.shuffle:
            rng.shuffle(batches)
        if self.world > 1:
            while len(batches) % self.world:
                batches.append(batches[len(batches) % self.world - 1])
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        # a generator: when Lightning resumes, it makes the iterator before it says which epoch this is
        yield from self._batches()[self.rank :: self.world][self.done() :]

    def __len__(self) -> int:
        batches = -(-len(self.lengths) // self.size)
        return -(-batches // self.world)


class SafetyData(L.LightningDataModule):
    """Everything a run trains and is tested on. `test` comes from the same sources as `train`; `unseen` does not.

    Raises:
        DataError: a split is empty, a held-out source is unknown, a test set is not held out, or a given file overlaps with
            the training rows.
    """

    def __init__(self, spec: DataSpec, *, seed: int, answer_in_path: bool = False):
        super().__init__()
        self.spec = spec
        self.seed = seed
        self.answer_in_path = answer_in_path
        self._template: Template | None = None
        self.train: list[Record] = []
        self.val: list[Record] = []
        self.test: list[Record] = []
        self.unseen: list[Record] = []
        self.missing: list[str] = []
        self.skipped: dict[str, int] = {}

    @property
    def template(self) -> Template:
        """How requests become tokens; known once `use_tokenizer` was called."""
        if self._template is None:
            raise DataError("call use_tokenizer(base.tokenizer) before asking for batches")
        return self._template

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reading and splitting need no tokenizer, so that bad data is told before a base is loaded."""
        spec = self.spec
        self._template = Template(
            tokenizer, system_prompt=spec.system_prompt, decision_prompt=spec.decision_prompt, max_length=spec.max_length
        )

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits; a second call changes nothing."""
        if self.train:
            return
        unknown = set(self.spec.holdout_sources) - set(self.spec.sources)
        if unknown:
            raise DataError(
                f"data.holdout_sources: {', '.join(sorted(unknown))} not among data.sources ({', '.join(self.spec.sources)})"
            )
        trained = [n for n, s in self.spec.sources.items() if s.test_only and s.weight and n not in self.spec.holdout_sources]
        if trained:
            raise DataError(
                f"data.sources: {', '.join(trained)}: a test set (test_only) is not trained on: name it in data.holdout_sources"
            )
        loaded, self.missing = load_sources(self.spec.sources, on_bad_row=self.spec.on_bad_row, seed=self.spec.split_seed)
        self.skipped = {name: part.skipped for name, part in loaded.items() if part.skipped}
        held = set(self.spec.holdout_sources)
        seen = [r for name, part in loaded.items() if name not in held for r in part.records]
        self.unseen = [r for name, part in loaded.items() if name in held for r in part.records]
        if not seen:
            raise DataError("data.holdout_sources leaves no source to train on")
        given = {"val": self.spec.val_path, "test": self.spec.test_path}
        split = split_by_group(
            seen,
            val=0.0 if given["val"] else self.spec.val_fraction,
            test=0.0 if given["test"] else self.spec.test_fraction,
            seed=self.spec.split_seed,
        )
        self.train, self.val, self.test = ([seen[i] for i in part] for part in (split.train, split.val, split.test))
        # no row that is judged by has a near-duplicate or a twin among those that teach, or that choose what is kept
        if given["val"]:
            self.val = self._apart("val", self._read("val", given["val"]), self.train, same_groups=True)
        if given["test"]:
            rows = self._read("test", given["test"])
            self.test = self._apart("test", rows, [*self.train, *self.val], same_groups=True)
        self.unseen = self._apart("unseen", self.unseen, [*self.train, *self.val])
        self.train = [r for r in self.train if r.safety_label.name in self.spec.train_labels]
        codes = coded(self.train, self.spec.coded, seed=self.spec.split_seed) if "ESCALATE" in self.spec.train_labels else []
        self.train = framed(self.train, self.spec.framed, seed=self.spec.split_seed) + codes
        for part in ("train", "val", "test"):
            if not getattr(self, part):
                left_out = "".join(f", {n} left out: {why}" for why, n in self.skipped.items() if why.startswith(f"{part} ("))
                raise DataError(
                    f"the {part} split has no rows ({len(seen)} in all{left_out}): give more rows or other fractions"
                )
        absent = [name for k, name in enumerate(LABELS) if all(r.safety_label != k for r in self.train)]
        if absent:
            log.warning("no training rows for %s: the head cannot learn it", ", ".join(absent))

    def _read(self, part: str, path: str) -> list[Record]:
        """A file of one's own that is a whole split."""
        rows, report = read_jsonl(path, on_bad_row=self.spec.on_bad_row)
        report_skipped(part, report)
        if report.skipped:
            self.skipped[f"{part} (bad rows)"] = len(report.skipped)
        return rows

    def _apart(self, part: str, rows: list[Record], others: list[Record], *, same_groups: bool = False) -> list[Record]:
        where = "training rows" if part == "val" else "training and validation rows"
        apart = apart_from(others, rows)
        kept = without_twins(others, apart, same_groups=same_groups)
        reasons = {
            f"near-duplicates of {where}": len(rows) - len(apart),
            f"of the same group as {where}": len(apart) - len(kept),
        }
        for why, count in reasons.items():
            if count:
                log.warning("%s: %d rows are %s and are left out", part, count, why)
                self.skipped[f"{part} ({why})"] = count
        return kept

    def describe(self) -> dict[str, dict[str, int]]:
        """Rows by split and `source/label`."""
        return {
            part: dict(sorted(Counter(f"{r.source}/{r.safety_label.name}" for r in getattr(self, part)).items()))
            for part in ("train", "val", "test", "unseen")
        }

    def _loader(self, records: list[Record], *, shuffle: bool) -> DataLoader[Batch]:
        dataset = RecordDataset(
            records,
            self.template,
            weights=self._weights(records) if shuffle else None,
            task_rows=self.spec.task_rows if shuffle else math.ceil(self.spec.task_rows),
            answer_in_path=self.answer_in_path,
        )
        trainer = self.trainer
        overfit = trainer is not None and bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        sampler = LengthSampler(
            [dataset.length(i) for i in range(len(dataset))],
            self.spec.batch_size if shuffle else self.spec.eval_batch_size,
            seed=self.seed,
            shuffle=shuffle and not overfit,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer and shuffle else 0,
        )
        if overfit:  # Lightning puts a sampler of its own on: it must number whole batches, the same ones every epoch
            return DataLoader([dataset[rows] for rows in sampler], batch_size=None)  # type: ignore[arg-type]
        # a generator of its own: making an iterator must not draw from the random numbers that training uses
        return DataLoader(dataset, batch_size=None, sampler=sampler, generator=torch.Generator())

    def _weights(self, records: list[Record]) -> list[float]:
        """How much each row counts."""
        return row_weights(records, reweigh_languages=self.spec.reweigh_languages)

    def sample(self, rows: int, *, batch_size: int) -> list[Batch]:
        """About `rows` training rows, the same for every seed, or all of them if there are fewer."""
        dataset = RecordDataset(self.train, self.template, weights=self._weights(self.train))
        lengths = [dataset.length(i) for i in range(len(dataset))]
        chosen = itertools.islice(LengthSampler(lengths, batch_size, seed=0, shuffle=True), -(-rows // batch_size))
        return [dataset[batch] for batch in chosen]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of training rows."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation rows."""
        return self._loader(self.val, shuffle=False)
