"""What joins GPUs, and how long NCCL's collectives take on it: latency and bandwidth, by NCCL's own constants.

    all-reduce, ring     base + 2 (N - 1) alpha + 2 (N - 1)/N S / beta
    all-reduce, tree     base + 2 ((g - 1) alpha in the node + log2(nodes) alpha between them) + 2 S / beta
    reduce-scatter, all-gather: rings of N - 1 steps, (N - 1)/N S / beta

N GPUs, g of them a node, S bytes. Of a ring's hops those between nodes cost that link's alpha, and beta is the smaller
of NVLink's and of what all the node's network cards carry together: NCCL's rings leave a node through each of its
cards. Of the forms, NCCL takes the one that its model (src/graph/tuning.cc) says is fastest; so does this, by the same
model without its corrections. Not modelled: NVLink SHARP (in one node of H100s it reaches 480 GB/s where rings have
370, NVIDIA/nccl-tests issue 212), the SMs and memory bandwidth that collectives take from the compute beside them,
other jobs on the network, stragglers.
"""

import math
from dataclasses import dataclass

from nanogpt_fast.errors import ConfigError
from nanogpt_fast.gpus import CHOICES


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways: seconds that it takes at least, seconds a hop, and its share of the links' bandwidth."""

    algorithm: str  # ring | tree
    base: float
    nvlink: float
    pcie: float
    network: float
    share: float
    nvlink_only: bool = False


# NVIDIA/nccl src/graph/tuning.cc at b6475625: baseLat and hwLat, in us, and its "various model refinements" of the
# bandwidth: LL sends a flag with every 4 bytes and is held to a quarter, LL128 carries 120 bytes of 128, trees reach
# 0.92.
PROTOCOLS = (
    Protocol("ring", 6.6e-6, 0.6e-6, 1.0e-6, 2.7e-6, 0.25),  # LL
    Protocol("ring", 14.0e-6, 1.9e-6, 2.5e-6, 4.0e-6, 0.92, nvlink_only=True),  # LL128
    Protocol("ring", 8.4e-6, 3.4e-6, 5.7e-6, 14.0e-6, 1.0),  # Simple
    Protocol("tree", 6.8e-6, 0.6e-6, 1.0e-6, 5.0e-6, 0.92 / 3.8),
    Protocol("tree", 14.0e-6, 1.25e-6, 1.9e-6, 8.5e-6, 0.92 * 120 / 128, nvlink_only=True),
    Protocol("tree", 0.0, 28.0e-6, 28.0e-6, 28.0e-6, 0.92),
)

# Bytes/s a GPU, one way, that NCCL counts on: links x topo.h's bandwidth of one (SM80, SM90, SM100_NVLINK_BW, at
# 069a3d4f). Data sheets give both ways and no overhead: 600, 900 and 1800 GB/s. Seen: 235 GB/s on A100s
# (stas00/ml-engineering, network/README.md), 370 on H100s (NCCL's author, nccl-tests issue 212).
_NVLINK3, _NVLINK4, _NVLINK5 = 12 * 20.0e9, 18 * 20.6e9, 18 * 40.1e9
# topo.h's PCI_BW is 12 GB/s of a Gen3 x16 slot; a generation doubles it. Seen: 25.9 GB/s among four RTX 4090 made to
# talk peer to peer (tinygrad/open-gpu-kernel-modules issue 36); 35 among four RTX 5090, 28 among eight (nccl issue
# 1639), which is taken for Gen5: the host's memory binds there. GeForce cards without peer-to-peer may stay below.
_PCIE4, _PCIE5 = 24.0e9, 28.0e9


@dataclass(frozen=True)
class Board:
    """How a GPU is joined to the others of its node, and the power it may draw."""

    bandwidth: float  # bytes/s a GPU to the others of its node, one way
    nic: float  # Gbit/s of InfiniBand a GPU
    watts: int  # by its data sheet
    nvlink: bool = False  # to all GPUs of the node; else PCIe
    node: int = 8  # GPUs


# InfiniBand: one card a GPU, 200 Gbit/s in a DGX A100, 400 in a DGX H100, H200, B200 and GB200 (data sheets). For PCIe
# boards one card of 200 for every two is supposed. NVLink bridges of PCIe boards join pairs only and are left out. A
# GH200 is a node by itself, its watts with the CPU's; GB200: a GPU of an NVL72.
BOARDS: dict[str, Board] = {
    "h100": Board(_NVLINK4, 400, 700, nvlink=True),
    "h100-pcie": Board(_PCIE5, 100, 350),
    "h100-nvl": Board(_PCIE5, 100, 400),
    "h200": Board(_NVLINK4, 400, 700, nvlink=True),
    "gh200": Board(_PCIE5, 400, 1000, node=1),
    "b200": Board(_NVLINK5, 400, 1000, nvlink=True),
    "gb200": Board(_NVLINK5, 400, 1200, nvlink=True, node=72),
    "a100": Board(_NVLINK3, 200, 400, nvlink=True),
    "a100-40gb": Board(_NVLINK3, 200, 400, nvlink=True),
    "a10": Board(_PCIE4, 100, 150),
    "a40": Board(_PCIE4, 100, 300),
    "a6000": Board(_PCIE4, 100, 300),
    "l4": Board(_PCIE4, 100, 72),
    "l40": Board(_PCIE4, 100, 300),
    "l40s": Board(_PCIE4, 100, 350),
    "rtx3090": Board(_PCIE4, 100, 350),
    "rtx4090": Board(_PCIE4, 100, 450),
    "rtx5090": Board(_PCIE5, 100, 575),
    "rtxpro6000": Board(_PCIE5, 100, 600),
}
# Of a card's line rate: "for NDR at 400 Gbps you should see 46-48 GB/s" (NCCL's developers, nccl-tests issue 290); 24
# of HDR's 25 (issue 252), 12.2 of EDR's 12.5 (issue 29).
INFINIBAND_SHARE = 0.94
# TCP over 100 Gbit/s Ethernet, one card a node: 4 to 6 GB/s at best (nccl issue 450). RoCE is InfiniBand here.
ETHERNET, ETHERNET_SHARE = 100.0, 0.48
# A hop by TCP, more than by InfiniBand: 8 bytes to one other machine took 38 us (nccl-tests issue 82), of which 6.6 are
# NCCL's base and 5 the hop that it counts on.
TCP_LATENCY = 26e-6
LINKS = ("nvlink", "ib", "ethernet")


