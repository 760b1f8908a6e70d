"""PRM-guided tree search inside the SGLang scheduler."""
