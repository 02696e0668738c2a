"""A package that can be checked by anybody: manifest, signature, model card, bill of materials and report."""
