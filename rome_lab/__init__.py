"""rome_lab: find where a language model keeps a fact, and change it (Meng et al., ROME)."""
