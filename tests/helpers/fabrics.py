"""Networks whose collectives have a closed form."""

import math

from interconnect import Fabric, Protocol


def plain(bandwidth: float, alpha: float = 0.0, node: int = 8, between: float = math.inf) -> Fabric:
    """Rings alone, every hop alike: 2 (N - 1) alpha + 2 (N - 1)/N S / bandwidth."""
    return Fabric(node, bandwidth, between, protocols=(Protocol("ring", 0.0, alpha, alpha, alpha, 1.0),))
