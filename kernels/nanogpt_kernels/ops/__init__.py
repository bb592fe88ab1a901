"""The ops' files; what they stand on (contract, registry, launch, primitives, reference) is in the package above."""
