"""The method, on one page.

data2vec (Baevski, Hsu, Xu, Babu, Gu, Auli, 2022, arXiv:2202.03555): a student sees an input of which part is hidden,
and regresses at the hidden places what its own moving average computes from the whole input, averaged over the top K
layers. Nothing below knows what kind of input it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_core.contract import FeatureEncoder, Masks, Part, Predictor, Tokens
from d2v_core.kernels import Linear
from d2v_core.loss import RegressionLoss
from d2v_core.targets import TopKTargets
from d2v_core.teacher import EMATeacher
from d2v_core.transformer import Transformer, TransformerOutput


class Student(nn.Module):
    """A feature encoder and a transformer: what is kept after pre-training."""

    def __init__(self, encoder: FeatureEncoder, transformer: Transformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.transformer = transformer

    def forward(self, tokens: Tokens, masks: Masks | None, taps: bool = False) -> tuple[Tokens, TransformerOutput]:
        """From `encoder.embed`'s tokens to the view and the transformer's output for it."""
        view = self.encoder.view(tokens, masks)
        return view, self.transformer(view.x, view.padding_mask, self.encoder.attention_bias(view), taps)


class LinearPredictor(Predictor):
    """One linear map at the scored tokens (fairseq's `final_proj`). For students that see all T places."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.linear = Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        return self.linear(tokens.x[:, tokens.num_extra :].flatten(0, 1)[masks.scored_rows])


@dataclass(frozen=True)
class Data2VecOutput:
    """loss_sum: () float32 over the scored tokens, to be divided by their number (all micro-batches together).

    prediction, target: (N, D). prediction_std, target_std: () mean over channels of the standard deviation over scored
    tokens; both fall towards 0 when the representation collapses.
    """

    loss_sum: Tensor
    num_scored: int
    prediction: Tensor
    target: Tensor
    prediction_std: Tensor
    target_std: Tensor


class Data2Vec(nn.Module):
    """Student, predictor and teacher. The optimizer takes the parameters that require gradients.

    After each optimizer step call `update_teacher(decay)` once, however many micro-batches it had.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        transformer: Transformer,
        predictor: Predictor,
        targets: TopKTargets,
        loss: RegressionLoss,
        teacher_parts: Mapping[str, Part],
    ) -> None:
        super().__init__()
        self.student = Student(encoder, transformer)
        self.predictor = predictor
        self.targets = targets
        self.loss = loss
        self.teacher = EMATeacher(self.student, teacher_parts)

    def forward(
        self, inputs: Mapping[str, Tensor], masks: Masks, teacher_inputs: Mapping[str, Tensor] | None = None
    ) -> Data2VecOutput:
        tokens = self.student.encoder.embed(inputs)
        target = self.target(
            tokens, inputs if teacher_inputs is None else teacher_inputs, masks, teacher_inputs is None
        )
        view, encoded = self.student(tokens, masks)
        seen = Tokens(encoded.x, view.padding_mask, view.grid, view.num_extra, view.index)
        prediction = self.predictor(seen, masks)
        return Data2VecOutput(
            loss_sum=self.loss(prediction, target),
            num_scored=len(target),
            prediction=prediction,
            target=target,
            prediction_std=channel_std(prediction),
            target_std=channel_std(target),
        )

    @torch.no_grad()
    def target(self, tokens: Tokens, inputs: Mapping[str, Tensor], masks: Masks, same_inputs: bool = True) -> Tensor:
        """What the teacher makes of the whole input, at the scored places: (N, D) float32.

        Where the teacher shares the embedding and its input, it is given the student's tokens: the expensive front end
        then runs once.
        """
        teacher = self.teacher.module
        assert isinstance(teacher, Student)
        if not (same_inputs and self.teacher.shares("encoder.embedding")):
            tokens = teacher.encoder.embed(inputs)
        view, encoded = teacher(tokens, None, taps=True)
        target = self.targets(encoded, view.padding_mask, view.num_extra)  # (B, T, D)
        num_tokens, copies = target.shape[1], masks.num_copies
        row = masks.scored_rows // (copies * num_tokens) * num_tokens + masks.scored_rows % num_tokens
        return target.flatten(0, 1)[row]

    def update_teacher(self, decay: float) -> None:
        self.teacher.update(self.student, decay)


@torch.no_grad()
def channel_std(x: Tensor) -> Tensor:
    """Mean over channels of sqrt(unbiased variance over rows + 1e-6) of (N, D): fairseq's `target_var`."""
    return (x.float().var(0) + 1e-6).sqrt().mean() if len(x) > 1 else x.new_zeros((), dtype=torch.float32)
