"""Probability, spoken in distributions: likelihoods, priors and divergences."""
