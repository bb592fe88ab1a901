"""The ops' files; what they stand on (contract, registry, launch, primitives) is in the package above."""
