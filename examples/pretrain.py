"""data2vec in a plain PyTorch loop, from the parts of d2v_core: no trainer, no configuration files, your own tensors.

The data here is a toy: noisy sine waves as sequences of 16-sample patches. Replace `Patches` and `batch` by yours.
"""

import torch
from torch import nn

from d2v_core import (
    Data2Vec,
    FeatureEncoder,
    Layout,
    LinearPredictor,
    RegressionLoss,
    SpanMasking,
    Tokens,
    TopKTargets,
    Transformer,
)
from d2v_core.config import LossConfig, ModelConfig, TargetConfig
from d2v_core.keyed import generator
from d2v_core.masking import SpanMaskingConfig

B, T, PATCH, D = 8, 50, 16, 32


class Patches(FeatureEncoder):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(PATCH, D)
        self.hidden = nn.Parameter(torch.randn(D))
        self.place = nn.Parameter(0.1 * torch.randn(T, D))

    def embed(self, inputs):
        return Tokens(self.embedding(inputs["signal"]), padding_mask=None, grid=(T,))

    def view(self, tokens, masks):
        x = tokens.x if masks is None else torch.where(masks.hidden[:, 0, :, None], self.hidden, tokens.x)
        return Tokens(nn.functional.layer_norm(x + self.place, (D,)), None, (T,))


def batch(step):
    frequency, phase = torch.rand(B, 1) * 0.2 + 0.02, torch.rand(B, 1) * 6.28
    wave = torch.sin(frequency * torch.arange(T * PATCH) + phase) + 0.1 * torch.randn(B, T * PATCH)
    masks = SpanMasking(SpanMaskingConfig(mask_prob=0.5, mask_length=5))
    return {"signal": wave.view(B, T, PATCH)}, masks(
        [Layout((T,))] * B, 1, [generator(0, "mask", step, i) for i in range(B)]
    )


def main(steps=100):
    out = None
    torch.manual_seed(0)
    model = Data2Vec(
        Patches(), Transformer(ModelConfig(embed_dim=D, num_layers=3, num_heads=4)), LinearPredictor(D),
        TopKTargets(TargetConfig(top_k_layers=3, layer_norms=["instance"])), RegressionLoss(LossConfig()),
        teacher_parts={"": "average"},
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        out = model(*batch(step))
        (out.loss_sum / out.num_scored).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(decay=0.99)
        if step % 20 == 0 or step == steps - 1:
            print(f"{step} loss {out.loss_sum.item() / out.num_scored:.3f} target_std {out.target_std.item():.2f}")
    return out


if __name__ == "__main__":
    main()
