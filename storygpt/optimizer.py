"""From gradients to new weights: parameter groups, optimizers, schedule and float16's scale."""

import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from config import InputError, TrainingConfig
from model import GPT


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Returns the blocks' matrices, the embeddings, and the biases and norms, which do not
    decay."""
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [model.wte.weight, model.wpe.weight], "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


class Muon(torch.optim.Muon):
    """torch's Muon, its state too, with all matrices of one shape in batched products.

    One by one the 40 matrices of the default model are some 900 small operators a step.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Makes one update, as torch's does with Nesterov momentum."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, weights in by_shape.items():
                gradients = [p.grad for p in weights]
                for p in weights:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                means = [self.state[p]["momentum_buffer"] for p in weights]
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, means, group["momentum"]))
                updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # match_rms_adamw
                torch._foreach_add_(weights, updates.float().unbind(), alpha=-rate)


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Brings (B, m, n) matrices U S Vᵀ near U Vᵀ, in bfloat16, by Newton-Schulz iterations."""
    a, b, c = coefficients
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, coefficients, steps).mT
    x = x.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def build_optimizers(model: GPT, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Makes fused AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101) for all weights; with
    `optimizer="muon"`, Muon (Jordan et al., 2024) for the blocks' matrices and AdamW for the rest.

    Muon's updates are scaled to AdamW's root mean square (Liu et al., 2025, arXiv:2502.16982), so
    that both follow the same learning rate.
    """
    groups = parameter_groups(model, config.weight_decay)
    match config.optimizer:
        case "adamw":
            muon = []
        case "muon":
            matrices = groups.pop(0)
            muon = [Muon([matrices], config.learning_rate, adjust_lr_fn="match_rms_adamw")]
        case _:
            raise InputError(f"there is no optimizer {config.optimizer}")
    betas = (config.beta1, config.beta2)
    return [torch.optim.AdamW(groups, config.learning_rate, betas, fused=True), *muon]


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> LRScheduler:
    """Makes a linear warm-up, then a cosine to min_lr at max_steps."""
    cosine = CosineAnnealingLR(
        optimizer, T_max=config.max_steps - config.warmup_steps, eta_min=config.min_lr
    )
    if config.warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=0.001, total_iters=config.warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[config.warmup_steps])


# What each optimizer keeps of a weight, in the weight's shape.
AVERAGES = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


class Optimizer:
    """The optimizers, their schedules and the scaler of float16, as one with one state.

    `backward` for every micro-batch, then one `step`.
    """

    # A healthy scale settles far above this; below it every step is being skipped.
    LEAST_SCALE = 2**-14

    def __init__(self, model: GPT, config: TrainingConfig, device: torch.device, dtype):
        self.parameters = list(model.parameters())
        self.grad_clip = config.grad_clip or math.inf
        self.optimizers = build_optimizers(model, config)
        self.schedules = [build_schedule(optimizer, config) for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self.schedules[0].get_last_lr()[0]

    @property
    def collapsed(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() < self.LEAST_SCALE

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a () loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> tuple[Tensor, bool]:
        """Clips, updates the weights and moves the schedule on; gradients are zero after it.

        Returns the () gradient norm before clipping, and whether the step was skipped because
        float16 overflowed: then no optimizer steps, also where its own gradients are finite, and
        the schedule waits.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        skipped = self.scaler.is_enabled() and not bool(grad_norm.isfinite())
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            if not skipped:
                self.scaler.step(optimizer)
                schedule.step()
            optimizer.zero_grad()
        self.scaler.update()
        return grad_norm, skipped

    def state_dict(self) -> dict:
        """Returns what resuming needs beside the weights and the step."""
        return {
            "optimizer_state_dicts": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler_state_dicts": [schedule.state_dict() for schedule in self.schedules],
            "scaler_state_dict": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Puts a `state_dict` back. Another model's raises whatever it runs into."""
        for name, parts in (("optimizer", self.optimizers), ("scheduler", self.schedules)):
            for part, saved in zip(parts, state[f"{name}_state_dicts"], strict=True):
                part.load_state_dict(saved)
        # A run that was in another precision so far has no scale to go on with.
        if state["scaler_state_dict"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler_state_dict"])
        for optimizer in self.optimizers:
            averages = AVERAGES.get(type(optimizer), ())
            for parameter, saved in optimizer.state.items():
                if any(saved[name].shape != parameter.shape for name in averages):
                    raise ValueError("other shapes than the weights")
