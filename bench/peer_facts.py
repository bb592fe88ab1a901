"""What a file of bench/peers says of itself, read without importing it: its package may not be here.

REQUIRES  how to get the package, with the version that the calls were written against
OPS       the ops it takes part in
"""

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class PeerFacts:
    requires: str  # "" for what comes with torch
    ops: tuple[str, ...]


def facts(peer: str) -> PeerFacts:
    """Of bench/peers/PEER.py; "" and () where the file says nothing."""
    path = FOLDER / f"{peer}.py"
    said = {}
    for node in ast.parse(path.read_text()).body if path.is_file() else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("REQUIRES", "OPS"):
            said[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return PeerFacts(said.get("REQUIRES", ""), said.get("OPS", ()))
