"""Interventions on slots: what the model is given in place of its own slots in a second answer to the same sample."""

INTERVENTIONS: dict[str, str] = {
    "own": "The model's own slots.",
    "self": "The model's own slots, recorded and given back.",
    "zero": "Vectors of zeros.",
    "mean": "The mean of all slots of the run.",
    "noise": "Normal noise with the mean and the covariance of the run's slots.",
    "pause": "The embedding of the token `latent_pad`.",
    "first": "The first slot of the answer, repeated.",
    "permute": "The answer's own slots in another order.",
    "swap": "The slots of another, unrelated sample.",
    "donor": "The slots of the same sample after an edit that changes its right answer.",
    "oracle": "The features of the true helper images.",
    "skip": "No look: the answer continues without markers and slots.",
    "markers": "Looks without slots: the markers alone.",
}
