"""Studies that settled a default once. They still run; what they found stands in docs/results.md."""
