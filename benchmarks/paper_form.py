"""The recipe of the studies of the paper's own losses: induction-quick without what the paper does not have, and at their sizes."""

PAPER_FORM: dict[str, object] = {
    "steps": 1500,
    "batch": 64,
    "C": 24,
    "delta": False,
    "losses.recon_layerwise": 0.5,
    "losses.layerwise_sites": "all",
    "losses.faithfulness": 1000.0,
    "merge.every": None,
    "merge.start": 0.15,
}
"""The fields in which it differs from induction-quick, whose target it has."""
