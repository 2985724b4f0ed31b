"""Layers of real networks that use deformable convolution, by name. No framework is needed here.

Batches are those of one GPU.
"""

from layers import Layer

ZOO = {
    # Detection: ResNet-50 with DCNv2, images of 800×1216, also at the blocks that halve the size
    "R50-DCNv2 c3": Layer(2, 128, 128, 100, 152, masked=True),
    "R50-DCNv2 c4": Layer(2, 256, 256, 50, 76, masked=True),
    "R50-DCNv2 c5": Layer(2, 512, 512, 25, 38, masked=True),
    "R50-DCNv2 c3 down": Layer(2, 128, 128, 200, 304, masked=True, stride=2),
    "R50-DCNv2 c5 down": Layer(2, 512, 512, 50, 76, masked=True, stride=2),
    "R50-DCNv1 dg4 c4": Layer(2, 256, 256, 50, 76, deform_groups=4),
    "R50 dil2 c5": Layer(2, 512, 512, 50, 76, masked=True, dilation=2),
    "ResNeXt g32 c4": Layer(2, 512, 512, 50, 76, masked=True, groups=32),
    "RepPoints P3": Layer(2, 256, 256, 100, 152),
    "CenterNet DLA 64": Layer(16, 64, 64, 128, 128, masked=True),
    "CenterNet DLA 256-128": Layer(16, 256, 128, 64, 64, masked=True),
    "PP-YOLO c5 infer": Layer(1, 512, 512, 20, 20, masked=True),
    "wide 1024": Layer(2, 1024, 1024, 25, 38),
    # Text detection
    "DBNet c3": Layer(16, 128, 128, 80, 80, masked=True),
    "DBNet c5": Layer(16, 512, 512, 20, 20, masked=True),
    # Video super-resolution: many deformable groups
    "EDVR train": Layer(8, 64, 64, 64, 64, masked=True, deform_groups=8),
    "EDVR-L train": Layer(8, 128, 128, 64, 64, masked=True, deform_groups=8),
    "BasicVSR++ train": Layer(8, 128, 64, 64, 64, masked=True, deform_groups=16),
    "BasicVSR++ infer": Layer(1, 128, 64, 180, 320, masked=True, deform_groups=16),
    "TDAN dg8 180x320": Layer(1, 64, 64, 180, 320, deform_groups=8),
    # Matting, segmentation: kernels of other sizes, depthwise ones, DCNv3 and DCNv4 as depthwise
    "BiRefNet ASPP 7x7": Layer(2, 64, 64, 64, 64, kernel=(7, 7), masked=True),
    "BiRefNet ASPP 1x1": Layer(2, 64, 64, 64, 64, kernel=(1, 1), masked=True),
    "D-LKA 5x5 depthwise": Layer(8, 96, 96, 56, 56, kernel=(5, 5), groups=96),
    "D-LKA 7x7 dil3 depthwise": Layer(8, 96, 96, 56, 56, kernel=(7, 7), dilation=3, groups=96),
    "DCNv3-like depthwise dg4": Layer(8, 64, 64, 56, 56, masked=True, groups=64, deform_groups=4),
    # Odd ones
    "first layer RGB 7x7 s2": Layer(8, 3, 64, 224, 224, kernel=(7, 7), stride=2),
    "1D audio 1x9": Layer(8, 64, 64, 1, 4000, kernel=(1, 9)),
    "odd 30 channels": Layer(8, 30, 30, 64, 64, masked=True),
    "4K one image": Layer(1, 32, 32, 1080, 1920),
}


def layers_named(parts: list[str]) -> dict[str, Layer]:
    """Those of the zoo whose name contains one of `parts`.

    Raises ValueError for a part that no name contains.
    """
    for part in parts:
        if not any(part in name for name in ZOO):
            raise ValueError(f'no layer\'s name contains "{part}"; there are {", ".join(ZOO)}')
    return {name: layer for name, layer in ZOO.items() if any(part in name for part in parts)}
