"""What a score has to beat: TF-IDF with logistic regression, a linear probe on the frozen base, and the context alone.

They are fitted on the run's own training rows and stored beside the adapter as safetensors + JSON, so that every later
evaluation, on any file, can print them too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from so8t.data.records import Record
from so8t.labels import LABELS

Floats = NDArray[np.float64]

_JAPANESE = r"[\u3040-\u30ff\u4e00-\u9fff]"
_TOKEN = rf"(?u){_JAPANESE}{{1}}|[^\W\u3040-\u30ff\u4e00-\u9fff]+"  # words; one token a character in Japanese


@dataclass(frozen=True)
class Linear:
    """Softmax of `x W^T + b`: `weights` `[3, F]`, `bias` `[3]`."""

    weights: Floats
    bias: Floats

    def probabilities(self, features: Floats) -> Floats:
        """`[N, F] -> [N, 3]`."""
        scores = np.asarray(features @ self.weights.T) + self.bias
        scores -= scores.max(-1, keepdims=True)
        exp = np.exp(scores)
        return exp / exp.sum(-1, keepdims=True)


def fit_linear(features: Floats, labels: Sequence[int], *, c: float, weights: Floats | None = None) -> Linear:
    """Multinomial logistic regression, balanced or with rows weighted by `weights` `[N]`; classes without rows get no chance
    (bias -inf stands in as -1e9)."""
    target = np.asarray(labels)
    found = np.zeros((len(LABELS), features.shape[1]))
    bias = np.full(len(LABELS), -1e9)
    seen = np.unique(target)
    if len(seen) == 1:
        bias[seen[0]] = 0.0
        return Linear(found, bias)
    balance = "balanced" if weights is None else None
    model = LogisticRegression(C=c, max_iter=1000, class_weight=balance).fit(features, target, sample_weight=weights)
    if len(seen) == 2:  # scikit-learn keeps one row for two classes
        found[seen[1]], bias[seen[0]], bias[seen[1]] = model.coef_[0], 0.0, model.intercept_[0]
    else:
        found[seen], bias[seen] = model.coef_, model.intercept_
    return Linear(found, bias)


class TfidfBaseline:
    """Words (characters in Japanese), 1- and 2-grams, TF-IDF, logistic regression."""

    def __init__(self, vectorizer: TfidfVectorizer, linear: Linear):
        self.vectorizer, self.linear = vectorizer, linear

    @staticmethod
    def _empty(vocabulary: dict[str, int] | None = None) -> TfidfVectorizer:
        return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_TOKEN, vocabulary=vocabulary)

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[int], *, c: float = 10.0) -> "TfidfBaseline":
        """Fits both stages."""
        vectorizer = cls._empty()
        return cls(vectorizer, fit_linear(vectorizer.fit_transform(texts), labels, c=c))

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """`N texts -> [N, 3]`."""
        return self.linear.probabilities(self.vectorizer.transform(texts))

    def save(self, folder: Path, name: str) -> None:
        """Writes `NAME.json` (vocabulary) and `NAME.safetensors`."""
        vocabulary = {word: int(i) for word, i in self.vectorizer.vocabulary_.items()}
        (folder / f"{name}.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        arrays = {"idf": self.vectorizer.idf_, "weights": self.linear.weights, "bias": self.linear.bias}
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / f"{name}.safetensors")

    @classmethod
    def load(cls, folder: Path, name: str) -> "TfidfBaseline":
        """The counterpart of `save`."""
        arrays = load_file(folder / f"{name}.safetensors")
        vectorizer = cls._empty(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        vectorizer.idf_ = arrays["idf"]
        return cls(vectorizer, Linear(arrays["weights"], arrays["bias"]))


class ProbeBaseline:
    """Logistic regression on standardised hidden states of the frozen base (final norm, decision position)."""

    def __init__(self, mean: Floats, scale: Floats, linear: Linear):
        self.mean, self.scale, self.linear = mean, scale, linear

    @classmethod
    def fit(cls, features: Floats, labels: Sequence[int], *, c: float = 0.01) -> "ProbeBaseline":
        """`[N, D]` features."""
        mean, scale = features.mean(0), features.std(0) + 1e-6
        return cls(mean, scale, fit_linear((features - mean) / scale, labels, c=c))

    def probabilities(self, features: Floats) -> Floats:
        """`[N, D] -> [N, 3]`."""
        return self.linear.probabilities((features - self.mean) / self.scale)

    def save(self, folder: Path, name: str) -> None:
        """Writes `NAME.safetensors`."""
        arrays = {"mean": self.mean, "scale": self.scale, "weights": self.linear.weights, "bias": self.linear.bias}
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / f"{name}.safetensors")

    @classmethod
    def load(cls, folder: Path, name: str) -> "ProbeBaseline":
        """The counterpart of `save`."""
        arrays = load_file(folder / f"{name}.safetensors")
        return cls(arrays["mean"], arrays["scale"], Linear(arrays["weights"], arrays["bias"]))


def full_text(record: Record) -> str:
    """What the model sees of a record."""
    return f"{record.context}\n\n{record.user_request}" if record.context else record.user_request


@dataclass
class Baselines:
    """All three, fitted on the same training rows."""

    tfidf: TfidfBaseline
    probe: ProbeBaseline
    context: TfidfBaseline

    @classmethod
    def fit(cls, train: Sequence[Record], features: Floats, probed: Sequence[Record] | None = None) -> "Baselines":
        """`features` `[N, D]`: the frozen base's states where it decides, a row each of `probed`, by default of `train`."""
        labels = [int(r.safety_label) for r in train]
        of_probed = labels if probed is None else [int(r.safety_label) for r in probed]
        return cls(
            TfidfBaseline.fit([full_text(r) for r in train], labels),
            ProbeBaseline.fit(features, of_probed),
            TfidfBaseline.fit([r.context or "none" for r in train], labels),
        )

    def probabilities(self, records: Sequence[Record], features: Floats) -> dict[str, torch.Tensor]:
        """By name, `[N, 3]` each."""
        table = {
            "TF-IDF": self.tfidf.probabilities([full_text(r) for r in records]),
            "frozen probe": self.probe.probabilities(features),
            "context only": self.context.probabilities([r.context or "none" for r in records]),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(p)).float() for name, p in table.items()}

    def save(self, folder: Path) -> None:
        """Into a folder of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tfidf.save(folder, "tfidf")
        self.probe.save(folder, "probe")
        self.context.save(folder, "context")

    @classmethod
    def load(cls, folder: Path) -> "Baselines":
        """The counterpart of `save`."""
        return cls(
            TfidfBaseline.load(folder, "tfidf"), ProbeBaseline.load(folder, "probe"), TfidfBaseline.load(folder, "context")
        )