@dataclass(frozen=True)
class Transfer:
    """One collective: its seconds, those of them that no bandwidth would shorten, bytes that a rank sends by a ring."""

    seconds: float = 0.0
    latency: float = 0.0
    sent: float = 0.0


@dataclass(frozen=True)
class Fabric:
    """How the GPUs of a run are joined."""

    node: int  # GPUs of a node
    inside: float  # bytes/s a GPU, one way
    between: float  # bytes/s of a node, all its cards together
    nvlink: bool = True
    network_latency: float = 0.0  # seconds a hop, besides the protocol's
    protocols: tuple[Protocol, ...] = PROTOCOLS

    def all_reduce(self, size: float, ranks: int) -> Transfer:
        return self._fastest(size, ranks, ("ring", "tree"), 2)

    def reduce_scatter(self, size: float, ranks: int) -> Transfer:
        """`size`: bytes of the whole, of which a rank keeps 1/ranks."""
        return self._fastest(size, ranks, ("ring",), 1)

    def all_gather(self, size: float, ranks: int) -> Transfer:
        return self._fastest(size, ranks, ("ring",), 1)

    def _fastest(self, size: float, ranks: int, algorithms: tuple[str, ...], rounds: int) -> Transfer:
        """rounds: how often the data go around the ring."""
        if ranks == 1 or size == 0:
            return Transfer()
        usable = [p for p in self.protocols if p.algorithm in algorithms and (self.nvlink or not p.nvlink_only)]
        return min((self._by(p, size, ranks, rounds) for p in usable), key=lambda t: t.seconds)

    def _by(self, p: Protocol, size: float, ranks: int, rounds: int) -> Transfer:
        nodes = math.ceil(ranks / self.node)
        inner, outer = p.nvlink if self.nvlink else p.pcie, p.network + self.network_latency
        sent = rounds * (ranks - 1) / ranks * size
        steps = rounds * (ranks - 1)
        if p.algorithm == "ring":  # around it, every node is left once; NCCL counts 2 nodes of an all-reduce's hops
            crossings = 0 if nodes == 1 else min(steps, 2 * nodes if rounds == 2 else nodes - 1)
            latency, moved = p.base + (steps - crossings) * inner + crossings * outer, sent
        else:
            in_node = min(ranks, self.node) - 1
            latency, moved = p.base + 2 * (in_node * inner + math.log2(nodes) * outer), 2.0 * size
        bandwidth = p.share * (self.inside if nodes == 1 else min(self.inside, self.between))
        return Transfer(latency + moved / bandwidth, latency, sent)


def fabric(link: str, gpu: str, nic: float | None = None) -> Fabric:
    """Nodes of this GPU joined by `link`; nic: Gbit/s a GPU instead of the usual card's. ConfigError for what there is
    not."""
    if link not in LINKS:
        raise ConfigError(f"unknown link {link!r}", where=f"--link={link}", expected=", ".join(LINKS))
    board = BOARDS[gpu]
    if link == "nvlink" and not board.nvlink:
        raise ConfigError(
            f"{CHOICES[gpu]} has no NVLink to all GPUs of its node",
            where=f"--link=nvlink --gpu {gpu}",
            expected="--link=ib or ethernet; inside a node it is PCIe then",
            hint="--link=ib",
        )
    line, share = (ETHERNET / board.node, ETHERNET_SHARE) if link == "ethernet" else (board.nic, INFINIBAND_SHARE)
    between = board.node * (nic or line) * 1e9 / 8 * share
    latency = TCP_LATENCY if link == "ethernet" else 0.0
    return Fabric(board.node, board.bandwidth, between, board.nvlink, latency)


def in_words(link: str, of: Fabric) -> str:
    inside = f"{'NVLink' if of.nvlink else 'PCIe'}, {of.inside / 1e9:.0f} GB/s a GPU"
    if link == "nvlink":
        return f"one node of {of.node} GPUs by {inside}"
    kind = "InfiniBand" if link == "ib" else "Ethernet, TCP"
    nodes = f"nodes of {of.node} GPUs by {inside}" if of.node > 1 else "a GPU a node"
    return f"{nodes}; between nodes {kind}, {of.between / 1e9:.3g} GB/s a node"
