"""The method, on one page.

data2vec (Baevski, Hsu, Xu, Babu, Gu, Auli, 2022, arXiv:2202.03555): a student sees an input of which part is hidden,
and regresses at the hidden places what its own moving average computes from the whole input, averaged over the top K
layers. Nothing below knows what kind of input it is.

data2vec 2.0 (Baevski, Babu, Hsu, Auli, 2022, arXiv:2212.07525) is the same page: `masks` then has several copies of
each sample, for one pass of the teacher; the encoder gives the student visible tokens only; the predictor is a decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2v_core.contract import FeatureEncoder, Masks, Part, Predictor, Tokens
from d2v_core.errors import UserError
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
    """One linear map of width embed_dim at the scored tokens (fairseq's `final_proj`). For students that see all T
    places."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.linear = Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        """As `Predictor.forward`."""
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

    encoder, transformer: the student. predictor: from its output to the targets' space. targets: what becomes of the
    teacher's layers. loss: between the two. teacher_parts: as `Modality.teacher_parts` gives them.
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
        """The loss of a micro-batch. inputs: what `FeatureEncoder.embed` reads; masks: what the student may not see and
        is scored on; teacher_inputs: where the teacher reads another input than the student."""
        tokens = self.student.encoder.embed(inputs)
        everywhere = self.teach(tokens, inputs if teacher_inputs is None else teacher_inputs, teacher_inputs is None)
        target = at_scored(everywhere, masks)
        view, encoded = self.student(tokens, masks)
        prediction = self.predictor(replace(view, x=encoded.x), masks)
        loss_sum = self.loss(prediction, target)
        if self.loss.cls_weight:  # 2.0: the token in front regresses the mean of its sample's targets
            if not view.num_extra:
                raise UserError(f"loss.cls_weight={self.loss.cls_weight}, but this encoder puts no token in front.")
            mean = mean_of_tokens(everywhere, tokens.padding_mask).repeat_interleave(masks.num_copies, 0)
            loss_sum = loss_sum + self.loss.of_rows(encoded.x[:, 0], mean, len(target))
        return Data2VecOutput(
            loss_sum=loss_sum,
            num_scored=len(target),
            prediction=prediction,
            target=target,
            prediction_std=channel_std(prediction),
            target_std=channel_std(target),
        )

    @torch.no_grad()
    def teach(self, tokens: Tokens, inputs: Mapping[str, Tensor], same_inputs: bool = True) -> Tensor:
        """The target at every place, (B, T, D) float32: once per sample, however many masked copies of it there are.

        tokens: the student's, of these inputs. Where the teacher shares the embedding and its input (same_inputs), it
        is given these tokens: the expensive front end then runs once.
        """
        teacher = self.teacher.module
        assert isinstance(teacher, Student)
        if not (same_inputs and self.teacher.shares("encoder.embedding")):
            tokens = teacher.encoder.embed(inputs)
        view, encoded = teacher(tokens, None, taps=True)
        return self.targets(encoded, view.padding_mask, view.num_extra)

    def update_teacher(self, decay: float, applied: Tensor | None = None) -> None:
        """The teacher's step towards the student. applied: as `EMATeacher.update` has it."""
        self.teacher.update(self.student, decay, applied)


def at_scored(everywhere: Tensor, masks: Masks) -> Tensor:
    """(B, T, D) of whole samples -> (N, D) in the order of scored_rows, which count the places of all copies."""
    num_tokens = everywhere.shape[1]
    sample = masks.scored_rows // (masks.num_copies * num_tokens)
    return everywhere.flatten(0, 1)[sample * num_tokens + masks.scored_rows % num_tokens]


def mean_of_tokens(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, T, D), (B, T) -> (B, D), padding left out."""
    if padding_mask is None:
        return x.mean(1)
    keep = ~padding_mask.unsqueeze(-1)
    return (x * keep).sum(1) / keep.sum(1)


def mean_of_valid(tokens: Tokens) -> Tensor:
    """(B, E + T, D) -> (B, D): the mean of what is neither an extra token nor padding."""
    padding_mask = tokens.padding_mask
    valid = None if padding_mask is None else padding_mask[:, tokens.num_extra :]
    return mean_of_tokens(tokens.x[:, tokens.num_extra :], valid)


@torch.no_grad()
def channel_std(x: Tensor) -> Tensor:
    """Mean over channels of sqrt(unbiased variance over rows + 1e-6) of (N, D): fairseq's `target_var`."""
    return (x.float().var(0) + 1e-6).sqrt().mean() if len(x) > 1 else x.new_zeros((), dtype=torch.float32)
