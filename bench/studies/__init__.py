"""Studies that settled a default once; what they found stands in docs/results.md."""
