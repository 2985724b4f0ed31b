#!/usr/bin/env python3
"""Write reference cases for deformable convolution, computed by torchvision in float64.

    make_golden.py OUT.npz [--seed N] [--cases NAME ...]

Needs torch and torchvision (0.29.1 wrote the file kept here). Every case holds, under `<case>/`:
    input  [N, C, H, W]          weight [O, C/groups, KH, KW]       bias-free
    offset [N, 2*G*KH*KW, OH, OW]   channel ((g*KH + ky)*KW + kx)*2 + {0: dy, 1: dx}
    mask   [N, G*KH*KW, OH, OW]     absent for version 1 cases
    output, grad_output [N, O, OH, OW]
    grad_input, grad_weight, grad_offset, grad_mask
    config = [stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, deform_groups]
Padding is explicit and symmetric: (pad_h, pad_h), (pad_w, pad_w).
"""

import argparse

import numpy as np
import torch
from torchvision.ops import deform_conv2d

# name: batch, in, out, height, width, kernel, stride, pad, dilation, groups, deform_groups, mask,
# offset scale
CASES = {
    "plain_3x3": (2, 4, 6, 7, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, False, 1.0),
    "modulated_3x3": (2, 4, 6, 7, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, True, 1.0),
    "torchvision_test": (3, 6, 2, 5, 4, (3, 2), (2, 1), (1, 0), (2, 1), 2, 3, True, 1.0),
    "batch_33": (33, 6, 2, 5, 4, (3, 2), (2, 1), (1, 0), (2, 1), 2, 3, True, 1.0),
    "strided": (2, 3, 5, 11, 9, (3, 3), (2, 2), (1, 1), (1, 1), 1, 1, False, 2.0),
    "dilated": (1, 3, 5, 12, 11, (3, 3), (1, 1), (2, 2), (2, 2), 1, 1, True, 1.5),
    "no_padding": (2, 2, 3, 6, 6, (2, 2), (1, 1), (0, 0), (1, 1), 1, 1, False, 0.5),
    "pointwise": (2, 8, 4, 5, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1, 4, True, 1.0),
    "depthwise": (2, 6, 6, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1), 6, 2, True, 1.0),
    "far_outside": (2, 4, 3, 6, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 2, True, 12.0),
    "wide_kernel": (1, 3, 4, 9, 10, (5, 1), (1, 2), (2, 0), (1, 1), 1, 3, False, 1.0),
    "zero_offsets": (2, 5, 4, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, False, 0.0),
}


def compute(generator, case):
    n, c, o, h, w, (kh, kw), stride, pad, dilation, groups, deform_groups, masked, scale = case
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((h, w), pad, dilation, (kh, kw), stride, strict=True)
    ]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "input": normal(n, c, h, w),
        "weight": normal(o, c // groups, kh, kw),
        "offset": scale * normal(n, 2 * deform_groups * kh * kw, *out),
    }
    if masked:
        tensors["mask"] = torch.rand(
            n, deform_groups * kh * kw, *out, generator=generator, dtype=torch.float64
        )
    for tensor in tensors.values():
        tensor.requires_grad_()
    output = deform_conv2d(
        tensors["input"],
        tensors["offset"],
        tensors["weight"],
        stride=stride,
        padding=pad,
        dilation=dilation,
        mask=tensors.get("mask"),
    )
    grad_output = normal(*output.shape)
    grads = torch.autograd.grad(output, list(tensors.values()), grad_output)
    record = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    record |= {f"grad_{name}": grad.numpy() for name, grad in zip(tensors, grads, strict=True)}
    record |= {"output": output.detach().numpy(), "grad_output": grad_output.numpy()}
    record["config"] = np.array([*stride, *pad, *dilation, groups, deform_groups])
    return record


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    arrays = {}
    for name in arguments.cases:
        arrays |= {f"{name}/{key}": value for key, value in compute(generator, CASES[name]).items()}
    np.savez_compressed(arguments.out, **arrays)
    print(f"{len(arguments.cases)} cases, {len(arrays)} arrays -> {arguments.out}")


if __name__ == "__main__":
    main()
