"""Independent re-derivations in float64, written from the formulas, slow and plain."""
