"""Reads the safety head that lies beside an exported checkpoint. Needs torch, transformers and safetensors, nothing else."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def unit_rms(x: Tensor) -> Tensor:
    """Scales vectors to root mean square 1: `[..., D] -> [..., D]`."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class SafetyHead:
    """ALLOW, ESCALATE or REFUSE: one linear map of a checkpoint's states at the prompt's last token, and one of its words."""

    def __init__(self, folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.spec = json.loads((Path(folder) / "safety_head.json").read_text(encoding="utf-8"))
        self.tensors = load_file(Path(folder) / "safety_head.safetensors")
        self.model, self.tokenizer = model, tokenizer

    def tokens(self, request: str, context: str | None = None) -> Tensor:
        """The prompt, `[1, T]`: control tokens in a request are plain text, a long request keeps its beginning and its end."""
        text = f"{context}\n\n{request}" if context else request
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        room = self.spec["room"]
        if len(ids) > room:
            ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
        return torch.tensor([self.spec["before"] + ids + self.spec["after"]])

    @torch.no_grad()
    def states(self, tokens: Tensor) -> list[Tensor]:
        """What is read, one for each of `layers`: `[1, T] -> [T, D]`."""
        top: list[Tensor] = []  # the last layer's output, before the final norm
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, inputs: top.append(inputs[0]))
        out = self.model.model(input_ids=tokens.to(self.model.device), output_hidden_states=True)
        hook.remove()
        states = [*out.hidden_states[:-1], top[0], out.last_hidden_state]
        return [states[-1 if layer == "last" else layer][0].float().cpu() for layer in self.spec["layers"]]

    def features(self, tokens: Tensor) -> list[Tensor]:
        """What the linear map reads of a prompt `[1, T]`, `[D]` each, as many for every one of `layers`."""
        features = []
        for state in map(unit_rms, self.states(tokens)):
            if self.spec["pooling"] != "mean":
                features.append(state[-1])
            if self.spec["pooling"] != "token":
                features.append(unit_rms(state.mean(0)))
        return features

    def too_strange(self, features: list[Tensor]) -> bool:
        """Whether a text is so unlike the training rows that it is not allowed."""
        if self.spec["limit"] is None:
            return False
        each = len(features) // len(self.spec["layers"])
        layers = [layer for layer in self.spec["layers"] for _ in range(each)]
        turned = [
            torch.einsum("nij,nj->ni", self.tensors["turn"], part.view(-1, 8)).flatten() if layer == "last" else part
            for layer, part in zip(layers, features, strict=True)
        ]
        distance = (torch.cat(turned) - self.tensors["shift"]) * self.tensors["scale"]
        return float(distance.square().mean()) > self.spec["limit"]

    def share_of_words(self, tokens: Tensor) -> Tensor:
        """What the words count in the decision: more, the more of a prompt `[T]` is spelt in parts of characters."""
        share: Tensor = self.tensors["words.share"]
        if "words.kind" not in self.tensors:
            return share
        kind = self.tensors["words.kind"][tokens][len(self.spec["before"]) :]
        parts = (kind == 1).sum() / (kind >= 0).sum().clamp(min=1)
        return share + (self.tensors["words.share_of_parts"] - share) * parts

    def with_words(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What the states say, pooled with what the words say: `[3], [T] -> [3]`."""
        if self.spec["words"] is None:
            return logits
        known, idf, table, bias = (self.tensors[f"words.{name}"] for name in ("known", "idf", "table", "bias"))
        share = self.share_of_words(tokens)
        if "words.fold" in self.tensors:
            tokens = self.tensors["words.fold"][tokens].long()
        opening = len(self.spec["before"])
        word = (tokens >= 0) | (torch.arange(len(tokens)) < opening)
        number, whole, longest, numbers = torch.zeros_like(tokens), torch.ones_like(word), self.spec["words"], []
        for n in range(longest):  # an n-gram ends where a shorter one ended a token before
            number = number[: len(tokens) - n] * 1_000_003 + tokens[n:] + 1
            whole = whole[: len(tokens) - n] & word[n:]
            behind = slice(max(0, opening - n), None)  # what ends behind the template's
            numbers.append((number * longest + n)[behind][whole[behind]])
        there = torch.isin(known, torch.cat(numbers))
        scores = idf[there] @ table[there] / idf[there].norm().clamp(min=1e-6) + bias
        return (1 - share) * logits.log_softmax(-1) + share * scores.log_softmax(-1)

    def decide(self, request: str, context: str | None = None) -> tuple[str, dict[str, float]]:
        """The decision and the probabilities, calibrated where `calibration` is there. Not finite, tied, under
        `min_confidence` or under the calibration's threshold, or too strange to be allowed: ESCALATE."""
        tokens = self.tokens(request, context)
        features = self.features(tokens)
        logits = self.tensors["weight"] @ torch.cat(features) + self.tensors["bias"]
        logits = self.with_words(logits, tokens[0])
        if not logits.isfinite().all():
            return "ESCALATE", dict.fromkeys(self.spec["labels"], 1 / 3)
        probabilities = logits.softmax(-1)
        best = probabilities.max()
        sure = int((probabilities == best).sum()) == 1 and best >= self.spec["min_confidence"]
        decision = self.spec["labels"][int(probabilities.argmax())] if sure else "ESCALATE"
        if decision == "ALLOW" and self.too_strange(features):
            decision = "ESCALATE"
        if calibration := self.spec["calibration"]:
            probabilities = (probabilities.double().log() / calibration["temperature"]).softmax(-1)
            if decision != "ESCALATE":
                least = calibration[decision.lower()]["at"]  # None: never given
                if least is None or probabilities[self.spec["labels"].index(decision)] < least:
                    decision = "ESCALATE"
        return decision, dict(zip(self.spec["labels"], probabilities.tolist(), strict=True))
