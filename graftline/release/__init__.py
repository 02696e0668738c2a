"""A package that anybody can verify: manifest, signature, model card, bill of materials and report."""
