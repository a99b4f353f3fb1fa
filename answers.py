"""How is an answer chosen instead of written?

As a discriminative model does, CLIP-ViL (Shen et al. 2021, arXiv 2107.06383) among them: the
encoder reads text and picture, and a head scores every answer that the training data knows,

    z = W_2 LayerNorm(gelu(W_1 p + b_1)) + b_2        W_1: d -> 2 d,  W_2: 2 d -> answers

where p is the state of the text's first token. A task has a head of its own, trained in every row
of methods.py. An answer that is in no list can never be given.

    python train.py --answers yes --tasks vqa,gqa,nlvr --method adapter
    python -m pytest tests/test_answers.py

Axes: B batch, D width of the language model, A answers of a task.
"""
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AnswerHead(nn.Sequential):
    """States (B, D) -> scores z (B, A) of the answers of `vocabulary`.

    kind: "bce", each answer by itself, right to the degree of its soft score; or "ce", one of them.
    """

    def __init__(self, d: int, eps: float, vocabulary: list[str], kind: str):
        super().__init__(nn.Linear(d, 2 * d), nn.GELU(), nn.LayerNorm(2 * d, eps),
                         nn.Linear(2 * d, len(vocabulary)))
        for linear in (self[0], self[3]):                # as in BERT: N(0, 0.02), biases 0
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.vocabulary, self.kind = vocabulary, kind
        self.place = {answer: i for i, answer in enumerate(vocabulary)}

    def targets(self, answers: list[dict[str, float]]) -> Tensor:
        """The soft scores of examples' right answers -> (B, A); an unknown answer has no place."""
        found = torch.zeros(len(answers), len(self.vocabulary))
        for row, scores in zip(found, answers):
            for answer, soft in scores.items():
                if answer in self.place:
                    row[self.place[answer]] = soft
        return found

    def loss(self, z: Tensor, targets: Tensor) -> Tensor:
        """Scores and targets (B, A) -> the loss of each example (B)."""
        if self.kind == "ce":
            return F.cross_entropy(z.float(), targets, reduction="none")
        # The sum over answers, not their mean: of thousands, nearly all are easy zeros.
        return F.binary_cross_entropy_with_logits(z.float(), targets, reduction="none").sum(1)

    def probabilities(self, z: Tensor) -> Tensor:
        return z.float().sigmoid() if self.kind == "bce" else z.float().softmax(-1)


def vocabulary(examples: list) -> list[str]:
    """All answers of training examples, sorted."""
    # Sorted, so that a row of W_2 means the same answer in every run on the same data.
    return sorted(set().union(*(example.targets for example in examples)))


# ----------------------------------------------------------- the answers of a pre-trained head

# CLIP-ViL's pre-training knew 9,500 answers, spelt by these rules (LXMERT's).
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPELT = {"a man": "man", "the man": "man", "a woman": "woman", "the woman": "woman",
         "grey": "gray", **{number: str(i) for i, number in enumerate(NUMBERS, 1)}}


def spell(answer: str) -> str:
    """"The Man." -> "man": how the pre-training spelt an answer."""
    answer = answer.lower()
    if answer.endswith("."):
        answer = answer[:-1].strip()
    for article in ("a ", "an ", "the "):
        if answer.startswith(article):
            answer = answer.removeprefix(article).strip()
    return SPELT.get(answer, answer)


@torch.no_grad()
def transplant(head: AnswerHead, old: Mapping[str, Tensor], answers: list[str]) -> int:
    """Begins a head as a pre-trained one left it; returns how many of its answers that one knew.

    old: the tensors 0, 2, 3 (.weight, .bias) of the pre-trained head, whose rows mean `answers`.
    The row of an answer that it did not know is zero.
    """
    place = {answer: i for i, answer in enumerate(answers)}
    rows = torch.tensor([place.get(spell(answer), -1) for answer in head.vocabulary])
    known = rows >= 0
    for name, p in head.named_parameters():
        new = old[name]
        if name.startswith("3."):
            new = new[rows]                            # a copy
            new[~known] = 0
        assert new.isfinite().all(), f"{name} of the head holds NaN or inf"
        assert p.shape == new.shape, f"{name} {tuple(new.shape)} does not fit {tuple(p.shape)}"
        p.copy_(new)
    return int(known.sum())
