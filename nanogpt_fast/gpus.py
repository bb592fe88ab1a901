"""What the data sheets say of GPUs, by the exact name that the driver gives: MFU, floors and rooflines divide by it.

Form factors of one chip differ (SXM, PCIe, NVL), so near names never match. A card that no row names is measured
instead (hardware.resolve_peak). Left out for want of a source: NVIDIA A10G (125 and 70 TFLOP/s are both published),
RTX PRO 6000 Max-Q and Server Edition (no tensor-core figure found), H200 NVL (835 and 840).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One product. Tensor-core figures are of dense 16-bit products accumulated in float32."""

    tflops: float
    gbps: float  # memory, 10^9 bytes/s
    gib: int  # of memory: the sheet's GB, which are GiB (less what ECC takes on GDDR)
    sms: int
    capability: int | None  # as in sm_90; None: no CUDA device
    flops_a_clock: int | None  # of one SM's tensor cores; None: not published
    source: str
    bfloat16: bool = True


# Sources. Where a sheet prints the rate "with sparsity" it is halved here, and GeForce cards have two rates, of which
# the one with float32 accumulation is taken. FLOPs a clock and SM are the architecture white papers' (V100, A100,
# GA102, Ada, H100, RTX Blackwell); B200's 8192 and MI300X's 2048 are its peak over units and boost clock.
# tests/test_hardware.py holds that tflops / (sms * flops_a_clock) is a clock that such a chip can have.
_V100 = "Tesla V100 data sheet"  # volta-v100-datasheet-update-us-1165301-r5
_A100 = "A100 data sheet"  # nvidia-a100-datasheet-us-nvidia-1758950-r4
_GA102 = "GA102 white paper v2"  # nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2, appendix A
_ADA = "Ada white paper"  # nvidia-ada-gpu-architecture, appendix A
_H100 = "H100 data sheet"  # nvidia.com/en-us/data-center/h100; SXM, PCIe: also the H100 white paper
_B200 = "Blackwell data sheet"  # blackwell-datasheet-3384703: HGX B200; GB200: a half of a superchip
_RTX50 = "RTX Blackwell white paper"  # nvidia-rtx-blackwell-gpu-architecture, appendix A

GPUS: dict[str, GPU] = {
    "Tesla V100-SXM2-16GB": GPU(125.0, 900.0, 16, 80, 70, 1024, _V100, bfloat16=False),
    "Tesla V100-SXM2-32GB": GPU(125.0, 900.0, 32, 80, 70, 1024, _V100, bfloat16=False),
    "Tesla V100-PCIE-16GB": GPU(112.0, 900.0, 16, 80, 70, 1024, _V100, bfloat16=False),
    "Tesla V100-PCIE-32GB": GPU(112.0, 900.0, 32, 80, 70, 1024, _V100, bfloat16=False),
    "Tesla T4": GPU(65.0, 320.0, 16, 40, 75, 1024, "T4 data sheet", bfloat16=False),  # t4-tensor-core-datasheet-951643
    "NVIDIA A100-SXM4-40GB": GPU(312.0, 1555.0, 40, 108, 80, 2048, _A100),
    "NVIDIA A100-SXM4-80GB": GPU(312.0, 2039.0, 80, 108, 80, 2048, _A100),
    "NVIDIA A100-PCIE-40GB": GPU(312.0, 1555.0, 40, 108, 80, 2048, _A100),
    "NVIDIA A100 80GB PCIe": GPU(312.0, 1935.0, 80, 108, 80, 2048, _A100),
    "NVIDIA A10": GPU(125.0, 600.0, 24, 72, 86, 1024, "A10 data sheet"),
    "NVIDIA A40": GPU(149.7, 696.0, 48, 84, 86, 1024, "A40 data sheet"),
    "NVIDIA RTX A6000": GPU(
        154.8, 768.0, 48, 84, 86, 1024, "RTX A6000 data sheet"
    ),  # us-nvidia-1454980-r9: 309.7 sparse
    "NVIDIA GeForce RTX 3090": GPU(71.2, 936.0, 24, 82, 86, 512, _GA102),
    "NVIDIA L4": GPU(121.0, 300.0, 24, 58, 89, 1024, "L4 data sheet"),  # 242 sparse
    "NVIDIA L40": GPU(181.0, 864.0, 48, 142, 89, 512, "L40 data sheet"),  # at GeForce's rate a clock, unlike the L40S
    "NVIDIA L40S": GPU(362.0, 864.0, 48, 142, 89, 1024, "L40S data sheet"),  # l40s-datasheet-28413
    "NVIDIA GeForce RTX 4090": GPU(165.2, 1008.0, 24, 128, 89, 512, _ADA),
    "NVIDIA H20": GPU(
        148.0, 4000.0, 96, 78, 90, None, "H20, as reported by Tom's Hardware"
    ),  # sold without a public sheet
    "NVIDIA H100 80GB HBM3": GPU(989.0, 3350.0, 80, 132, 90, 4096, _H100),  # SXM5
    "NVIDIA H100 PCIe": GPU(756.0, 2000.0, 80, 114, 90, 4096, _H100),
    "NVIDIA H100 NVL": GPU(835.0, 3900.0, 94, 132, 90, 4096, _H100),
    "NVIDIA GH200 480GB": GPU(
        989.0, 4000.0, 96, 132, 90, 4096, "GH200 data sheet"
    ),  # 480 GB is the CPU's; 96 GB of HBM3
    "NVIDIA GH200 144G HBM3e": GPU(989.0, 4900.0, 144, 132, 90, 4096, "GH200 data sheet"),
    "NVIDIA H200": GPU(
        989.0, 4800.0, 141, 132, 90, 4096, "H200 data sheet"
    ),  # hpc-datasheet-sc23-h200-datasheet-3002446
    "NVIDIA B200": GPU(2250.0, 8000.0, 180, 148, 100, 8192, _B200),
    "NVIDIA GB200": GPU(2500.0, 8000.0, 186, 152, 100, 8192, _B200),
    "NVIDIA GeForce RTX 5090": GPU(209.5, 1792.0, 32, 170, 120, 512, _RTX50),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": GPU(
        503.8,
        1792.0,
        96,
        188,
        120,
        1024,
        "RTX PRO 6000 data sheet",  # 4000 TOPS of sparse FP4, 8 a dense 16-bit FLOP
    ),
    "AMD Instinct MI300X": GPU(1307.4, 5300.0, 192, 304, None, 2048, "Instinct MI300X data sheet"),
}

CHOICES = {  # short names, of the command line: the name that the driver gives, a key of GPUS
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h100-nvl": "NVIDIA H100 NVL",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200 480GB",
    "b200": "NVIDIA B200",
    "gb200": "NVIDIA GB200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a10": "NVIDIA A10",
    "a40": "NVIDIA A40",
    "a6000": "NVIDIA RTX A6000",
    "l4": "NVIDIA L4",
    "l40": "NVIDIA L40",
    "l40s": "NVIDIA L40S",
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx5090": "NVIDIA GeForce RTX 5090",
    "rtxpro6000": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
}
